"""Calibration batches: checked, cut to size, moved, and their padding known."""

import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor
from transformers import PreTrainedModel

from hf_prune.errors import ConfigError, DataError
from hf_prune.statistics.processes import share_of_process

Batch = Mapping[str, Tensor]


def main_input(model: PreTrainedModel, batch: Batch) -> Tensor:
    """The tensor whose first axis counts examples: `input_ids`, or `inputs_embeds`."""
    for name in (model.main_input_name, "inputs_embeds"):
        if name in batch:
            return batch[name]
    raise DataError(f"a batch has no {model.main_input_name!r}; its keys are {sorted(batch)}.")


def _check_labels(labels: Tensor, classes: int, index: int) -> None:
    bad = ((labels < 0) & (labels != -100)) | (labels >= classes)
    if bad.any():
        row = int(bad.reshape(bad.shape[0], -1).any(dim=1).nonzero()[0])
        value = int(labels[bad][0])
        raise DataError(
            f"batch {index}, row {row}: label {value} is outside [0, {classes}). "
            "Load the model with num_labels of your data, or map the labels."
        )


def _vocabulary_size(model: PreTrainedModel) -> int | None:
    """How many token ids the model knows; None where it does not read any, or does not say."""
    try:
        return getattr(model.get_input_embeddings(), "num_embeddings", None)
    except NotImplementedError:  # models of images and sound, and with several towers
        return None


def is_a(model: PreTrainedModel, *endings: str) -> bool:
    """Whether the class of a model, or one that it is derived from, has a name with such an end."""
    return any(kind.__name__.endswith(endings) for kind in type(model).__mro__)


def _classes(model: PreTrainedModel, batch: Batch) -> int:
    """How many classes a label is one of."""
    if is_a(model, "ForMultipleChoice"):
        return main_input(model, batch).shape[1]  # [B, choices, T]
    if is_a(model, "ForCTC"):
        return int(model.config.vocab_size)
    vocabulary = _vocabulary_size(model)
    speaks = model.get_output_embeddings() is not None and vocabulary
    return int((vocabulary if speaks else model.config.num_labels) or 0)


def _check_tensors(batch: Batch, index: int) -> None:
    if not isinstance(batch, Mapping):
        raise DataError(f"batch {index} is a {type(batch).__name__}; expected a dict of tensors.")
    for name, value in batch.items():
        if isinstance(value, Tensor):
            continue
        text = isinstance(value, str) or (
            isinstance(value, Sequence) and any(isinstance(item, str) for item in value)
        )
        fix = (
            f"Remove the column of texts {name!r} from the data: the model reads what a tokenizer "
            "makes of it."
            if text
            else "Let the tokenizer or processor make tensors, with padding=True and "
            'return_tensors="pt"; or remove the column, if the model does not read it.'
        )
        raise DataError(
            f"batch {index}: {name!r} is a {type(value).__name__}; expected a tensor. {fix}"
        )


def check_batch(model: PreTrainedModel, batch: Batch, index: int) -> None:
    """Refuse what would crash or poison a pass, before it runs.

    Raises:
        DataError: naming the batch and the row of a label or token id out of range, what is no
            tensor, or an empty batch.
    """
    _check_tensors(batch, index)
    inputs = main_input(model, batch)
    if inputs.numel() == 0:
        raise DataError(f"batch {index} is empty: its input has shape {list(inputs.shape)}.")
    vocabulary = _vocabulary_size(model)
    if vocabulary and not inputs.is_floating_point():
        bad = (inputs < 0) | (inputs >= vocabulary)
        if bad.any():
            row = int(bad.flatten(1).any(dim=1).nonzero()[0])
            raise DataError(
                f"batch {index}, row {row}: token id {int(inputs[bad][0])} is outside "
                f"[0, {vocabulary}). Is the tokenizer the one of this model?"
            )
    labels = batch.get("labels")
    if labels is not None and not labels.is_floating_point():
        _check_labels(labels, _classes(model, batch), index)


def _first(batch: Batch, rows: int, examples: int) -> dict[str, Tensor]:
    return {
        name: value[:rows] if value.ndim and value.shape[0] == examples else value
        for name, value in batch.items()
    }


def take(
    model: PreTrainedModel, batches: Iterable[Batch] | None, *, at_least: int, at_most: int
) -> list[dict[str, Tensor]]:
    """The first examples of `batches`, checked: `at_most` of all processes together.

    Raises:
        ConfigError: when no more are asked for than would be too few.
        DataError: on every process, when one has nothing, or all together have less than
            `at_least`; or when something is out of range.
    """
    if at_most < at_least:
        raise ConfigError(
            f"calibration_samples (or reconstruction_samples) asks for {at_most} examples, fewer "
            f"than min_calibration_samples={at_least}: raise the one, or lower the other."
        )
    asked, at_most = at_most, share_of_process(at_most)
    taken: list[dict[str, Tensor]] = []
    count = 0
    for index, batch in enumerate(batches or ()):
        check_batch(model, batch, index)
        examples = main_input(model, batch).shape[0]
        taken.append(_first(batch, min(examples, at_most - count), examples))
        count += min(examples, at_most - count)
        if count >= at_most:
            break
    counts = gather_object([count])
    if min(counts) == 0 and asked >= len(counts):
        raise DataError(
            "the calibration set is empty. Pass batches (dicts of tensors); an iterator can be "
            "consumed only once."
        )
    check_enough(sum(counts), at_least)
    return taken


def check_enough(examples: int, at_least: int) -> None:
    """Refuse to calibrate on fewer examples, of all processes, than a recipe asks for.

    Raises:
        DataError: saying both numbers.
    """
    if examples < at_least:
        raise DataError(
            f"the calibration set has {examples} examples to fit to, fewer than "
            f"min_calibration_samples={at_least}. Pass more batches, or lower it in the recipe."
        )


def first_examples(model: PreTrainedModel, batches: Sequence[Batch], count: int) -> list[Batch]:
    """As many whole batches as hold `count` examples of all processes, the last one cut."""
    count, taken = share_of_process(count), list[Batch]()
    for batch in batches:
        if count <= 0:
            break
        examples = main_input(model, batch).shape[0]
        taken.append(batch if examples <= count else _first(batch, count, examples))
        count -= examples
    return taken


def examples_of(batch: Batch, chosen: Tensor) -> dict[str, Tensor]:
    """Some examples of a batch: those where `chosen`, `[B]`, is True."""
    return {
        name: value[chosen.to(value.device)]
        if value.ndim and value.shape[0] == len(chosen)
        else value
        for name, value in batch.items()
    }


def one_by_one(model: PreTrainedModel, batch: Batch) -> Iterator[dict[str, Tensor]]:
    """Each example of a batch, in a batch of its own."""
    examples = main_input(model, batch).shape[0]
    for row in range(examples):
        yield {
            name: value[row : row + 1] if value.ndim and value.shape[0] == examples else value
            for name, value in batch.items()
        }


def to_device(batch: Batch, device: torch.device) -> dict[str, Tensor]:
    """The batch on a device."""
    return {name: value.to(device) for name, value in batch.items()}


def by_token(values: Tensor, mask: Tensor) -> Tensor:
    """The rows of real tokens, `[real tokens, N]`, of `[B, T, N]`, or of `[B * T, N]`.

    With several choices an example, `mask` is `[B, choices * T]`, and values `[B * choices, T, N]`.
    """
    if values.shape[:-1] != mask.shape:
        values = values.reshape(*mask.shape, values.shape[-1])
    rows: Tensor = values.flatten(0, 1) if bool(mask.all()) else values[mask]
    return rows


def token_mask(model: PreTrainedModel, batch: Batch) -> Tensor:
    """True for real tokens, `[B, T]`; all of them where the batch has no attention mask of them.

    With several choices an example, `[B, choices, T]`. Of a spectrogram, `[B, bins, frames]`, the
    attention mask is one of frames, of which Whisper reads all, and so it says nothing here.
    """
    inputs = main_input(model, batch)
    mask = batch.get("attention_mask")
    fits = inputs.shape[:2] if inputs.is_floating_point() else inputs.shape
    if mask is None or mask.shape != fits:
        return torch.ones(fits, dtype=torch.bool, device=inputs.device)
    return mask.bool()


def decoder_mask(batch: Batch) -> Tensor | None:
    """Which tokens of a decoder are real, `[B, T]`; None where nothing says so.

    Said by `decoder_attention_mask`; or by labels, of which -100 is padding; or, where the decoder
    reads what the encoder reads, one place later, by `attention_mask`.
    """
    told = batch.get("decoder_attention_mask")
    if told is not None:
        return told.bool()
    if "labels" in batch and batch["labels"].ndim == 2:
        return batch["labels"] != -100
    mask = batch.get("attention_mask")
    if mask is None or mask.ndim != 2 or "input_ids" not in batch or "decoder_input_ids" in batch:
        return None
    return torch.cat([torch.ones_like(mask[:, :1]), mask[:, :-1]], dim=1).bool()


def sequence_mask(model: PreTrainedModel, batch: Batch, module: str, like: Tensor) -> Tensor:
    """True for the real ones of the tokens that a module sees, `[B, T]`.

    A decoder reads another sequence than its encoder, a tower of images another than one of text.
    What is neither padded nor told about is real: patches of an image, frames of sound.

    Args:
        model: whose batch it is.
        batch: with `attention_mask`, and of encoder-decoders `decoder_attention_mask`, or labels of
            which -100 is padding.
        module: dotted path of the module from the base model.
        like: what the module sees or gives, `[B, T, E]` or `[B * T, E]`.

    Raises:
        DataError: when there is padding, and it cannot be told where the module sees it.
    """
    examples = main_input(model, batch).shape[0]
    tokens = like.numel() // like.shape[-1] // examples
    parts = module.split(".")
    decoder = bool(model.config.is_encoder_decoder) and "decoder" in parts
    mask = decoder_mask(batch) if decoder else batch.get("attention_mask")
    if mask is not None and is_a(model, "ForMultipleChoice"):
        mask = mask.flatten(1)  # [B, choices, T] -> [B, choices * T]
    if mask is not None and mask.shape == (examples, tokens) and "vision_model" not in parts:
        return mask.bool()
    told = mask is not None and not bool(mask.bool().all()) and "vision_model" not in parts
    if told and not decoder:
        raise DataError(
            f"{module} sees {tokens} tokens, and the attention mask of shape "
            f"{list(mask.shape)} does not say which of them are padding. Pass examples of one "  # type: ignore[union-attr]  # told
            "length, without a mask."
        )
    return torch.ones(examples, tokens, dtype=torch.bool, device=like.device)


def is_causal_lm(model: PreTrainedModel) -> bool:
    """Whether the logits at `t` predict the label at `t + 1`.

    Masked language models and those with encoder and decoder predict the label at `t` itself.
    """
    speaks = model.get_output_embeddings() is not None
    masked = is_a(model, "ForMaskedLM", "ForPreTraining", "ForCTC")
    return speaks and not masked and not getattr(model.config, "is_encoder_decoder", False)


def counted_positions(model: PreTrainedModel, labels: Tensor) -> Tensor:
    """True where the logits predict a label: `[B]`, or `[B, T]`.

    In causal language models the logits at `t` predict the label at `t + 1`.
    """
    counted = labels != -100
    if is_causal_lm(model) and labels.ndim == 2:
        counted = torch.cat([counted[:, 1:], torch.zeros_like(counted[:, :1])], dim=1)
    return counted


def labels_of_examples(model: PreTrainedModel, batch: Batch) -> Tensor:
    """Of how many labels the loss of each example is a mean, `[B]`.

    That of an answer in a text is of one, its span; that of a CTC model of one, its transcript.

    Raises:
        ConfigError: for a model whose loss adds up means over different things.
    """
    if is_a(model, "ForPreTraining") and model.get_output_embeddings() is not None:
        raise ConfigError(
            f"the loss of {type(model).__name__} adds a mean over tokens to one over examples, so "
            "that it depends on how examples are batched. Load the model as ForMaskedLM; or use a "
            "criterion without labels such as 'kfac_obs', and batches without them."
        )
    inputs = main_input(model, batch)
    examples = inputs.shape[0]
    if "labels" not in batch or is_a(model, "ForCTC"):
        return torch.ones(examples, dtype=torch.int64, device=inputs.device)
    return counted_positions(model, batch["labels"]).view(examples, -1).sum(dim=1)


def summed_loss(model: PreTrainedModel, loss: Tensor, count: int) -> Tensor:
    """The loss of a batch times the labels that it is a mean over; of CTC it may be a sum already.

    Args:
        model: that gave the loss.
        loss: of a batch.
        count: of labels.
    """
    summed = is_a(model, "ForCTC") and model.config.ctc_loss_reduction == "sum"
    return loss if summed else loss * count


def forward_kwargs(model: PreTrainedModel, batch: Batch, *, labels: bool) -> dict[str, Any]:
    """What to call the model with: no cache, and labels only where they are wanted."""
    given = {"decoder_input_ids", "decoder_inputs_embeds"} & set(batch)
    if model.config.is_encoder_decoder and not given and "labels" in batch:
        labels = labels or batch["labels"].ndim == 2  # from which the decoder's input is made
    kwargs: dict[str, Any] = {
        name: value for name, value in batch.items() if labels or name != "labels"
    }
    if hasattr(model.config.get_text_config(), "use_cache"):
        kwargs["use_cache"] = False
    return kwargs


def example_seed(inputs: Tensor, mask: Tensor, seed: int) -> int:
    """A seed from the content of one example, without its padding.

    So that what is random about an example does not depend on its batch, its place or its process.
    """
    content = inputs[mask].detach().cpu().contiguous()
    return zlib.crc32(content.view(torch.uint8).numpy().tobytes(), seed & 0xFFFFFFFF)
