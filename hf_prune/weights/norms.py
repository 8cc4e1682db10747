"""One layer pruned from the norms of its inputs alone: no Gram matrix, no second network.

What Wanda without a re-fit needs. All matrices of a layer are judged by what they saw in one pass,
and pruned together, as in the paper.

Source: Sun et al. 2023, arXiv:2306.11695.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from hf_prune.errors import NumericsError
from hf_prune.statistics.collect import sum_over_processes
from hf_prune.statistics.moments import same_on_all
from hf_prune.weights.find import Matrix, set_values_
from hf_prune.weights.inputs import never_ran, real_rows
from hf_prune.weights.patterns import keep
from hf_prune.weights.problem import Options
from hf_prune.weights.walk import Real


def _squares(
    layer: nn.Module, local: Mapping[str, str], run: Callable[[int], Any], real: Sequence[Real]
) -> dict[str, Tensor]:
    """The mean square of every input over real tokens of all processes, `[C]` in float64."""
    modules = {name: layer.get_submodule(inner) for name, inner in local.items()}
    sums: dict[str, Tensor] = {}
    counts = dict.fromkeys(modules, 0)
    now: list[Real] = [Real()]
    handles = []
    for name, module in modules.items():

        def add(module: nn.Module, args: tuple[Tensor, ...], name: str = name) -> None:
            rows = real_rows(args[0].detach(), now[0].of(local[name]))
            found = rows.float().square().sum(dim=0).double()
            sums[name] = sums[name] + found if name in sums else found
            counts[name] += len(rows)

        handles.append(module.register_forward_pre_hook(add))
    try:
        for index, here in enumerate(real):
            now[0] = here
            run(index)
    finally:
        for handle in handles:
            handle.remove()
    found = {}
    for name, value in sums.items():
        count = sum_over_processes(torch.tensor([float(counts[name])], device=value.device))
        found[name] = sum_over_processes(value) / count.clamp(min=1)
    return found


@torch.no_grad()
def prune_by_norms(
    layer: nn.Module,
    local: Mapping[str, str],
    matrices: Sequence[Matrix],
    removed: Mapping[str, Sequence[int]],
    options: Options,
    *,
    run: Callable[[int], Any],
    real: Sequence[Real],
) -> Iterator[tuple[Matrix, Tensor, float]]:
    """Prune the linear matrices of a layer by `|W| * norm of the input`, in place.

    Args:
        layer: that runs.
        local: by module of the model, its name in the layer.
        matrices: of the layer; linear ones.
        removed: entries to remove from each matrix, by parameter name.
        options: of which the pattern and the masks of earlier stages count.
        run: runs the layer on a batch, given by its number.
        real: which tokens of each batch are real, by names in the layer.

    Yields:
        Each matrix, its mask, and the share of its outputs' mean square that is lost, if inputs
        were uncorrelated.

    Raises:
        NumericsError: when inputs are not finite, naming the parameter.
        UnsupportedModelError: when calibration never runs a matrix.
    """
    squares = _squares(layer, {m.module: local[m.module] for m in matrices}, run, real)
    for matrix in matrices:
        if matrix.module not in squares:
            raise never_ran([matrix.module])
        inputs = squares[matrix.module]
        if not bool(torch.isfinite(inputs).all()):
            raise NumericsError(f"{matrix.name}: its inputs on calibration data are not finite.")
        weight = matrix.view(matrix.parameter.data)[0]
        scores = weight.float().abs() * inputs.sqrt().float()
        count, allowed = removed[matrix.name][0], options.allowed_of(matrix, 0)
        rows, columns = weight.shape
        pattern = options.pattern.at(count, (rows, columns))
        kept = keep(same_on_all(scores), count, pattern, allowed)
        lost = scores.double().square()
        error = float((lost * ~kept).sum() / lost.sum().clamp(min=1e-30))
        mask = torch.ones_like(matrix.parameter, dtype=torch.bool)
        matrix.write_(mask, 0, kept)
        set_values_(matrix, 0, torch.where(kept, weight, 0))
        yield matrix, mask, error
