"""Statistics against one example, one unit at a time; and the same for every split into batches."""

from types import SimpleNamespace

import pytest
import torch
from tinies import CORE, TINY
from transformers import (
    BertForMultipleChoice,
    BertForPreTraining,
    BertForQuestionAnswering,
    Wav2Vec2ForCTC,
)

from hf_prune.criteria import STATISTICS, needs
from hf_prune.errors import ConfigError, DataError, NumericsError
from hf_prune.gates.attach import attach_gates
from hf_prune.sites import base_model, find_sites, projection
from hf_prune.statistics.batches import example_seed, sequence_mask, token_mask
from hf_prune.statistics.collect import SEED_STEP, collect
from hf_prune.statistics.projection import _directions, _drawn, project_logits, project_output

families = pytest.mark.parametrize("name", [*CORE, "opt"])
GRADIENTS = ("gate_grad", "projected_fisher")
DATA = (*GRADIENTS, "input_norm")
FACTORS = {
    "gate_grad": ("label_hessian", "label_output_gradient"),
    "projected_fisher": ("hessian", "output_gradient"),
    "sample": ("sampled_hessian", "sampled_output_gradient"),
}
"""Factors of the curvature, by the target whose gradient they are of."""
CURVATURE = ("weight_grad_square", "input_gram", *(n for pair in FACTORS.values() for n in pair))
GATES = ("gate_square", "projected_gate_fisher", "gate_grad_signed")


def examples(batch):
    """Each example alone, without its padding."""
    for row in range(len(batch["input_ids"])):
        length = int(batch["attention_mask"][row].sum())
        yield {
            key: value[row : row + 1, :length] if value.ndim == 2 else value[row : row + 1]
            for key, value in batch.items()
        }


def signs(logits, tokens, seed):
    """The random signs of one example: drawn from its content."""
    mask = torch.ones(len(tokens), dtype=torch.bool)
    generator = torch.Generator().manual_seed(example_seed(tokens, mask, seed))
    drawn = torch.randint(0, 2, logits.shape, generator=generator, dtype=torch.int8)
    drawn = drawn.double() * 2 - 1
    return drawn - drawn.mean(dim=-1, keepdim=True)


def drawn_class(chances, uniform):
    """The class into whose part of [0, 1) a number falls, one class after the other."""
    below = 0.0
    for label, chance in enumerate(chances):
        below += chance
        if uniform < below:
            return label
    raise AssertionError


def likelihood(logits, tokens, seed):
    """The log-likelihood of a class for each row, drawn from the model's own prediction."""
    mask = torch.ones(len(tokens), dtype=torch.bool)
    generator = torch.Generator().manual_seed(example_seed(tokens, mask, seed))
    rows = logits.view(-1, logits.shape[-1]).log_softmax(dim=-1)
    uniform = torch.rand(logits.shape[:-1], generator=generator, dtype=torch.float64).view(-1)
    total = 0.0
    for row, number in zip(rows, uniform.tolist(), strict=True):
        total = total + row[drawn_class(row.detach().exp().tolist(), number)]
    return total


def targets(model, example, seed):
    """Loss, random projection and likelihood of a draw of one example, in float64 throughout."""
    logits = model(**{k: v for k, v in example.items() if k != "labels"}).logits[0]
    rows, labels = logits.view(-1, logits.shape[-1]), example["labels"].view(-1)
    if logits.ndim == 2:  # a decoder: each token is predicted from those before it
        rows, labels = rows[:-1], labels[1:]
    loss = -torch.log_softmax(rows, dim=-1)[range(len(labels)), labels].mean()
    projected = (signs(logits, example["input_ids"][0], seed) * logits).sum()
    sample = likelihood(logits, example["input_ids"][0], seed)
    return {"gate_grad": loss, "projected_fisher": projected, "sample": sample}


def slow_loop(model, batch, seed):
    """By example and unit: the slope of the target as one gate moves, by central differences."""
    model = model.double()
    sites = find_sites(model)
    gates = attach_gates(model, sites)
    total = {
        s.name: {n: torch.zeros(s.units, dtype=torch.float64) for n in GRADIENTS} for s in sites
    }
    step = 1e-3  # some layers compute in float32 whatever the weights
    rows = list(examples(batch))
    with torch.no_grad():
        for example in rows:
            for site in sites:
                for unit in range(0, site.units, 1 if site.kind == "heads" else 11):
                    values = []
                    for sign in (1, -1):
                        gate = torch.ones(site.units, dtype=torch.float64)
                        gate[unit] += sign * step
                        gates.values = {site.name: gate}
                        values.append(targets(model, example, seed))
                    for name in GRADIENTS:
                        slope = (values[0][name] - values[1][name]) / (2 * step)
                        slope = slope.abs() if name == "gate_grad" else slope.square()
                        total[site.name][name][unit] += slope / len(rows)
    gates.remove()
    return total


def plain_signs(values, generator, said, *, language):
    """The projection of a classifier, also for a vocabulary."""
    drawn = torch.randint(0, 2, values.shape, generator=generator, dtype=torch.int8).double()
    drawn = drawn * 2 - 1
    return (drawn - drawn.mean(dim=-1, keepdim=True)).to(values)


@families
def test_gradients_against_finite_differences(name, tiny, inputs_for, monkeypatch):
    monkeypatch.setattr("hf_prune.statistics.projection._directions", plain_signs)
    model, batch = tiny(name), inputs_for(name, lengths=(5, 3))
    sites = find_sites(model)
    found = collect(model, sites, [batch], DATA, seed=3)
    expected = slow_loop(tiny(name), batch, 3)
    for site in sites:
        step = 1 if site.kind == "heads" else 11
        for key in GRADIENTS:
            ours, slow = found[site.name][key][::step], expected[site.name][key][::step]
            assert slow.max() > 5e-4
            torch.testing.assert_close(ours, slow, atol=2e-4, rtol=5e-3, msg=f"{site.name} {key}")


@pytest.mark.parametrize("name", ["t5", "bart", "whisper", "vit", "wav2vec2"])
def test_gate_gradients_of_every_input(name, tiny, inputs_for):
    """What `taylor` needs is defined wherever there is a loss."""
    model = tiny(name)
    sites = find_sites(model)
    found = collect(model, sites, [inputs_for(name)], ["gate_grad"])
    assert all(found[s.name]["gate_grad"].shape == (s.units,) for s in sites)
    assert all(found[s.name]["gate_grad"].max() > 0 for s in sites)


@pytest.mark.parametrize("name", ["t5", "bart", "whisper", "vit", "wav2vec2", "clip"])
def test_curvature_of_every_input(name, tiny, inputs_for):
    """Encoder-decoders, images and sound: each site counts the tokens that it really sees."""
    model, batch = tiny(name), inputs_for(name)
    sites, base, seen = find_sites(model), base_model(model), {}
    for site in sites:
        projection(base, site.gate.module).register_forward_hook(
            lambda _, args, output, key=site.name: seen.update({key: args[0].detach()})
        )
    keys = ["input_gram", "hessian", "output_gradient"]
    found = collect(model, sites, [batch], keys)
    for site in sites:
        values = seen[site.name].unflatten(0, (len(next(iter(batch.values()))), -1))
        values = values.flatten(1, -2)  # [B, T, N]
        mask = sequence_mask(model, batch, site.layer_module, values)
        assert mask.shape == values.shape[:2]
        tokens = values[mask].double()
        expected = tokens.T @ tokens / len(tokens)
        torch.testing.assert_close(found[site.name]["input_gram"], expected, atol=1e-5, rtol=1e-4)
        assert found[site.name]["hessian"].diagonal().max() > 0
        assert found[site.name]["output_gradient"].trace() == pytest.approx(1)


def test_a_decoder_has_padding_of_its_own(tiny, inputs_for):
    model, batch = tiny("t5"), inputs_for("t5")
    batch["labels"][0, 4:] = -100
    like = torch.zeros(4, 7, 3)
    mask = sequence_mask(model, batch, "decoder.block.0", like)
    assert mask.sum(dim=1).tolist() == [4, 7, 7, 7]
    encoder = sequence_mask(model, batch, "encoder.block.0", torch.zeros(4, 9, 3))
    assert torch.equal(encoder, batch["attention_mask"].bool())
    with pytest.raises(DataError, match="does not say which of them are padding"):
        sequence_mask(model, batch, "encoder.block.0", torch.zeros(4, 5, 3))


@pytest.mark.parametrize("name", ["t5", "bart"])
def test_a_decoder_that_reads_what_its_encoder_reads(name, tiny, inputs_for):
    """Of classifiers: the same tokens, one place later, and the same padding."""
    model, batch = tiny(name), inputs_for(name, 0, (9, 4))
    batch["labels"] = torch.tensor([0, 1])
    like = torch.zeros(2, 9, 3)
    assert sequence_mask(model, batch, "decoder.block.0", like).sum(dim=1).tolist() == [9, 5]
    batch["decoder_input_ids"] = batch["input_ids"]
    assert sequence_mask(model, batch, "decoder.block.0", like).all(), "nothing says so"


@families
def test_input_norm_against_a_loop(name, tiny, inputs_for):
    model, batch = tiny(name), inputs_for(name)
    sites = find_sites(model)
    found = collect(model, sites, [batch], ["input_norm"])
    seen = {}
    for site in sites:
        module = projection(base_model(model), site.gate.module)
        module.register_forward_pre_hook(
            lambda _, args, key=site.name: seen.setdefault(key, []).append(args[0].flatten(0, -2))
        )
    with torch.no_grad():
        for example in examples(batch):
            model(**example)
    for site in sites:
        tokens = torch.cat(seen[site.name]).double()
        assert len(tokens) == int(batch["attention_mask"].sum())
        norm = tokens.square().mean(dim=0).sqrt().view(site.units, -1)
        torch.testing.assert_close(found[site.name]["input_norm"], norm, atol=1e-5, rtol=1e-4)


def split(batch, sizes):
    start = 0
    for size in sizes:
        yield {key: value[start : start + size] for key, value in batch.items()}
        start += size


@families
@pytest.mark.parametrize("statistic", [*DATA, *FACTORS["gate_grad"], *FACTORS["sample"]])
def test_the_split_into_batches_does_not_matter(name, statistic, tiny, inputs_for):
    model, batch = tiny(name), inputs_for(name)
    sites = find_sites(model)
    whole = collect(model, sites, [batch], [statistic])
    for parts in (split(batch, (1, 3)), examples(batch)):
        other = collect(model, sites, parts, [statistic])
        for site in sites:
            ours, theirs = whole[site.name][statistic], other[site.name][statistic]
            atol = max(1e-6, 1e-5 * float(ours.abs().max()))
            torch.testing.assert_close(ours, theirs, atol=atol, rtol=1e-3, msg=site.name)


@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_the_loss_of_transcripts_is_that_of_each_example(inputs_for, reduction):
    """CTC takes no mean over labels: a sum over examples, or their mean by length."""
    config = TINY["wav2vec2"]()
    config.ctc_loss_reduction, config.pad_token_id = reduction, 0
    torch.manual_seed(0)
    model, batch = Wav2Vec2ForCTC(config).eval(), inputs_for("wav2vec2")
    batch["labels"] = torch.tensor([[5, 7, 9]] * 2 + [[5, -100, -100]] * 2)
    sites, names = find_sites(model), ["gate_grad", "weight_grad_square", "label_hessian"]
    whole = collect(model, sites, [batch], names)
    other = collect(model, sites, split(batch, (1, 1, 1, 1)), names)
    for site in sites:
        for name in names:
            ours, theirs = whole[site.name][name], other[site.name][name]
            atol = 1e-4 * float(theirs.abs().max())
            torch.testing.assert_close(ours, theirs, atol=atol, rtol=1e-3, msg=name)


def test_a_loss_of_two_means_is_refused(inputs_for):
    model, batch = BertForPreTraining(TINY["bert"]()), inputs_for("bert")
    batch["next_sentence_label"] = batch["labels"] % 2
    batch["labels"] = batch["input_ids"]
    sites = find_sites(model)
    with pytest.raises(ConfigError, match="BertForPreTraining adds a mean over tokens to one over"):
        collect(model, sites, [batch], ["gate_grad"])
    found = collect(model, sites, [batch], ["projected_fisher"])
    assert all(each["projected_fisher"].sum() > 0 for each in found.values())


def test_padding_of_several_choices_does_not_matter():
    torch.manual_seed(0)
    model = BertForMultipleChoice(TINY["bert"]()).eval()
    ids, mask = torch.randint(5, 99, (4, 3, 9)), torch.ones(4, 3, 9, dtype=torch.long)
    mask[:, :, 6:] = 0
    mask[:, 1, 4:] = 0
    whole = {"input_ids": ids, "attention_mask": mask, "labels": torch.tensor([0, 2, 1, 1])}
    less = {k: v[..., :6] if v.ndim == 3 else v for k, v in whole.items()}
    less["input_ids"] = less["input_ids"].masked_fill(less["attention_mask"] == 0, 0)
    sites = find_sites(model)
    names = ["gate_grad", "label_hessian", "hessian", "input_gram", "projected_fisher"]
    one, two = collect(model, sites, [whole], names), collect(model, sites, [less], names)
    for site in sites:
        for name in names:
            assert two[site.name][name].abs().max() > 0
            torch.testing.assert_close(
                one[site.name][name], two[site.name][name], atol=1e-8, rtol=1e-3, msg=name
            )


@families
def test_padded_tokens_do_not_matter(name, tiny, inputs_for):
    model, batch = tiny(name), inputs_for(name)
    sites = find_sites(model)
    whole = collect(model, sites, [batch], DATA)
    ids = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, 77)
    other = collect(model, sites, [{**batch, "input_ids": ids}], DATA)
    for site in sites:
        for key in DATA:
            torch.testing.assert_close(whole[site.name][key], other[site.name][key])


@families
def test_shapes_and_side_effects(name, tiny, inputs_for):
    model, batch = tiny(name), inputs_for(name)
    model.train()
    sites = find_sites(model)
    hooks = sum(len(m._forward_pre_hooks) for m in model.modules())
    found = collect(model, sites, iter([batch]), [*DATA, "generator"])
    assert sum(len(m._forward_pre_hooks) for m in model.modules()) == hooks
    assert model.training
    assert all(p.grad is None for p in model.parameters())
    for site in sites:
        assert set(found[site.name]) == set(DATA)
        for key, value in found[site.name].items():
            shape = (site.units, site.gate.width) if key == "input_norm" else (site.units,)
            assert (value.shape, value.dtype, value.device.type) == (shape, torch.float64, "cpu")
            assert (value >= 0).all()
    again = collect(model.eval(), sites, [batch], DATA)
    assert torch.equal(again[sites[0].name]["gate_grad"], found[sites[0].name]["gate_grad"])


def test_every_statistic_is_tested():
    assert {*DATA, *CURVATURE, *GATES, "generator"} == set(STATISTICS)


def test_seed_changes_the_projection(tiny, inputs_for):
    model, batch = tiny("bert"), inputs_for("bert")
    sites = find_sites(model)
    one, two = (collect(model, sites, [batch], ["projected_fisher"], seed=s) for s in (0, 1))
    name = sites[0].name
    assert not torch.equal(one[name]["projected_fisher"], two[name]["projected_fisher"])


def test_projection_is_blind_to_a_constant():
    mask, logits = torch.tensor([[True, True, True], [True, False, True]]), torch.randn(2, 3, 5)
    one = project_logits(logits, [0, 1], mask)
    torch.testing.assert_close(project_logits(logits + 3, [0, 1], mask), one, atol=1e-4, rtol=0)
    assert one.shape == (2,)
    changed = logits.clone()
    changed[1, 1] = 50.0
    assert torch.equal(project_logits(changed, [0, 1], mask), one), "padding does not count"
    assert project_logits(torch.randn(2, 1), [0, 1], said="numbers").abs().min() > 0


def test_nothing_is_run_for_nothing(tiny):
    def explode():
        raise AssertionError
        yield

    sites = find_sites(tiny("bert"))
    assert needs(lambda weight: weight) == ()
    assert collect(tiny("bert"), sites, explode(), ["generator"]) == {s.name: {} for s in sites}


def test_no_batch(tiny):
    model = tiny("bert")
    with pytest.raises(DataError, match="the calibration set is empty: no batch was given"):
        collect(model, find_sites(model), [], ["input_norm"])


def test_labels_are_missing(tiny, inputs_for):
    model, batch = tiny("bert"), inputs_for("bert")
    del batch["labels"]
    with pytest.raises(DataError, match=r"have no 'labels'\. Add them, or use .*'fisher'"):
        collect(model, find_sites(model), [batch], ["gate_grad"])
    assert not any(m._forward_pre_hooks for m in projections(model))
    collect(model, find_sites(model), [batch], ["projected_fisher"])


def projections(model):
    return [projection(base_model(model), s.gate.module) for s in find_sites(model)]


@pytest.mark.parametrize("statistic", DATA)
def test_not_finite(tiny, inputs_for, statistic):
    model, batch = tiny("bert"), inputs_for("bert")
    with torch.no_grad():
        model.bert.encoder.layer[0].intermediate.dense.bias[3] = float("inf")
    with pytest.raises(
        NumericsError, match=rf"layer\.\d.*: the statistic '{statistic}' has values"
    ):
        collect(model, find_sites(model), [batch], [statistic])


def seen_and_gradients(model, sites, example, seed):
    """For each site: the inputs, and the gradients of all targets, of its projection."""
    seen, leaves, handles = {}, {}, []
    for site in sites:

        def keep(_, args, output, key=site.name):
            leaves[key] = torch.zeros_like(output, requires_grad=True)
            seen[key] = args[0].detach().flatten(0, -2)  # [1, T, N] or [T, N] -> [T, N]
            return output + leaves[key]

        module = projection(base_model(model), site.gate.module)
        handles.append(module.register_forward_hook(keep))
    made = targets(model, example, seed)
    for handle in handles:
        handle.remove()
    keys = [site.name for site in sites]
    return seen, {
        source: dict(
            zip(
                keys,
                torch.autograd.grad(target, [leaves[k] for k in keys], retain_graph=True),
                strict=True,
            )
        )
        for source, target in made.items()
    }


def of_example(site, x, gradients):
    """What one example adds to each statistic, one token at a time."""
    gradients = {source: g.flatten(0, -2) for source, g in gradients.items()}  # [T, E]
    square = (gradients["gate_grad"].T @ x).square().double()  # [E, U * D]
    columns = square.unflatten(1, (site.units, site.gate.width))
    found = {
        "weight_grad_square": columns.transpose(0, 1).flatten(1),
        "input_gram": sum(torch.outer(a, a) for a in x.double()),
    }
    for source, (hessian, output_gradient) in FACTORS.items():
        tokens = list(zip(x.double(), gradients[source].double(), strict=True))
        found[hessian] = sum(g.square().sum() * torch.outer(a, a) for a, g in tokens)
        found[output_gradient] = sum(torch.outer(g, g) for _, g in tokens)
    return found


def slow_curvature(model, batch, seed):
    sites = find_sites(model)
    found = {site.name: {} for site in sites}
    for example in examples(batch):
        seen, gradients = seen_and_gradients(model, sites, example, seed)
        for site in sites:
            key = site.name
            own = {source: each[key] for source, each in gradients.items()}
            for name, value in of_example(site, seen[key], own).items():
                found[key][name] = found[key].get(name, 0) + value
    count, tokens = len(batch["input_ids"]), int(batch["attention_mask"].sum())
    for each in found.values():
        each["weight_grad_square"] /= count
        each["input_gram"] /= tokens
        for hessian, output_gradient in FACTORS.values():
            each[hessian] /= count
            each[output_gradient] /= each[output_gradient].trace()
    return found


@families
def test_curvature_against_a_loop(name, tiny, inputs_for, monkeypatch):
    monkeypatch.setattr("hf_prune.statistics.projection._directions", plain_signs)
    model, batch = tiny(name), inputs_for(name)
    sites = find_sites(model)
    found = collect(model, sites, [batch], CURVATURE, seed=3)
    expected = slow_curvature(model, batch, 3)
    for site in sites:
        for key in CURVATURE:
            ours, slow = found[site.name][key], expected[site.name][key]
            assert slow.abs().max() > 0
            atol = 1e-5 * float(slow.abs().max())
            torch.testing.assert_close(ours, slow, atol=atol, rtol=1e-3, msg=f"{site.name} {key}")


def test_gates_agree_with_each_other(tiny, inputs_for):
    """The full matrices have the diagonals as their diagonals."""
    model, batch = tiny("bert"), inputs_for("bert")
    sites = find_sites(model)
    keys = {"gate_square", "projected_gate_fisher", "projected_fisher", "gate_grad"}
    found = collect(model, sites, [batch], keys | {"gate_grad_signed"})
    one = {k: v[:1] for k, v in batch.items()}
    single = collect(model, sites, [one], keys | {"gate_grad_signed"})
    for site in sites:
        each, alone = found[site.name], single[site.name]
        diagonal = each["projected_gate_fisher"].diagonal()
        torch.testing.assert_close(diagonal, each["projected_fisher"])
        assert bool((each["gate_square"] >= each["gate_grad"].square() - 1e-12).all())
        torch.testing.assert_close(alone["gate_square"], alone["gate_grad_signed"].square())
        torch.testing.assert_close(alone["gate_grad_signed"].abs(), alone["gate_grad"])


def test_directions_of_a_vocabulary_have_the_covariance_of_its_entries():
    """Mean over draws of `v v^T` is `diag(p) - p p^T`, the curvature of the KL divergence."""
    logits = torch.tensor([[2.0, 0.0, -1.0, 0.5]])
    generator = torch.Generator().manual_seed(0)
    draws = torch.cat(
        [_directions(logits, generator, "classes", language=True) for _ in range(20_000)]
    )
    p = torch.softmax(logits[0], dim=-1)
    torch.testing.assert_close(
        draws.T @ draws / len(draws), torch.diag(p) - torch.outer(p, p), atol=0.01, rtol=0
    )


@pytest.mark.parametrize("key", ["hessian", "sampled_hessian"])
def test_more_projections_are_averaged(tiny, inputs_for, key):
    model, batch = tiny("bert"), inputs_for("bert")
    sites = find_sites(model)
    both = collect(model, sites, [batch], [key], seed=5, projections=2)
    each = [collect(model, sites, [batch], [key], seed=seed) for seed in (5, 5 + SEED_STEP)]
    for site in sites:
        mean = sum(one[site.name][key] for one in each) / 2
        torch.testing.assert_close(both[site.name][key], mean)
        assert not torch.allclose(each[0][site.name][key], each[1][site.name][key])


def test_all_factors_of_one_pass_are_those_of_their_own(tiny, inputs_for):
    """Loss, projection and draw share a forward pass, and nothing else."""
    model, batch = tiny("gpt2"), inputs_for("gpt2")
    sites = find_sites(model)
    names = [name for pair in FACTORS.values() for name in pair]
    together = collect(model, sites, [batch], names, seed=2)
    for pair in FACTORS.values():
        alone = collect(model, sites, [batch], pair, seed=2)
        for site in sites:
            for name in pair:
                torch.testing.assert_close(together[site.name][name], alone[site.name][name])


def covariance(values, said, draws=20_000):
    """Mean over draws, and the covariance of the entries of one row (or of one column)."""
    generator = torch.Generator().manual_seed(0)
    found = torch.stack([_drawn(values, generator, said) for _ in range(draws)])
    found = found[..., 0] if said == "positions" else found[:, 0]
    return found.mean(dim=0), found.T @ found / draws


def test_draws_have_the_fisher_information_of_what_is_said():
    """Mean 0, covariance `diag(p) - p p^T`; of numbers 1, and of flags `p (1 - p)`."""
    logits = torch.tensor([2.0, 0.0, -1.0, 0.5])
    p = torch.softmax(logits, dim=-1)
    fisher = torch.diag(p) - torch.outer(p, p)
    flag = torch.sigmoid(logits)
    expected = {
        "classes": (logits.unsqueeze(0), fisher),
        "positions": (torch.stack([logits, 3 * logits], dim=-1), fisher),
        "flags": (logits.unsqueeze(0), torch.diag(flag * (1 - flag))),
        "numbers": (logits.unsqueeze(0), torch.eye(4)),
    }
    for said, (values, wanted) in expected.items():
        mean, found = covariance(values, said, draws=8_000)
        torch.testing.assert_close(mean, torch.zeros(4), atol=0.04, rtol=0, msg=said)
        torch.testing.assert_close(found, wanted, atol=0.05, rtol=0, msg=said)


@pytest.mark.parametrize(
    ("problem", "classes"), [("multi_label_classification", 3), ("regression", 1)]
)
def test_draws_of_other_tasks(tiny, inputs_for, problem, classes):
    """Flags and numbers have a curvature, too: a softmax of one number would have none."""
    model = tiny("bert")
    model.config.problem_type = problem
    model.classifier = torch.nn.Linear(32, classes)
    sites, batch = find_sites(model), inputs_for("bert")
    del batch["labels"]
    found = collect(model, sites, [batch], FACTORS["sample"])
    assert all(found[s.name]["sampled_hessian"].diagonal().max() > 0 for s in sites)


def test_several_numbers_are_no_classes(tiny, inputs_for):
    """A normal deviate for each number, whose sum is not that of a class less its chance."""
    model, batch = tiny("bert"), inputs_for("bert")
    model.config.problem_type = "regression"
    rows = zip(batch["input_ids"], token_mask(model, batch), strict=True)
    seeds = [example_seed(*row, 0) for row in rows]
    output = SimpleNamespace(logits=torch.ones(len(seeds), 3))
    found = project_output(model, batch, output, 0, sampled=True)
    drawn = [torch.randn(1, 3, generator=torch.Generator().manual_seed(s)).sum() for s in seeds]
    torch.testing.assert_close(found, torch.stack(drawn))


def test_nothing_is_drawn_from_a_model_without_a_head(tiny, inputs_for):
    model, batch = tiny("bert"), inputs_for("bert")
    del batch["labels"]
    with pytest.raises(ConfigError, match=r"BertModel has no head.* criterion: kfac_obs"):
        collect(model.bert, find_sites(model.bert), [batch], ["sampled_hessian"])


@pytest.mark.parametrize("name", ["bert", "gpt2"])
def test_seeds_of_draws_and_of_labels(name, tiny, inputs_for):
    """The same seed draws the same; others draw others; labels know no seed."""
    model, batch = tiny(name), inputs_for(name)
    sites, (drawn, told) = find_sites(model), ("sampled_hessian", "label_hessian")
    found = [collect(model, sites, [batch], [drawn, told], seed=s) for s in (0, 0, 1, 2, 3, 4)]
    for site in sites:
        one, same, *others = (each[site.name] for each in found)
        assert torch.equal(one[drawn], same[drawn])
        assert not all(torch.allclose(one[drawn], other[drawn]) for other in others)
        assert all(torch.equal(one[told], other[told]) for other in (same, *others))


def test_spans_are_labels(inputs_for):
    """Of models that answer questions: `gate_grad` is that of the mean loss of each example."""
    torch.manual_seed(0)
    config = TINY["bert"]()
    config.num_labels = 2
    model = BertForQuestionAnswering(config).eval()
    batch = inputs_for("bert")
    del batch["labels"]
    batch |= {"start_positions": torch.tensor([1, 0, 2, 1]), "end_positions": torch.ones(4).long()}
    sites = find_sites(model)
    found = collect(model, sites, [batch], ["gate_grad"])
    alone = [
        collect(model, sites, [{k: v[i : i + 1] for k, v in batch.items()}], ["gate_grad"])
        for i in range(4)
    ]
    for site in sites:
        mean = torch.stack([each[site.name]["gate_grad"] for each in alone]).mean(dim=0)
        assert mean.max() > 0
        torch.testing.assert_close(found[site.name]["gate_grad"], mean, atol=1e-6, rtol=1e-4)
    del batch["end_positions"]
    with pytest.raises(DataError, match="have no 'labels'"):
        collect(model, sites, [batch], ["gate_grad"])
