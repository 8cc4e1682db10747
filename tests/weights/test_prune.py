"""The walk: masks are exact, each fit repairs, both paths agree, and interrupted runs go on."""

import copy
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from hf_prune import compress, sparsify_
from hf_prune.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    NumericsError,
    UnsupportedModelError,
)
from hf_prune.families import FAMILIES
from hf_prune.recipe import Schedule
from hf_prune.sites import base_model, find_sites
from hf_prune.weights import prune as room
from hf_prune.weights.budgets import uniform
from hf_prune.weights.find import find_matrices
from hf_prune.weights.patterns import Pattern, parse_pattern
from hf_prune.weights.problem import Options
from hf_prune.weights.progress import Progress
from hf_prune.weights.prune import prune_weights_

families = pytest.mark.parametrize("name", sorted(FAMILIES))
HEADS = ["classifier*", "*pooler*", "lm_head*"]
OWN = {"dense_target": False, "refit_steps": 0}


def run(model, batches, sparsity=0.5, pattern="unstructured", ignore=(), **options):
    progress = options.pop("progress", None)
    parsed = parse_pattern(pattern)
    matrices = find_matrices(model, ignore=ignore)
    removed = uniform(matrices, sparsity, parsed)
    told = Options(pattern=parsed, **options)
    return prune_weights_(model, matrices, removed, told, batches, progress=progress)


def unused_towers(name):
    """What text alone does not run."""
    return ["*vision*", "*multi_modal*"] if name == "gemma3" else []


@families
def test_zeros_are_exact_and_nothing_else_changes(name, tiny, inputs_for, logits):
    model, dense = tiny(name), tiny(name)
    model.train()
    logits(model, inputs_for(name))  # transformers puts hooks of its own, at the first call
    hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())
    batches = [inputs_for(name, seed) for seed in range(2)]
    result = run(model, batches, pattern="2:4", iterations=3, ignore=unused_towers(name))
    assert model.training
    left = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())
    assert left == hooks
    assert all("forward" not in module.__dict__ for module in model.modules())
    before = dict(dense.named_parameters())
    biases = {key.replace("weight", "bias") for key in result.masks}
    for key, parameter in model.named_parameters():
        if key in result.masks:
            mask = result.masks[key]
            assert torch.equal(parameter != 0, mask), key
            assert int(mask.sum()) * 2 == mask.numel(), key
        elif key not in biases:
            assert torch.equal(parameter, before[key]), key
    assert set(result.errors) == set(result.masks)


@families
def test_layer_by_layer_and_whole_give_the_same(name, tiny, inputs_for, monkeypatch):
    """Running one layer at a time, with known outputs replayed, is only faster."""
    batches = [inputs_for(name, seed) for seed in range(2)]
    first, second = tiny(name), tiny(name)
    told = {"criterion": "wanda", "dense_target": False, "ignore": unused_towers(name)}
    run(first, batches, **told)
    monkeypatch.setattr(room, "known_layers", lambda *args: {})
    run(second, batches, **told)
    for (key, ours), theirs in zip(first.named_parameters(), second.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-3, msg=key)


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama", "opt", "t5", "vit"])
def test_the_dense_target_and_the_refit_repair(name, tiny, inputs_for, logits):
    dense = tiny(name)
    batches = [inputs_for(name, seed, (9, 6, 4, 7) * 8) for seed in range(6)]
    losses = {}
    for title, options in {
        "magnitude": {"criterion": "magnitude", **OWN},
        "refit": {"criterion": "magnitude", "dense_target": False},
        "own": {"dense_target": False},
        "dense": {},
    }.items():
        model = tiny(name)
        run(model, batches, 0.6, ignore=[*HEADS, *unused_towers(name)], **options)
        gaps = [logits(model, b) - logits(dense, b) for b in batches]
        losses[title] = sum(float(gap.square().mean()) for gap in gaps)
    assert losses["dense"] < losses["own"] < losses["magnitude"], losses
    assert losses["refit"] < losses["magnitude"], losses


def test_nothing_removed_nothing_lost(tiny, inputs_for, logits):
    model, dense, batch = tiny("bert"), tiny("bert"), inputs_for("bert")
    run(model, [batch], 0.0)
    torch.testing.assert_close(logits(model, batch), logits(dense, batch), atol=1e-4, rtol=1e-4)


def test_the_first_matrix_is_fitted_as_least_squares_says(tiny, inputs_for):
    """Almost no ridge, all entries kept but one row's: the rest is ordinary least squares."""
    model, dense = tiny("bert"), tiny("bert")
    batches = [inputs_for("bert", seed, (9, 6, 4, 7) * 8) for seed in range(6)]
    key = "bert.encoder.layer.0.attention.self.query"
    matrices = [m for m in find_matrices(model) if m.name == f"{key}.weight"]
    told = Options(ridge=1e-6, refit_steps=60, iterations=0)
    result = prune_weights_(model, matrices, uniform(matrices, 0.3, Pattern()), told, batches)
    mask = result.masks[f"{key}.weight"]
    seen = []
    with torch.no_grad():
        for batch in batches:
            hidden = dense.bert.embeddings(batch["input_ids"])
            seen.append(hidden[batch["attention_mask"].bool()])
    inputs = torch.cat(seen).double()
    old = dense.get_submodule(key)
    wanted = inputs @ old.weight.double().T + old.bias.double()
    new = model.get_submodule(key)
    for row in range(4):
        on = mask[row]
        design = torch.cat([inputs[:, on], torch.ones(len(inputs), 1, dtype=torch.float64)], 1)
        solution = torch.linalg.lstsq(design, wanted[:, row : row + 1]).solution[:, 0]
        ours = torch.cat([new.weight[row, on], new.bias[row : row + 1]]).double()
        torch.testing.assert_close(ours, solution, atol=2e-3, rtol=2e-2)


def test_padding_is_never_counted(tiny, inputs_for):
    batches = [inputs_for("bert", seed) for seed in range(3)]
    changed = [
        {**b, "input_ids": b["input_ids"].masked_fill(b["attention_mask"] == 0, 77)}
        for b in batches
    ]
    first, second = tiny("bert"), tiny("bert")
    run(first, batches, criterion="wanda")
    run(second, changed, criterion="wanda")
    for (key, ours), theirs in zip(first.named_parameters(), second.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-3, rtol=1e-3, msg=key)


def test_only_the_dense_target_costs_a_dense_network(tiny, inputs_for, monkeypatch):
    def refuse(module):
        raise MemoryError

    batches = [inputs_for("bert", seed) for seed in range(2)]
    model = tiny("bert")
    matrices = find_matrices(model)  # some lie outside of the layers
    removed = uniform(matrices, 0.5, Pattern())
    monkeypatch.setattr(room, "copy", SimpleNamespace(deepcopy=refuse))
    with pytest.raises(MemoryError):
        prune_weights_(model, matrices, removed, Options(), batches)
    own = Options(criterion="sparsegpt", dense_target=False)
    result = prune_weights_(model, matrices, removed, own, batches)
    assert len(result.errors) == len(matrices)


def test_inputs_far_from_zero():
    """Products in float32 lose what varies: more damping, and no error."""
    torch.manual_seed(0)
    layer = nn.Linear(16, 8)
    inputs = [1000 + 0.1 * torch.randn(64, 16) for _ in range(4)]
    before = layer(inputs[0]).detach()
    result = sparsify_(layer, inputs, sparsity=0.5)
    assert int(result.masks["weight"].sum()) == 64
    assert float((layer(inputs[0]).detach() - before).square().mean()) < 0.01
    assert torch.isfinite(layer.weight).all()


def test_the_dense_target_is_dense_where_embeddings_go():
    """Layers behind a pruned embedding repair it; they are not fitted to what it became."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(50, 32), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 8))
    dense, alone = copy.deepcopy(model), copy.deepcopy(model)
    batches = [torch.randint(50, (64,)) for _ in range(8)]
    sparsify_(model, batches, sparsity=0.5, weights={"embeddings": True})
    alone[0].load_state_dict(model[0].state_dict())
    assert int((model[0].weight == 0).sum()) == 800
    with torch.no_grad():
        every = torch.arange(50)
        losses = [float((each(every) - dense(every)).square().mean()) for each in (model, alone)]
    assert losses[0] < losses[1]


class Twins(nn.Module):
    """Two modules of one matrix, with biases of their own and inputs of their own."""

    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Linear(12, 12), nn.Linear(12, 12)
        self.two.weight = self.one.weight

    def forward(self, x):
        left, right = self.one(x[:, :12]), self.two(x[:, 12:])
        return torch.cat([left, right], dim=1)


@pytest.mark.parametrize("dense_target", [True, False])
def test_a_matrix_of_two_modules_is_fitted_to_both(dense_target):
    """The error that is reported is that of both, and near the best for both."""
    torch.manual_seed(0)
    mixes = [
        torch.randn(12, 12) * torch.logspace(-1, 1, 12)[order]
        for order in (range(12), range(11, -1, -1))
    ]
    inputs = torch.cat([torch.randn(400, 12) @ mix for mix in mixes], dim=1)
    model = Twins().eval()
    with torch.no_grad():
        dense, biases = model(inputs), torch.cat([model.one.bias, model.two.bias])
    weights = {"dense_target": dense_target}
    result = sparsify_(model, [inputs[:200], inputs[200:]], sparsity=0.4, weights=weights)
    with torch.no_grad():
        lost = (model(inputs) - dense).square().mean() / (dense - biases).square().mean()
        assert torch.equal(torch.cat([model.one.bias, model.two.bias]), biases)
    assert list(result.masks) == ["one.weight"]
    assert float(lost) == pytest.approx(result.errors["one.weight"], rel=0.3)


class Again(nn.Module):
    """Calls one layer as often as a batch has rows."""

    def __init__(self):
        super().__init__()
        self.inner, self.outer = nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x):
        for _ in range(len(x)):
            x = self.inner(x).tanh()
        return self.outer(x)


@pytest.mark.parametrize("dense_target", [True, False])
def test_every_call_of_every_batch_counts(dense_target):
    results = []
    torch.manual_seed(1)
    few, many = torch.randn(1, 40, 6), torch.randn(3, 40, 6)
    for batches in ([few, many], [many, few]):
        torch.manual_seed(0)
        model = Again().eval()
        matrices = find_matrices(model)
        told = Options(dense_target=dense_target)
        prune_weights_(model, matrices, uniform(matrices, 0.5, Pattern()), told, batches)
        results.append(model)
    for ours, theirs in zip(results[0].parameters(), results[1].parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["t5", "bart"])
@pytest.mark.parametrize("criterion", ["admm", "wanda"])
def test_padding_of_encoder_and_decoder_is_never_counted(name, criterion, tiny, inputs_for):
    """Both are of one length here: only what a module reads says whose padding it sees."""
    batches, changed = [], []
    for seed in range(3):
        batch = inputs_for(name, seed, (9, 9))
        ids = batch["input_ids"]
        ours, theirs = torch.ones_like(ids), torch.ones_like(ids)
        ours[0, 4:], theirs[1, 6:] = 0, 0
        told = {"attention_mask": ours, "decoder_attention_mask": theirs}
        batches.append({"input_ids": ids, "decoder_input_ids": ids.flip(1), **told})
        other = {
            "input_ids": ids.masked_fill(ours == 0, 77),
            "decoder_input_ids": ids.flip(1).masked_fill(theirs == 0, 77),
        }
        changed.append({**other, **told})
    first, second = tiny(name), tiny(name)
    run(first, batches, criterion=criterion)
    run(second, changed, criterion=criterion)
    for (key, one), two in zip(first.named_parameters(), second.parameters(), strict=True):
        torch.testing.assert_close(one, two, atol=1e-3, rtol=1e-3, msg=key)


@contextmanager
def dying_after_a_layer(monkeypatch, layers=1):
    """A walk that is broken off when it begins its second layer, or a later one."""
    real, done = room.prune_block, []

    def dies(block, *args):
        if len(done) == layers:
            raise KeyboardInterrupt
        done.append(block.prefix)
        return real(block, *args)

    with monkeypatch.context() as patch:
        patch.setattr(room, "prune_block", dies)
        yield


def test_an_interrupted_run_goes_on(tiny, inputs_for, tmp_path, monkeypatch):
    batches = [inputs_for("llama", seed) for seed in range(2)]
    whole = tiny("llama")
    run(whole, batches)
    progress = Progress(tmp_path / "state", "this run")
    with dying_after_a_layer(monkeypatch), pytest.raises(KeyboardInterrupt):
        run(tiny("llama"), batches, progress=progress)
    model = tiny("llama")
    result = run(model, batches, progress=progress)
    assert result.resumed == ["model.layers.0"]
    for (key, ours), theirs in zip(model.named_parameters(), whole.named_parameters(), strict=True):
        torch.testing.assert_close(ours, theirs[1], atol=1e-5, rtol=1e-5, msg=key)
    assert set(result.errors) == set(result.masks)
    with pytest.raises(CheckpointError, match=r"layers\.0\.safetensors is from a run with another"):
        run(tiny("llama"), batches, progress=Progress(tmp_path / "state", "another"))


@pytest.mark.parametrize("name", ["t5", "bart"])
def test_a_run_that_was_interrupted_in_the_decoder_goes_on(
    name, tiny, inputs_for, tmp_path, monkeypatch
):
    batches, heads = [inputs_for(name, seed) for seed in range(2)], [*HEADS]
    whole = tiny(name)
    run(whole, batches, ignore=heads)
    progress = Progress(tmp_path / "state", "this run")
    with dying_after_a_layer(monkeypatch, 3), pytest.raises(KeyboardInterrupt):
        run(tiny(name), batches, ignore=heads, progress=progress)
    model = tiny(name)
    result = run(model, batches, ignore=heads, progress=progress)
    assert [layer.split(".")[-3:-2] for layer in result.resumed].count(["decoder"]) == 1
    assert len(result.resumed) == 3
    for (key, ours), theirs in zip(model.named_parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5, msg=key)


@pytest.mark.parametrize("name", ["t5", "bart", "whisper"])
def test_layers_of_encoder_and_decoder_run_alone(name, tiny, inputs_for):
    """The whole model runs a fixed number of times, however many layers it has."""
    runs = []
    for layers in (2, 4):
        config = tiny(name).config
        keys = ("num_layers", "num_decoder_layers", "encoder_layers", "decoder_layers")
        config.update({key: layers for key in keys if hasattr(config, key)})
        model, calls = type(tiny(name))(config).eval(), []
        model.register_forward_pre_hook(lambda *args, calls=calls: calls.append(1))
        run(model, [inputs_for(name, seed) for seed in range(2)], ignore=[*HEADS])
        runs.append(len(calls))
    assert runs[0] == runs[1]


def test_a_model_in_memory_goes_on_where_it_was(tiny, inputs_for, tmp_path, monkeypatch):
    batches = [inputs_for("llama", seed) for seed in range(2)]
    whole, told = tiny("llama"), {"sparsity": 0.5, "progress": tmp_path / "state"}
    sparsify_(whole, batches, sparsity=0.5)
    with dying_after_a_layer(monkeypatch), pytest.raises(KeyboardInterrupt):
        sparsify_(tiny("llama"), batches, **told)
    model = tiny("llama")
    assert sparsify_(model, batches, **told).resumed == ["model.layers.0"]
    for (key, ours), theirs in zip(model.named_parameters(), whole.named_parameters(), strict=True):
        torch.testing.assert_close(ours, theirs[1], atol=1e-5, rtol=1e-5, msg=key)
    other = tiny("llama")
    other.model.layers[1].mlp.up_proj.weight.data[0, 0] += 1.0
    norm = tiny("llama")  # of which no entry can go, but which everything passes
    norm.model.layers[0].input_layernorm.weight.data[0] += 1.0
    for changed, data, fields in (
        (other, batches, {}),
        (norm, batches, {}),
        (tiny("llama"), batches[:1], {}),
        (tiny("llama"), batches, {"seed": 1}),
        (tiny("llama"), batches, {"sparsity": 0.6}),
    ):
        with pytest.raises(CheckpointError, match="is from a run with another model, recipe or"):
            sparsify_(changed, data, **{**told, **fields})
    with pytest.raises(ConfigError, match="Linear has no layers that run one after another"):
        sparsify_(nn.Linear(4, 4), [torch.randn(8, 4)], **told)
    plain = {"criterion": "magnitude", "reconstruct": False, "weights": {"dense_target": False}}
    with pytest.raises(ConfigError, match=r"'magnitude' without a re-fit .* runs no layer"):
        sparsify_(tiny("llama"), **told, **plain)


def test_a_compression_goes_on_at_the_layer_that_it_had_reached(
    tiny, inputs_for, tmp_path, monkeypatch
):
    batches = [inputs_for("llama", seed, (9, 6, 4, 7) * 4) for seed in range(2)]
    units = {"stage": "prune", "units": ["neurons"], "sparsity": 0.25}
    recipe = {"stages": [units, {"stage": "prune", "units": ["weights"], "sparsity": 0.5}]}
    whole = compress(tiny("llama"), recipe, batches)
    assert "resumed" not in whole.report["pruning"][1]
    told = {"progress": tmp_path / "state"}
    with dying_after_a_layer(monkeypatch), pytest.raises(KeyboardInterrupt):
        compress(tiny("llama"), recipe, batches, **told)
    again = compress(tiny("llama"), recipe, batches, **told)
    assert again.report["pruning"][1]["resumed"] == ["model.layers.0"]
    pairs = zip(again.model.named_parameters(), whole.model.parameters(), strict=True)
    for (key, ours), theirs in pairs:
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5, msg=key)
    plain = {"criterion": "magnitude", "reconstruct": False, "weights": {"dense_target": False}}
    light = {**recipe["stages"][1], "sparsity": 0.6, **plain}
    for stages in ([units], [units, light]):
        with pytest.raises(ConfigError, match="keeps layers of a stage of single weights"):
            compress(tiny("llama"), {"stages": stages}, batches, **told)
    mixed = {"stages": [*recipe["stages"], light]}
    entries = compress(tiny("llama"), mixed, batches, progress=tmp_path / "other").report["pruning"]
    assert ["resumed" in entry for entry in entries] == [False, True, False]


def test_pruning_by_norms_goes_on_too(tiny, inputs_for, tmp_path, monkeypatch):
    batches = [inputs_for("llama", seed) for seed in range(2)]
    told = {"criterion": "wanda", "dense_target": False, "refit_steps": 0}
    whole = tiny("llama")
    run(whole, batches, **told)
    progress = Progress(tmp_path / "state", "this run")
    real, done = room.prune_by_norms, []

    def dies(*args, **kwargs):
        if done:
            raise KeyboardInterrupt
        done.append(1)
        return real(*args, **kwargs)

    monkeypatch.setattr(room, "prune_by_norms", dies)
    with pytest.raises(KeyboardInterrupt):
        run(tiny("llama"), batches, progress=progress, **told)
    monkeypatch.setattr(room, "prune_by_norms", real)
    model = tiny("llama")
    assert run(model, batches, progress=progress, **told).resumed == ["model.layers.0"]
    for (key, ours), theirs in zip(model.named_parameters(), whole.named_parameters(), strict=True):
        torch.testing.assert_close(ours, theirs[1], atol=1e-6, rtol=1e-6, msg=key)


@torch.no_grad()
def test_any_module_by_the_fields_of_a_stage():
    net = nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 10)).train()
    images = torch.rand(32, 1, 8, 8)
    before = net.eval()(images)
    net.train()
    found = sparsify_(net, images.split(8), sparsity=0.5, ignore=("3*",))
    assert net.training
    assert list(found.masks) == ["0.weight"]
    assert int((net[0].weight == 0).sum()) == int((~found.masks["0.weight"]).sum()) == 36
    gap = float((net.eval()(images) - before).square().mean() / before.square().mean())
    plain = copy.deepcopy(net)
    told = {"criterion": "magnitude", "reconstruct": False, "weights": {"dense_target": False}}
    sparsify_(plain, sparsity=0.5, **told)
    assert float((plain(images) - before).square().mean() / before.square().mean()) > gap
    with pytest.raises(ConfigError, match="reads all batches that it is given"):
        sparsify_(plain, sparsity=0.5, calibration_samples=8, **told)
    with pytest.raises(ConfigError, match=r"sparsify_: .*sparsty"):
        sparsify_(net, images.split(8), sparsty=0.5)
    with pytest.raises(DataError, match="needs calibration batches"):
        sparsify_(net, sparsity=0.5)
    with pytest.raises(ConfigError, match="leave remove_dead to compress"):
        sparsify_(net, images.split(8), sparsity=0.5, weights={"remove_dead": True})
    with pytest.raises(ConfigError, match="leave sequence_length to compress"):
        sparsify_(net, images.split(8), sparsity=0.5, sequence_length=7)
    for fields in ({"schedule": Schedule()}, {"polish_steps": 2}):
        with pytest.raises(ConfigError, match="in one shot: leave schedule to PruneCallback"):
            sparsify_(net, images.split(8), sparsity=0.5, **fields)


class Net(nn.Module):
    """Two convolutions, one of them grouped, a recurrent layer, and a linear one."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Conv2d(1, 6, 3, padding=1)
        self.second = nn.Conv2d(6, 6, 3, groups=2)
        self.rnn = nn.LSTM(36, 10, batch_first=True)
        self.last = nn.Linear(10, 4)

    def forward(self, x):
        hidden = self.second(self.first(x).relu()).relu()  # [B, 6, 6, 6]
        states = self.rnn(hidden.permute(0, 2, 1, 3).flatten(2))[0]  # [B, 6, 10]
        return self.last(states[:, -1])


@pytest.mark.parametrize("criterion", ["admm", "wanda", "sparsegpt", "magnitude", "random"])
def test_any_module(criterion):
    batches = [
        torch.randn(64, 1, 8, 8, generator=torch.Generator().manual_seed(s)) for s in range(4)
    ]
    losses = []
    for options in (OWN, {}):
        model, dense = Net(), Net()
        result = run(model, batches, 0.6, criterion=criterion, **options)
        assert set(result.masks) == {m.name for m in find_matrices(model)}
        for key, mask in result.masks.items():
            assert torch.equal(model.get_parameter(key) != 0, mask)
        with torch.no_grad():
            losses.append(float(sum((model(b) - dense(b)).square().mean() for b in batches)))
    assert losses[1] < losses[0]


def test_lists_are_what_a_recipe_and_a_loader_have():
    """A DataLoader over a TensorDataset gives lists of tensors."""
    net = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
    loader = DataLoader(TensorDataset(torch.randn(32, 8)), batch_size=8)
    told = {"ignore": ["*bias"], "weights": {"targets": ["0", "2"]}}
    assert list(sparsify_(net, loader, sparsity=0.5, **told).masks) == ["0.weight", "2.weight"]
    labelled = DataLoader(TensorDataset(torch.randn(32, 8), torch.zeros(32)), batch_size=8)
    with pytest.raises(DataError, match=r"2 values, .* of Sequential\.forward .* without labels"):
        sparsify_(net, labelled, sparsity=0.5)
    with pytest.raises(ConfigError, match="leave units out"):
        sparsify_(net, loader, sparsity=0.5, units=["weights"])


class Encoder(nn.Module):
    """Two layers of torch's own, whose attention computes with its matrices by itself."""

    def __init__(self):
        super().__init__()
        layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
        self.layers = nn.TransformerEncoder(layer, 2)

    def forward(self, x, padding=None):
        return self.layers(x, src_key_padding_mask=padding)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("way", ["admm", "own inputs", "knapsack", "fisher_diagonal"])
def test_attention_that_computes_inside(way):
    fields = {
        "admm": {},
        "own inputs": {"criterion": "sparsegpt", "weights": {"dense_target": False}},
        "knapsack": {"solver": "knapsack"},
        "fisher_diagonal": {"criterion": "fisher_diagonal", "solver": "global"},
    }[way]
    torch.manual_seed(0)
    dense = Encoder().eval()
    lengths = torch.tensor([[6, 3, 4, 5] * 2]).T
    batches = [(torch.randn(8, 6, 16), torch.arange(6) >= lengths)]
    model, plain = copy.deepcopy(dense), copy.deepcopy(dense)
    result = sparsify_(model, batches, sparsity=0.5, **fields)
    assert len(result.masks) == 8
    assert "layers.layers.1.self_attn.in_proj_weight" in result.masks
    assert "layers.layers.1.self_attn.out_proj.weight" in result.masks
    total = sum(mask.numel() for mask in result.masks.values())
    assert sum(int(mask.sum()) for mask in result.masks.values()) == total // 2
    for name, mask in result.masks.items():
        assert not model.get_parameter(name)[~mask].any()
    own = {"dense_target": False}
    sparsify_(plain, sparsity=0.5, criterion="magnitude", reconstruct=False, weights=own)
    inputs, padding = batches[0]
    with torch.no_grad():
        wanted = dense(inputs, padding)[~padding]
        lost = [
            float((m(inputs, padding)[~padding] - wanted).square().mean()) for m in (model, plain)
        ]
    assert lost[0] < 0.6 * lost[1]
    other = copy.deepcopy(dense)
    changed = inputs.masked_fill(padding.unsqueeze(-1), 0.0)
    if way not in ("knapsack", "fisher_diagonal"):  # which follow linear layers to their padding
        names = ["*linear*"]
        sparsify_(other, [(changed, padding)], sparsity=0.5, ignore=names, **fields)
        again = copy.deepcopy(dense)
        sparsify_(again, batches, sparsity=0.5, ignore=names, **fields)
        for (name, one), two in zip(other.named_parameters(), again.parameters(), strict=True):
            if "layers.0" in name:
                torch.testing.assert_close(one, two, atol=1e-5, rtol=1e-4)
    assert torch.backends.mha.get_fastpath_enabled()
    skipped = copy.deepcopy(dense).requires_grad_(False)
    told = {"sparsity": 0.5, "ignore": ["*layers.0*", "*out_proj"], **fields}
    assert len(sparsify_(skipped, batches, **told).masks) == 3


def test_biases_of_queries_keys_and_values_of_other_widths_are_fitted():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.MultiheadAttention(16, 2, kdim=6, vdim=10, batch_first=True)

        def forward(self, query, key, value):
            return self.inner(query, key, value, need_weights=False)[0]

    torch.manual_seed(0)
    model = Net()
    batch = tuple(torch.randn(8, 5, width) + 2 for width in (16, 6, 10))
    before = model.inner.in_proj_bias.detach().clone()
    assert len(sparsify_(model, [batch], sparsity=0.5).masks) == 4
    moved = (model.inner.in_proj_bias - before).abs().view(3, 16)
    assert (moved.mean(dim=1) > 0.01).all()


class Mixing(nn.Module):
    """A part of a layer with torch's attention behind it."""

    def __init__(self, part):
        super().__init__()
        self.part, self.dense = part, part.dense
        self.attention = nn.MultiheadAttention(part.dense.out_features, 2, batch_first=True)

    def forward(self, x):
        y = self.part(x)
        return y + self.attention(y, y, y, need_weights=False)[0]


def test_progress_keeps_all_that_attention_became(tiny, inputs_for, tmp_path):
    def make():
        model = tiny("bert")
        torch.manual_seed(0)
        for layer in model.bert.encoder.layer:
            layer.intermediate = Mixing(layer.intermediate)
        return model

    told = {"sparsity": 0.5, "progress": tmp_path / "state"}
    batches, models = [inputs_for("bert", seed) for seed in range(2)], (make(), make())
    first, second = (sparsify_(model, batches, **told) for model in models)
    assert (len(first.resumed), len(second.resumed)) == (0, 2)
    for (key, ours), theirs in zip(
        models[1].named_parameters(), models[0].parameters(), strict=True
    ):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5, msg=key)


def test_what_no_batch_runs_is_named():
    model = Net()
    model.extra = nn.Linear(3, 3)
    with pytest.raises(UnsupportedModelError, match="calibration never ran extra"):
        run(model, [torch.randn(2, 1, 8, 8)])


def test_data_is_asked_for_only_where_it_is_needed():
    with pytest.raises(DataError, match="criterion 'admm' with its re-fit needs calibration"):
        run(Net(), [])
    result = run(Net(), [], criterion="magnitude", **OWN)
    assert len(result.masks) == 5


def test_inputs_that_are_not_finite_are_named():
    with pytest.raises(NumericsError, match=r"first\.weight: the inputs"):
        run(Net(), [torch.full((2, 1, 8, 8), float("nan"))])


@pytest.mark.parametrize("name", ["llama", "bert", "gpt2"])
def test_output_projections_repair_what_the_residual_lost(name, tiny, inputs_for):
    """With almost no ridge no other values on the mask bring the layer closer to the dense one."""
    model, dense = tiny(name), tiny(name)
    batches = [inputs_for(name, seed, (9, 6, 4, 7) * 4) for seed in range(4)]
    site = [s for s in find_sites(model) if s.layer == 0][-1]
    down = f"{model.base_model_prefix}.{site.gate.module}"
    earlier = {"llama": "*layers.0.self_attn*", "bert": "*layer.0.attention*", "gpt2": "*h.0.attn*"}
    matrices = find_matrices(model, targets=[earlier[name], down])
    removed = uniform(matrices, 0.6, Pattern())
    told = Options(ridge=1e-7, refit_steps=200, iterations=0)
    mask = prune_weights_(model, matrices, removed, told, batches).masks[f"{down}.weight"]

    def error():
        total = 0.0
        for batch in batches:
            kwargs = {k: v for k, v in batch.items() if k != "labels"}
            hidden = [
                base_model(m)(**kwargs, output_hidden_states=True).hidden_states[1]
                for m in (model, dense)
            ]
            gap = (hidden[0] - hidden[1])[batch["attention_mask"].bool()]
            total += float(gap.double().square().sum())
        return total

    if name == "bert":  # the layer ends with a norm: what is fitted is the sum before it
        for each in (model, dense):
            base_model(each).encoder.layer[0].output.LayerNorm = nn.Identity()
    with torch.no_grad():
        best = error()
        weight = model.get_parameter(f"{down}.weight")
        for seed in range(3):
            step = torch.randn(weight.shape, generator=torch.Generator().manual_seed(seed)) * mask
            for sign in (1, -1):
                weight += sign * 0.003 * step
                assert error() > best
                weight -= sign * 0.003 * step
