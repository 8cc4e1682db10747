"""Which layer reads which channel of another one, in a module that nobody has described.

Traced by `torch.fx`, and followed past what works on each channel alone: activations, pools, norms.
"""

import copy
import inspect
import operator
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from hf_prune.errors import UnsupportedModelError
from hf_prune.statistics.streams import in_eval
from hf_prune.weights.find import CONVOLUTIONS, RECURRENT

Layer = nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d
LAYERS = (nn.Linear, *CONVOLUTIONS)
READERS = (*LAYERS, *RECURRENT)
ELEMENTWISE = (
    *(nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout),
    *(nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.CELU, nn.SELU, nn.GELU, nn.SiLU, nn.Mish),
    *(nn.Tanh, nn.Sigmoid, nn.Hardtanh, nn.Hardswish, nn.Hardsigmoid, nn.Softplus, nn.Softsign),
)
"""Modules that make every number from the one in its place, by one rule for all channels."""
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
"""Modules that do so by a rule of each channel; with what they have stored, not with the batch."""
POOLS: dict[Any, int] = {
    **{nn.MaxPool1d: 1, nn.MaxPool2d: 2, nn.MaxPool3d: 3},
    **{nn.AvgPool1d: 1, nn.AvgPool2d: 2, nn.AvgPool3d: 3},
    **{nn.AdaptiveMaxPool1d: 1, nn.AdaptiveMaxPool2d: 2, nn.AdaptiveMaxPool3d: 3},
    **{nn.AdaptiveAvgPool1d: 1, nn.AdaptiveAvgPool2d: 2, nn.AdaptiveAvgPool3d: 3},
    **{F.max_pool1d: 1, F.max_pool2d: 2, F.adaptive_avg_pool1d: 1, F.adaptive_avg_pool2d: 2},
}
"""What makes every number from neighbours in the same channel, and over how many axes."""
FUNCTIONS = (
    *(torch.relu, torch.tanh, torch.sigmoid),
    *(F.relu, F.gelu, F.silu, F.leaky_relu, F.elu, F.tanh, F.sigmoid),
)
METHODS = ("relu", "tanh", "sigmoid")
"""Functions, and methods of tensors, that do as the modules of `ELEMENTWISE` do."""
POOLED = (torch.mean, torch.amax, torch.amin, "mean", "amax", "amin")
"""Functions and methods that make one number of those along some axes."""


@dataclass(frozen=True)
class Way:
    """How far the channels of a layer were followed, and what a constant one gives there.

    `value` is `[1, C]`, with ones for positions; it is NaN where it differs at borders. `span`
    neighbours come from one channel after positions were laid side by side. `alone`: nothing else
    reads what was passed, so that it may be written to in place.
    """

    node: fx.Node
    value: Tensor
    span: int = 1
    alone: bool = True


@dataclass(frozen=True)
class Flow:
    """All that reads the channels of one layer: norms on the way, and layers at the end."""

    layer: str
    norms: tuple[str, ...]
    readers: dict[str, Way]


@dataclass(frozen=True)
class States:
    """All that reads the states of a recurrent layer outside of it, as zeros at its start.

    `output` are the states of its last layer at every step, those of both directions side by side;
    `final` those of one layer and direction after the last step, by their place among all.
    """

    layer: str
    output: Flow | None
    final: dict[int, Flow]


def _is_plain(part: nn.Module, kinds: Any) -> bool:
    """Whether a module is one of some classes, and does what its class does, and nothing else."""
    hooks = part._forward_hooks or part._forward_pre_hooks
    return type(part) in kinds and not hooks and "forward" not in vars(part)


def _parameters_of(part: nn.Module) -> set[str]:
    """The names of the parameters that the class of a layer or norm gives it."""
    if not isinstance(part, nn.RNNBase):
        return {"weight", "bias"}
    stems = ["weight_ih", "weight_hh", *["bias_ih", "bias_hh"] * part.bias]
    stems += ["weight_hr"] if part.proj_size else []
    ways = ("", "_reverse") if part.bidirectional else ("",)
    return {f"{s}_l{n}{way}" for s in stems for n in range(part.num_layers) for way in ways}


def _owned(root: nn.Module) -> dict[str, nn.Module]:
    """Plain layers and norms that stand in one place, with parameters that are theirs alone."""
    holders: dict[int, int] = {}
    for part in root.modules():
        for parameter in part._parameters.values():
            holders[id(parameter)] = holders.get(id(parameter), 0) + 1
    places: dict[int, int] = {}
    for _, part in root.named_modules(remove_duplicate=False):
        places[id(part)] = places.get(id(part), 0) + 1
    return {
        name: part
        for name, part in root.named_modules()
        if _is_plain(part, (*READERS, *NORMS))
        and {*part._parameters} == _parameters_of(part)
        and places[id(part)] == 1
        and getattr(part, "groups", 1) == 1
        and all(holders[id(own)] == 1 for own in part._parameters.values() if own is not None)
    }


class _Shapes(fx.Interpreter):
    """Runs a graph, and notes the shape of every tensor in it."""

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        if isinstance(result, Tensor):
            n.meta["shape"] = result.shape
        return result


def _trace(root: nn.Module, batch: tuple[Any, ...]) -> fx.Graph:
    """What the module does, with the shape of every result for this batch.

    Raises:
        UnsupportedModelError: when `torch.fx` cannot tell.
    """
    parameters = list(inspect.signature(type(root).forward).parameters.values())[1 + len(batch) :]
    told = {p.name: p.default for p in parameters if p.default is not p.empty}
    try:
        with in_eval(root), torch.no_grad():
            graph = fx.Tracer().trace(root, told)
            _Shapes(fx.GraphModule(root, graph)).run(*copy.deepcopy(batch))
    except Exception as error:  # whatever the forward of a stranger does while it is traced
        raise UnsupportedModelError(
            f"torch.fx cannot trace {type(root).__name__} ({error}), so that which layer reads "
            "which channel is not known: leave its shapes as they are."
        ) from error
    return graph


def _shape(node: fx.Node) -> torch.Size:
    """Of a node's result; empty where it is no tensor."""
    found: torch.Size = node.meta.get("shape", torch.Size())
    return found


def _counts_examples(node: Any) -> bool:
    """Whether a node is nothing but how many examples a tensor with channels has."""
    if not isinstance(node, fx.Node):
        return False
    if node.op == "call_method" and node.target == "size":
        return tuple(node.args[1:]) == (0,) and len(_shape(node.all_input_nodes[0])) > 1
    if node.target is operator.getitem and node.args[1] == 0:
        return isinstance(node.args[0], fx.Node) and _is_shape(node.args[0])
    return False


def _is_shape(node: fx.Node) -> bool:
    """Whether a node is the shape of a tensor with channels."""
    named = (node.op, node.target, *node.args[1:]) == ("call_function", getattr, "shape")
    return named and len(_shape(node.all_input_nodes[0])) > 1


def _is_harmless(node: fx.Node) -> bool:
    """Whether a node asks of a tensor nothing but how many examples it has."""
    return _counts_examples(node) or (_is_shape(node) and all(map(_counts_examples, node.users)))


def _flattened(node: fx.Node, module: nn.Module | None, way: Way) -> Way | None:
    """Past a node that lays all positions of a channel side by side, of any number of channels."""
    given, flat = _shape(way.node), False
    if module is not None and _is_plain(module, (nn.Flatten,)):
        flat = (getattr(module, "start_dim", 0), getattr(module, "end_dim", 0)) == (1, -1)
    elif module is None and node.target in (torch.flatten, "flatten"):
        flat = (*node.args[1:], *node.kwargs.values()) == (1,)
    elif module is None and node.target in ("view", "reshape"):
        first, *rest = node.args[1] if isinstance(node.args[1], tuple | list) else node.args[1:]
        flat = _counts_examples(first) and rest == [-1]
    if not flat or _shape(node) != torch.Size((given[0], given[1:].numel())):
        return None
    return replace(way, node=node, value=way.value.flatten(1), span=given[2:].numel())


def _is_whole(index: Any) -> bool:
    return isinstance(index, slice) and index == slice(None)


def _picked(node: fx.Node, way: Way) -> Way | None:
    """Past a node that takes some positions, or pools over some, with channels in the last axis."""
    rank = len(_shape(way.node))
    if node.target is operator.getitem:
        index = node.args[1] if isinstance(node.args[1], tuple) else (node.args[1],)
        plain = all(type(item) in (int, slice) for item in index)
        takes = plain and (len(index) < rank or (len(index) == rank and _is_whole(index[-1])))
        return replace(way, node=node) if takes else None
    if node.target in POOLED:
        rest = dict(zip(("dim", "keepdim"), node.args[1:], strict=False)) | node.kwargs
        dims = rest.pop("dim", None)
        axes = dims if isinstance(dims, tuple | list) else (dims,)
        known = all(isinstance(axis, int) and (axis + rank) % rank != rank - 1 for axis in axes)
        return replace(way, node=node) if known and set(rest) <= {"keepdim"} else None
    return None


def _is_uneven(pool: nn.Module | None) -> bool:
    """Whether a pool makes something else of a constant, at borders or everywhere."""
    if pool is None or "AvgPool" not in type(pool).__name__:
        return False
    padding = getattr(pool, "padding", 0)
    pads = padding != 0 if isinstance(padding, int) else any(padding)
    return pads or getattr(pool, "divisor_override", None) is not None


def _drops_nothing(node: fx.Node) -> bool:
    """Whether a functional dropout is off in eval mode."""
    rest = dict(zip(("p", "training", "inplace"), node.args[1:], strict=False)) | node.kwargs
    return node.target is F.dropout and rest.get("training", True) is False


def _is_in_place(node: fx.Node, module: nn.Module | None) -> bool:
    told = getattr(module, "inplace", False) or node.kwargs.get("inplace", False)
    return bool(told) or any(item is True for item in node.args)


def _step(root: nn.Module, way: Way, node: fx.Node) -> Way | None:
    """One node further, or nothing, where what it does to channels is not known."""
    if node.args[:1] != (way.node,):
        return None
    module = root.get_submodule(str(node.target)) if node.op == "call_module" else None
    if _is_in_place(node, module) and not way.alone:
        return None
    only = node.all_input_nodes == [way.node]
    value = way.value.clone()  # some change it in place
    if module is not None and _is_plain(module, ELEMENTWISE):
        return replace(way, node=node, value=copy.deepcopy(module).eval()(value))
    if node.target in FUNCTIONS and only:
        function: Any = node.target
        return replace(way, node=node, value=function(value, *node.args[1:], **node.kwargs))
    if node.op == "call_method" and node.target in METHODS:
        return replace(way, node=node, value=getattr(value, str(node.target))())
    if _drops_nothing(node):
        return replace(way, node=node)
    if value.ndim == 2:  # the others read further axes
        return _picked(node, way) if only and module is None and way.span == 1 else None
    pool = node.target if module is None else type(module)
    if pool in POOLS and only and (module is None or _is_plain(module, POOLS)):
        if POOLS[pool] != value.ndim - 2 or len(_shape(way.node)) != value.ndim:
            return None
        uneven = value.where(value == 0, torch.nan) if _is_uneven(module) else value
        return replace(way, node=node, value=uneven)
    return _flattened(node, module, way)


def _normed(norm: Any, way: Way, node: fx.Node) -> Way | None:
    """Past a norm whose channels are those of the way."""
    fits = norm.running_mean is not None and norm.num_features == way.value.shape[1]
    if not fits or way.span > 1 or (way.value.ndim == 2 and len(_shape(way.node)) != 2):
        return None
    return replace(way, node=node, value=copy.deepcopy(norm).eval()(way.value))


def _reads(layer: Any, way: Way) -> bool:
    """Whether a layer has its columns in the order of the channels."""
    channels = way.value.shape[1]
    if isinstance(layer, RECURRENT):
        return way.value.ndim == 2 and way.span == 1 and layer.input_size == channels
    if isinstance(layer, nn.Linear):
        return way.value.ndim == 2 and layer.in_features == channels * way.span
    return bool(way.value.ndim == layer.weight.ndim and layer.in_channels == channels)


def _follow(root: nn.Module, start: Way, name: str, once: Mapping[str, nn.Module]) -> Flow | None:
    """Who reads the channels of a layer; nothing where somebody does in an unknown way.

    `once` are the layers and norms that may be narrowed.
    """
    norms: list[str] = []
    readers: dict[str, Way] = {}
    ways = [start]
    while ways:
        way = ways.pop()
        users = [node for node in way.node.users if not _is_harmless(node)]
        if not users:
            return None
        way = replace(way, alone=way.alone and len(users) == 1)
        for node in users:
            target = str(node.target)
            known = once.get(target) if node.op == "call_module" else None
            known = known if node.args == (way.node,) and not node.kwargs else None
            if isinstance(known, READERS):
                if not _reads(known, way):
                    return None
                readers[target] = way
                continue
            further = _step(root, way, node) if known is None else _normed(known, way, node)
            if further is None:
                return None
            norms += [target] if known is not None else []
            ways.append(further)
    return Flow(name, tuple(norms), readers)


def _follow_layer(root: nn.Module, node: fx.Node, once: Mapping[str, nn.Module]) -> Flow | None:
    """Who reads the channels of a linear layer or a convolution."""
    name = str(node.target)
    layer: Any = once[name]
    dims = layer.weight.ndim
    if dims > 2 and len(_shape(node)) != dims:  # without a batch, axes are others
        return None
    if not len(layer.weight):
        return None
    bias = layer.weight.new_zeros(layer.weight.shape[0]) if layer.bias is None else layer.bias
    return _follow(root, Way(node, bias.detach().view(1, -1, *[1] * (dims - 2))), name, once)


def _places(node: fx.Node) -> dict[int, fx.Node] | None:
    """By number, all that takes one item of a result; nothing where a user does something else."""
    found: dict[int, fx.Node] = {}
    for user in node.users:
        index: Any = user.args[1] if user.target is operator.getitem else None
        if type(index) is not int or index in found:
            return None
        found[index] = user
    return found


def _finals(module: nn.RNNBase, found: fx.Node) -> dict[int, fx.Node] | None:
    """What takes the last state of each layer and direction, out of all that a module returns.

    Nothing where it cannot be told, or where the cells of an LSTM are read.
    """
    if isinstance(module, nn.LSTM):
        both = _places(found)
        if both is None or (1 in both and both[1].users) or not set(both) <= {0, 1}:
            return None
        if 0 not in both:
            return {}
        found = both[0]
    count = module.num_layers * (2 if module.bidirectional else 1)
    only = next(iter(found.users)) if len(found.users) == 1 else None
    if only is not None and (count, only.target, only.args[1:]) == (1, "squeeze", (0,)):
        return {0: only}
    taken = _places(found)
    if taken is None:
        return None
    finals = {place % count: node for place, node in taken.items()}
    return finals if len(finals) == len(taken) else None


def _follow_states(root: nn.Module, node: fx.Node, once: Mapping[str, nn.Module]) -> States | None:
    """Who reads the states of a recurrent layer that starts with zeros."""
    name = str(node.target)
    module: Any = once[name]
    parts = _places(node)
    if module.proj_size or len(node.args) != 1 or node.kwargs or parts is None:
        return None
    if not set(parts) <= {0, 1}:
        return None
    finals = _finals(module, parts[1]) if 1 in parts else {}
    if finals is None:
        return None
    starts = {place: state for place, state in finals.items() if state.users}
    if 0 in parts and parts[0].users:
        starts[-1] = parts[0]
    nothing = module.weight_hh_l0.new_zeros(1, module.hidden_size)  # [1, H]
    both = nothing.repeat(1, 2) if module.bidirectional else nothing
    final: dict[int, Flow] = {}
    for place, start in starts.items():
        way = Way(start, both if place < 0 else nothing, alone=len(starts) == 1)
        flow = _follow(root, way, name, once)
        if flow is None:
            return None
        final[place] = flow
    return States(name, final.pop(-1, None), final)


def steps(root: nn.Module, batch: tuple[Any, ...]) -> str:
    """All that a module does, as text: what its forward reads of sizes is in it as numbers.

    Raises:
        UnsupportedModelError: when it cannot be traced.
    """
    return str(_trace(root, batch).python_code("self").src)


def find_flows(root: nn.Module, batch: tuple[Any, ...]) -> list[Flow | States]:
    """The layers whose channels or states can be followed to layers that read them, last first.

    Args:
        root: any module with the forward of its class; tracing may leave things on it.
        batch: arguments of its `forward`, with a batch axis.

    Raises:
        UnsupportedModelError: when it cannot be traced.
    """
    graph, owned = _trace(root, batch), _owned(root)
    read = {str(node.target).rpartition(".")[0] for node in graph.nodes if node.op == "get_attr"}
    calls: dict[str, list[fx.Node]] = {}
    for node in graph.nodes:
        if node.op == "call_module":
            calls.setdefault(str(node.target), []).append(node)
    once = {
        name: owned[name]
        for name, nodes in calls.items()
        if len(nodes) == 1 and name in owned and name not in read
    }
    return list(_all_flows(root, {name: calls[name][0] for name in once}, once))


def _all_flows(
    root: nn.Module, starts: Mapping[str, fx.Node], once: Mapping[str, nn.Module]
) -> Iterator[Flow | States]:
    for name in reversed(list(starts)):
        found: Flow | States | None = None
        if isinstance(once[name], LAYERS):
            found = _follow_layer(root, starts[name], once)
        elif isinstance(once[name], RECURRENT):
            found = _follow_states(root, starts[name], once)
        if found is not None:
            yield found
