"""Channels of plain modules go when zeros have left them without effect, and outputs stay."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

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


class Branches(nn.Module):
    """Ways that are not followed: a sum, a shared layer, a matrix read by hand, a fixed size."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.shared = nn.Linear(10, 4), nn.Linear(10, 4), nn.Linear(4, 4)
        self.hand, self.last = nn.Linear(4, 4), nn.Linear(4, 3)
        self.sized, self.end = nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, x):
        x = self.shared(self.shared(self.a(x) + self.b(x)))
        x = self.last(self.hand(F.linear(x, self.hand.weight)))
        return self.end(self.sized(x).view(-1, 4))


def test_what_is_not_certain_stays():
    net = fresh(0, Branches)
    for layer in (net.a, net.b, net.shared, net.hand, net.sized):
        layer.weight.data[1:3] = 0
        layer.bias.data.zero_()
    assert not remove_dead_channels_(net, IMAGES).kept


def test_errors(tiny):
    with pytest.raises(UnsupportedModelError, match="`compress` removes its dead units"):
        remove_dead_channels_(tiny("bert"), IMAGES)
    net = fresh(0)
    with pytest.raises(DataError, match="not a list"):
        remove_dead_channels_(net, [IMAGES])
    with pytest.raises(UnsupportedModelError, match="cannot trace Net"):
        remove_dead_channels_(net, IMAGES[:, :1])
    with pytest.raises(ConfigError, match=r"'fist' cannot be removed; did you mean 'first'\?"):
        keep_channels_(net, IMAGES, {"fist": (0,)})
    for places in ((), (1, 0), (-1, 2), (5, 6)):
        with pytest.raises(ConfigError, match="not rising indices of its 6 channels"):
            keep_channels_(net, IMAGES, {"first": places})
