"""What a stage lets solvers choose from: the levels of each site, and which units it keeps."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from hf_prune.budget.levels import Levels, stage_levels
from hf_prune.budget.template import apply_template
from hf_prune.criteria.ranking import Ranking
from hf_prune.recipe import Prune
from hf_prune.sites import Site


@dataclass(frozen=True)
class Prepared:
    """Rankings and levels that hold all that a stage demands."""

    rankings: Mapping[str, Ranking]
    levels: Levels


def prepare(sites: Sequence[Site], rankings: Mapping[str, Ranking], stage: Prune) -> Prepared:
    """Rankings and levels as a stage demands. Doing it twice changes nothing.

    Args:
        sites: from `find_sites`.
        rankings: from `score`.
        stage: a structured one.

    Raises:
        ConfigError: when floors or the template do not fit the sites.
    """
    levels: Levels = stage_levels(sites, stage)
    if stage.template is not None:
        rankings, levels = apply_template(stage.template, sites, rankings, levels)
    return Prepared(rankings, levels)
