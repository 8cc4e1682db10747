"""What a stage lets solvers choose from: the levels of each site, and which units it keeps."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from hf_prune.budget.levels import Levels, stage_levels
from hf_prune.budget.solvers import get_solver
from hf_prune.budget.template import apply_template
from hf_prune.criteria.ranking import Ranking
from hf_prune.errors import ConfigError
from hf_prune.recipe import Prune
from hf_prune.sites import Site


@dataclass(frozen=True)
class Prepared:
    """Rankings and levels that hold all that a stage demands."""

    rankings: Mapping[str, Ranking]
    levels: Levels


MASK_SEARCH = "mask_search"
"""The solver that exchanges units within a site, after its levels are chosen."""
PAIRED = ("block_fisher",)
"""Criteria that judge pairs of units, which it needs."""


def check_solver(stage: Prune) -> None:
    """Refuse a solver that nobody knows, or that cannot work with the criterion.

    Raises:
        ConfigError: with what to write instead.
    """
    get_solver(stage.solver)
    if stage.solver == MASK_SEARCH and stage.criterion not in PAIRED:
        raise ConfigError(
            f"solver: mask_search exchanges units by what pairs of them lose together, which "
            f"criterion {stage.criterion!r} does not say: write criterion: {PAIRED[0]}."
        )


def _with_swaps(ranking: Ranking) -> Ranking:
    if ranking.pairs is None:
        raise ConfigError("mask_search needs rankings with pairs, from criterion: block_fisher.")
    return Ranking.with_swaps(ranking.pairs)


def prepare(sites: Sequence[Site], rankings: Mapping[str, Ranking], stage: Prune) -> Prepared:
    """Rankings and levels as a stage demands. Doing it twice changes nothing.

    Args:
        sites: from `find_sites`.
        rankings: from `score`.
        stage: a structured one.

    Raises:
        ConfigError: when floors or the template do not fit the sites, or the criterion the solver.
    """
    check_solver(stage)
    levels: Levels = stage_levels(sites, stage)
    if stage.solver == MASK_SEARCH:
        rankings = {name: _with_swaps(ranking) for name, ranking in rankings.items()}
    if stage.template is not None:
        rankings, levels = apply_template(stage.template, sites, rankings, levels)
    return Prepared(rankings, levels)
