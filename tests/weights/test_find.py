"""Every kind of matrix of any module is found once, and seen as rows of inputs."""

import pytest
import torch
from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from transformers import MixtralConfig, MixtralForCausalLM

from hf_prune import sparsify_
from hf_prune.errors import ConfigError, UnsupportedModelError
from hf_prune.statistics.streams import Call
from hf_prune.weights.find import find_matrices, find_weights, set_values_
from hf_prune.weights.inputs import real_rows, traced
from hf_prune.weights.rows import paired_rows


class Everything(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(7, 4)
        self.tied = nn.Linear(4, 7, bias=False)
        self.tied.weight = self.embed.weight
        self.conv = nn.Conv2d(4, 6, (3, 2), groups=2, padding=1)
        self.rnn = nn.LSTM(4, 3, num_layers=2, bidirectional=True)
        self.again = self.conv


def test_each_is_found_once():
    found = {m.name: (m.kind, m.groups) for m in find_matrices(Everything())}
    recurrent = {n for n, _ in Everything().rnn.named_parameters() if n.startswith("weight")}
    assert found == {"conv.weight": ("convolution", 2)} | {
        f"rnn.{name}": ("recurrent", 1) for name in recurrent
    }
    opted = [m.name for m in find_matrices(Everything(), embeddings=True)]
    assert opted[0] == "embed.weight"
    assert "tied.weight" not in opted


@pytest.mark.parametrize(
    ("targets", "ignore", "expected"),
    [
        (["Conv2d"], [], ["conv.weight"]),
        (["conv"], [], ["conv.weight"]),
        (["rnn.weight_hh_l0*"], [], ["rnn.weight_hh_l0", "rnn.weight_hh_l0_reverse"]),
        ([], ["LSTM"], ["conv.weight"]),
    ],
)
def test_targets_and_ignore_by_name_class_or_pattern(targets, ignore, expected):
    found = find_matrices(Everything(), targets=targets, ignore=ignore)
    assert [m.name for m in found] == expected


def test_a_target_that_fits_nothing():
    with pytest.raises(
        ConfigError, match=r"nothing is called .convv\.weight.; did you mean .conv\.w"
    ):
        find_matrices(Everything(), targets=["convv.weight"])


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        (
            "conw*",
            r"ignore: nothing is called 'conw\*'; did you mean 'conv'\? Known: conv\.weight, ",
        ),
        ("bert.encoder.layer.0", "fits something that holds what is pruned"),
        (
            "encoder.layer.0.*",
            r"nothing is called 'encoder\.layer\.0\.\*'; did you mean 'bert\.enc",
        ),
        ("BertLayer", "fits something that holds"),
    ],
)
def test_what_is_to_be_ignored_must_be_there(pattern, message, tiny):
    model = Everything() if pattern == "conw*" else tiny("bert")
    with pytest.raises(ConfigError, match=message):
        find_weights(model, [pattern])


@pytest.mark.parametrize(
    "pattern",
    ["*LayerNorm*", "*.bias", "Dropout", "bert.embeddings*", "qa_outputs.*", "*.lm_head.weight"],
)
def test_what_is_not_prunable_may_be_ignored(pattern, tiny):
    assert set(find_weights(tiny("bert"), [pattern])) == set(find_weights(tiny("bert")))


@pytest.mark.parametrize("pattern", ["embed", "tied", "tied.*", "Linear"])
def test_any_name_of_a_shared_matrix_will_do(pattern):
    everything = find_matrices(Everything(), embeddings=True)
    left = find_matrices(Everything(), embeddings=True, ignore=[pattern])
    assert [m.name for m in left] == [m.name for m in everything if m.name != "embed.weight"]
    (taken,) = find_matrices(Everything(), embeddings=True, targets=[pattern])
    assert taken.name == "embed.weight"


def test_a_target_that_shares_an_embedding_is_explained(tiny):
    with pytest.raises(ConfigError, match=r"'lm_head' is an embedding.*\{embeddings: true\}"):
        find_matrices(tiny("gpt2"), targets=["lm_head"])
    (taken,) = find_matrices(tiny("gpt2"), targets=["lm_head"], embeddings=True)
    assert taken.name == "transformer.wte.weight"


def packed():
    config = MixtralConfig(
        vocab_size=50,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        num_local_experts=3,
    )
    torch.manual_seed(0)
    return MixtralForCausalLM._from_config(config, experts_implementation="eager").eval()


@pytest.mark.parametrize("criterion", ["admm", "magnitude"])
def test_strides_that_have_no_view(criterion):
    """What is written to a convolution in channels_last reaches its parameter and its mask."""
    results = []
    for layout in (torch.contiguous_format, torch.channels_last):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 6, 2, groups=2))
        inputs = torch.randn(8, 3, 6, 6)
        masks = sparsify_(
            model.to(memory_format=layout), [inputs], sparsity=0.5, criterion=criterion
        ).masks
        for name, mask in masks.items():
            assert torch.equal(model.get_parameter(name) != 0, mask)
            assert int(mask.sum()) * 2 == mask.numel()
        results.append(model)
    for ours, theirs in zip(results[0].parameters(), results[1].parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)


def test_a_projection_of_attention_is_found_once_and_others_of_its_class_too():
    attention = nn.MultiheadAttention(8, 2)
    plain = NonDynamicallyQuantizableLinear(4, 4)
    names = [m.name for m in find_matrices(nn.ModuleList([attention, plain]))]
    assert names == ["0.in_proj_weight", "0.out_proj.weight", "1.weight"]


def test_packed_experts():
    matrices = {
        m.name.rpartition(".")[2]: m for m in find_matrices(packed(), targets=["*experts*"])
    }
    assert set(matrices) == {"gate_up_proj", "down_proj"}
    up = matrices["gate_up_proj"]
    assert (up.groups, up.view(up.parameter).shape) == (3, (3, 48, 16))
    set_values_(up, 1, torch.zeros(48, 16))
    assert not up.parameter[1].any()
    assert up.parameter[0].any()


def rows_of(module, name, *args):
    """What a matrix of a module is multiplied with, `[G, rows, C]`."""
    (matrix,) = (m for m in find_matrices(module) if m.name == name)
    side = (module, Call(args, {}))
    return matrix, torch.stack([ours for _, ours in paired_rows(matrix, side, side, None)])


@pytest.mark.parametrize(
    "module",
    [
        nn.Conv1d(4, 6, 3, stride=2, padding=1, groups=2),
        nn.Conv2d(4, 6, (3, 2), stride=(2, 1), dilation=(1, 2), padding=(1, 0)),
        nn.Conv2d(4, 6, 3, padding="same", padding_mode="circular"),
        nn.Conv3d(2, 3, 2),
    ],
)
def test_patches_times_matrix_is_the_convolution(module):
    sizes = [6, 7, 5][: len(module.kernel_size)]
    inputs = torch.randn(2, module.in_channels, *sizes)
    matrix, rows = rows_of(module, "weight", inputs)
    weights = matrix.view(module.weight)  # [G, R, C]
    product = torch.cat([x @ w.T for x, w in zip(rows, weights, strict=True)], dim=1)
    expected = module(inputs) - module.bias.view(-1, *[1] * len(sizes))
    torch.testing.assert_close(product, expected.movedim(1, -1).flatten(0, -2))


def by_time(value, axis):
    """`[steps, C]`, the first step of all sequences first."""
    return value.movedim(axis, 0).flatten(0, 1)


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
@pytest.mark.parametrize("batch_first", [True, False])
def test_rows_of_recurrent_matrices(kind, batch_first):
    """The states before each step, of every layer and direction: those that a loop would see."""
    torch.manual_seed(0)
    module = kind(4, 3, num_layers=2, bidirectional=True, batch_first=batch_first)
    inputs = torch.randn(2, 5, 4) if batch_first else torch.randn(5, 2, 4)
    time = 1 if batch_first else 0
    output = module(inputs)[0]  # of the last layer, [.., .., 2 * 3]
    for end, part, order in (("", slice(0, 3), 1), ("_reverse", slice(3, 6), -1)):
        _, rows = rows_of(module, f"weight_hh_l1{end}", inputs)
        states = output[..., part] if order == 1 else output[..., part].flip(time)
        before = torch.cat([torch.zeros_like(states[:, :1]), states[:, :-1]], 1)
        if not batch_first:
            before = torch.cat([torch.zeros_like(states[:1]), states[:-1]], 0)
        torch.testing.assert_close(rows[0], by_time(before, time))
    assert torch.equal(rows_of(module, "weight_ih_l0", inputs)[1][0], by_time(inputs, time))
    first = kind(4, 3, bidirectional=True, batch_first=batch_first)
    first.load_state_dict({k: v for k, v in module.state_dict().items() if "_l0" in k})
    torch.testing.assert_close(
        rows_of(module, "weight_ih_l1", inputs)[1][0], by_time(first(inputs)[0], time)
    )


def test_a_given_first_state_counts():
    module = nn.GRU(4, 3)
    start = torch.randn(1, 2, 3)
    _, rows = rows_of(module, "weight_hh_l0", torch.randn(5, 2, 4), start)
    torch.testing.assert_close(rows[0, :2], start[0])


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
@pytest.mark.parametrize("batch_first", [True, False])
def test_a_given_first_state_of_one_sequence_counts(kind, batch_first):
    """One sequence without a batch, of two layers and directions, is seen as a batch of one."""
    torch.manual_seed(0)
    module = kind(4, 3, num_layers=2, bidirectional=True, batch_first=batch_first)
    inputs, start = torch.randn(5, 4), torch.randn(4, 3)
    given = (start, torch.randn(4, 3)) if kind is nn.LSTM else start
    output = module(inputs, given)[0]
    _, rows = rows_of(module, "weight_hh_l1", inputs, given)
    torch.testing.assert_close(rows[0], torch.cat([start[2:3], output[:-1, :3]]))
    _, rows = rows_of(module, "weight_hh_l1_reverse", inputs, given)
    torch.testing.assert_close(rows[0], torch.cat([start[3:4], output[1:, 3:].flip(0)]))


@pytest.mark.parametrize("kind", [nn.LSTMCell, nn.GRUCell, nn.RNNCell])
def test_rows_of_recurrent_cells(kind):
    cell, inputs, state = kind(4, 3), torch.randn(2, 4), torch.randn(2, 3)
    assert torch.equal(rows_of(cell, "weight_ih", inputs)[1][0], inputs)
    assert torch.equal(rows_of(cell, "weight_hh", inputs)[1][0], torch.zeros(2, 3))
    given = (state, state + 1) if kind is nn.LSTMCell else state
    assert torch.equal(rows_of(cell, "weight_hh", inputs, given)[1][0], state)


@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")
@pytest.mark.parametrize("given", [False, True])
def test_states_that_are_projected(given):
    """The matrix that projects is one, too, and what it is multiplied with gives the states."""
    torch.manual_seed(0)
    module = nn.LSTM(4, 6, proj_size=3, bidirectional=True)
    names = ["weight_ih_l0", "weight_hh_l0", "weight_hr_l0"]
    assert [m.name for m in find_matrices(module)] == [*names, *(f"{n}_reverse" for n in names)]
    inputs, start = torch.randn(5, 2, 4), (torch.randn(2, 2, 3), torch.randn(2, 2, 6))
    more = (start,) if given else ()
    states = module(inputs, *more)[0]
    zero = torch.zeros(1, 2, 3)
    _, rows = rows_of(module, "weight_hh_l0", inputs, *more)
    before = torch.cat([start[0][:1] if given else zero, states[:-1, :, :3]])
    torch.testing.assert_close(rows[0], before.flatten(0, 1))
    for end, part in (("", states[..., :3]), ("_reverse", states[..., 3:].flip(0))):
        matrix, rows = rows_of(module, f"weight_hr_l0{end}", inputs, *more)
        torch.testing.assert_close(rows[0] @ matrix.parameter.T, part.flatten(0, 1))


@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")
@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
@pytest.mark.parametrize("given", [False, True])
def test_packed_sequences_are_those_that_they_hold(kind, given):
    """Each alone, one after the other, would give the same rows, in whatever order."""
    torch.manual_seed(0)
    more = {"proj_size": 2} if kind is nn.LSTM else {}
    module = kind(4, 3, num_layers=2, bidirectional=True, **more)
    sequences = [torch.randn(length, 4) for length in (2, 5, 3)]
    width = 2 if more else 3
    states = (torch.randn(4, 3, width), torch.randn(4, 3, 3))
    start = states if kind is nn.LSTM else states[0]
    packed = nn.utils.rnn.pack_sequence(sequences, enforce_sorted=False)
    for matrix in find_matrices(module):
        _, rows = rows_of(module, matrix.name, packed, *([start] if given else []))
        alone = []
        for index, sequence in enumerate(sequences):
            own = tuple(state[:, index] for state in states)
            first = [own if kind is nn.LSTM else own[0]] if given else []
            alone.append(rows_of(module, matrix.name, sequence, *first)[1][0])
        expected = torch.cat(alone)
        assert rows[0].shape == expected.shape
        torch.testing.assert_close(rows[0].T @ rows[0], expected.T @ expected)
        torch.testing.assert_close(rows[0].sum(0), expected.sum(0))


class Relu(nn.RNN):
    """Made in its own way."""

    def __init__(self, width):
        super().__init__(4, width, nonlinearity="relu")


def test_a_subclass_computes_as_its_base():
    torch.manual_seed(0)
    ours, inputs = Relu(3), torch.randn(5, 2, 4)
    states = ours(inputs)[0]
    before = torch.cat([torch.zeros_like(states[:1]), states[:-1]])
    torch.testing.assert_close(rows_of(ours, "weight_hh_l0", inputs)[1][0], before.flatten(0, 1))


def test_named_arguments_and_lists_of_states():
    """Inputs come first in `forward`, wherever a call names them."""
    torch.manual_seed(0)
    inputs, states = torch.randn(5, 2, 3), [torch.randn(1, 2, 3), torch.randn(1, 2, 3)]
    for module, start in ((nn.GRU(3, 3), states[0]), (nn.LSTM(3, 3), states)):
        call = Call((), {"hx": start, "input": inputs})
        for matrix in find_matrices(module):
            found = paired_rows(matrix, (module, call), (module, call), None)[0][0]
            given = tuple(start) if isinstance(start, list) else start
            expected = rows_of(module, matrix.name, inputs, given)[1][0]
            assert torch.equal(found, expected), matrix.name


def test_what_is_no_tensor_is_refused_by_name():
    with pytest.raises(UnsupportedModelError, match="Linear was called with a list; only tensors"):
        rows_of(nn.Linear(4, 3), "weight", [torch.randn(5, 4)])


def test_rows_of_experts_are_the_tokens_routed_to_them():
    model = packed()
    name = "model.layers.0.mlp.experts"
    ids = torch.randint(0, 50, (2, 6))
    mask = torch.ones(2, 6, dtype=torch.bool)
    mask[1, 4:] = False
    with torch.no_grad(), traced(model, [name]) as trace:
        model(ids)
    module, call = model.get_submodule(name), trace.calls[name][0]
    up, down = find_matrices(model, targets=["*experts*"])
    hidden, index = call.args[0].view(-1, 16), call.args[1]
    real = mask.flatten()
    for matrix in (up, down):
        pairs = paired_rows(matrix, (module, call), (module, call), mask)
        for expert in range(3):
            tokens = [t for t in range(12) if real[t] and expert in index[t].tolist()]
            inputs = hidden[tokens]
            if matrix is down:
                gate, value = (inputs @ module.gate_up_proj[expert].T).chunk(2, dim=-1)
                inputs = module.act_fn(gate) * value
            torch.testing.assert_close(pairs[expert][1], inputs)


def test_padding_is_left_out():
    value, mask = torch.randn(2, 3, 4), torch.tensor([[True, True, False], [True, False, False]])
    assert real_rows(value, mask).shape == (3, 4)
    assert real_rows(value[:, 0], mask).shape == (2, 4)
    assert real_rows(value, None).shape == (6, 4)
