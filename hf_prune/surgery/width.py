"""Re-fit after the hidden width was narrowed: what reads the channels, and what writes them.

In the order in which the network runs. A projection that reads fewer channels is fitted to what it
gave in the dense network; one that writes them, to the dense sum of residual and output, so that it
repairs what was lost before; a norm gets the scale and the shift of each channel that fit its dense
output best. Inputs are those of the network as it is by then, narrowed and fitted so far. Examples
that are held out of each fit of a projection say whether it is kept.

Source: the fits and their targets are those of `reconstruct`.
"""

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_prune.sites import (
    HIDDEN,
    Site,
    base_model,
    find_module,
    find_sites,
    logical_weight,
    norms,
    readers,
)
from hf_prune.statistics.batches import by_token, forward_kwargs, to_device
from hf_prune.statistics.collect import sum_over_processes
from hf_prune.statistics.moments import Moments
from hf_prune.statistics.streams import (
    Enough,
    Stream,
    by_layer,
    by_stack,
    first_tensor,
    in_eval,
    run_layer,
    start_streams,
    watched,
)
from hf_prune.surgery.dense import DenseTargets
from hf_prune.surgery.fit import fit_, inputs_and_residual

TINY = 1e-12
"""A channel that varies less than this keeps its scale."""


@contextmanager
def _inputs_of(module: nn.Module) -> Iterator[list[Tensor]]:
    """The input of a module, and nothing after it."""
    seen: list[Tensor] = []

    def keep(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        seen.append(args[0].detach())
        raise Enough

    handle = module.register_forward_pre_hook(keep)
    try:
        yield seen
    except Enough:
        pass
    finally:
        handle.remove()


@dataclass
class _Record:
    """What modules of the dense network gave, batch by batch."""

    outputs: dict[str, list[Tensor]] = field(default_factory=dict)
    reads: dict[str, str] = field(default_factory=dict)
    """By module, the first one that reads the same tensor."""

    @property
    def order(self) -> list[str]:
        """The modules, as they ran."""
        return list(self.outputs)

    @contextmanager
    def of(self, modules: Mapping[str, nn.Module]) -> Iterator[None]:
        """Record while the network runs on one batch."""
        read: dict[int, tuple[str, Tensor]] = {}  # the tensor is held, so that its id stays its own
        handles = []
        for name, module in modules.items():

            def keep(module: nn.Module, args: Any, output: Any, name: str = name) -> None:
                first, _ = read.setdefault(id(args[0]), (name, args[0])) if args else (name, None)
                self.reads[name] = first
                self.outputs.setdefault(name, []).append(first_tensor(output).detach())

            handles.append(module.register_forward_hook(keep))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def _fit_channels(module: nn.Module, pairs: Sequence[tuple[Tensor, Tensor]]) -> None:
    """Scale and shift of each channel of a norm, `a y + b`, by least squares of `[tokens, E]`.

    No shift where the norm has no bias.
    """
    weight, bias = module.weight, getattr(module, "bias", None)
    assert isinstance(weight, nn.Parameter)  # noqa: S101  # what a norm has
    sums = torch.zeros(5, len(weight), dtype=torch.float64, device=weight.device)
    for y, t in pairs:
        y, t = y.double(), t.double()
        rows = (y, t, y * y, y * t, torch.ones_like(y))
        sums += torch.stack([each.sum(dim=0) for each in rows])
    sums = sum_over_processes(sums)
    mean_y, mean_t, yy, yt, _ = sums / sums[-1].clamp(min=1)
    if bias is None:
        mean_y, mean_t = torch.zeros_like(mean_y), torch.zeros_like(mean_t)
    spread = yy - mean_y.square()
    scale = torch.where(spread > TINY, (yt - mean_y * mean_t) / spread.clamp(min=TINY), 1.0)
    extra = 1.0 if _adds_one(module) else 0.0
    weight.data.copy_((weight.detach().double() + extra) * scale - extra)
    if isinstance(bias, nn.Parameter):
        bias.data.copy_(bias.detach().double() * scale + mean_t - scale * mean_y)


def _adds_one(module: nn.Module) -> bool:
    """Whether a norm scales by one more than its weight, as Gemma's do."""
    probe = copy.deepcopy(module)
    zero = torch.zeros_like(probe.weight)  # type: ignore[arg-type]  # a norm has one
    probe.weight = nn.Parameter(zero)
    inputs = torch.arange(1.0, len(zero) + 1).to(zero)[None]
    bias = getattr(probe, "bias", None)
    output = probe(inputs) - (0 if bias is None else bias)
    return bool(output.abs().max() > 0)


@dataclass
class _Walk:
    """A narrowed network beside the dense one, on their way through layers."""

    model: PreTrainedModel
    targets: DenseTargets
    site: Site
    kept: Tensor
    ridge: float
    streams: list[Stream] = field(default_factory=list)
    """Of the dense network; `calls` are those of the narrowed one."""
    calls: list[Stream] = field(default_factory=list)
    fitted: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        dense = self.targets.dense
        tables = [m for m in dense.modules() if isinstance(m, nn.Embedding)]
        tied = {id(p) for table in tables for p in table.parameters()}
        reading = [n for n in readers(self.site) if id(find_module(dense, n).weight) not in tied]
        self.norms = frozenset(norms(dense, self.site))
        self.names = [*reading, *self.norms]
        self.channels = self.norms | {s.module for s in self.site.slices if s.axis == 0}
        self.layers = by_layer(self.targets.sites)
        self.streams = self.targets.streams

    def _split(self, index: int, values: Tensor) -> tuple[Tensor, Tensor] | None:
        """Which rows are fitted and which judge; None, where it cannot be told what they are."""
        judges = self.targets.held_out[index].to(values.device)  # [B]
        if values.shape[:1] == judges.shape and values.ndim == 2:  # one for each example
            return ~judges, judges
        mask = self.streams[index].mask.to(values.device)
        if values.shape[:2] != mask.shape and len(values) != mask.numel():
            return None
        return mask & ~judges.unsqueeze(1), mask & judges.unsqueeze(1)

    def _fit(self, name: str, inputs: Sequence[Tensor], targets: Sequence[Tensor]) -> None:
        """Fit one module; targets are those of the channels that are left."""
        module = find_module(self.model, name)
        pairs: list[tuple[list[Tensor], list[Tensor]]] = []
        for index, values in enumerate(inputs):
            parts = self._split(index, values)
            if parts is None:
                return
            both = (values, targets[index].to(values.device))
            rows = [[_rows(v, part) for v in both] for part in parts]
            pairs.append((rows[0], rows[1]))
        self.fitted.append(name)
        if name in self.norms:
            every = [(module(x), t) for pair in pairs for x, t in pair if len(x)]
            _fit_channels(module, every)
            return
        fitted, held_out = (Moments.of(logical_weight(module)) for _ in range(2))
        for first, second in pairs:
            fitted.add(*first)
            held_out.add(*second)
        fit_(module, (fitted.over_processes(), held_out.over_processes()), self.ridge)

    def fit_readers(self, first: str, record: _Record, run: Callable[[int], Any]) -> None:
        """Fit all modules that read the same tensor to what they gave in the dense network.

        Args:
            first: the first of them.
            record: of the dense network.
            run: runs the narrowed network on a batch, at least up to that module.
        """
        inputs: list[Tensor] = []
        for index in range(len(self.targets.batches)):
            with _inputs_of(find_module(self.model, first)) as seen:
                run(index)
            inputs += seen
        for name in (n for n in record.order if record.reads[n] == first):
            outputs = record.outputs[name]
            if name in self.channels:
                outputs = [value[..., self.kept.to(value.device)] for value in outputs]
            self._fit(name, inputs, outputs)

    def _fit_writer(self, site: Site, sums: Sequence[Tensor]) -> None:
        """Fit an output projection to the dense sum of residual and output."""
        base, inputs, targets = base_model(self.model), [], []
        for index, total in enumerate(sums):
            with watched(base, site, stop=True) as seen:
                self._run(site.layer_module, index)
            values, residual = inputs_and_residual(seen)
            inputs.append(values)
            targets.append(total[..., self.kept.to(total.device)].to(residual.device) - residual)
        self._fit(site.gate.module, inputs, targets)

    def _run(self, layer: str, index: int) -> Tensor:
        stream = self.calls[index]
        return run_layer(base_model(self.model), layer, stream.pruned, stream.calls[layer])

    def enter(self, layers: Sequence[str]) -> None:
        """Begin a list of layers, with what each network gives to its first."""
        model, dense = self.model, self.targets.dense
        batches = self.targets.batches
        if layers[0] == next(iter(self.layers)):
            self.streams = [replace(stream) for stream in self.targets.streams]
        else:
            self.streams = [start_streams(dense, dense, [batch], layers)[0] for batch in batches]
        self.calls = [start_streams(model, model, [batch], layers)[0] for batch in batches]

    def go_through(self, layer: str) -> None:
        """Fit everything in a layer, in the order in which it runs, and pass it."""
        base, record = base_model(self.targets.dense), _Record()
        sites = {site.gate.module: site for site in self.layers[layer]}
        left = {site.gate.module for site in find_sites(self.model)}
        inside = [name for name in self.names if name.startswith(f"{layer}.")]
        modules = {name: find_module(self.targets.dense, name) for name in (*inside, *sites)}
        sums: dict[str, list[Tensor]] = {name: [] for name in sites}
        for stream in self.streams:
            with ExitStack() as stack:
                stack.enter_context(record.of(modules))
                seen = {n: stack.enter_context(watched(base, s)) for n, s in sites.items()}
                stream.dense = run_layer(base, layer, stream.dense, stream.calls[layer])
            for name, item in seen.items():
                assert item.total is not None  # noqa: S101  # the layer ran
                sums[name].append(item.total)
        for name in record.order:
            if name in sites and name in left:
                self._fit_writer(sites[name], sums[name])
            elif name not in sites and record.reads[name] == name:
                self.fit_readers(name, record, lambda index: self._run(layer, index))
        for index, stream in enumerate(self.calls):
            stream.pruned = self._run(layer, index)


def _rows(values: Tensor, part: Tensor) -> Tensor:
    """The rows of a part, `[rows, N]`, of `[B, N]`, `[B, T, N]` or `[B * T, N]`."""
    return values[part] if part.ndim == 1 else by_token(values, part)


@torch.no_grad()
def refit_width(
    model: PreTrainedModel, targets: DenseTargets, kept: Sequence[int], *, ridge: float = 1e-2
) -> list[str]:
    """Re-fit, in place, what reads and what writes a hidden width that was narrowed.

    Args:
        model: after `remove_units`. Evaluated in eval mode and left as it was.
        targets: of the dense model, from `dense_targets`.
        kept: the channels that are left.
        ridge: pull towards the old weights, as in `refit`.

    Returns:
        The names of the modules that were re-fitted, in order.

    Raises:
        NumericsError: when a sum is not finite.
        UnsupportedModelError: when the dense model has no single hidden width.
    """
    dense = targets.dense
    (site,) = find_sites(dense, [HIDDEN])
    with in_eval(model, dense):
        walk = _Walk(model, targets, site, torch.tensor(kept), ridge)
        layers = list(walk.layers)
        stacks = by_stack(layers)
        inside = tuple(f"{name}." for name in layers)
        outer = [name for name in walk.names if not name.startswith(inside)]
        record = _Record()
        places = {name: find_module(dense, name) for name in (*outer, *layers)}
        for batch in targets.batches:
            with record.of(places):
                dense(**forward_kwargs(dense, to_device(batch, dense.device), labels=False))

        def run(index: int) -> None:
            batch = to_device(targets.batches[index], model.device)
            model(**forward_kwargs(model, batch, labels=False))

        stack = ""
        for name in record.order:
            if name in walk.layers:
                before, stack = stack, name.rpartition(".")[0]
                if before != stack:
                    walk.enter(stacks[stack])
                walk.go_through(name)
            elif record.reads[name] == name:
                walk.fit_readers(name, record, run)
    return walk.fitted
