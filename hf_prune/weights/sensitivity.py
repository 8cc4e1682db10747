"""What budgets need to know of a dense model: its inputs, and how much its outputs matter."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from hf_prune.errors import DataError
from hf_prune.statistics.collect import sum_over_processes
from hf_prune.statistics.streams import first_tensor, in_eval
from hf_prune.weights.find import CONVOLUTIONS, Matrix
from hf_prune.weights.gradients import differentiable, projected
from hf_prune.weights.inputs import Trace, main_tensor, never_ran, real_rows, rows_of, traced
from hf_prune.weights.walk import Inputs, real_tokens


@dataclass
class Sensitivity:
    """What is known of one matrix.

    `grams` are `E[x x^T]` for each group, `[C, C]`. By `weights` the squared error of the outputs
    of each group counts, its mean over tokens: the sum over all tokens of the mean square of the
    gradient with respect to one output. An expert has the share of the tokens that it gets.
    """

    grams: list[Tensor]
    weights: list[float]


@dataclass
class _Sums:
    """Sums over tokens of `x x^T` for each group of one matrix, and their numbers of tokens."""

    grams: list[Tensor] = field(default_factory=list)
    counts: list[int] = field(default_factory=list)

    def add(self, parts: Sequence[Tensor]) -> None:
        """Add the rows `[tokens, C]` of each group."""
        grams = [x.detach().float().T @ x.detach().float() for x in parts]
        old = self.grams or [torch.zeros_like(gram) for gram in grams]
        self.grams = [a + b for a, b in zip(old, grams, strict=True)]
        counts = self.counts or [0] * len(parts)
        self.counts = [a + len(x) for a, x in zip(counts, parts, strict=True)]

    def totals(self) -> list[float]:
        """How many tokens each group saw on all processes."""
        counts = torch.tensor(self.counts, dtype=torch.float64, device=self.grams[0].device)
        found: list[float] = sum_over_processes(counts).tolist()
        return found

    def means(self) -> list[Tensor]:
        """`E[x x^T]` over the tokens of all processes."""
        return [
            sum_over_processes(gram) / max(count, 1.0)
            for gram, count in zip(self.grams, self.totals(), strict=True)
        ]


@contextmanager
def _watched_outputs(
    model: nn.Module, names: Sequence[str], found: list[tuple[str, Tensor]]
) -> Iterator[None]:
    """Keep what modules give, at each of their calls."""

    def keep(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            found.append((name, first_tensor(output)))

        return hook

    handles = [model.get_submodule(name).register_forward_hook(keep(name)) for name in names]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _sources(model: nn.Module, matrices: Sequence[Matrix], trace: Trace) -> dict[str, Matrix]:
    """For each matrix, the first one that sees the same input."""
    first: dict[tuple[int, str], Matrix] = {}
    result = {}
    for matrix in matrices:
        if matrix.module not in trace.calls:
            raise never_ran([matrix.module])
        module = model.get_submodule(matrix.module)
        alone = "" if matrix.kind == "linear" else matrix.name
        key = (id(main_tensor(module, trace.calls[matrix.module][0])), alone)
        result[matrix.name] = first.setdefault(key, matrix)
    return result


def _energy(module: nn.Module, gradient: Tensor) -> float:
    """The squares of the gradients of one call, summed over tokens, their mean over outputs."""
    width = module.out_channels if isinstance(module, CONVOLUTIONS) else gradient.shape[-1]
    return float(gradient.double().square().sum()) / width


def measure_sensitivity(
    model: nn.Module, matrices: Sequence[Matrix], batches: Sequence[Inputs], seed: int = 0
) -> dict[str, Sensitivity]:
    """One forward and one backward pass over all batches, of random projections of the outputs.

    Matrices that share their input share one Gram matrix. The gradient is that of the outputs of
    the module that holds a matrix; no labels are needed.

    Raises:
        DataError: when there is no batch.
        UnsupportedModelError: when calibration never runs one of the matrices.
    """
    if not batches:
        raise DataError("this budget needs calibration batches: it reads inputs and gradients.")
    names = list(dict.fromkeys(matrix.module for matrix in matrices))
    sums = {matrix.name: _Sums() for matrix in matrices}
    energy, tokens = dict.fromkeys(names, 0.0), dict.fromkeys(names, 0)
    sources: dict[str, Matrix] = {}
    with in_eval(model), differentiable([matrix.parameter for matrix in matrices]):
        every = zip(batches, real_tokens(model, batches), strict=True)
        for index, (batch, real) in enumerate(every):
            found: list[tuple[str, Tensor]] = []
            with (
                torch.enable_grad(),
                traced(model, names) as trace,
                _watched_outputs(model, names, found),
            ):
                value = projected(model, batch, seed, index)
            sources = sources or _sources(model, matrices, trace)
            outputs = [output for _, output in found]
            gradients = torch.autograd.grad(value, outputs, allow_unused=True)
            for (name, _), gradient in zip(found, gradients, strict=True):
                if gradient is not None:
                    energy[name] += _energy(model.get_submodule(name), gradient)
            for name, calls in trace.calls.items():
                seen = (main_tensor(model.get_submodule(name), call) for call in calls)
                tokens[name] += sum(len(real_rows(value, real.of(name))) for value in seen)
            for matrix in dict.fromkeys(sources.values()):
                module = model.get_submodule(matrix.module)
                for call in trace.calls[matrix.module]:
                    rows = rows_of(matrix, module, call, real.of(matrix.module))
                    sums[matrix.name].add(rows)
    device = next(model.parameters()).device
    felt = torch.tensor([[energy[n], tokens[n]] for n in names], dtype=torch.float64, device=device)
    whole = dict(zip(names, sum_over_processes(felt).tolist(), strict=True))
    known = {m.name: (sums[m.name].means(), sums[m.name].totals()) for m in sources.values()}
    result = {}
    for matrix in matrices:
        (value, rows), (grams, counts) = whole[matrix.module], known[sources[matrix.name].name]
        shares = [n / max(rows, 1.0) if matrix.kind == "experts" else 1.0 for n in counts]
        result[matrix.name] = Sensitivity(grams, [value * share for share in shares])
    return result
