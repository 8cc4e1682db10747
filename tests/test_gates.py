"""Gates: closed, they are zeroed columns; removed, they leave no trace."""

import pytest
import torch
from tinies import CORE

from hf_prune.gates.attach import attach_gates
from hf_prune.gates.plans import masked, plan_gates
from hf_prune.plan import Plan, SitePlan
from hf_prune.sites import base_model, find_sites, logical_weight, projection

families = pytest.mark.parametrize("name", CORE)


def hooks(model):
    return sum(len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules())


@families
def test_closed_gates_are_zeroed_columns(name, tiny, inputs_for, uneven_plan, logits):
    model, batch = tiny(name), inputs_for(name)
    plan = uneven_plan(model)
    with masked(model, plan):
        gated = logits(model, batch)
    for site in find_sites(model):
        weight = logical_weight(projection(base_model(model), site.gate.module)).data
        for unit in plan.sites[site.name].removed:
            weight[:, unit * site.gate.width : (unit + 1) * site.gate.width] = 0
    torch.testing.assert_close(logits(model, batch), gated, atol=1e-5, rtol=0)


@families
def test_no_trace(name, tiny, inputs_for, uneven_plan, logits):
    model, batch = tiny(name), inputs_for(name)
    keys, before, dense = list(model.state_dict()), hooks(model), logits(model, batch)
    with masked(model, uneven_plan(model)):
        assert hooks(model) == before + 2 * len(find_sites(model))
        assert list(model.state_dict()) == keys
        assert not torch.equal(logits(model, batch), dense)
    assert hooks(model) == before
    assert torch.equal(logits(model, batch), dense)


def test_an_error_inside_removes_them_too(tiny, uneven_plan):
    model = tiny("bert")

    def fail():
        with masked(model, uneven_plan(model)):
            raise RuntimeError("inside")

    with pytest.raises(RuntimeError, match="inside"):
        fail()
    assert hooks(model) == 0


def test_a_gate_per_example(tiny, inputs_for, logits):
    model, batch = tiny("bert"), inputs_for("bert")
    site = find_sites(model)[0]
    dense = logits(model, batch)
    gates = attach_gates(model, [site])
    gates.values[site.name] = torch.ones(4, 1, site.units)
    gates.values[site.name][2] = 0
    changed = (logits(model, batch) - dense).abs().amax(dim=1) > 1e-4
    assert changed.tolist() == [False, False, True, False]
    gates.remove()
    assert torch.equal(logits(model, batch), dense)


def test_gates_work_in_half_precision(tiny, inputs_for, uneven_plan, logits):
    model = tiny("llama").to(torch.bfloat16)
    with masked(model, uneven_plan(model)):
        assert logits(model, inputs_for("llama")).dtype == torch.bfloat16


def test_only_what_loses_something_has_a_gate():
    plan = Plan("x", {"a": SitePlan("heads", 3, (0, 1, 2)), "b": SitePlan("heads", 3, (0, 2))})
    values = plan_gates(plan)
    assert list(values) == ["b"]
    assert values["b"].tolist() == [1, 0, 1]


@pytest.mark.parametrize("name", ["bert", "gpt2"])
def test_input_and_weight_are_gated_alike(name, tiny, inputs_for):
    """Many tokens: the weight is smaller and is scaled; few tokens: the input is."""
    model = tiny(name)
    site = find_sites(model)[1]
    layer = model.base_model.get_submodule(site.gate.module)
    gates = attach_gates(model, [site])
    generator = torch.Generator().manual_seed(0)
    gate = torch.rand(site.units, generator=generator)
    inputs = torch.randn(200, site.units * site.gate.width, generator=generator)
    parameter, found = layer.weight, []
    for part in (200, 1):
        gates.values[site.name] = gate.clone().requires_grad_()
        rows = inputs.clone().requires_grad_()
        outputs = torch.cat([layer(piece) for piece in rows.split(part)])
        layer.zero_grad()
        outputs.square().sum().backward()
        assert layer.weight is parameter, "the parameter is back after each call"
        gradients = (rows.grad, layer.weight.grad.clone(), gates.values[site.name].grad)
        found.append((outputs.detach(), *gradients))
    assert inputs.numel() > parameter.numel() > inputs[0].numel()
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
    gates.remove()


def test_a_gate_that_changes_in_place_is_seen(tiny):
    model = tiny("bert")
    site = find_sites(model)[0]
    layer = model.base_model.get_submodule(site.gate.module)
    gates = attach_gates(model, [site])
    gate = gates.values[site.name] = torch.ones(site.units)
    inputs = torch.ones(100, site.units * site.gate.width)
    with torch.no_grad():
        opened = layer(inputs)
        gate.zero_()
        torch.testing.assert_close(layer(inputs), layer.bias.expand_as(opened))
        assert not torch.allclose(opened, layer.bias.expand_as(opened))
    gates.remove()


def test_an_error_in_a_gated_layer_brings_the_parameter_back(tiny):
    model = tiny("bert")
    site = find_sites(model)[1]
    layer = model.base_model.get_submodule(site.gate.module)
    gates = attach_gates(model, [site])
    gates.values[site.name] = torch.ones(site.units)
    parameter = layer.weight
    with pytest.raises(RuntimeError):
        layer(torch.ones(900, site.units + 1))
    assert layer.weight is parameter
    gates.remove()


@pytest.mark.parametrize("name", ["bert", "gpt2"])
def test_the_gated_weight_keeps_its_memory_and_its_graph(tiny, name):
    """Two calls before one backward, a second derivative, and another gate in between."""
    model = tiny(name)
    site = find_sites(model)[1]
    layer = model.base_model.get_submodule(site.gate.module)
    gates = attach_gates(model, [site])
    width = site.units * site.gate.width
    rows = torch.randn(2, 900, width, generator=torch.Generator().manual_seed(0))
    one, two = torch.ones(site.units), torch.ones(site.units)
    one[::2], two[1::2] = 0, 0

    def plain(inputs, gate):
        columns = gate if name == "bert" else gate.unsqueeze(1)
        weight = layer.weight * columns
        return inputs @ (weight.T if name == "bert" else weight) + layer.bias

    for gates_used in ((one, one), (one, two)):
        total, expected = 0.0, 0.0
        for inputs, gate in zip(rows, gates_used, strict=True):
            gates.values[site.name] = gate
            total = total + layer(inputs).square().sum()
            expected = expected + plain(inputs, gate).square().sum()
        (ours,) = torch.autograd.grad(total, layer.weight, create_graph=True)
        (theirs,) = torch.autograd.grad(expected, layer.weight, create_graph=True)
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-2)
        second = [torch.autograd.grad(g.square().sum(), layer.weight)[0] for g in (ours, theirs)]
        torch.testing.assert_close(*second, rtol=1e-3, atol=1e-1 * float(second[1].abs().max()))
    layer.weight.grad = None
    layer(rows[0]).square().sum().backward()
    (wanted,) = torch.autograd.grad(plain(rows[0], two).square().sum(), layer.weight)
    torch.testing.assert_close(layer.weight.grad, wanted, rtol=1e-4, atol=1e-2)
    gates.remove()


def test_a_weight_that_changes_before_backward_is_an_error(tiny):
    model = tiny("bert")
    site = find_sites(model)[1]
    layer = model.base_model.get_submodule(site.gate.module)
    gates = attach_gates(model, [site])
    gates.values[site.name] = torch.ones(site.units)
    loss = layer(torch.ones(900, site.units)).square().sum()
    with torch.no_grad():
        layer.weight.add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    gates.remove()
