"""What the modules of a network are called with while it runs, and what they give."""

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence
from torch.utils.hooks import RemovableHandle

from hf_prune.errors import UnsupportedModelError
from hf_prune.statistics.batches import by_token
from hf_prune.statistics.streams import Call, Enough, first_tensor


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


@contextmanager
def modules_that_run() -> Iterator[None]:
    """Inside a `with` block, torch computes a layer by its modules, and not by one fast kernel."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


def check_ran(unused: Sequence[str]) -> None:
    """Refuse modules that the calibration data of one of the processes never runs, on all of them.

    Raises:
        UnsupportedModelError: naming them.
    """
    names = list(dict.fromkeys(gather_object(list(unused))))
    if names:
        raise never_ran(names)


def never_ran(names: Sequence[str]) -> UnsupportedModelError:
    """The error for modules that calibration does not reach."""
    return UnsupportedModelError(
        f"calibration never ran {', '.join(names[:3])}: nothing is known about its inputs. "
        f"Leave it out with ignore=({names[0]!r},), or a pattern."
    )


def first_argument(module: nn.Module, call: Call) -> Any:
    """The first argument of a call, wherever it stands: by the order of `forward`, if named."""
    if call.args:
        return call.args[0]
    names = (*inspect.signature(module.forward).parameters, *call.kwargs)
    return next(call.kwargs[name] for name in names if name in call.kwargs)


def main_tensor(module: nn.Module, call: Call) -> Tensor:
    """The tensor that comes first in a call; of a packed sequence all its steps.

    Raises:
        UnsupportedModelError: when it is something else.
    """
    value = first_argument(module, call)
    if isinstance(value, PackedSequence):
        return value.data
    if not isinstance(value, Tensor):
        raise UnsupportedModelError(
            f"{type(module).__name__} was called with a {type(value).__name__}; only tensors and "
            "packed sequences are followed. Leave the module out with ignore, or prune it without "
            "its inputs: criterion='magnitude', reconstruct=False, weights={'dense_target': False}."
        )
    return value


def real_rows(value: Tensor, mask: Tensor | None) -> Tensor:
    """`[..., C]` as `[rows, C]`, without padding where `value` is `[B, T, C]` or `[B * T, C]`."""
    if mask is not None and value.shape[:-1].numel() == mask.numel():
        return by_token(value, mask.to(value.device))
    return value.reshape(-1, value.shape[-1])
