"""Scores of single weights that read gradients, collected before anything is pruned."""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_prune.errors import DataError, NumericsError, UnsupportedModelError
from hf_prune.statistics.batches import forward_kwargs, to_device
from hf_prune.statistics.collect import SEED_STEP, sum_over_processes
from hf_prune.statistics.projection import project_output
from hf_prune.statistics.streams import in_eval, in_order
from hf_prune.weights.find import Matrix
from hf_prune.weights.inputs import check_ran, modules_that_run
from hf_prune.weights.walk import Inputs, call_model


@contextmanager
def differentiable(parameters: Sequence[Tensor]) -> Iterator[None]:
    """Inside a `with` block frozen parameters have gradients, too."""
    frozen = [parameter for parameter in parameters if not parameter.requires_grad]
    for parameter in frozen:
        parameter.requires_grad_(True)
    try:
        yield
    finally:
        for parameter in frozen:
            parameter.requires_grad_(False)


def output_tensor(value: object) -> Tensor:
    """The tensor that a module gives: logits, or the first of what it gives.

    Raises:
        UnsupportedModelError: when that is no tensor.
    """
    if isinstance(value, Mapping):
        value = value.get("logits", next(iter(value.values())))
    if isinstance(value, tuple | list) and value:
        value = value[0]
    if not isinstance(value, Tensor):
        raise UnsupportedModelError(
            f"the module gives a {type(value).__name__}, of which no gradient can be taken: let it "
            "give a tensor, or a tuple, list or dict that begins with one."
        )
    return value


def projected(model: nn.Module, batch: Inputs, seed: int, index: int) -> Tensor:
    """A random projection of the outputs of each example, summed.

    Directions are drawn from the content of an example where that is known; of the batches of other
    modules each has directions of its own, by its number `index`.
    """
    if isinstance(model, PreTrainedModel) and isinstance(batch, Mapping):
        moved = to_device(batch, model.device)
        output = model(**forward_kwargs(model, moved, labels=False))
        return project_output(model, moved, output, seed).sum()
    output = output_tensor(call_model(model, batch))
    signs = torch.randint(
        2, output.shape, generator=torch.Generator().manual_seed(seed + index), dtype=torch.int64
    )
    return (output * (signs.to(output.device) * 2 - 1)).sum()


def _loss(model: nn.Module, batch: Inputs) -> Tensor:
    if not isinstance(model, PreTrainedModel) or not isinstance(batch, Mapping):
        raise DataError(
            "criterion 'sensitivity' needs the loss of a transformers model on batches with "
            "labels. Use 'fisher_diagonal' for other modules: it needs no labels."
        )
    if "labels" not in batch:
        raise DataError("criterion 'sensitivity' needs labels in every batch.")
    loss = model(**forward_kwargs(model, to_device(batch, model.device), labels=True)).loss
    if loss is None:
        raise DataError(f"{type(model).__name__} gave no loss: pass all the labels that it needs.")
    assert isinstance(loss, Tensor)  # noqa: S101  # what a model gives
    return loss


def gradient_scores(
    model: nn.Module,
    matrices: Sequence[Matrix],
    batches: Sequence[Inputs],
    criterion: str,
    seed: int = 0,
    projections: int = 1,
) -> dict[str, Tensor]:
    """Scores `[G, R, C]` of each matrix; higher = keep.

    `sensitivity` is `|w * dL/dw|`, to first order what the loss changes by if a weight were zeroed,
    with the gradient averaged over batches (Lee et al. 2018, arXiv:1810.02340; Molchanov et al.
    2019, arXiv:1906.10771). `fisher_diagonal` is `w^2 * mean (d(v . z)/dw)^2` for random
    projections `v . z` of the outputs of each batch, half of the second-order change of the
    outputs; it needs no labels. `projections` says how many of each batch; each costs one backward
    pass.

    Raises:
        DataError: when there is no batch, or none with labels where they are needed.
        NumericsError: when a gradient is not finite, naming the parameter.
        UnsupportedModelError: when calibration never runs one of the matrices.
    """
    if not batches:
        raise DataError(f"criterion {criterion!r} needs calibration batches.")
    sums = {m.name: torch.zeros_like(m.parameter, dtype=torch.float32) for m in matrices}
    parameters = [matrix.parameter for matrix in matrices]
    first_order = criterion == "sensitivity"
    names = list(dict.fromkeys(n for m in matrices for n in (m.module, *m.others)))
    turns = range(1 if first_order else projections)
    with (
        in_eval(model),
        modules_that_run(),
        differentiable(parameters),
        in_order(model, names) as ran,
    ):
        for (index, batch), turn in itertools.product(enumerate(batches), turns):
            own = seed + turn * SEED_STEP
            with torch.enable_grad():
                value = _loss(model, batch) if first_order else projected(model, batch, own, index)
            found = torch.autograd.grad(value, parameters, allow_unused=True)
            for matrix, gradient in zip(matrices, found, strict=True):
                if gradient is not None:
                    sums[matrix.name] += gradient if first_order else gradient.square()
    check_ran([m.module for m in matrices if not {m.module, *m.others} & set(ran)])
    result = {}
    count = float(
        sum_over_processes(torch.tensor(float(len(batches)), device=parameters[0].device))
    )
    for matrix in matrices:
        total = sum_over_processes(sums[matrix.name]) / (count * len(turns))
        if not torch.isfinite(total).all():
            raise NumericsError(f"{matrix.name}: the gradient is not finite.")
        weight = matrix.parameter.detach().float()
        scores = (weight * total).abs() if first_order else weight.square() * total
        result[matrix.name] = matrix.view(scores.contiguous())
    return result
