"""The re-fit repairs, counts real tokens only, and changes nothing but output projections."""

import pytest
import torch
from tinies import CORE, DECODERS, ENCODERS, SEQ2SEQ, without_labels

from hf_prune.errors import UnsupportedModelError
from hf_prune.plan import Plan, SitePlan
from hf_prune.sites import base_model, find_sites
from hf_prune.statistics.streams import by_layer
from hf_prune.surgery import reconstruct as reconstruct_module
from hf_prune.surgery.reconstruct import dense_targets, reconstruct, refit
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
        ours, theirs = (out[0] if isinstance(out, tuple) else out for out in seen)
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


def test_shared_layers_are_refused(case):
    dense, pruned, batches, _ = case("albert")
    with pytest.raises(UnsupportedModelError, match="albert runs its layers several times"):
        reconstruct(pruned, dense, batches)


@pytest.fixture
def nothing_held_out(monkeypatch):
    """Every example is fitted, so that every fit is kept."""

    def none(model, batch):
        return torch.zeros(len(batch["input_ids"]), dtype=torch.bool)

    monkeypatch.setattr(reconstruct_module, "_held_out", none)


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
    monkeypatch.setattr(reconstruct_module, "MAX_STORED_BYTES", 0)
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
            walk.run(layer)
        assert reconstruct_module._is_end(walk, last[-1])
        walk.fit(last[-1], walk.dense_sums(last), last=True)
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
