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
from transformers.pytorch_utils import Conv1D

from hf_prune.errors import ConfigError
from hf_prune.measure.latency import synchronize
from hf_prune.weights.inputs import main_tensor, traced
from hf_prune.weights.walk import Inputs, call_model

MIN_SPARSITY = 0.5
"""Layers with fewer zeros than this are not even timed."""
ROW_DTYPES = (torch.float32, torch.float64)
"""Those that compressed rows are multiplied in on a CPU."""
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


class SparseLinear(nn.Linear):
    """A linear layer in compressed rows, for inference on a CPU.

    `weight` is there, in compressed rows: models ask for its dtype and device.
    """

    def __init__(self, dense: nn.Linear) -> None:
        with torch.device("meta"):
            super().__init__(dense.in_features, dense.out_features, bias=False)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")
            rows = dense.weight.detach().to_sparse_csr()
        self.weight = nn.Parameter(rows, requires_grad=False)
        self.bias = dense.bias
        self.train(dense.training)

    def forward(self, x: Tensor) -> Tensor:
        """`[..., in]` to `[..., out]`."""
        flat = x.reshape(-1, self.in_features)
        product = (self.weight @ flat.T).T  # [tokens, out]
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
        rows % SEMI_STRUCTURED_ROWS == 0
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
    """A sparse execution: its name, the dtypes and layers that it takes, and how one is made."""

    name: str
    dtypes: tuple[torch.dtype, ...]
    fits: Callable[[nn.Linear], bool]
    make: Callable[[nn.Linear], nn.Module]


KERNELS = {
    "cpu": _Kernel("compressed rows", ROW_DTYPES, _fits_rows, SparseLinear),
    "cuda": _Kernel("2:4", SEMI_STRUCTURED_DTYPES, _fits_semi_structured, _semi_structured),
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


def _as_linear(module: nn.Module) -> nn.Linear | None:
    """A linear layer that computes what the module does; None for other modules."""
    if type(module) is nn.Linear:
        return module
    if type(module) is not Conv1D:
        return None
    with torch.device("meta"):
        layer = nn.Linear(module.nx, module.nf, bias=False)
    weight = module.weight.detach().T.contiguous()  # [in, out] -> [out, in]
    layer.weight, layer.bias = nn.Parameter(weight, requires_grad=False), module.bias
    return layer.train(module.training)


def _chosen(model: nn.Module, kernel: _Kernel) -> dict[str, nn.Linear]:
    """The layers that a kernel takes, by name.

    Raises:
        ConfigError: when it takes the dtype of none.
    """
    fused = {  # torch reads their weights, and never calls them
        layer
        for module in model.modules()
        if isinstance(module, nn.TransformerEncoderLayer)
        for layer in module.modules()
    }
    found = (
        (name, _as_linear(module)) for name, module in model.named_modules() if module not in fused
    )
    layers = {name: layer for name, layer in found if layer is not None}
    dtypes = {layer.weight.dtype for layer in layers.values()}
    if dtypes and not dtypes & set(kernel.dtypes):
        takes, has = (", ".join(sorted(map(str, some))) for some in (kernel.dtypes, dtypes))
        raise ConfigError(
            f"{kernel.name} are for {takes}, and the linear layers are {has}: convert the model, "
            f"such as by model.to({kernel.dtypes[0]})."
        )
    return {
        name: layer
        for name, layer in layers.items()
        if layer.weight.dtype in kernel.dtypes and kernel.fits(layer)
    }


@torch.no_grad()
def use_sparse_(
    model: nn.Module, batch: Inputs, *, min_gain: float = 1.1, rounds: int = 7
) -> list[Timing]:
    """Execute linear layers by sparse kernels, in place, where that is faster here.

    On a CPU, compressed rows for layers with more than half of their weights zero. On a CUDA
    device, 2:4 kernels for float16 or bfloat16 matrices with two zeros among any four neighbours,
    whose rows are a multiple of 32 and whose columns are a multiple of 64. The model is for
    inference afterwards: save it before.

    Args:
        model: any module, its zeros exact. `Conv1D` counts as a linear layer.
        batch: as large as those that the model will see, as `sparsify_` takes them; it is run once.
        min_gain: how many times as fast a layer must have become.
        rounds: measured rounds of each layer.

    Returns:
        Every layer that the kernel takes, its two times, and whether the kernel is used. Where none
        is, nothing was gained by zeros: the times say so.

    Raises:
        ConfigError: for a model on a device, or in a dtype, that no sparse kernel is known for.
    """
    device = next(model.parameters()).device
    kernel = KERNELS.get(device.type)
    if kernel is None:
        raise ConfigError(
            f"no sparse kernel is known for {device.type!r}: move the model to a CPU "
            "(compressed rows) or to a CUDA device (2:4)."
        )
    chosen = _chosen(model, kernel)
    model.eval()
    with traced(model, list(chosen)) as trace:
        call_model(model, batch)
    timings = []
    for name, layer in chosen.items():
        if name not in trace.calls:
            continue
        dense = model.get_submodule(name)
        inputs = main_tensor(dense, trace.calls[name][0])
        sparse = kernel.make(layer)
        slow, fast = _median_ms([partial(dense, inputs), partial(sparse, inputs)], rounds, device)
        used = slow >= min_gain * fast
        if used:
            model.set_submodule(name, sparse)
        share = float((layer.weight == 0).float().mean())
        timings.append(Timing(name, kernel.name, share, slow, fast, used))
    return timings
