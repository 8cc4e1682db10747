"""Norms and biases alone, trained for a few steps towards the dense network's outputs.

What is left to repair after a re-fit, at hardly any cost: no optimizer state of a matrix, no label,
and no zero is touched. Examples to which nothing was fitted say whether it is kept: a decoder knows
its calibration text by heart after a re-fit, so that examples of that one would see nothing.

Source: recovery through normalisation alone is that of Frankle et al. 2020, arXiv:2003.00152, who
train nothing else; the target here is the dense network's distribution.
"""

import fnmatch
import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_prune.errors import DataError, NumericsError
from hf_prune.statistics.batches import Batch, forward_kwargs, to_device
from hf_prune.statistics.collect import sum_over_processes
from hf_prune.statistics.logits import Said, divergence, has_head, said
from hf_prune.statistics.streams import in_eval
from hf_prune.surgery.dense import set_apart

JUDGES = 2
"""Seed of the examples that judge a polish: others than choose a ridge, or judge a search."""


def with_judges(
    model: PreTrainedModel, batches: Sequence[Batch]
) -> tuple[list[Batch], list[Batch]]:
    """Batches to fit to, and batches of other examples, which judge a polish afterwards.

    Raises:
        DataError: when the model gives no logits; and, on every process, when one of them has
            nothing to fit to, or none of them a judge.
    """
    fitted, judges = set_apart(model, batches, JUDGES)
    found = torch.tensor([float(not fitted), float(len(judges))], device=model.device)
    empty, judging = sum_over_processes(found).tolist()
    if empty or not judging:
        raise DataError(
            "polish_steps: one calibration example in five judges, and there are too few of them: "
            "pass some dozens."
        )
    with in_eval(model), torch.no_grad():
        _said(model, to_device(fitted[0], model.device))
    return fitted, judges


def _said(model: PreTrainedModel, batch: Batch) -> Said:
    output = model(**forward_kwargs(model, batch, labels=False))
    if not has_head(output):
        raise DataError(f"{type(model).__name__} gives no logits: a polish needs a task head.")
    return said(model, batch, output)


def _divergence(model: PreTrainedModel, dense: PreTrainedModel, batch: Batch) -> tuple[Tensor, int]:
    """Mean divergence from the dense network over a batch, and of how many rows."""
    with torch.no_grad():
        wanted = _said(dense, to_device(batch, dense.device)).to(model.device)
    found = divergence(wanted, _said(model, to_device(batch, model.device)))
    return found.sum() / max(len(found), 1), len(found)


@torch.no_grad()
def _judged(model: PreTrainedModel, dense: PreTrainedModel, judges: Sequence[Batch]) -> float:
    """Mean divergence on the examples that judge, of all processes; NaN, where there is none."""
    total = torch.zeros(2, dtype=torch.float64, device=model.device)
    for batch in judges:
        loss, rows = _divergence(model, dense, batch)
        total += torch.tensor([float(loss) * rows, rows], device=total.device)
    lost, rows = sum_over_processes(total).tolist()
    return lost / rows if rows else math.nan


def _train(
    model: PreTrainedModel,
    dense: PreTrainedModel,
    batches: Sequence[Batch],
    vectors: Sequence[nn.Parameter],
    steps: int,
    learning_rate: float,
) -> None:
    """Adam on some vectors of a model, one batch a step."""
    optimizer = torch.optim.Adam(vectors, lr=learning_rate)
    falling = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    for step in range(steps):
        loss, rows = _divergence(model, dense, batches[step % len(batches)])
        wrong = torch.tensor(float(not torch.isfinite(loss)), device=loss.device)
        if bool(sum_over_processes(wrong)):
            raise NumericsError(f"the loss of step {step} of a polish is not finite.")
        gradients = torch.autograd.grad(loss * rows, vectors, allow_unused=True)
        count = sum_over_processes(torch.tensor(float(rows), device=loss.device)).clamp(min=1)
        for vector, gradient in zip(vectors, gradients, strict=True):
            if gradient is not None:
                vector.grad = sum_over_processes(gradient) / count.to(gradient.dtype)
        optimizer.step()
        falling.step()
    for vector in vectors:
        vector.grad = None


def polish_(
    model: PreTrainedModel,
    dense: PreTrainedModel,
    batches: Sequence[Batch],
    judges: Sequence[Batch],
    *,
    steps: int,
    learning_rate: float = 1e-3,
    ignore: Sequence[str] = (),
) -> dict[str, float | bool]:
    """Train norms and biases towards the dense network's distribution, in place.

    Args:
        model: pruned; run in eval mode and left in the mode it was in.
        dense: what it should say.
        batches: one batch a step, again and again. Labels are not used, and padding is never
            counted.
        judges: batches of other examples, to which nothing was fitted, as `with_judges` gives them.
        steps: of Adam, its rate falling to zero.
        learning_rate: at the start.
        ignore: shell patterns of parameters, with or without the name of the base model, that are
            left alone, as a stage has them.

    Returns:
        `before` and `after`, the divergence in nats on the examples that judge, and whether the
        result was `kept`: it is not, where they got worse, or there are none.

    Raises:
        DataError: when there are no batches, or the model gives no logits.
        NumericsError: when the loss is not finite; the model is as it was.
    """
    if not batches:
        raise DataError("a polish needs calibration batches.")
    prefix = f"{model.base_model_prefix}."
    vectors = [
        parameter
        for name, parameter in model.named_parameters()
        if parameter.ndim == 1
        and not any(
            fnmatch.fnmatchcase(each, pattern)
            for pattern in ignore
            for each in (name, name.removeprefix(prefix))
        )
    ]
    old = [vector.detach().clone() for vector in vectors]
    wanted = [vector.requires_grad for vector in vectors]
    kept = False
    try:
        with in_eval(model, dense), torch.enable_grad():
            before = _judged(model, dense, judges)
            for vector in vectors:
                vector.requires_grad_()
            _train(model, dense, batches, vectors, steps, learning_rate)
            after = _judged(model, dense, judges)
        kept = after < before
    finally:
        for vector, value, grad in zip(vectors, old, wanted, strict=True):
            vector.requires_grad_(grad)
            if not kept:
                vector.data.copy_(value)
    return {"before": before, "after": after, "kept": kept}
