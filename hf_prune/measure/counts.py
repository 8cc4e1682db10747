"""Exact counts: parameters by distinct storage, multiply-accumulates, bytes on disk."""

from collections.abc import Iterable

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedModel

from hf_prune.sites import layer_modules
from hf_prune.statistics.example import example_batch


def _distinct(parameters: Iterable[nn.Parameter]) -> int:
    """Entries of parameters that lie in distinct storages (shared ones once)."""
    seen: dict[tuple[object, ...], int] = {}
    for parameter in parameters:
        meta = parameter.device.type == "meta"
        where = id(parameter) if meta else parameter.untyped_storage().data_ptr()
        key = (parameter.device, where, 0 if meta else parameter.storage_offset())
        seen[key] = max(seen.get(key, 0), parameter.numel())
    return sum(seen.values())


def count_parameters(model: nn.Module) -> int:
    """All parameters, tied ones once."""
    return _distinct(model.parameters())


def count_memory(model: nn.Module) -> int:
    """Bytes of all parameters in memory, tied ones once, each in its own dtype."""
    by_size: dict[int, list[nn.Parameter]] = {}
    for parameter in model.parameters():
        by_size.setdefault(parameter.element_size(), []).append(parameter)
    return sum(size * _distinct(parameters) for size, parameters in by_size.items())


def count_encoder_parameters(model: PreTrainedModel) -> int:
    """Parameters of the transformer layers: no embeddings, no head. Decoders have them too."""
    return _distinct(p for layer in layer_modules(model) for p in layer.parameters())


def count_nonzero(model: nn.Module) -> int:
    """Parameters that are not exactly zero, tied ones once."""
    return sum(int(torch.count_nonzero(p)) for p in model.parameters())


@torch.no_grad()
def count_macs(model: PreTrainedModel, sequence_length: int = 128) -> int:
    """Multiply-accumulates of one sequence: half the FLOPs that torch counts in a real pass."""
    training = model.training
    model.eval()
    kwargs = {"use_cache": False} if hasattr(model.config, "use_cache") else {}
    trained = [p for p in model.parameters() if p.requires_grad]
    for parameter in trained:  # the counter cannot follow parameters that modules hand on
        parameter.requires_grad_(False)
    try:
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            model(**example_batch(model, 1, sequence_length), **kwargs)
    finally:
        model.train(training)
        for parameter in trained:
            parameter.requires_grad_(True)
    return int(counter.get_total_flops()) // 2


def count_bytes(model: PreTrainedModel) -> int:
    """Bytes of the weights on disk: all tensors that are saved, shared ones once; no headers."""
    sizes: dict[tuple[object, ...], int] = {}
    for tensor in model.state_dict().values():
        key = (tensor.device, tensor.untyped_storage().data_ptr(), tensor.storage_offset())
        sizes[key] = max(sizes.get(key, 0), tensor.numel() * tensor.element_size())
    return sum(sizes.values())
