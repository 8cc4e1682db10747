"""Exact counts: parameters by distinct storage, multiply-accumulates, bytes on disk."""

import tempfile
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedModel

from hf_prune.sites import layer_modules


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


def count_encoder_parameters(model: PreTrainedModel) -> int:
    """Parameters of the transformer layers: no embeddings, no head. Decoders have them too."""
    return _distinct(p for layer in layer_modules(model) for p in layer.parameters())


def count_nonzero(model: nn.Module) -> int:
    """Parameters that are not exactly zero, tied ones once."""
    return sum(int(torch.count_nonzero(p)) for p in model.parameters())


def _samples(model: PreTrainedModel, tokens: int) -> int:
    """Samples of sound of which the convolutions of a speech encoder make so many tokens."""
    config = model.config
    for kernel, stride in zip(
        reversed(config.conv_kernel), reversed(config.conv_stride), strict=True
    ):
        tokens = (tokens - 1) * stride + kernel
    return tokens


def _picture(model: PreTrainedModel, batch_size: int) -> torch.Tensor:
    config = getattr(model.config, "vision_config", model.config)
    return torch.zeros(batch_size, config.num_channels, config.image_size, config.image_size)


def example_batch(
    model: PreTrainedModel, batch_size: int, sequence_length: int
) -> dict[str, torch.Tensor]:
    """Inputs for measuring, on the model's device: `[B, T]` token ids, all of them real tokens.

    Encoder-decoders get as many for the decoder. Images, and sound for Whisper, have the one size
    that their model takes, whatever the length.
    """
    config, inputs = model.config, {}
    if model.main_input_name == "input_values":
        inputs["input_values"] = torch.zeros(batch_size, _samples(model, sequence_length))
    elif model.main_input_name == "input_features":
        frames = 2 * config.max_source_positions
        inputs["input_features"] = torch.zeros(batch_size, config.num_mel_bins, frames)
    if model.main_input_name == "pixel_values" or config.model_type == "clip":
        inputs["pixel_values"] = _picture(model, batch_size)
    if model.main_input_name == "input_ids" or config.is_encoder_decoder:
        vocabulary = int(config.get_text_config().vocab_size)
        generator = torch.Generator().manual_seed(0)
        low = min(5, vocabulary - 1)  # past padding and the like
        ids = torch.randint(low, vocabulary, (batch_size, sequence_length), generator=generator)
        if model.main_input_name == "input_ids":
            inputs |= {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        if config.is_encoder_decoder:
            inputs["decoder_input_ids"] = ids
    return {name: value.to(model.device) for name, value in inputs.items()}


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
    """Bytes of the weights on disk: the model is saved to a temporary folder, and measured."""
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return sum(path.stat().st_size for path in Path(folder).glob("*.safetensors"))
