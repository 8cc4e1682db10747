"""Which layer reads which channel of another one, in a module that nobody has described.

Traced by `torch.fx`, and followed past what works on each channel alone: activations, pools, norms.
"""

import copy
import operator
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.passes.shape_prop import ShapeProp, TensorMetadata
from torch.nn import functional as F

from hf_prune.errors import UnsupportedModelError
from hf_prune.statistics.streams import in_eval
from hf_prune.weights.find import CONVOLUTIONS

Layer = nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d
ELEMENTWISE = (
    *(nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout),
    *(nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.CELU, nn.SELU, nn.GELU, nn.SiLU, nn.Mish),
    *(nn.Tanh, nn.Sigmoid, nn.Hardtanh, nn.Hardswish, nn.Hardsigmoid, nn.Softplus, nn.Softsign),
)
"""Modules that make every number from the one in its place, by one rule for all channels."""
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
"""Modules that do so by a rule of each channel; with what they have stored, not with the batch."""
POOLS = (
    *(nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d),
    *(nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d, nn.AdaptiveMaxPool3d),
    *(nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d),
)
"""Modules that make every number from neighbours in the same channel."""
FUNCTIONS = (
    *(torch.relu, torch.tanh, torch.sigmoid),
    *(F.relu, F.gelu, F.silu, F.leaky_relu, F.elu, F.tanh, F.sigmoid),
)
POOLING = (F.max_pool1d, F.max_pool2d, F.adaptive_avg_pool1d, F.adaptive_avg_pool2d)
METHODS = ("relu", "tanh", "sigmoid")
"""Functions, and methods of tensors, that do as these modules do."""


@dataclass(frozen=True)
class Way:
    """How far the channels of a layer were followed, and what a constant one gives there.

    `value` is `[1, C]`, with ones for positions; it is NaN where it differs at borders. `span`
    neighbours come from one channel after positions were laid side by side.
    """

    node: fx.Node
    value: Tensor
    span: int = 1


@dataclass(frozen=True)
class Flow:
    """All that reads the channels of one layer: norms on the way, and layers at the end."""

    layer: str
    norms: tuple[str, ...]
    readers: dict[str, Way]


def _own_layers(module: nn.Module) -> dict[str, Layer]:
    """Layers whose parameters are theirs alone, and not computed from others."""
    holders: dict[int, int] = {}
    for part in module.modules():
        for parameter in part._parameters.values():
            holders[id(parameter)] = holders.get(id(parameter), 0) + 1
    return {
        name: part
        for name, part in module.named_modules()
        if isinstance(part, (nn.Linear, *CONVOLUTIONS))
        and getattr(part, "groups", 1) == 1
        and "weight" in part._parameters
        and all(holders[id(own)] == 1 for own in part._parameters.values() if own is not None)
    }


def _trace(module: nn.Module, batch: tuple[Any, ...]) -> fx.Graph:
    """What the module does, with the shape of every result for this batch.

    Raises:
        UnsupportedModelError: when `torch.fx` cannot tell.
    """
    try:
        with in_eval(module), torch.no_grad():
            graph = fx.Tracer().trace(module)
            ShapeProp(fx.GraphModule(module, graph)).propagate(*batch)
    except Exception as error:  # whatever the forward of a stranger does while it is traced
        raise UnsupportedModelError(
            f"torch.fx cannot trace {type(module).__name__} ({error}), so that which layer reads "
            "which channel is not known: leave its shapes as they are."
        ) from error
    return graph


def _shape(node: fx.Node) -> torch.Size | None:
    meta = node.meta.get("tensor_meta")
    return meta.shape if isinstance(meta, TensorMetadata) else None


def _counts_examples(node: fx.Node) -> bool:
    """Whether a node reads nothing but how many examples there are."""
    if node.op == "call_method" and node.target == "size":
        return tuple(node.args[1:]) == (0,)
    return ((node.op, node.target, *node.args[1:]) == ("call_function", getattr, "shape")) and all(
        user.target is operator.getitem and user.args[1] == 0 for user in node.users
    )


def _flattened(node: fx.Node, module: nn.Module | None, way: Way) -> Way | None:
    """Past a node that lays all positions of a channel side by side, of any number of channels."""
    given, last = _shape(way.node), node.args[-1]
    last = last[-1] if isinstance(last, tuple | list) else last
    flat = isinstance(module, nn.Flatten) or node.target in (torch.flatten, "flatten")
    if given is None or not (flat or (node.target in ("view", "reshape") and last == -1)):
        return None
    if _shape(node) != torch.Size((given[0], given[1:].numel())):
        return None
    return replace(way, node=node, value=way.value.flatten(1), span=given[2:].numel())


def _pads_with_zeros(pool: nn.Module | None) -> bool:
    """Whether an average counts zeros beyond the border."""
    padding = getattr(pool, "padding", 0) if "Avg" in type(pool).__name__ else 0
    return padding != 0 if isinstance(padding, int) else any(padding)


def _step(root: nn.Module, way: Way, node: fx.Node) -> Way | None:
    """One node further, or nothing, where what it does to channels is not known."""
    if node.args[:1] != (way.node,):
        return None
    module = root.get_submodule(str(node.target)) if node.op == "call_module" else None
    alone = node.all_input_nodes == [way.node]
    pooling = isinstance(module, POOLS) or node.target in POOLING
    value = way.value.clone()  # some change it in place
    if isinstance(module, ELEMENTWISE):
        return replace(way, node=node, value=copy.deepcopy(module).eval()(value))
    if node.target in FUNCTIONS and alone:
        function: Any = node.target
        return replace(way, node=node, value=function(value, *node.args[1:], **node.kwargs))
    if node.op == "call_method" and node.target in METHODS:
        return replace(way, node=node, value=getattr(value, str(node.target))())
    if node.target is F.dropout:
        return replace(way, node=node)
    if way.value.ndim == 2:  # the others read a second axis
        return None
    if pooling and alone:
        uneven = value.where(value == 0, torch.nan) if _pads_with_zeros(module) else value
        return replace(way, node=node, value=uneven)
    return _flattened(node, module, way)


def _normed(root: nn.Module, way: Way, node: fx.Node) -> Way | None:
    """Past a norm whose channels are those of the way."""
    norm = root.get_submodule(str(node.target))
    shape = _shape(way.node)
    if not isinstance(norm, NORMS) or norm.running_mean is None or way.span > 1 or shape is None:
        return None
    if norm.num_features != way.value.shape[1] or (way.value.ndim == 2 and len(shape) != 2):
        return None
    return replace(way, node=node, value=copy.deepcopy(norm).eval()(way.value))


def _reads(layer: Layer, way: Way) -> bool:
    """Whether a layer has its columns in the order of the channels."""
    if isinstance(layer, nn.Linear):
        return way.value.ndim == 2 and layer.in_features == way.value.shape[1] * way.span
    return way.value.ndim == layer.weight.ndim


def _follow(
    root: nn.Module, start: fx.Node, once: Mapping[str, fx.Node], layers: Mapping[str, Layer]
) -> Flow | None:
    """Who reads the channels of a layer; nothing where somebody does in an unknown way."""
    name = str(start.target)
    layer, shape = layers[name], _shape(start)
    dims = layer.weight.ndim
    if shape is None or (dims > 2 and len(shape) != dims):  # without a batch, axes are others
        return None
    bias = layer.weight.new_zeros(layer.weight.shape[0]) if layer.bias is None else layer.bias
    norms: list[str] = []
    readers: dict[str, Way] = {}
    ways = [Way(start, bias.detach().view(1, -1, *[1] * (dims - 2)))]
    while ways:
        way = ways.pop()
        if not way.node.users:
            return None
        for node in way.node.users:
            target = str(node.target)
            if _counts_examples(node):
                continue
            known = once.get(target) is node and node.args == (way.node,)
            if known and target in layers:
                if not _reads(layers[target], way):
                    return None
                readers[target] = way
                continue
            further = _normed(root, way, node) if known else None
            if further is not None:
                norms.append(target)
            further = further or _step(root, way, node)
            if further is None:
                return None
            ways.append(further)
    return Flow(name, tuple(norms), readers) if readers else None


def find_flows(root: nn.Module, batch: tuple[Any, ...]) -> Iterator[Flow]:
    """The layers whose channels can be followed to the end, last first."""
    graph, layers = _trace(root, batch), _own_layers(root)
    read = {str(node.target).rpartition(".")[0] for node in graph.nodes if node.op == "get_attr"}
    calls: dict[str, list[fx.Node]] = {}
    for node in graph.nodes:
        if node.op == "call_module":
            calls.setdefault(str(node.target), []).append(node)
    once = {name: nodes[0] for name, nodes in calls.items() if len(nodes) == 1 and name not in read}
    for name in reversed([name for name in once if name in layers]):
        flow = _follow(root, once[name], once, layers)
        if flow is not None:
            yield flow
