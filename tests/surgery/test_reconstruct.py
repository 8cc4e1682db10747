"""The re-fit repairs, counts real tokens only, and changes nothing but output projections."""

import copy

import pytest
import torch
from tinies import CORE, DECODERS, ENCODERS, SEQ2SEQ, TINY, without_labels
from transformers import AutoModelForSequenceClassification

from hf_prune.plan import Plan, SitePlan
from hf_prune.sites import base_model, find_sites, gate_weight
from hf_prune.statistics.moments import solve_towards
from hf_prune.statistics.streams import by_layer
from hf_prune.surgery import dense as dense_module
from hf_prune.surgery import fit as fit_module
from hf_prune.surgery import reconstruct as reconstruct_module
from hf_prune.surgery.dense import dense_targets
from hf_prune.surgery.reconstruct import reconstruct, refit
from hf_prune.surgery.remove import remove_units

families = pytest.mark.parametrize("name", [*CORE, "opt"])


@pytest.fixture
def case(tiny, inputs_for, uneven_plan):
    def make(name):
        dense, pruned = tiny(name), tiny(name)
        plan = uneven_plan(pruned, seed=1)
        remove_units(pruned, plan)
        batches = [inputs_for(name, seed, (9, 6, 4, 7) * 4) for seed in range(4)]
        return dense, pruned, batches, plan

    return make


def sums(model, batch):
    """The sum of residual and output at every site, at real tokens."""
    base, seen, handles = base_model(model), {}, []
    for site in find_sites(model):
        if site.sum_module:

            def before(module, args, name=site.name):
                seen[name] = args[0]

            module = base.get_submodule(site.sum_module)
            handles.append(module.register_forward_pre_hook(before))
        else:

            def after(module, args, output, name=site.name):
                seen[name] = output[0] if isinstance(output, tuple) else output

            module = base.get_submodule(site.layer_module)
            handles.append(module.register_forward_hook(after))
    with torch.no_grad():
        model(**{k: v for k, v in batch.items() if k != "labels"})
    for handle in handles:
        handle.remove()
    mask = batch["attention_mask"].bool()
    return {name: value.view(*mask.shape, -1)[mask] for name, value in seen.items()}


def errors(model, dense, batches):
    total = {}
    for batch in batches:
        ours, theirs = sums(model, batch), sums(dense, batch)
        for name in ours:  # a site of which nothing is left is none
            value = theirs[name]
            error = (ours[name] - value).double().square().sum().item()
            total[name] = total.get(name, 0.0) + error
    return total


@families
def test_lowers_the_error_at_every_site(name, case, inputs_for):
    dense, pruned, batches, _ = case(name)
    before = errors(pruned, dense, batches)
    unseen = [inputs_for(name, 50, (9, 6, 4, 7) * 4)]
    before_unseen = errors(pruned, dense, unseen)
    fitted = reconstruct(pruned, dense, batches, ridge=1e-4)
    assert fitted == [site.name for site in find_sites(pruned)]
    after, after_unseen = errors(pruned, dense, batches), errors(pruned, dense, unseen)
    for site, error in before.items():
        assert 0 < after[site] < 0.9 * error, site
    last = list(before)[-1]
    assert after_unseen[last] < before_unseen[last]


@pytest.mark.parametrize("name", sorted({*ENCODERS, *DECODERS} - {*CORE, "opt", "albert"}))
def test_repairs_every_family_that_reads_one_text(name, case):
    """At the last site, whose sum is all that the model has computed."""
    dense, pruned, batches, _ = case(name)
    last = find_sites(pruned)[-1].name
    before = errors(pruned, dense, batches)[last]
    reconstruct(pruned, dense, batches, ridge=1e-3)
    assert 0 < errors(pruned, dense, batches)[last] < before


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama"])
def test_repairs_what_whole_blocks_left(name, tiny, inputs_for):
    """A layer of which nothing is left is run all the same, and the next one makes up for it."""
    dense, pruned = tiny(name), tiny(name)
    lost = find_sites(pruned)[:2]
    sites = {site.name: SitePlan(site.kind, site.units, ()) for site in lost}
    remove_units(pruned, Plan(name, sites))
    batches = [inputs_for(name, seed, (9, 6, 4, 7) * 4) for seed in range(5)]
    last = find_sites(pruned)[-1].name
    before = errors(pruned, dense, batches)[last]
    assert reconstruct(pruned, dense, batches, ridge=1e-3) == [s.name for s in find_sites(pruned)]
    assert 0 < errors(pruned, dense, batches)[last] < before


def last_layer_error(model, dense, batches):
    """At the end of the last layer: squared difference to the dense network, all tokens."""
    total, layer = 0.0, find_sites(model)[-1].layer_module
    for batch in batches:
        seen = []
        for each in (model, dense):
            hook = (
                base_model(each)
                .get_submodule(layer)
                .register_forward_hook(lambda m, a, out, seen=seen: seen.append(out))
            )
            with torch.no_grad():
                each(**without_labels(each, batch))
            hook.remove()
        runs = len(seen) // 2  # of a shared layer the last one
        last = seen[runs - 1], seen[-1]
        ours, theirs = (out[0] if isinstance(out, tuple) else out for out in last)
        total += (ours - theirs).double().square().sum().item()
    return total


@pytest.mark.parametrize("name", [*SEQ2SEQ, "vit", "clip", "clip_vision_model", "wav2vec2"])
def test_repairs_other_inputs(name, case):
    """Each stack is entered with what the pruned and re-fitted one before it gives."""
    dense, pruned, batches, _ = case(name)
    before = last_layer_error(pruned, dense, batches)
    fitted = reconstruct(pruned, dense, batches, ridge=1e-3)
    assert fitted == [site.name for site in find_sites(pruned)]
    assert last_layer_error(pruned, dense, batches) < 0.9 * before


@pytest.fixture(params=[(3, 2, 1), (4, 1, 1), (4, 1, 2)], ids=str)
def shared(request, inputs_for):
    """ALBERT of some layers, groups of shared layers, and layers in each; its batches."""
    layers, groups, inner = request.param
    config = TINY["albert"]()
    config.num_hidden_layers, config.num_hidden_groups = layers, groups
    config.inner_group_num = inner
    torch.manual_seed(3)
    dense = AutoModelForSequenceClassification.from_config(config).eval()
    with torch.no_grad():
        for parameter in dense.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.15)
    return dense, [inputs_for("albert", seed, (9, 6, 4, 7) * 4) for seed in range(4)]


@pytest.mark.parametrize("stored", [True, False])
def test_shared_layers_are_fitted_to_all_their_runs(shared, uneven_plan, stored, monkeypatch):
    """What the last run of the last layer gives is closer to the dense network than before."""
    if not stored:
        monkeypatch.setattr(dense_module, "MAX_STORED_BYTES", 0)
    dense, batches = shared
    pruned = copy.deepcopy(dense)
    remove_units(pruned, uneven_plan(pruned, seed=1))
    targets = dense_targets(dense, batches)
    assert (targets.stored is None) != stored
    before = last_layer_error(pruned, dense, batches)
    fitted = refit(pruned, targets, ridge=1e-3)
    assert fitted == [site.name for site in find_sites(pruned)]
    assert last_layer_error(pruned, dense, batches) < 0.8 * before


def test_a_shared_layer_sees_the_moments_of_all_its_runs(shared, uneven_plan, monkeypatch):
    """The first fit has as many tokens as runs times real tokens, each with its own target."""
    dense, batches = shared
    pruned = copy.deepcopy(dense)
    remove_units(pruned, uneven_plan(pruned, seed=1))
    site = find_sites(pruned)[0]
    inputs, targets = [], []
    base, core = base_model(pruned), base_model(dense)
    for batch in batches:
        mask, seen = batch["attention_mask"].bool(), {"x": [], "y": [], "ours": [], "theirs": []}
        handles = [
            base.get_submodule(site.gate.module).register_forward_hook(
                lambda m, a, o, seen=seen: seen["x"].append(a[0]) or seen["y"].append(o)
            )
        ]
        for root, key in ((base, "ours"), (core, "theirs")):
            handles.append(
                root.get_submodule(site.sum_module).register_forward_pre_hook(
                    lambda m, a, seen=seen, key=key: seen[key].append(a[0])
                )
            )
        with torch.no_grad():
            for model in (pruned, dense):
                model(**without_labels(model, batch))
        for handle in handles:
            handle.remove()
        for x, y, ours, theirs in zip(*seen.values(), strict=True):
            inputs.append(x[mask])
            targets.append((theirs - (ours - y))[mask])
    first = []

    def keep(fitted, held_out, weight, bias, ridges, solve):
        first.append(fitted.plus(held_out))
        return weight, bias, None

    monkeypatch.setattr(fit_module, "fit_checked", keep)
    refit(pruned, dense_targets(dense, batches))
    x, t = torch.cat(inputs).double(), torch.cat(targets).double()
    assert len(x) == int(first[0].count)
    assert len(inputs) == site.runs * len(batches)
    torch.testing.assert_close(first[0].xx, x.T @ x, atol=1e-3, rtol=1e-4)
    torch.testing.assert_close(first[0].tx, t.T @ x, atol=1e-3, rtol=1e-4)


def test_shared_layers_that_only_get_worse_are_left_alone(shared, uneven_plan, monkeypatch):
    """Fits that are good for the moments and bad for the runs that follow are not kept."""
    dense, batches = shared
    pruned = copy.deepcopy(dense)
    remove_units(pruned, uneven_plan(pruned, seed=1))
    state = copy.deepcopy(pruned.state_dict())

    def worse(fitted, held_out, weight, bias, ridges, solve):
        return weight + 5, bias, 1.0

    monkeypatch.setattr(fit_module, "fit_checked", worse)
    refit(pruned, dense_targets(dense, batches))
    shared_runs = [site.runs > 1 for site in find_sites(pruned)]
    assert any(shared_runs)
    for site in find_sites(pruned):
        name = next(key for key in state if key.endswith(f"{site.gate.module}.weight"))
        assert torch.equal(pruned.state_dict()[name], state[name]) == (site.runs > 1)


@families
def test_parallel_fits_see_the_dense_inputs(name, case):
    """Each narrowed site is the ridge solution from the dense network's inputs and outputs."""
    dense, pruned, batches, plan = case(name)
    state = {k: v.clone() for k, v in pruned.state_dict().items()}
    sites, before = find_sites(pruned), {site.name: site for site in find_sites(dense)}
    targets = dense_targets(dense, batches)
    fitted = refit(pruned, targets, ridge=1e-3, kept=plan)
    assert fitted == [s.name for s in sites if s.units < before[s.name].units]
    base, core = base_model(pruned), base_model(dense)
    seen = {site.name: [] for site in sites}
    for site in sites:
        core.get_submodule(site.gate.module).register_forward_hook(
            lambda m, a, o, site=site: seen[site.name].append((a[0], o))
        )
    with torch.no_grad():
        for batch in batches:
            dense(**without_labels(dense, batch))
    for site in sites:
        module = base.get_submodule(site.gate.module)
        x, t = [], []
        for batch, (inputs, output) in zip(batches, seen[site.name], strict=True):
            mask = batch["attention_mask"].bool()
            by_unit = inputs.view(*mask.shape, -1, site.gate.width)[mask]
            x.append(by_unit[:, list(plan.sites[site.name].kept)].flatten(1))
            t.append(output.view(*mask.shape, -1)[mask])
        x, t = torch.cat(x), torch.cat(t)

        def error(weight, bias, x=x, t=t):
            return float(
                (x @ weight.detach().T + (0 if bias is None else bias.detach()) - t).square().sum()
            )

        stored = module.weight.T if type(module).__name__ == "Conv1D" else module.weight
        old = state[next(k for k in state if k.endswith(f"{site.gate.module}.weight"))]
        old = old.T if type(module).__name__ == "Conv1D" else old
        bias = module.bias
        old_bias = (
            None
            if bias is None
            else state[next(k for k in state if k.endswith(f"{site.gate.module}.bias"))]
        )
        if site.name in fitted:
            assert error(stored, bias) < error(old, old_bias), site.name
        else:
            assert torch.equal(stored, old)


@families
def test_rescaling_is_one_factor_for_each_unit(name, case):
    dense, pruned, batches, _ = case(name)
    base = base_model(pruned)
    sites = find_sites(pruned)
    old = {s.name: gate_weight(base, s).detach().clone() for s in sites}  # [U, N]
    last = sites[-1].name
    before = errors(pruned, dense, batches)[last]
    fitted = refit(pruned, dense_targets(dense, batches), rescale=True, least_squares=False)
    assert fitted == [site.name for site in sites]
    changed = 0
    for site in sites:
        ratio = gate_weight(base, site).detach() / old[site.name]
        torch.testing.assert_close(ratio, ratio[:, :1].expand_as(ratio), rtol=1e-3, atol=1e-3)
        changed += int((ratio[:, 0] - 1).abs().max() > 1e-4)
    assert changed, "held-out examples confirm at least one"
    assert errors(pruned, dense, batches)[last] < before


def test_rescaling_comes_before_the_re_fit(case, monkeypatch):
    """Both together start the re-fit from rescaled weights."""
    dense, pruned, batches, _ = case("bert")
    starts = []
    original = fit_module.fit_checked

    def spy(fitted, held_out, weight, bias, ridges, solve):
        starts.append((solve is not solve_towards, weight.clone()))
        return original(fitted, held_out, weight, bias, ridges, solve)

    monkeypatch.setattr(fit_module, "fit_checked", spy)
    refit(pruned, dense_targets(dense, batches), rescale=True)
    assert [by_unit for by_unit, _ in starts] == [True, False] * 4
    assert any(
        not torch.equal(a, b) for (_, a), (_, b) in zip(starts[::2], starts[1::2], strict=True)
    )


@pytest.fixture
def nothing_held_out(monkeypatch):
    """Every example is fitted, so that every fit is kept."""

    def none(model, batch):
        return torch.zeros(len(batch["input_ids"]), dtype=torch.bool)

    monkeypatch.setattr(dense_module, "held_out_examples", none)


@families
def test_each_fit_is_the_least_squares_optimum(name, case, nothing_held_out):
    """With almost no ridge, no other weights of the last site lower its error further."""
    dense, pruned, batches, _ = case(name)
    reconstruct(pruned, dense, batches, ridge=1e-8)
    site = find_sites(pruned)[-1]
    best = errors(pruned, dense, batches)[site.name]
    module = base_model(pruned).get_submodule(site.gate.module)
    for seed in range(3):
        step = torch.randn(module.weight.shape, generator=torch.Generator().manual_seed(seed))
        module.weight.data += 0.01 * step
        assert errors(pruned, dense, batches)[site.name] > best
        module.weight.data -= 0.01 * step


@families
def test_padding_is_never_counted(name, case):
    dense, pruned, batches, _ = case(name)
    other = case(name)[1]
    changed = [
        {**b, "input_ids": b["input_ids"].masked_fill(b["attention_mask"] == 0, 77)}
        for b in batches
    ]
    reconstruct(pruned, dense, batches)
    reconstruct(other, dense, changed)
    for (key, ours), theirs in zip(pruned.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5, msg=key)


@families
def test_only_output_projections_change(name, case, nothing_held_out):
    dense, pruned, batches, _ = case(name)
    state = {k: v.clone() for k, v in pruned.state_dict().items()}
    dense_state = {k: v.clone() for k, v in dense.state_dict().items()}
    pruned.train()
    ids = [id(p) for p in pruned.parameters()]
    hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in pruned.modules())
    reconstruct(pruned, dense, batches)
    assert (pruned.training, dense.training) == (True, False)
    assert [id(p) for p in pruned.parameters()] == ids
    left = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in pruned.modules())
    assert left == hooks
    gates = tuple(site.gate.module for site in find_sites(pruned))
    for key, value in pruned.state_dict().items():
        is_gate = key.rpartition(".")[0].endswith(gates)
        assert torch.equal(value, state[key]) != is_gate, key
    for key, value in dense.state_dict().items():
        assert torch.equal(value, dense_state[key]), key


@families
def test_nothing_removed_nothing_fitted(name, tiny, inputs_for):
    dense, same = tiny(name), tiny(name)
    assert reconstruct(same, dense, [inputs_for(name)]) == []
    for ours, theirs in zip(same.parameters(), dense.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_chosen_sites(case):
    dense, pruned, batches, _ = case("bert")
    sites = [site.name for site in find_sites(pruned)]
    assert reconstruct(pruned, dense, batches, changed={sites[2]}) == [sites[2]]


@families
def test_one_dense_pass_serves_many_models_and_memory(name, case, monkeypatch):
    """Targets made once, and targets that are too large to keep, give the same weights."""
    dense, pruned, batches, _ = case(name)
    again, large = case(name)[1], case(name)[1]
    targets = dense_targets(dense, batches)
    assert refit(pruned, targets) == refit(again, targets)
    monkeypatch.setattr(dense_module, "MAX_STORED_BYTES", 0)
    big = dense_targets(dense, batches)
    assert big.stored is None
    refit(large, big)
    parts = zip(pruned.named_parameters(), again.parameters(), large.parameters(), strict=True)
    for (key, one), two, three in parts:
        assert torch.equal(one, two), key
        torch.testing.assert_close(three, one, msg=key)


@families
def test_the_stream_is_the_networks_own(name, case):
    """After the walk, the shortcut past each last site gives what the network computes."""
    dense, pruned, batches, _ = case(name)
    walk = reconstruct_module._Walk(pruned, dense_targets(dense, batches), 1e-2)
    layers = by_layer(find_sites(pruned))
    last = list(layers.values())[-1]
    with torch.no_grad():
        for layer in list(layers)[:-1]:
            walk.run([layer])
        assert reconstruct_module._is_end(walk, last[-1])
        runs = [last[-1].layer_module]
        walk.fit(last[-1], walk.dense_sums(last, runs), runs, last=True)
        ours = [hidden.clone() for hidden in walk.hidden]
        seen = []
        handle = (
            base_model(pruned)
            .get_submodule(last[-1].layer_module)
            .register_forward_hook(lambda m, a, out: seen.append(out))
        )
        for batch in batches:
            pruned(**{k: v for k, v in batch.items() if k != "labels"})
        handle.remove()
    for hidden, output, batch in zip(ours, seen, batches, strict=True):
        mask = batch["attention_mask"].bool()
        output = output[0] if isinstance(output, tuple) else output
        torch.testing.assert_close(hidden[mask], output[mask], atol=1e-5, rtol=1e-5)


def test_the_split_into_batches_changes_nothing(case):
    """Which examples judge is drawn from their content."""
    dense, pruned, batches, _ = case("bert")
    other = case("bert")[1]
    whole = {k: torch.cat([b[k] for b in batches]) for k in batches[0]}
    parts = [{k: v[i : i + 3] for k, v in whole.items()} for i in range(0, len(whole["labels"]), 3)]
    reconstruct(pruned, dense, batches)
    reconstruct(other, dense, parts)
    for (key, ours), theirs in zip(pruned.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4, msg=key)
