"""The metric of the task: accuracy and loss on labelled batches."""

from collections.abc import Iterable

import torch
from transformers import PreTrainedModel

from hf_prune.errors import DataError, NumericsError
from hf_prune.statistics.batches import Batch, check_batch, main_input, to_device
from hf_prune.statistics.collect import sum_over_processes


@torch.inference_mode()
def evaluate(model: PreTrainedModel, batches: Iterable[Batch]) -> dict[str, float]:
    """Accuracy and mean loss of a classifier, over all batches of all processes.

    Args:
        model: gives `logits` `[B, C]` or `[B, T, C]`; labels of -100 are not counted.
        batches: dicts of tensors with `labels`.

    Returns:
        `accuracy` in [0, 1], `loss` (mean over batches, by examples) and `examples`.

    Raises:
        DataError: when there is nothing to evaluate, or no label.
        NumericsError: when the loss is not finite.
    """
    training = model.training
    model.eval()
    sums = torch.zeros(4, dtype=torch.float64)  # right, counted, loss, examples
    try:
        for index, batch in enumerate(batches):
            check_batch(model, batch, index)
            if "labels" not in batch:
                raise DataError(f"batch {index} has no 'labels' to compare with.")
            batch = to_device(batch, model.device)
            output = model(**batch)
            labels = batch["labels"]
            counted = labels != -100
            right = (output.logits.argmax(dim=-1) == labels) & counted
            rows = main_input(model, batch).shape[0]
            loss = float(output.loss) * rows
            sums += torch.tensor([int(right.sum()), int(counted.sum()), loss, rows])
    finally:
        model.train(training)
    right, counted, loss, rows = sum_over_processes(sums.to(model.device)).tolist()
    if not counted:
        raise DataError("there is nothing to evaluate: no batch, or no label other than -100.")
    if loss != loss or loss in (float("inf"), float("-inf")):
        raise NumericsError("the evaluation loss is not finite.")
    return {"accuracy": right / counted, "loss": loss / rows, "examples": int(rows)}
