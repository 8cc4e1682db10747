"""The metric of the task: accuracy and loss on labelled batches."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from hf_prune.errors import DataError, NumericsError
from hf_prune.statistics.batches import (
    Batch,
    check_batch,
    is_a,
    is_causal_lm,
    main_input,
    summed_loss,
    to_device,
)
from hf_prune.statistics.collect import sum_over_processes
from hf_prune.statistics.logits import kind_of, logits_of


def _judged(model: PreTrainedModel, labels: Tensor, output: Any) -> tuple[int, int]:
    """Right answers and all of them; none, where labels are not each one of several classes."""
    if is_a(model, "ForCTC") or kind_of(model, output) != "classes":
        return 0, 0
    found = logits_of(output).argmax(dim=-1)
    if is_causal_lm(model):  # what stands at `t` predicts the label at `t + 1`
        found, labels = found[:, :-1], labels[:, 1:]
    counted = labels != -100
    return int(((found == labels) & counted).sum()), int(counted.sum())


@torch.inference_mode()
def evaluate(model: PreTrainedModel, batches: Iterable[Batch]) -> dict[str, float]:
    """Accuracy and mean loss, over all batches of all processes.

    Args:
        model: gives `logits` `[B, C]` or `[B, T, C]`; labels of -100 are not counted.
        batches: dicts of tensors with `labels`.

    Returns:
        `loss` (mean over batches, by examples) and `examples`; and where each label is one of
        several classes or a token, `accuracy` in [0, 1]. Numbers, several labels at once and
        transcripts (CTC) have none. A causal language model is right where it predicts the next
        token.

    Raises:
        DataError: when there is nothing to evaluate, no label, or no loss of it.
        NumericsError: when the loss is not finite.
    """
    training = model.training
    model.eval()
    sums = torch.zeros(5, dtype=torch.float64)  # right, judged, counted, loss, examples
    try:
        for index, batch in enumerate(batches):
            check_batch(model, batch, index)
            if "labels" not in batch:
                raise DataError(f"batch {index} has no 'labels' to compare with.")
            batch = to_device(batch, model.device)
            output = model(**batch)
            if output.loss is None:
                raise DataError(
                    f"{type(model).__name__} gave no loss for batch {index}: pass all the labels "
                    "that it needs."
                )
            labels = batch["labels"]
            rows = main_input(model, batch).shape[0]
            loss = float(summed_loss(model, output.loss, rows))
            counted = int((labels != -100).sum())
            sums += torch.tensor([*_judged(model, labels, output), counted, loss, rows])
    finally:
        model.train(training)
    right, judged, counted, loss, rows = sum_over_processes(sums.to(model.device)).tolist()
    if not counted:
        raise DataError("there is nothing to evaluate: no batch, or no label other than -100.")
    if loss != loss or loss in (float("inf"), float("-inf")):
        raise NumericsError("the evaluation loss is not finite.")
    accuracy = {"accuracy": right / judged} if judged else {}
    return {**accuracy, "loss": loss / rows, "examples": int(rows)}
