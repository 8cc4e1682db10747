"""What budgets need to know of a dense model: its inputs, and how much its outputs matter."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from hf_prune.errors import DataError
from hf_prune.statistics.collect import sum_over_processes
from hf_prune.statistics.streams import in_eval
from hf_prune.weights.find import CONVOLUTIONS, Matrix
from hf_prune.weights.gradients import differentiable, projected
from hf_prune.weights.inputs import (
    Trace,
    check_ran,
    main_tensor,
    modules_that_run,
    real_rows,
    traced,
)
from hf_prune.weights.rows import rows_of
from hf_prune.weights.walk import Inputs, Real, real_tokens


@dataclass
class Sensitivity:
    """What is known of one matrix.

    `grams` are `E[x x^T]` for each group, `[C, C]`. By `weights` the squared error of the outputs
    of each group counts, its mean over tokens: the sum over all tokens of the mean square of the
    gradient with respect to one output. An expert has the share of the tokens that it gets. What
    torch's attention makes of queries, keys and values is no output of a module: there the sum is
    that of the square of the gradient with respect to the matrix, over the mean square of the
    input, as if tokens were felt independently of each other.
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


def _tensors(value: Any) -> list[Tensor]:
    """All tensors with a gradient in what a module gives: outputs, and the states after them."""
    if isinstance(value, Tensor):
        return [value] if value.requires_grad else []
    if isinstance(value, Mapping):
        value = tuple(value.values())
    parts = value if isinstance(value, tuple | list) else ()
    return [item for part in parts for item in _tensors(part)]


@contextmanager
def _watched_outputs(
    model: nn.Module, names: Sequence[str], found: list[tuple[str, Tensor]]
) -> Iterator[None]:
    """Keep all that modules give, at each of their calls."""

    def keep(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            found.extend((name, tensor) for tensor in _tensors(output))

        return hook

    handles = [model.get_submodule(name).register_forward_hook(keep(name)) for name in names]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _holders(matrix: Matrix) -> tuple[str, ...]:
    """All modules that have a matrix."""
    return (matrix.module, *matrix.others)


def _within(matrix: Matrix) -> bool:
    """Whether a matrix gives what its module does not show: queries, keys or values."""
    return matrix.kind == "attention" and matrix.owner == matrix.module


def _add_sources(
    sources: dict[str, Matrix], model: nn.Module, matrices: Sequence[Matrix], trace: Trace
) -> None:
    """For each matrix that a run is the first to call, the first one that sees the same input."""
    first: dict[tuple[int, str], Matrix] = {}
    for matrix in matrices:
        called = [name for name in _holders(matrix) if name in trace.calls]
        if called and matrix.name not in sources:
            module = model.get_submodule(called[0])
            alone = "" if matrix.kind == "linear" and not matrix.others else matrix.name
            key = (id(main_tensor(module, trace.calls[called[0]][0])), alone)
            sources[matrix.name] = first.setdefault(key, matrix)


def _energy(module: nn.Module, gradient: Tensor) -> float:
    """The squares of the gradients of one call, summed over tokens, their mean over outputs."""
    width = module.out_channels if isinstance(module, CONVOLUTIONS) else gradient.shape[-1]
    return float(gradient.double().square().sum()) / width


@dataclass
class _Felt:
    """What is summed over batches: by module energy and tokens, by matrix the moments of inputs."""

    model: nn.Module
    matrices: Sequence[Matrix]
    energy: dict[str, float] = field(default_factory=dict)
    tokens: dict[str, int] = field(default_factory=dict)
    sums: dict[str, _Sums] = field(default_factory=dict)
    sources: dict[str, Matrix] = field(default_factory=dict)
    inner: dict[str, Tensor] = field(default_factory=dict)
    """Of matrices whose outputs no module gives: squares of their gradients, for each group."""

    @property
    def names(self) -> list[str]:
        """All modules that have one of the matrices."""
        return list(dict.fromkeys(n for matrix in self.matrices for n in _holders(matrix)))

    def add(self, batch: Inputs, real: Real, seed: int, index: int) -> None:
        """One forward and one backward pass."""
        found: list[tuple[str, Tensor]] = []
        with (
            torch.enable_grad(),
            traced(self.model, self.names) as trace,
            _watched_outputs(self.model, self.names, found),
        ):
            value = projected(self.model, batch, seed, index)
        _add_sources(self.sources, self.model, self.matrices, trace)
        inner = [matrix for matrix in self.matrices if _within(matrix)]
        outputs = [output for _, output in found] + [matrix.parameter for matrix in inner]
        gradients = torch.autograd.grad(value, outputs, allow_unused=True)
        for matrix, gradient in zip(inner, gradients[len(found) :], strict=True):
            if gradient is not None:
                squares = matrix.view(gradient).double().square().sum(dim=(1, 2))  # [groups]
                self.inner[matrix.name] = self.inner.get(matrix.name, 0.0) + squares
        for (name, _), gradient in zip(found, gradients[: len(found)], strict=True):
            if gradient is not None:
                energy = _energy(self.model.get_submodule(name), gradient)
                self.energy[name] = self.energy.get(name, 0.0) + energy
        for name, calls in trace.calls.items():
            seen = (main_tensor(self.model.get_submodule(name), call) for call in calls)
            rows = sum(len(real_rows(value, real.of(name))) for value in seen)
            self.tokens[name] = self.tokens.get(name, 0) + rows
        for matrix in dict.fromkeys(self.sources.values()):
            for name in _holders(matrix):
                module = self.model.get_submodule(name)
                for call in trace.calls.get(name, ()):
                    parts = rows_of(matrix, module, call, real.of(name))
                    self.sums.setdefault(matrix.name, _Sums()).add(parts)

    def _felt_within(self, matrix: Matrix, grams: Sequence[Tensor]) -> list[float]:
        """By gradients of the matrix itself, for each group; of one output, as all others."""
        groups, rows, _ = matrix.view(matrix.parameter).shape
        none = torch.zeros(groups, dtype=torch.float64, device=matrix.parameter.device)
        squares = sum_over_processes(self.inner.get(matrix.name, none)).tolist()
        inputs = [max(float(gram.diagonal().sum()), 1e-30) for gram in grams]
        return [square / x / rows for square, x in zip(squares, inputs, strict=True)]

    def result(self) -> dict[str, Sensitivity]:
        """What is known of each matrix over all processes."""
        check_ran([m.module for m in self.matrices if m.name not in self.sources])
        device = next(self.model.parameters()).device
        table = [[self.energy.get(n, 0.0), self.tokens.get(n, 0)] for n in self.names]
        felt = torch.tensor(table, dtype=torch.float64, device=device)
        whole = dict(zip(self.names, sum_over_processes(felt).tolist(), strict=True))
        known = {n: (item.means(), item.totals()) for n, item in self.sums.items()}
        result = {}
        for matrix in self.matrices:
            grams, counts = known[self.sources[matrix.name].name]
            value, rows = (sum(whole[n][i] for n in _holders(matrix)) for i in (0, 1))
            shares = [n / max(rows, 1.0) if matrix.kind == "experts" else 1.0 for n in counts]
            felt_by = [value * share for share in shares]
            if _within(matrix):
                felt_by = self._felt_within(matrix, grams)
            result[matrix.name] = Sensitivity(grams, felt_by)
        return result


def measure_sensitivity(
    model: nn.Module, matrices: Sequence[Matrix], batches: Sequence[Inputs], seed: int = 0
) -> dict[str, Sensitivity]:
    """One forward and one backward pass over all batches, of random projections of the outputs.

    Matrices that share their input share one Gram matrix. The gradient is that of all that the
    modules give that hold a matrix: of recurrent ones their outputs and their last states. No
    labels are needed.

    Raises:
        DataError: when there is no batch.
        UnsupportedModelError: when calibration never runs one of the matrices.
    """
    if not batches:
        raise DataError("this budget needs calibration batches: it reads inputs and gradients.")
    felt = _Felt(model, matrices)
    with (
        in_eval(model),
        modules_that_run(),
        differentiable([matrix.parameter for matrix in matrices]),
    ):
        for index, (batch, real) in enumerate(
            zip(batches, real_tokens(model, batches), strict=True)
        ):
            felt.add(batch, real, seed, index)
    return felt.result()
