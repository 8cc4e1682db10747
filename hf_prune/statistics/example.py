"""Inputs that every model takes, for measuring it and for comparing it with another."""

import torch
from torch import nn
from transformers import PreTrainedModel

from hf_prune.errors import ConfigError
from hf_prune.statistics.batches import is_a


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


def tokens_up_to(model: PreTrainedModel, sequence_length: int) -> int:
    """So many tokens, or as many as a table of positions has; rotary ones have no table."""
    config = model.config.get_text_config()
    most = getattr(config, "max_position_embeddings", None)
    most = getattr(config, "max_target_positions", None) if most is None else most  # Whisper
    if most is None or sequence_length <= most:
        return sequence_length
    tables = (m.num_embeddings for m in model.modules() if isinstance(m, nn.Embedding))
    return most if most in tables else sequence_length


def _check_length(model: PreTrainedModel, sequence_length: int) -> None:
    most = tokens_up_to(model, sequence_length)
    if most < sequence_length:
        raise ConfigError(
            f"sequence_length={sequence_length} is more than the {most} positions of "
            f"{type(model).__name__}: set sequence_length to the number of tokens that it will see."
        )


def _ended(ids: torch.Tensor, end: int | list[int] | None, other: int) -> torch.Tensor:
    """`[B, T]` ids, each row with one end of a text, its last token: classifiers read there."""
    if end is None:
        return ids
    first = end if isinstance(end, int) else end[0]
    ids = ids.masked_fill(ids == first, other if other != first else other + 1)
    ids[:, -1] = first
    return ids


def example_batch(
    model: PreTrainedModel, batch_size: int, sequence_length: int
) -> dict[str, torch.Tensor]:
    """Inputs for measuring, on the model's device: `[B, T]` token ids, all of them real tokens.

    Images and sound are in the model's dtype.

    Encoder-decoders get as many for the decoder, models of multiple choice one choice,
    `[B, 1, T]`. Images, and sound for Whisper, have the one size
    that their model takes, whatever the length.

    Raises:
        ConfigError: when the model has fewer positions.
    """
    _check_length(model, sequence_length)
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
        if config.is_encoder_decoder:
            ids = _ended(ids, config.get_text_config().eos_token_id, low)
        if model.main_input_name == "input_ids":
            inputs |= {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        if config.is_encoder_decoder:
            inputs["decoder_input_ids"] = ids
    if is_a(model, "ForMultipleChoice"):
        inputs = {name: value.unsqueeze(1) for name, value in inputs.items()}  # [B, 1, T]
    return {
        name: value.to(model.device, model.dtype if value.is_floating_point() else None)
        for name, value in inputs.items()
    }
