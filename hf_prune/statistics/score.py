"""Scores: what a criterion says of the units of each site, as rankings."""

import zlib
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_prune.criteria import get_criterion, needs
from hf_prune.criteria.ranking import Ranking
from hf_prune.errors import ConfigError, NumericsError
from hf_prune.recipe import Prune
from hf_prune.sites import Site, base_model, gate_weight
from hf_prune.statistics.collect import PROJECTED, SAMPLED, Statistics


def check_weights(model: nn.Module) -> None:
    """Refuse a model with weights that are not finite, before anything is computed from them.

    Raises:
        NumericsError: naming the first such parameter.
    """
    for name, parameter in model.named_parameters():
        if not torch.isfinite(parameter).all():
            count = int((~torch.isfinite(parameter)).sum())
            raise NumericsError(
                f"{name} has {count} values that are NaN or infinite. The checkpoint is damaged or "
                "training diverged: nothing was changed."
            )


def _generator(site: Site, seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(zlib.crc32(site.name.encode(), seed & 0xFFFFFFFF))


def _as_ranking(found: "Tensor | Ranking", site: Site, criterion: str) -> Ranking:
    values = found.errors if isinstance(found, Ranking) else found
    if not torch.isfinite(values).all():
        raise NumericsError(
            f"{site.name}: criterion {criterion!r} gave a score that is not finite."
        )
    return found if isinstance(found, Ranking) else Ranking.from_scores(found.double().cpu())


@torch.no_grad()
def score(
    model: PreTrainedModel,
    sites: Sequence[Site],
    criterion: str,
    statistics: Statistics | None = None,
    seed: int = 0,
) -> dict[str, Ranking]:
    """The order in which units go and what is lost, for each site.

    Args:
        model: whose weights are read.
        sites: from `find_sites`.
        criterion: a key of `hf_prune.criteria.CRITERIA`.
        statistics: from `collect`, with what the criterion needs.
        seed: of random criteria; each site draws from its own stream.

    Returns:
        For each site a ranking, on the CPU. Criteria that judge units one by one give scores, which
        add up.

    Raises:
        NumericsError: when a score is not finite, naming the site.
    """
    function = get_criterion(criterion)
    base = base_model(model)
    result = {}
    for site in sites:
        arguments: dict[str, object] = {
            name: _generator(site, seed)
            if name == "generator"
            else (statistics or {})[site.name][name]
            for name in needs(function)
        }
        found = function(gate_weight(base, site).detach().cpu(), **arguments)
        result[site.name] = _as_ranking(found, site, criterion)
    return result


def check_projections(stage: Prune) -> None:
    """Refuse `projections` of a structured stage whose criterion draws none.

    Raises:
        ConfigError: saying which do.
    """
    drawn = set(needs(get_criterion(stage.criterion))) & (PROJECTED | SAMPLED)
    if stage.projections > 1 and not drawn:
        raise ConfigError(
            f"projections={stage.projections}: criterion {stage.criterion!r} draws none, and they "
            "would be ignored. Leave them out, or use kfac_obs or fisher."
        )
