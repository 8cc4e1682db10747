"""Channels of plain modules go when zeros have left them without effect, and outputs stay."""

import copy
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrize, prune

from hf_prune import keep_channels_, remove_dead_channels_
from hf_prune.errors import ConfigError, DataError, UnsupportedModelError


class Net(nn.Module):
    """Two convolutions with a norm, and three linear layers, joined by functions and modules."""

    def __init__(self, padding=1, pool=None):
        super().__init__()
        self.first = nn.Conv2d(2, 6, 3, padding=padding)
        self.norm = nn.BatchNorm2d(6)
        self.pool = pool or nn.AvgPool2d(2)
        self.second = nn.Conv2d(6, 5, 3)
        self.act = nn.LeakyReLU(inplace=True)
        self.wide = nn.Linear(5 * 4, 7)
        self.drop = nn.Dropout(0.5)
        self.last = nn.Linear(7, 3)

    def forward(self, x):
        x = self.pool(F.silu(self.norm(self.first(x))))
        x = F.adaptive_avg_pool2d(self.act(self.second(x)), 2)
        x = F.dropout(x, 0.1, self.training)
        return self.last(self.drop(torch.tanh(self.wide(x.view(x.size(0), -1)))))


def fresh(seed, make=Net, **how):
    """A network in float64, whose norm has seen something."""
    torch.manual_seed(seed)
    net = make(**how).double()
    for part in net.modules():
        if isinstance(part, nn.BatchNorm2d):
            nn.init.normal_(part.bias)
            part.running_mean.normal_()
            part.running_var.uniform_(0.5, 2)
    return net.eval()


def outputs(net, batch):
    with torch.no_grad():
        return net(batch)


IMAGES = torch.randn(3, 2, 10, 10, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@settings(max_examples=30, deadline=None)
@given(st.data())
def test_outputs_stay_whatever_is_zero(data):
    pools = [nn.MaxPool2d(2, padding=1), nn.AvgPool2d(3, padding=1, stride=2), nn.AvgPool2d(2)]
    net = fresh(
        data.draw(st.integers(0, 99)),
        padding=data.draw(st.integers(0, 1)),
        pool=data.draw(st.sampled_from(pools)),
    )
    for layer in (net.first, net.second, net.wide, net.last):
        for axis in (0, 1):
            indices = st.integers(0, layer.weight.shape[axis] - 1)
            zeros = data.draw(st.lists(indices, max_size=layer.weight.shape[axis] - 1))
            layer.weight.data.index_fill_(axis, torch.tensor(zeros, dtype=torch.long), 0)
        if data.draw(st.booleans()):
            layer.bias.data.zero_()
    before, dense = outputs(net, IMAGES), copy.deepcopy(net)
    masks = {f"{name}.weight": p.weight != 0 for name, p in net.named_children() if p is net.wide}
    left = remove_dead_channels_(net, IMAGES, masks)
    torch.testing.assert_close(outputs(net, IMAGES), before)
    assert torch.equal(left.masks["wide.weight"], net.wide.weight != 0)
    state = net.state_dict()
    keep_channels_(dense, IMAGES, left.kept)
    dense.load_state_dict(state)
    assert torch.equal(outputs(dense, IMAGES), outputs(net, IMAGES))
    assert not remove_dead_channels_(net, IMAGES).kept  # nothing dead is left


def test_which_channels_go_and_what_they_leave():
    net = fresh(0, padding=0)
    net.second.weight.data[:, 2] = 0  # nobody reads channel 2 of the first layer
    net.first.weight.data[4] = 0  # it gives a constant, which the second one can take
    net.wide.weight.data.view(7, 5, 4)[:, 1] = 0
    net.wide.weight.data[3] = 0
    bias, before = net.second.bias.detach().clone(), outputs(net, IMAGES)
    left = remove_dead_channels_(net, IMAGES)
    assert left.kept == {"first": (0, 1, 3, 5), "second": (0, 2, 3, 4), "wide": (0, 1, 2, 4, 5, 6)}
    assert net.norm.num_features == len(net.norm.running_mean) == 4
    assert (net.second.in_channels, net.second.out_channels) == (4, 4)
    assert (net.wide.in_features, net.wide.out_features, net.last.in_features) == (16, 6, 6)
    assert not torch.equal(net.second.bias, bias[[0, 2, 3, 4]])
    torch.testing.assert_close(outputs(net, IMAGES), before)
    net.train()(IMAGES).sum().backward()
    assert all(p.grad is not None for p in net.parameters())


def test_what_is_unread_frees_what_it_read():
    net = fresh(0, lambda: nn.Sequential(*[nn.Linear(4, 4) for _ in range(3)]))
    with torch.no_grad():
        net[1].weight.copy_(torch.eye(4))
        net[2].weight[:, 3] = 0
    batch = torch.randn(5, 4, dtype=torch.float64)
    assert remove_dead_channels_(net, batch).kept == {"0": (0, 1, 2), "1": (0, 1, 2)}


def test_a_constant_stays_where_its_reader_has_a_border_or_no_bias():
    border = fresh(0, lambda: nn.Sequential(nn.Conv2d(2, 4, 3), nn.Conv2d(4, 2, 3, padding=1)))
    without = fresh(0, lambda: nn.Sequential(nn.Linear(10, 4), nn.Linear(4, 2, bias=False)))
    for net in (border, without):
        net[0].weight.data[1] = 0
        assert not remove_dead_channels_(net, IMAGES).kept
        net[0].bias.data[1] = 0
        assert remove_dead_channels_(net, IMAGES).kept == {"0": (0, 2, 3)}


def test_one_channel_stays():
    net = fresh(0)
    net.second.weight.data.zero_()
    before = outputs(net, IMAGES)
    left = remove_dead_channels_(net, IMAGES)
    assert left.kept["first"] == left.kept["second"] == (0,)
    torch.testing.assert_close(outputs(net, IMAGES), before)


def test_a_row_that_only_a_dead_channel_fed_is_dead_too():
    net = fresh(0, lambda: nn.Sequential(*[nn.Linear(4, 4) for _ in range(3)]))
    net[0].weight.data[1] = 0
    net[1].weight.data[2, [0, 2, 3]] = 0
    batch = torch.randn(5, 4, dtype=torch.float64)
    before = outputs(net, batch)
    assert remove_dead_channels_(net, batch).kept == {"0": (0, 2, 3), "1": (0, 1, 3)}
    torch.testing.assert_close(outputs(net, batch), before)


class Forward(nn.Module):
    """A few layers of width 6, and a forward that is given."""

    def __init__(self, forward, **parts):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(10, 6), nn.Linear(6, 3), nn.Linear(6, 3)
        self.conv, self.next = nn.Conv1d(2, 6, 3), nn.Conv1d(6, 3, 3)
        self.told = forward
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, x, task=None):
        return self.told(self, x, task)


def in_place(s, x, task):
    y = s.a(x)
    z = F.relu(y, inplace=True)
    return s.b(z) + s.c(y)


def in_place_through_a_view(s, x, task):
    y = s.a(x)
    v = y.flatten(1)
    return s.b(F.relu(y, inplace=True)).flatten(1) + s.b(v.view(3, 20, 6)).flatten(1)


def branch(s, x, task):
    hidden = s.a(x)
    return hidden if task is None else s.b(hidden.relu())


def by_type(s, x, task):
    hidden = s.a(x)
    return s.b((hidden.softmax(-1) if isinstance(hidden, torch.Tensor) else hidden).relu())


WAYS = {
    "sum": lambda s, x, t: s.b(s.a(x) + s.a(x).relu()),
    "shared": lambda s, x, t: s.b(s.a(x)) + s.b(s.a(x).relu()),
    "read by hand": lambda s, x, t: s.b(s.a(x)) + F.linear(x, s.a.weight).sum(),
    "in place": in_place,
    "in place through a view": in_place_through_a_view,
    "branch": branch,
    "by type": by_type,
    "count of channels": lambda s, x, t: s.b(s.a(x.mean((0, 1, 2))).relu()) * x.shape[0],
    "first axis is channels": lambda s, x, t: (
        s.b((y := s.a(x.mean((0, 1, 2)))).relu()) * y.shape[0]
    ),
    "attribute": lambda s, x, t: s.b(s.a(x)) / s.b.in_features,
    "all parameters": lambda s, x, t: s.b(s.a(x)) + sum(p.pow(2).sum() for p in s.parameters()),
    "dropout": lambda s, x, t: s.b(F.dropout(s.a(x), 1.0)),
    "pool of another kind": lambda s, x, t: s.next(F.max_pool2d(s.conv(x[:, :, 0]), 3, 1, 1)),
    "fixed size": lambda s, x, t: s.b(s.a(x).view(-1, 6)),
    "flatten from elsewhere": lambda s, x, t: s.b(s.a(x).flatten(0, 1)),
    "only in training": lambda s, x, t: (s.b(s.a(x)), s.c(s.a(x)) if s.training else None),
}


@pytest.mark.parametrize("way", sorted(WAYS))
@pytest.mark.parametrize("seed", range(3))
def test_what_is_not_certain_stays_or_is_refused(way, seed):
    """Outputs are the same afterwards, in training mode there are some, or nothing was changed."""
    net = fresh(seed, Forward, forward=WAYS[way])
    for layer in (net.a, net.conv):
        layer.weight.data[1:4] = 0
    net.b.weight.data[:, 4] = 0
    state, before = copy.deepcopy(net.state_dict()), outputs(net, IMAGES)
    try:
        remove_dead_channels_(net, IMAGES)
    except UnsupportedModelError:
        assert all(torch.equal(state[key], value) for key, value in net.state_dict().items())
    found = outputs(net, IMAGES)
    if way != "dropout":
        torch.testing.assert_close(found, before)
    net.train()(IMAGES)


def test_how_positions_lie_is_not_told_by_one_batch():
    """With one position of each sequence, channels seem to lie side by side."""

    def forward(s, x, task):
        rows = s.conv(x)
        return s.b(rows.relu().reshape(x.size(0) * rows.size(2), -1))

    net = fresh(0, Forward, forward=forward)
    net.conv.weight.data[2] = 0
    longer = IMAGES[:, :, 0]  # [B, 2, 10]
    before = outputs(net, longer)
    assert not remove_dead_channels_(net, longer[..., :3]).kept
    assert torch.equal(outputs(net, longer), before)


def hooked(net):
    net[0].register_forward_hook(lambda module, args, output: output + 1)


def hooked_before(net):
    net[2].register_forward_pre_hook(lambda module, args: (args[0].softmax(-1),))


def hooked_between(net):
    net[1].register_forward_hook(lambda module, args, output: output.softmax(-1))


def patched(net):
    plain = net[0].forward
    net[0].forward = lambda x: plain(x).softmax(-1)


def patched_as_a_whole(net):
    plain = type(net).forward
    net.forward = lambda x: plain(net, x) + net[0](x).sum()


def padded_later(net):
    net[0], net[2] = nn.Conv2d(2, 6, 3), nn.Conv2d(6, 4, 3)
    net.double()
    net[2].padding = (1, 1)


def divided(net):
    net[0], net[1] = nn.Conv2d(2, 6, 3), nn.AvgPool2d(2, divisor_override=1)
    net[2] = nn.Conv2d(6, 4, 3)
    net.double()


def bias_is_pruned(net):
    prune.l1_unstructured(net[2], "bias", 1)


def bias_is_made(net):
    parametrize.register_parametrization(net[2], "bias", nn.Tanh())


def first_bias_is_made(net):
    parametrize.register_parametrization(net[0], "bias", nn.Tanh())


def norm_is_made(net):
    net[0], net[1], net[2] = nn.Conv2d(2, 6, 3), nn.BatchNorm2d(6), nn.Conv2d(6, 4, 3)
    net.double()
    parametrize.register_parametrization(net[1], "weight", nn.Tanh())


def with_a_buffer(net):
    net[0].register_buffer("seen", torch.zeros(2))


class Own(nn.Linear):
    """A linear layer that does something else."""

    def forward(self, x):
        return super().forward(x).softmax(-1)


def subclassed(net):
    net[0] = Own(10, 6).double()


CHANGES = [
    *(hooked, hooked_before, hooked_between, patched, patched_as_a_whole, padded_later, divided),
    *(bias_is_pruned, bias_is_made, first_bias_is_made, norm_is_made, with_a_buffer, subclassed),
]


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("seed", range(3))
def test_modules_that_do_more_than_their_class(change, seed):
    def make():
        return nn.Sequential(nn.Linear(10, 6), nn.ReLU(), nn.Linear(6, 4))

    net = fresh(seed, make)
    change(net.eval())
    with torch.no_grad():
        net[0].weight[1:4] = 0
    before = outputs(net, IMAGES)
    try:
        remove_dead_channels_(net, IMAGES)
    except UnsupportedModelError:
        assert change is patched_as_a_whole
    torch.testing.assert_close(outputs(net, IMAGES), before)


def test_nothing_else_is_written_to():
    """Not the batch, not a state that was taken before, not what shares storage with a bias."""
    net = fresh(0, lambda: nn.Sequential(nn.ReLU(True), nn.Linear(10, 6), nn.Linear(6, 4)))
    net[1].weight.data[2] = 0
    other, state = nn.Parameter(net[2].bias.data), net.state_dict()
    kept, batch, given = copy.deepcopy(state), IMAGES.clone(), dict(vars(net))
    assert remove_dead_channels_(net, batch).kept == {"1": (0, 1, 3, 4, 5)}
    assert torch.equal(batch, IMAGES)
    assert torch.equal(other, kept["2.bias"])
    assert all(torch.equal(kept[key], value) for key, value in state.items())
    assert vars(net).keys() == given.keys()
    frozen = fresh(
        0, lambda: nn.Sequential(nn.Linear(10, 6), nn.Linear(6, 4)).requires_grad_(False)
    )
    frozen[0].weight.data[2] = 0
    assert remove_dead_channels_(frozen, batch).kept
    assert not any(p.requires_grad for p in frozen.parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_half_precision_hides_no_difference(dtype):
    """Rounding of half precision is as large as what a forward that reads a width makes of it."""

    def forward(s, x, task):
        return s.b(s.a(x).relu()) * s.a.out_features**-0.5

    net = fresh(0, Forward, forward=forward).to(dtype)
    net.a.weight.data[1:4] = 0
    before = outputs(net, IMAGES.to(dtype))
    with pytest.raises(UnsupportedModelError, match="gives something else"):
        remove_dead_channels_(net, IMAGES.to(dtype))
    assert torch.equal(outputs(net, IMAGES.to(dtype)), before)
    plain = fresh(0, Forward, forward=lambda s, x, t: s.b(s.a(x).relu())).to(dtype)
    plain.a.weight.data[2] = 0
    assert remove_dead_channels_(plain, IMAGES.to(dtype)).kept == {"a": (0, 1, 3, 4, 5)}


def test_what_a_forward_counts_is_not_counted():
    class Counting(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(10, 6), nn.Linear(6, 3)
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x):
            self.calls.add_(1)
            return self.b(self.a(x))

    net = fresh(0, Counting)
    net.a.weight.data[2] = 0
    assert remove_dead_channels_(net, IMAGES).kept
    keep_channels_(net, IMAGES, {"a": (0, 1)})
    assert net.calls == 0


def test_scripted_layers_beside_others():
    net = fresh(0, lambda: nn.Sequential(nn.Linear(10, 6), nn.ReLU(), nn.Linear(6, 4)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        net.append(torch.jit.script(nn.Linear(4, 2).double()))
    net[0].weight.data[2] = 0
    before = outputs(net, IMAGES)
    assert remove_dead_channels_(net, IMAGES).kept == {"0": (0, 1, 3, 4, 5)}
    torch.testing.assert_close(outputs(net, IMAGES), before)


def test_layers_without_shapes_are_refused():
    net = nn.Sequential(nn.Linear(10, 6), nn.ReLU(), nn.LazyLinear(3)).double()
    with pytest.raises(UnsupportedModelError, match="lazy layers: run it once"):
        keep_channels_(net, IMAGES, {"0": (0, 1)})
    assert net[0].out_features == 6


def test_a_bias_that_is_a_buffer_stays():
    net = fresh(0, lambda: nn.Sequential(nn.Linear(10, 6), nn.Linear(6, 4)))
    net[0].weight.data[2] = 0
    bias = net[1].bias.detach()
    del net[1].bias
    net[1].register_buffer("bias", bias)
    assert not remove_dead_channels_(net, IMAGES).kept
    del net[1]._buffers["bias"]
    net[1].bias = bias  # nothing but an attribute
    assert not remove_dead_channels_(net, IMAGES).kept


def test_layers_without_outputs():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        net = fresh(0, Forward, forward=lambda s, x, t: s.b(s.a(x)), none=nn.Linear(10, 0))
        empty = nn.Sequential(nn.Linear(10, 6), nn.Linear(6, 0)).double()
    net.told = lambda s, x, t: s.b(s.a(x)) + s.none(x).sum()
    net.a.weight.data[2] = 0
    assert remove_dead_channels_(net, IMAGES).kept == {"a": (0, 1, 3, 4, 5)}
    assert remove_dead_channels_(empty, IMAGES).kept == {"0": (0,)}


def test_a_bias_that_stays_zero_takes_nothing():
    net = fresh(0, lambda: nn.Sequential(nn.Linear(10, 6), nn.Linear(6, 4)))
    net[0].weight.data[2] = 0
    net[1].bias.data[0] = 0
    masks = {"1.bias": net[1].bias != 0}
    assert not remove_dead_channels_(net, IMAGES, masks).kept
    assert remove_dead_channels_(net, IMAGES, {"1.bias": torch.ones(4, dtype=torch.bool)}).kept


def test_arguments_that_are_left_out_have_their_defaults():
    net = fresh(0, Forward, forward=lambda s, x, t: s.b(s.a(x)) if t is None else s.a(x))
    net.a.weight.data[2] = 0
    assert remove_dead_channels_(net, IMAGES).kept == {"a": (0, 1, 3, 4, 5)}
    with pytest.raises(UnsupportedModelError, match="gives something else"):
        remove_dead_channels_(fresh_dead(), (IMAGES, torch.ones(1)))


def fresh_dead():
    net = fresh(0, Forward, forward=lambda s, x, t: s.b(s.a(x)) / s.b.in_features)
    net.a.weight.data[2] = 0
    return net


def test_errors(tiny):
    with pytest.raises(UnsupportedModelError, match="`compress` removes its dead units"):
        remove_dead_channels_(tiny("bert"), IMAGES)
    net = fresh(0)
    with pytest.raises(DataError, match="not a list"):
        remove_dead_channels_(net, [IMAGES])
    with pytest.raises(DataError, match=r"Net does not run on this batch: .*to have 2 channels"):
        remove_dead_channels_(net, IMAGES[:, :1])
    with pytest.raises(DataError, match=r"Net does not run on this batch: .*positional argument"):
        remove_dead_channels_(net, (IMAGES, IMAGES))
    with pytest.raises(
        DataError, match=r"the mask 'first.weight' of shape \[2\] fits no parameter"
    ):
        remove_dead_channels_(net, IMAGES, {"first.weight": torch.ones(2)})
    several = fresh(0, Forward, forward=lambda s, x, t: s.b(x) if (x > 0).all() else s.a(x))
    with pytest.raises(
        UnsupportedModelError, match=r"torch\.fx cannot trace Forward \(.*control flow"
    ):
        remove_dead_channels_(several, IMAGES)
    with pytest.raises(ConfigError, match=r"there is no layer 'fist'; did you mean 'first'\?"):
        keep_channels_(net, IMAGES, {"fist": (0,)})
    with pytest.raises(ConfigError, match=r"channels of 'last' is not certain"):
        keep_channels_(net, IMAGES, {"last": (0,)})
    for places in (
        (),
        (1, 0),
        (-1, 2),
        (5, 6),
        (0.0, 1.0),
        (True, 2),
        3,
        None,
        torch.tensor([0, 1]),
    ):
        with pytest.raises(ConfigError, match="are not rising indices of its 6 channels"):
            keep_channels_(net, IMAGES, {"first": places})
