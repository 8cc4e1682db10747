"""Teachers: a model that runs beside the student, or its logits on disk."""

import hashlib
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from hf_prune.errors import CheckpointError, ConfigError, DataError
from hf_prune.statistics.batches import Batch, forward_kwargs, main_input, to_device, token_mask

_NOT_FOR_THE_TEACHER = ("labels", "num_items_in_batch", "use_cache")
CACHE_VERSION = "1"
"""Version of the file of cached logits."""


def _labels(model: PreTrainedModel) -> dict[int, str]:
    return {int(index): str(name) for index, name in (model.config.id2label or {}).items()}


def _generic(names: Mapping[int, str]) -> bool:
    return all(name == f"LABEL_{index}" for index, name in names.items())


def check_teacher(student: PreTrainedModel, teacher: PreTrainedModel) -> None:
    """Refuse a teacher that speaks of other classes or tokens.

    Raises:
        ConfigError: naming what differs.
    """
    for name in ("num_labels", "vocab_size"):
        size, other = getattr(student.config, name, None), getattr(teacher.config, name, None)
        if size != other:
            raise ConfigError(f"{name} is {size} in the student and {other} in the teacher.")
    ours, theirs = _labels(student), _labels(teacher)
    if student.get_output_embeddings() is not None or _generic(ours) or _generic(theirs):
        return
    for index, label in ours.items():
        if theirs.get(index) != label:
            raise ConfigError(
                f"class {index} is {label!r} in the student and {theirs.get(index)!r} in the "
                "teacher: load both with the same id2label."
            )


def teacher_inputs(teacher: PreTrainedModel, kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """What the student was called with, without what is not for the teacher.

    Models with encoder and decoder make the decoder's inputs from the labels: they get them.
    """
    found = {name: value for name, value in kwargs.items() if name not in _NOT_FOR_THE_TEACHER}
    both = getattr(teacher.config, "is_encoder_decoder", False)
    if both and "labels" in kwargs and "decoder_input_ids" not in kwargs:
        found["labels"] = kwargs["labels"]
    return found


def _keys(inputs: Tensor, mask: Tensor) -> list[bytes]:
    """A digest of the real tokens, or pixels, of each example, whatever its padding and batch."""
    exact = inputs.float() if inputs.is_floating_point() else inputs.to(torch.int64)
    rows = [row[keep].cpu().numpy() for row, keep in zip(exact, mask, strict=True)]
    return [hashlib.blake2b(row.tobytes(), digest_size=16).digest() for row in rows]


def _no_cache(model: PreTrainedModel) -> ConfigError:
    return ConfigError(
        f"{type(model).__name__} gives no logits of classes or tokens that could be cached: let "
        "the teacher itself run beside its student, DistillCallback(teacher)."
    )


@torch.no_grad()
def cache_logits(
    teacher: PreTrainedModel, batches: Iterable[Batch], path: "str | os.PathLike[str]"
) -> int:
    """Write a teacher's logits to a file, so that it need not run while its students learn.

    Args:
        teacher: runs in eval mode, and is left as it was.
        batches: dicts of tensors. Examples are known by their tokens: order, padding and batches
            may differ later.
        path: of the file, in safetensors. Complete or absent, whatever happens.

    Returns:
        The number of examples.

    Raises:
        ConfigError: for a teacher that answers questions: its distributions are over the tokens of
            a padded batch, so that they differ from batch to batch.
        DataError: when there is no batch.
    """
    keys: list[bytes] = []
    values: list[Tensor] = []
    training = teacher.training
    teacher.eval()
    for batch in batches:
        batch = to_device(batch, teacher.device)
        mask = token_mask(teacher, batch)
        output = teacher(**forward_kwargs(teacher, batch, labels=False))
        if output.get("logits") is None:
            teacher.train(training)
            raise _no_cache(teacher)
        logits = output["logits"].cpu()
        keys += _keys(main_input(teacher, batch), mask)
        if logits.ndim == 3:
            values += [row[keep] for row, keep in zip(logits, mask.cpu(), strict=True)]
        else:
            values += list(logits.unsqueeze(1))  # [B, 1, C]
    teacher.train(training)
    if not keys:
        raise DataError("there is nothing to cache: no batch was given.")
    ends = torch.tensor([len(rows) for rows in values]).cumsum(0)
    names = torch.frombuffer(bytearray(b"".join(keys)), dtype=torch.uint8).view(-1, 16)
    tensors = {"keys": names, "ends": ends, "logits": torch.cat(values).contiguous()}
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    stage = target.with_name(f"{target.name}.tmp-{os.getpid()}")
    save_file(tensors, stage, {"hf_prune_logits": CACHE_VERSION})
    os.replace(stage, target)
    return len(keys)


class CachedLogits:
    """The logits of a teacher, from a file that `cache_logits` wrote.

    Raises:
        CheckpointError: when the file is not such a file.
    """

    def __init__(self, path: "str | os.PathLike[str]") -> None:
        self.path = Path(path)
        try:
            with safe_open(self.path, framework="pt") as file:
                if (file.metadata() or {}).get("hf_prune_logits") != CACHE_VERSION:
                    raise CheckpointError(f"{path} holds no cached logits: see cache_logits().")
                names, ends, self.logits = (
                    file.get_tensor(name) for name in ("keys", "ends", "logits")
                )
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{path}: {error}") from error
        starts = torch.cat([ends.new_zeros(1), ends[:-1]]).tolist()
        keys = [bytes(row) for row in names.tolist()]
        self.rows = dict(zip(keys, zip(starts, ends.tolist(), strict=True), strict=True))

    def check(self, student: PreTrainedModel) -> None:
        """Refuse a student with another number of classes or tokens.

        Raises:
            ConfigError: naming both numbers, or for a student that answers questions.
        """
        if type(student).__name__.endswith("ForQuestionAnswering"):
            raise _no_cache(student)
        causal = student.get_output_embeddings() is not None
        ours = student.config.vocab_size if causal else student.config.num_labels
        if int(self.logits.shape[-1]) != ours:
            raise ConfigError(
                f"the student has {ours} classes, {self.path} has {self.logits.shape[-1]}."
            )

    def __call__(self, inputs: Tensor, mask: Tensor, like: Tensor) -> Tensor:
        """The teacher's logits of a batch, in the shape of the student's.

        Args:
            inputs: `[B, T]`.
            mask: `[B, T]`, True for real tokens.
            like: `[B, C]` or `[B, T, C]`.

        Raises:
            DataError: naming the row that was not cached.
        """
        result = torch.zeros_like(like, requires_grad=False)
        for row, key in enumerate(_keys(inputs, mask)):
            if key not in self.rows:
                raise DataError(
                    f"row {row} of a batch is not in {self.path}: cache the logits of the data "
                    "that the student learns from, cut to the same length."
                )
            start, end = self.rows[key]
            found = self.logits[start:end].to(like)
            if like.ndim == 3:
                result[row, mask[row]] = found
            else:
                result[row] = found[0]
        return result
