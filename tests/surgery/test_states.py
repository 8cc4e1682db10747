"""States of recurrent layers go when zeros have left them without effect, and outputs stay."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from hf_prune import keep_channels_, remove_dead_channels_
from hf_prune.errors import ConfigError, UnsupportedModelError

KINDS = {
    "lstm": nn.LSTM,
    "gru": nn.GRU,
    "tanh": nn.RNN,
    "relu": lambda *sizes, **how: nn.RNN(*sizes, nonlinearity="relu", **how),
}
BLOCKS = {"lstm": 4, "gru": 3, "tanh": 1, "relu": 1}
NEW = {"lstm": 2, "gru": 2, "tanh": 0, "relu": 0}


def last_step(s, x):
    out, _ = s.rnn(x)
    return s.head(s.act(out[:, -1]))


def all_steps(s, x):
    return s.head(s.rnn(x)[0])


def mean(s, x):
    out, _ = s.rnn(x)
    return s.head(out.mean(dim=1))


def last_state(s, x):
    _, h = s.rnn(x)
    h = h[0] if isinstance(s.rnn, nn.LSTM) else h
    return s.head(s.act(h[-1]))


def both(s, x):
    out, h = s.rnn(x)
    h = h[0] if isinstance(s.rnn, nn.LSTM) else h
    return s.other(out[:, 0:1, :]).sum(1) + s.head(h[-1])


WAYS = {f.__name__: f for f in (last_step, all_steps, mean, last_state, both)}


class Net(nn.Module):
    """A linear layer, a recurrent one, and one or two readers."""

    def __init__(self, kind="lstm", way=last_step, act=nn.Sigmoid, **how):
        super().__init__()
        self.before = nn.Linear(4, 5)
        self.rnn = KINDS[kind](5, 6, batch_first=True, **how)
        width = 6 * (2 if how.get("bidirectional") else 1)
        self.act = act()
        self.head = nn.Linear(6 if way in (last_state, both) else width, 3)
        self.other = nn.Linear(width, 3)
        self.way = way

    def forward(self, x):
        return self.way(self, self.before(x).tanh())


def fresh(seed, make=Net, **how):
    torch.manual_seed(seed)
    return make(**how).double().eval()


def outputs(net, batch):
    with torch.no_grad():
        return net(batch)


def silence(rnn, kind, end, state):
    """Zero what makes a state anything else than zero."""
    row = NEW[kind] * rnn.hidden_size + state
    for key, parameter in rnn.named_parameters():
        if key.endswith(end):
            parameter.data[row] = 0


def leave_unread(net, layer, way, state):
    """Zero what reads a state, but what the state itself does."""
    rnn = net.rnn
    end = f"_l{layer}" + ("_reverse" if way else "")
    weight = getattr(rnn, f"weight_hh{end}").data.view(-1, rnn.hidden_size, rnn.hidden_size)
    own = weight[:, state, state].clone()
    weight[:, :, state] = 0
    weight[:, state, state] = own
    column = way * rnn.hidden_size + state
    for reader in (net.head, net.other):
        if layer == rnn.num_layers - 1:
            reader.weight.data[:, column % reader.in_features] = 0
    for name, parameter in rnn.named_parameters():
        if name.startswith(f"weight_ih_l{layer + 1}"):
            parameter.data[:, column] = 0


SEQUENCES = torch.randn(*(3, 7, 4), dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_outputs_stay_whatever_is_zero(data):
    kind = data.draw(st.sampled_from(sorted(KINDS)))
    way = WAYS[data.draw(st.sampled_from(sorted(WAYS)))]
    net = fresh(
        data.draw(st.integers(0, 99)),
        kind=kind,
        way=way,
        bias=data.draw(st.booleans()),
        num_layers=data.draw(st.integers(1, 2)),
        bidirectional=data.draw(st.booleans()),
    )
    dense, rnn = copy.deepcopy(net), net.rnn
    expected = 5
    for layer in range(rnn.num_layers):
        for direction in range(2 if rnn.bidirectional else 1):
            gone = data.draw(st.sets(st.integers(0, 5), min_size=1, max_size=3))
            for state in gone:
                if data.draw(st.booleans()):
                    silence(rnn, kind, f"_l{layer}" + ("_reverse" if direction else ""), state)
                else:
                    leave_unread(net, layer, direction, state)
            expected = min(expected, len(gone))
    net.before.weight.data[1] = 0
    net.before.bias.data[1] = 0
    before = outputs(net, SEQUENCES)
    masks = {name: p != 0 for name, p in net.named_parameters() if "weight" in name}
    left = remove_dead_channels_(net, SEQUENCES, masks)
    torch.testing.assert_close(outputs(net, SEQUENCES), before)
    assert rnn.hidden_size <= 6 - expected
    assert rnn.input_size == net.before.out_features == 4
    kept = {name: mask for name, mask in left.masks.items()}
    assert all(torch.equal(p != 0, kept[n]) for n, p in net.named_parameters() if n in kept)
    keep_channels_(dense, SEQUENCES, left.kept)
    dense.load_state_dict(net.state_dict())
    assert torch.equal(outputs(dense, SEQUENCES), outputs(net, SEQUENCES))
    assert not remove_dead_channels_(net, SEQUENCES).kept  # nothing dead is left
    net.train()(SEQUENCES).sum().backward()
    used = [*net.rnn.parameters(), *net.head.parameters(), *net.before.parameters()]
    assert all(p.grad is not None for p in used)


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_which_states_go(kind):
    net = fresh(0, kind=kind)
    silence(net.rnn, kind, "_l0", 1)
    leave_unread(net, 0, 0, 4)
    bias, before = net.head.bias.detach().clone(), outputs(net, SEQUENCES)
    left = remove_dead_channels_(net, SEQUENCES)
    assert left.kept == {"rnn.weight_hh_l0": (0, 2, 3, 5)}
    assert (net.rnn.hidden_size, net.head.in_features) == (4, 4)
    assert net.rnn.weight_hh_l0.shape == (4 * BLOCKS[kind], 4)
    assert not torch.equal(net.head.bias, bias)  # half of what silent states had there
    torch.testing.assert_close(outputs(net, SEQUENCES), before)
    wider = torch.randn(2, 31, 4, dtype=torch.float64)
    assert outputs(net, wider).shape == (2, 3)


READ = [
    ("rnn.weight_hh_l0_reverse", 7, 4),  # beside: by the input gate of state 1
    ("rnn.weight_ih_l1", 3, 10),  # above, by either direction
    ("rnn.weight_ih_l1_reverse", 20, 10),
]


@pytest.mark.parametrize(("name", "row", "column"), READ)
def test_one_weight_that_reads_a_state_keeps_it(name, row, column):
    net = fresh(0, num_layers=2, bidirectional=True)
    for layer in range(2):
        for direction in range(2):
            leave_unread(net, layer, direction, 4)
    read = copy.deepcopy(net)
    read.get_parameter(name).data[row, column] = 0.1
    assert not remove_dead_channels_(read, SEQUENCES).kept
    assert len(remove_dead_channels_(net, SEQUENCES).kept) == 4
    read = fresh(0)
    leave_unread(read, 0, 0, 4)
    read.head.weight.data[2, 4] = 0.1
    assert not remove_dead_channels_(read, SEQUENCES).kept


def test_what_only_dead_states_read_goes_next():
    """A state that is read by a silent one alone, and the channels before that only they read."""
    net = fresh(0)
    silence(net.rnn, "lstm", "_l0", 1)
    leave_unread(net, 0, 0, 4)
    weight = net.rnn.weight_hh_l0.data.view(4, 6, 6)
    weight[:, 1, 4] = 1.0
    weight[2, 1, 4] = 0.0
    silent = net.rnn.weight_ih_l0.data.view(4, 6, 5)
    silent[:, [0, 2, 3, 5], 2] = 0
    before = outputs(net, SEQUENCES)
    left = remove_dead_channels_(net, SEQUENCES)
    assert left.kept == {"rnn.weight_hh_l0": (0, 2, 3, 5), "before": (0, 1, 3, 4)}
    torch.testing.assert_close(outputs(net, SEQUENCES), before)


def test_one_state_stays_and_layers_lose_equally_many():
    net = fresh(0, num_layers=2)
    for state in range(6):
        silence(net.rnn, "lstm", "_l0", state)
    silence(net.rnn, "lstm", "_l1", 2)
    before = outputs(net, SEQUENCES)
    left = remove_dead_channels_(net, SEQUENCES)
    assert left.kept["rnn.weight_hh_l1"] == (0, 1, 3, 4, 5)
    assert len(left.kept["rnn.weight_hh_l0"]) == 5
    torch.testing.assert_close(outputs(net, SEQUENCES), before)
    alone = fresh(0)
    for state in range(6):
        silence(alone.rnn, "lstm", "_l0", state)
    remove_dead_channels_(alone, SEQUENCES)
    assert alone.rnn.hidden_size == 1


def test_one_recurrent_layer_reads_another():
    def forward(s, x):
        return s.head(s.second(s.rnn(x)[0])[1][0])

    net = fresh(0, kind="gru", way=forward, bidirectional=True)
    net.second, net.head = nn.GRU(12, 5, batch_first=True), nn.Linear(5, 3)
    net.double()
    net.rnn.weight_hh_l0.data[:, 2] = 0
    net.rnn.weight_hh_l0_reverse.data[:, 3] = 0
    net.second.weight_ih_l0.data[:, [2, 9]] = 0
    net.second.weight_hh_l0.data[:, 0] = 0
    net.head.weight.data[:, 0] = 0
    before = outputs(net, SEQUENCES)
    left = remove_dead_channels_(net, SEQUENCES)
    assert left.kept == {
        "second.weight_hh_l0": (1, 2, 3, 4),
        "rnn.weight_hh_l0": (0, 1, 3, 4, 5),
        "rnn.weight_hh_l0_reverse": (0, 1, 2, 4, 5),
    }
    torch.testing.assert_close(outputs(net, SEQUENCES), before)


def first_state(s, x):
    return s.head(s.rnn(x, (x.new_ones(1, x.size(0), 6), x.new_ones(1, x.size(0), 6)))[0])


def cells(s, x):
    return s.head(s.rnn(x)[1][1][-1])


def all_states(s, x):
    return s.head(s.rnn(x)[1][0].transpose(0, 1).sum(1))


def returned(s, x):
    out, states = s.rnn(x)
    return s.head(out[:, -1]) + states[0].sum()


def twice(s, x):
    return s.head(s.rnn(s.rnn(x)[0][..., :5])[0])


def some_states(s, x):
    return s.head(s.rnn(x)[0][:, :, [0, 1, 2, 3, 4, 5]])


def over_states(s, x):
    out, _ = s.rnn(x)
    return s.head(out) + out.mean(-1, keepdim=True)


def in_place(s, x):
    out, _ = s.rnn(x)
    first, last = out[:, 0], out[:, -1]
    last.relu_()
    return s.head(first) + s.other(last)


def by_truth(s, x):
    return s.head(s.rnn(x)[1][0][True].squeeze(0))


UNCERTAIN = [
    by_truth,
    first_state,
    cells,
    all_states,
    returned,
    twice,
    some_states,
    over_states,
    in_place,
]


@pytest.mark.parametrize("way", UNCERTAIN)
def test_what_is_not_certain_stays(way):
    net = fresh(0, way=way)
    silence(net.rnn, "lstm", "_l0", 1)
    leave_unread(net, 0, 0, 4)
    before = outputs(net, SEQUENCES)
    remove_dead_channels_(net, SEQUENCES)
    assert net.rnn.hidden_size == 6
    assert torch.equal(outputs(net, SEQUENCES), before)


def test_a_size_that_is_read_as_a_number_is_noticed():
    """Here it makes a difference for longer sequences alone."""

    def forward(s, x):
        return s.head(s.rnn(x)[0][:, : s.rnn.hidden_size]).sum(1)

    net = fresh(0, way=forward)
    silence(net.rnn, "lstm", "_l0", 1)
    with pytest.raises(UnsupportedModelError, match="gives something else"):
        remove_dead_channels_(net, SEQUENCES[:, :4])
    assert net.rnn.hidden_size == 6


def test_weights_are_laid_out_when_sizes_are_true(monkeypatch):
    seen, plain = [], nn.RNNBase.flatten_parameters

    def flatten(self):
        seen.append(len(self.weight_hh_l0) == 4 * self.hidden_size == len(self.weight_ih_l0))
        plain(self)

    net = fresh(0)
    silence(net.rnn, "lstm", "_l0", 1)
    monkeypatch.setattr(nn.RNNBase, "flatten_parameters", flatten)
    assert remove_dead_channels_(net, SEQUENCES).kept
    assert seen
    assert all(seen)


@pytest.mark.parametrize("value", [None, torch.zeros(3), torch.zeros(24)])
def test_layers_with_parameters_of_their_own_stay(value):
    net = fresh(0)
    silence(net.rnn, "lstm", "_l0", 1)
    net.rnn.register_parameter("extra_l0", None if value is None else nn.Parameter(value))
    assert not remove_dead_channels_(net, SEQUENCES).kept


def test_projected_states_stay():
    net = fresh(0, proj_size=2)
    net.head = nn.Linear(2, 3).double()
    net.rnn.weight_hr_l0.data[:, 1] = 0
    assert not remove_dead_channels_(net, SEQUENCES).kept


def test_a_bias_that_stays_zero_takes_nothing():
    net = fresh(0)
    silence(net.rnn, "lstm", "_l0", 1)
    masks = {"head.bias": torch.arange(3) > 0}
    assert not remove_dead_channels_(net, SEQUENCES, masks).kept


def test_errors():
    net = fresh(0, num_layers=2)
    with pytest.raises(ConfigError, match="rising indices of its 6 channels"):
        keep_channels_(net, SEQUENCES, {"rnn.weight_hh_l0": (3, 1), "rnn.weight_hh_l1": (0, 1)})
    for kept in (
        {"rnn.weight_hh_l0": (0, 1)},
        {"rnn.weight_hh_l0": (0, 1), "rnn.weight_hh_l1": (0,)},
    ):
        with pytest.raises(ConfigError, match="equally many states have to stay of each of rnn"):
            keep_channels_(net, SEQUENCES, kept)
    with pytest.raises(ConfigError, match="channels of 'rnn' is not certain"):
        keep_channels_(net, SEQUENCES, {"rnn": (0, 1)})
    assert net.rnn.hidden_size == 6
