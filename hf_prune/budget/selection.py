"""A plan, and what goals asked for beside what it removes."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from hf_prune.budget.allocate import allocate, total_error
from hf_prune.budget.costs import Goal
from hf_prune.budget.even import allocate_evenly
from hf_prune.budget.prepare import prepare
from hf_prune.criteria.ranking import Ranking
from hf_prune.plan import Plan, SitePlan
from hf_prune.recipe import Prune
from hf_prune.sites import Site


@dataclass(frozen=True)
class Outcome:
    """What one goal asked for, and what is removed, in the same unit of cost.

    `tolerance` is for what is measured and therefore noisy: the share of what may be left by which
    it may be exceeded.
    """

    cost: str
    asked: int
    removed: int
    total: int
    tolerance: float = 0.0

    @property
    def met(self) -> bool:
        """Whether at least what was asked is removed."""
        return self.removed >= self.asked - self.tolerance * (self.total - self.asked)

    def to_dict(self) -> dict[str, object]:
        """For the report."""
        return {
            "cost": self.cost,
            "total": self.total,
            "asked_to_remove": self.asked,
            "removed": self.removed,
            "met": self.met,
            "sparsity": self.removed / self.total if self.total else 0.0,
        }


FLOORS = "floors and ignored sites hold the rest"
"""Why what is counted is not met: solvers stop before a goal only there."""
OTHERS = "all that can be removed is less: embeddings, norms and heads hold the rest"
"""Why it is not met where not even all units are enough."""


@dataclass(frozen=True)
class Selection:
    """A plan, and for each goal what it asked for and what the plan removes.

    `limit` says why a goal is not met, where one is not.
    """

    plan: Plan
    outcomes: tuple[Outcome, ...]
    error: float
    limit: str = FLOORS

    @property
    def met(self) -> bool:
        """Whether every goal is met."""
        return all(outcome.met for outcome in self.outcomes)

    def shortfalls(self) -> list[str]:
        """For each goal that is not met, what was asked for, what is removed, and why no more."""
        return [
            f"asked to remove {goal.asked} {goal.cost}, removed {goal.removed}: {self.limit}"
            for goal in self.outcomes
            if not goal.met
        ]

    def to_dict(self) -> dict[str, object]:
        """For the report: the first goal, and all of them under `goals` where there are more."""
        result = {**self.outcomes[0].to_dict(), "met": self.met, "error": self.error}
        if len(self.outcomes) > 1:
            result["goals"] = [outcome.to_dict() for outcome in self.outcomes]
        return result


def selection_of(
    sites: Sequence[Site],
    rankings: Mapping[str, Ranking],
    counts: Mapping[str, int],
    goals: Sequence[Goal],
    *,
    model_type: str,
) -> Selection:
    """The plan that keeps the best so many units of each site, beside what goals ask for.

    Args:
        sites: from `find_sites`.
        rankings: from `score`.
        counts: by site, how many units stay.
        goals: what is to go.
        model_type: of the model, for the plan.
    """
    kept = {
        site.name: SitePlan(site.kind, site.units, rankings[site.name].kept(counts[site.name]))
        for site in sites
    }
    outcomes = tuple(
        Outcome(goal.cost, goal.asked, goal.removed(counts), goal.total) for goal in goals
    )
    missed = [goal for goal in goals if goal.removed(counts) < goal.asked]
    limit = OTHERS if any(goal.asked > goal.prunable for goal in missed) else FLOORS
    return Selection(Plan(model_type, kept), outcomes, total_error(sites, rankings, counts), limit)


def decide(
    sites: Sequence[Site],
    rankings: Mapping[str, Ranking],
    stage: Prune,
    goals: Sequence[Goal],
    *,
    model_type: str,
) -> Selection:
    """The plan that meets the goals of a stage.

    Args:
        sites: from `find_sites`.
        rankings: from `score`.
        stage: solver, floors and `round_to`.
        goals: what is to go.
        model_type: of the model, for the plan.
    """
    ready = prepare(sites, rankings, stage)
    solve = allocate_evenly if stage.even else allocate
    counts = solve(sites, ready.rankings, goals, solver=stage.solver, levels=ready.levels)
    return selection_of(sites, ready.rankings, counts, goals, model_type=model_type)
