"""What the matrices of a module are multiplied with, as rows: one row per token, pixel or step.

A linear layer sees its input as it is; a convolution sees patches; a recurrent matrix sees a step
of the sequence, or the state before it; an expert sees the tokens that were routed to it.
"""

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, pad
from torch.utils.hooks import RemovableHandle

from hf_prune.errors import UnsupportedModelError
from hf_prune.statistics.batches import by_token
from hf_prune.statistics.streams import Call, Enough, first_tensor
from hf_prune.weights.find import Matrix, is_transposed

ROUTING = ("top_k_index", "router_indices")
"""Names under which packed experts are told which experts each token goes to, `[tokens, k]`."""


@dataclass
class Trace:
    """What some modules were called with in one run, and the sums of residual and output."""

    calls: dict[str, list[Call]] = field(default_factory=dict)
    order: list[str] = field(default_factory=list)
    outputs: dict[str, Tensor] = field(default_factory=dict)
    totals: dict[str, Tensor] = field(default_factory=dict)


def _keep_call(trace: Trace, name: str, *, stop: bool) -> Any:
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        trace.calls.setdefault(name, []).append(Call(args, kwargs))
        trace.order.append(name)
        if stop:
            raise Enough

    return hook


def _keep_output(store: dict[str, Tensor], name: str) -> Any:
    def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        store[name] = first_tensor(output)

    return hook


def _keep_input(store: dict[str, Tensor], name: str, *, stop: bool) -> Any:
    def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
        store[name] = args[0]
        if stop:
            raise Enough

    return hook


@contextmanager
def traced(
    root: nn.Module,
    modules: Sequence[str],
    sums: Mapping[str, str] | None = None,
    stop_after: str | None = None,
) -> Iterator[Trace]:
    """Watch modules of `root` inside a `with` block. `Enough` ends the block early and quietly.

    Args:
        root: in which names are looked up; "" is `root` itself.
        modules: whose calls are kept.
        sums: for some of them, the module whose input is the sum of residual and output; "" = that
            sum is the output of `root`.
        stop_after: the module at whose call (or, if it has one, at whose sum) the run ends: the
            rest is not needed.
    """
    trace, handles = Trace(), list[RemovableHandle]()
    for name in modules:
        hook = _keep_call(trace, name, stop=name == stop_after and name not in (sums or {}))
        module = root.get_submodule(name)
        handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))
    for name, at in (sums or {}).items():
        module, where = root.get_submodule(name), root.get_submodule(at)
        handles.append(module.register_forward_hook(_keep_output(trace.outputs, name)))
        handles.append(
            where.register_forward_pre_hook(
                _keep_input(trace.totals, name, stop=name == stop_after)
            )
            if at
            else where.register_forward_hook(_keep_output(trace.totals, name))
        )
    try:
        yield trace
    except Enough:
        pass
    finally:
        for handle in handles:
            handle.remove()


@dataclass
class Replay:
    """Outputs of modules that will not change any more, so that later runs need not compute them.

    Kept for one block, by batch and module.
    """

    outputs: dict[tuple[int, str], list[Tensor]] = field(default_factory=dict)

    @contextmanager
    def on(self, root: nn.Module, index: int, names: Sequence[str]) -> Iterator[None]:
        """Inside a `with` block, modules give what they gave for batch `index` before, if known."""
        handles, replaced = list[RemovableHandle](), list[nn.Module]()
        for name in names:
            module = root.get_submodule(name)
            known = self.outputs.get((index, name))
            if known is None:
                fresh = self.outputs[index, name] = []
                handles.append(module.register_forward_hook(_append_output(fresh)))
            else:
                module.forward = _give(iter(known))
                replaced.append(module)
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
            for module in replaced:
                del module.forward
            for name in names:  # a run that ended before a module was called knows nothing of it
                if not self.outputs[index, name]:
                    del self.outputs[index, name]


def _append_output(store: list[Tensor]) -> Any:
    def hook(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        store.append(output)

    return hook


def _give(values: Iterator[Tensor]) -> Any:
    return lambda *args, **kwargs: next(values)


def never_ran(names: Sequence[str]) -> UnsupportedModelError:
    """The error for modules that calibration does not reach."""
    inside = any(name.rpartition(".")[2] == "out_proj" for name in names)
    hint = (
        " nn.MultiheadAttention, also in nn.TransformerEncoder, computes with out_proj by itself: "
        "its matrices are not followed."
    )
    return UnsupportedModelError(
        f"calibration never ran {', '.join(names[:3])}: nothing is known about its inputs. "
        f"Leave it out with ignore=({names[0]!r},), or a pattern such as '*out_proj'."
        f"{hint if inside else ''}"
    )


def main_tensor(module: nn.Module, call: Call) -> Tensor:
    """The first argument of a call, wherever it stands."""
    value = call.args[0] if call.args else next(iter(call.kwargs.values()))
    if not isinstance(value, Tensor):
        raise UnsupportedModelError(
            f"{type(module).__name__} was called with a {type(value).__name__}; only tensors are "
            "followed. Pass padded tensors instead of packed sequences."
        )
    return value


def real_rows(value: Tensor, mask: Tensor | None) -> Tensor:
    """`[..., C]` as `[rows, C]`, without padding where `value` is `[B, T, C]` or `[B * T, C]`."""
    if mask is not None and value.shape[:-1].numel() == mask.numel():
        return by_token(value, mask.to(value.device))
    return value.reshape(-1, value.shape[-1])


def _patches(module: nn.Conv1d | nn.Conv2d | nn.Conv3d, value: Tensor) -> Tensor:
    """The patches that a convolution multiplies, `[G, B * positions, C]`."""
    if value.ndim == len(module.kernel_size) + 1:
        value = value.unsqueeze(0)  # unbatched
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
    value = pad(value, module._reversed_padding_repeated_twice, mode=mode)
    sizes = zip(module.kernel_size, module.stride, module.dilation, strict=True)
    for axis, (size, stride, dilation) in enumerate(sizes):
        value = value.unfold(2 + axis, (size - 1) * dilation + 1, stride)[..., ::dilation]
    dims = len(module.kernel_size)
    value = value.unflatten(1, (module.groups, -1))  # [B, G, I, *positions, *kernel]
    positions = range(3, 3 + dims)
    kernel = range(3 + dims, 3 + 2 * dims)
    value = value.permute(1, 0, *positions, 2, *kernel)  # [G, B, *positions, I, *kernel]
    return value.flatten(2 + dims).flatten(1, 1 + dims)  # [G, B * positions, I * kernel]


def _one_layer(module: nn.RNNBase, layer: int, *, reverse: bool) -> nn.RNNBase:
    """One layer and direction of a recurrent module, as a module of its own."""
    end = f"_l{layer}" + ("_reverse" if reverse else "")
    weight: Tensor = getattr(module, f"weight_ih{end}")
    kwargs: dict[str, Any] = {"bias": module.bias, "batch_first": module.batch_first}
    if type(module) is nn.RNN:
        kwargs["nonlinearity"] = module.nonlinearity
    if module.proj_size:
        kwargs["proj_size"] = module.proj_size
    with torch.device("meta"):
        make: Any = type(module)
        single: nn.RNNBase = make(weight.shape[1], module.hidden_size, **kwargs)
    state = {k.removesuffix("_l0"): k for k, _ in single.named_parameters()}
    single.load_state_dict(
        {k: getattr(module, stem + end).detach() for stem, k in state.items()}, assign=True
    )
    return single.eval()


def _steps(module: nn.RNNBase, call: Call, key: str) -> Tensor:
    """What a recurrent matrix is multiplied with, `[steps, C]`: inputs, or states before a step."""
    value = main_tensor(module, call)
    start = call.args[1] if len(call.args) > 1 else call.kwargs.get("hx")
    states = start if isinstance(start, tuple) else (start,)
    if value.ndim == 2:
        value = value.unsqueeze(0 if module.batch_first else 1)
        states = tuple(None if state is None else state.unsqueeze(1) for state in states)
    time = 1 if module.batch_first else 0
    ways = 2 if module.bidirectional else 1
    for layer in range(module.num_layers):
        results = []
        for way in range(ways):
            end = f"_l{layer}" + ("_reverse" if way else "")
            if key == f"weight_ih{end}":
                return value.flatten(0, 1)
            single = _one_layer(module, layer, reverse=bool(way))
            index = layer * ways + way
            first = None
            if states[0] is not None:
                first = tuple(s[index : index + 1] for s in states if s is not None)
                first = first if len(first) > 1 else first[0]
            inputs = value.flip(time) if way else value
            output = single(inputs, first)[0]
            if key == f"weight_hh{end}":
                before: Tensor = output.roll(1, time)
                zero = torch.zeros_like(before.select(time, 0))
                head = zero if states[0] is None else states[0][index]
                before.select(time, 0).copy_(head)
                return before.flatten(0, 1)
            results.append(output.flip(time) if way else output)
        value = torch.cat(results, dim=-1)
    raise UnsupportedModelError(f"{type(module).__name__} has no matrix {key!r} to follow.")


def _cell(module: nn.RNNCellBase, call: Call, key: str) -> Tensor:
    """What a matrix of a recurrent cell is multiplied with, `[B, C]`: the input, or the state."""
    value = main_tensor(module, call)
    if key == "weight_ih":
        return value.reshape(-1, value.shape[-1])
    state = call.args[1] if len(call.args) > 1 else call.kwargs.get("hx")
    state = state[0] if isinstance(state, tuple) else state
    rows = value.numel() // value.shape[-1]
    if state is None:
        return value.new_zeros(rows, module.hidden_size)
    before: Tensor = state.reshape(rows, module.hidden_size)
    return before


def _not_followed(matrix: Matrix, module: nn.Module) -> str | None:
    """Why the inputs of packed experts cannot be told from what their module is called with."""
    takes = inspect.signature(module.forward).parameters
    if "hidden_states" not in takes or not any(name in takes for name in ROUTING):
        return f"its forward takes {', '.join(takes)}, and none of {', '.join(ROUTING)}"
    if not matrix.name.endswith("down_proj"):
        return None
    if not isinstance(getattr(module, "gate_up_proj", None), Tensor):
        return "it has no gate_up_proj, which gives what down_proj reads"
    if not any(callable(getattr(module, name, None)) for name in ("_apply_gate", "act_fn")):
        return "it has neither _apply_gate nor act_fn, one of which gives what down_proj reads"
    return None


def check_followed(model: nn.Module, matrices: Sequence[Matrix]) -> None:
    """Refuse packed experts whose inputs cannot be told, before anything is changed.

    Raises:
        UnsupportedModelError: naming the parameter, and why.
    """
    for matrix in matrices:
        if matrix.kind != "experts":
            continue
        module = model.get_submodule(matrix.module)
        why = _not_followed(matrix, module)
        if why is not None:
            raise UnsupportedModelError(
                f"{matrix.name}: the inputs of the experts of {type(module).__name__} are not "
                f"known: {why}. Leave them out with ignore, or prune without calibration: "
                "criterion: magnitude, reconstruct: false, weights: {dense_target: false}."
            )


def _gated(module: nn.Module, hidden: Tensor, expert: int) -> Tensor:
    """What the `down_proj` of an expert reads, from `[tokens, E]` to `[tokens, F]`."""
    packed, bias = module.gate_up_proj, getattr(module, "gate_up_proj_bias", None)
    assert isinstance(packed, Tensor)  # noqa: S101  # as `check_followed` has seen
    weight = packed[expert].T if is_transposed(module) else packed[expert]
    both = linear(hidden, weight, None if bias is None else bias[expert])  # [tokens, 2 * F]
    gating: Any = getattr(module, "_apply_gate", None)
    if gating is not None:
        gated: Tensor = gating(both)
        return gated
    gate, up = both.chunk(2, dim=-1)
    product: Tensor = module.act_fn(gate) * up  # type: ignore[operator]  # an activation
    return product


def _routed(
    matrix: Matrix, module: nn.Module, call: Call, tokens: Sequence[Tensor]
) -> list[Tensor]:
    """The inputs of each expert's matrix, for the given tokens of each: `[tokens, C]`."""
    bound = inspect.signature(module.forward).bind(*call.args, **call.kwargs).arguments
    hidden = bound["hidden_states"].reshape(-1, bound["hidden_states"].shape[-1])
    if not matrix.name.endswith("down_proj"):
        return [hidden[index] for index in tokens]
    return [_gated(module, hidden[index], expert) for expert, index in enumerate(tokens)]


def _tokens(matrix: Matrix, module: nn.Module, call: Call, mask: Tensor | None) -> list[Tensor]:
    """Which real tokens each expert gets."""
    bound = inspect.signature(module.forward).bind(*call.args, **call.kwargs).arguments
    index = next(bound[name] for name in ROUTING if name in bound)
    index = index.reshape(-1, index.shape[-1])  # [tokens, k]
    real = torch.ones(index.shape[0], dtype=torch.bool, device=index.device)
    if mask is not None and mask.numel() == index.shape[0]:
        real = mask.flatten().to(index.device)
    hit = [(index == expert).any(dim=1) & real for expert in range(matrix.groups)]
    return [item.nonzero().squeeze(1) for item in hit]


@torch.no_grad()
def rows_of(matrix: Matrix, module: nn.Module, call: Call, mask: Tensor | None) -> list[Tensor]:
    """What each group of a matrix was multiplied with in one call, `[rows, C]` each."""
    if matrix.kind == "experts":
        return _routed(matrix, module, call, _tokens(matrix, module, call, mask))
    if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        return list(_patches(module, main_tensor(module, call)))
    if isinstance(module, nn.RNNBase):
        return [_steps(module, call, matrix.name.rpartition(".")[2])]
    if isinstance(module, nn.RNNCellBase):
        return [_cell(module, call, matrix.name.rpartition(".")[2])]
    return [real_rows(main_tensor(module, call), mask)]


@torch.no_grad()
def paired_rows(
    matrix: Matrix,
    dense: tuple[nn.Module, Call],
    pruned: tuple[nn.Module, Call],
    mask: Tensor | None,
) -> list[tuple[Tensor, Tensor]]:
    """Rows of the dense and of the pruned stream for each group, `[rows, C]` each, in one order.

    Experts of both streams see the tokens that the pruned network routes to them.
    """
    if matrix.kind == "experts":
        tokens = _tokens(matrix, *pruned, mask)
        ours = _routed(matrix, *pruned, tokens)
        return list(zip(_routed(matrix, *dense, tokens), ours, strict=True))
    return list(zip(rows_of(matrix, *dense, mask), rows_of(matrix, *pruned, mask), strict=True))
