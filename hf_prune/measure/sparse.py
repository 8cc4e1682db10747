"""Sparse execution: used where it was measured to be faster on this machine, refused elsewhere.

Zeros alone make nothing faster. A linear layer with very many of them can be multiplied in
compressed rows (CSR) on a CPU, one with two zeros among any four neighbours by the semi-structured
kernels of CUDA devices. Whether that pays depends on the machine, the threads and the number of
tokens, so that each layer is timed with the inputs that it really gets.
"""

import copy
import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.sparse import to_sparse_semi_structured
from transformers import PreTrainedModel

from hf_prune.errors import ConfigError
from hf_prune.measure.latency import synchronize
from hf_prune.statistics.batches import Batch, forward_kwargs, to_device
from hf_prune.weights.inputs import main_tensor, traced

MIN_SPARSITY = 0.5
"""Layers with fewer zeros than this are not even timed."""
SEMI_STRUCTURED_DTYPES = (torch.float16, torch.bfloat16)
"""Those of the semi-structured kernels for floating-point weights."""
SEMI_STRUCTURED_ROWS, SEMI_STRUCTURED_COLUMNS = 32, 64
"""Sizes of a matrix must be multiples of these, whichever kernel library torch was built with."""


@dataclass(frozen=True)
class Timing:
    """One layer, timed dense and sparse, in turn; medians in milliseconds."""

    name: str
    kernel: str
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


def is_semi_structured(weight: Tensor) -> bool:
    """Whether at most two of any four neighbours in a row of `[out, in]` are not zero."""
    if weight.ndim != 2 or weight.shape[1] % 4:
        return False
    fours = (weight != 0).reshape(weight.shape[0], -1, 4)  # [out, in / 4, 4]
    return bool((fours.sum(dim=-1) <= 2).all())


def _fits_semi_structured(dense: nn.Linear) -> bool:
    rows, columns = dense.weight.shape
    return (
        dense.weight.dtype in SEMI_STRUCTURED_DTYPES
        and rows % SEMI_STRUCTURED_ROWS == 0
        and columns % SEMI_STRUCTURED_COLUMNS == 0
        and is_semi_structured(dense.weight)
    )


def _fits_rows(dense: nn.Linear) -> bool:
    return float((dense.weight == 0).float().mean()) > MIN_SPARSITY


def _semi_structured(dense: nn.Linear) -> nn.Module:
    """A copy of a linear layer that holds its weight in the format of the CUDA kernels."""
    copied = copy.copy(dense)
    copied._parameters = dict(dense._parameters)  # the bias is shared, the weight is not
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The PyTorch API of SparseSemiStructuredTensor")
        weight = to_sparse_semi_structured(dense.weight.detach())
    copied.weight = nn.Parameter(weight, requires_grad=False)
    return copied


@dataclass(frozen=True)
class _Kernel:
    """A sparse execution: its name, the layers that it takes, and how one is made."""

    name: str
    fits: Callable[[nn.Linear], bool]
    make: Callable[[nn.Linear], nn.Module]


KERNELS = {
    "cpu": _Kernel("compressed rows", _fits_rows, SparseLinear),
    "cuda": _Kernel("2:4", _fits_semi_structured, _semi_structured),
}
"""By type of device."""


def _median_ms(
    functions: Sequence[Callable[[], object]], rounds: int, device: torch.device
) -> list[float]:
    """Median time of each, in turn, so that a busy machine is fair to all."""
    times: list[list[float]] = [[] for _ in functions]
    for turn in range(rounds + 1):
        for function, found in zip(functions, times, strict=True):
            synchronize(device)
            start = time.perf_counter()
            function()
            synchronize(device)
            if turn:
                found.append((time.perf_counter() - start) * 1e3)
    return [statistics.median(found) for found in times]


@torch.no_grad()
def use_sparse_(
    model: PreTrainedModel, batch: Batch, *, min_gain: float = 1.1, rounds: int = 7
) -> list[Timing]:
    """Execute linear layers by sparse kernels, in place, where that is faster here.

    On a CPU, compressed rows for layers with more than half of their weights zero. On a CUDA
    device, 2:4 kernels for float16 or bfloat16 matrices with two zeros among any four neighbours,
    whose rows are a multiple of 32 and whose columns are a multiple of 64. The model is for
    inference afterwards: save it before.

    Args:
        model: its zeros exact.
        batch: as large as those that the model will see; it is run once.
        min_gain: how many times as fast a layer must have become.
        rounds: measured rounds of each layer.

    Returns:
        Every layer that the kernel takes, its two times, and whether the kernel is used. Where none
        is, nothing was gained by zeros: the times say so.

    Raises:
        ConfigError: for a model on a device that no sparse kernel is known for.
    """
    kernel = KERNELS.get(model.device.type)
    if kernel is None:
        raise ConfigError(
            f"no sparse kernel is known for {model.device.type!r}: move the model to a CPU "
            "(compressed rows) or to a CUDA device (2:4)."
        )
    linear_layers = {n: m for n, m in model.named_modules() if type(m) is nn.Linear}
    chosen = [name for name, module in linear_layers.items() if kernel.fits(module)]
    model.eval()
    with traced(model, chosen) as trace:
        model(**forward_kwargs(model, to_device(batch, model.device), labels=False))
    timings = []
    for name in chosen:
        if name not in trace.calls:
            continue
        dense = linear_layers[name]
        inputs = main_tensor(dense, trace.calls[name][0])
        sparse = kernel.make(dense)
        slow, fast = _median_ms(
            [partial(dense, inputs), partial(sparse, inputs)], rounds, model.device
        )
        used = slow >= min_gain * fast
        if used:
            model.set_submodule(name, sparse)
        share = float((dense.weight == 0).float().mean())
        timings.append(Timing(name, kernel.name, share, slow, fast, used))
    return timings
