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
from hf_prune.weights.find import Matrix
from hf_prune.weights.gradients import projected
from hf_prune.weights.inputs import Trace, main_tensor, never_ran, paired_rows, traced
from hf_prune.weights.walk import Inputs, mask_of


@dataclass
class Sensitivity:
    """What is known of one matrix.

    `grams` are `E[x x^T]` for each group, `[C, C]`. By `weight` a squared error of its outputs
    counts: it is the mean square of the gradient with respect to one of them.
    """

    grams: list[Tensor]
    weight: float


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

    def means(self) -> list[Tensor]:
        """`E[x x^T]` over the tokens of all processes."""
        counts = [
            torch.tensor([float(count)], device=self.grams[0].device) for count in self.counts
        ]
        return [
            sum_over_processes(gram) / sum_over_processes(count).clamp(min=1)
            for gram, count in zip(self.grams, counts, strict=True)
        ]


@contextmanager
def _watched_outputs(
    model: nn.Module, names: Sequence[str], found: dict[str, Tensor]
) -> Iterator[None]:
    def keep(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            found[name] = first_tensor(output)

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
    energy, counts = dict.fromkeys(names, 0.0), dict.fromkeys(names, 0)
    sources: dict[str, Matrix] = {}
    with in_eval(model):
        for index, batch in enumerate(batches):
            found: dict[str, Tensor] = {}
            with (
                torch.enable_grad(),
                traced(model, names) as trace,
                _watched_outputs(model, names, found),
            ):
                value = projected(model, batch, seed, index)
            sources = sources or _sources(model, matrices, trace)
            gradients = torch.autograd.grad(value, list(found.values()), allow_unused=True)
            for name, gradient in zip(found, gradients, strict=True):
                if gradient is not None:
                    energy[name] += float(gradient.double().square().sum())
                    counts[name] += gradient.numel()
            mask = mask_of(model, batch)
            for matrix in dict.fromkeys(sources.values()):
                module = model.get_submodule(matrix.module)
                for call in trace.calls[matrix.module]:
                    pairs = paired_rows(matrix, (module, call), (module, call), mask)
                    sums[matrix.name].add([x for x, _ in pairs])
    grams = {matrix.name: sums[matrix.name].means() for matrix in dict.fromkeys(sources.values())}
    device = next(model.parameters()).device
    felt = torch.tensor([[energy[n], counts[n]] for n in names], dtype=torch.float64, device=device)
    felt = sum_over_processes(felt)  # [modules, 2]
    weights = dict(zip(names, (felt[:, 0] / felt[:, 1].clamp(min=1)).tolist(), strict=True))
    return {m.name: Sensitivity(grams[sources[m.name].name], weights[m.module]) for m in matrices}
