"""Sparse execution: used where it was measured to be faster on this machine, refused elsewhere.

Zeros alone make nothing faster. A linear layer with very many of them can be multiplied in
compressed rows (CSR) on a CPU; whether that pays depends on the machine, the threads and the number
of tokens, so that each layer is timed with the inputs that it really gets.
"""

import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from transformers import PreTrainedModel

from hf_prune.errors import ConfigError
from hf_prune.statistics.batches import Batch, forward_kwargs, to_device
from hf_prune.weights.inputs import main_tensor, traced

MIN_SPARSITY = 0.5
"""Layers with fewer zeros than this are not even timed."""


@dataclass(frozen=True)
class Timing:
    """One layer, timed dense and in compressed rows, in turn; medians in milliseconds."""

    name: str
    sparsity: float
    dense_ms: float
    sparse_ms: float
    used: bool

    def to_dict(self) -> dict[str, Any]:
        """As plain data, for a report."""
        return asdict(self)


class SparseLinear(nn.Module):
    """A linear layer in compressed rows, for inference on a CPU."""

    def __init__(self, dense: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = dense.in_features, dense.out_features
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")
            rows = dense.weight.detach().to_sparse_csr()
        self.register_buffer("rows", rows, persistent=False)
        self.bias = dense.bias

    def forward(self, x: Tensor) -> Tensor:
        """`[..., in]` to `[..., out]`."""
        flat = x.reshape(-1, self.in_features)
        rows = self.rows
        assert isinstance(rows, Tensor)  # noqa: S101  # a buffer
        product = (rows @ flat.T).T  # [tokens, out]
        if self.bias is not None:
            product = product + self.bias
        return product.reshape(*x.shape[:-1], self.out_features)


def _median_ms(functions: Sequence[Callable[[], object]], rounds: int) -> list[float]:
    """Median time of each, in turn, so that a busy machine is fair to all."""
    times: list[list[float]] = [[] for _ in functions]
    for turn in range(rounds + 1):
        for function, found in zip(functions, times, strict=True):
            start = time.perf_counter()
            function()
            if turn:
                found.append((time.perf_counter() - start) * 1e3)
    return [statistics.median(found) for found in times]


@torch.no_grad()
def use_sparse_(
    model: PreTrainedModel, batch: Batch, *, min_gain: float = 1.1, rounds: int = 7
) -> list[Timing]:
    """Execute linear layers in compressed rows, in place, where that is faster here.

    The model is for inference afterwards: save it before.

    Args:
        model: on a CPU, its zeros exact.
        batch: as large as those that the model will see; it is run once.
        min_gain: how many times as fast a layer must have become.
        rounds: measured rounds of each layer.

    Returns:
        Every layer with more than half of its weights zero, its two times, and whether compressed
        rows are used. Where none is, nothing was gained by zeros: the times say so.

    Raises:
        ConfigError: for a model that is not on a CPU.
    """
    if model.device.type != "cpu":
        raise ConfigError("compressed rows are for CPUs: move the model there.")
    found = {
        name: float((module.weight == 0).float().mean())
        for name, module in model.named_modules()
        if type(module) is nn.Linear
    }
    chosen = {name: share for name, share in found.items() if share > MIN_SPARSITY}
    model.eval()
    with traced(model, list(chosen)) as trace:
        model(**forward_kwargs(model, to_device(batch, model.device), labels=False))
    timings = []
    for name, share in chosen.items():
        if name not in trace.calls:
            continue
        dense = model.get_submodule(name)
        assert isinstance(dense, nn.Linear)  # noqa: S101  # chosen above
        inputs = main_tensor(dense, trace.calls[name][0])
        sparse = SparseLinear(dense)
        slow, fast = _median_ms(
            [
                lambda x=inputs, m=dense: linear(x, m.weight, m.bias),  # type: ignore[misc]  # mypy cannot see defaults
                lambda x=inputs, m=sparse: m(x),  # type: ignore[misc]  # the same
            ],
            rounds,
        )
        used = slow >= min_gain * fast
        if used:
            model.set_submodule(name, sparse)
        timings.append(Timing(name, share, slow, fast, used))
    return timings
