"""What a stage asks for while a model trains, step by step, and the selections that give it."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from accelerate import PartialState
from accelerate.utils import gather_object
from transformers import PreTrainedModel

from hf_prune.budget.selection import Outcome, Selection
from hf_prune.criteria.ranking import Ranking
from hf_prune.errors import CheckpointError, PlanError
from hf_prune.measure.latency_table import LatencyTable
from hf_prune.plan import Plan
from hf_prune.recipe import Prune
from hf_prune.sites import Site
from hf_prune.targets import Chooser


def same_on_all_processes(selection: Selection) -> Selection:
    """The selection, after all processes have compared theirs.

    Raises:
        PlanError: on every process, when two of them decided differently.
    """
    if PartialState().num_processes > 1:
        prints = gather_object([selection.plan.fingerprint()])
        if len(set(prints)) > 1:
            raise PlanError("processes decided differently: their data or weights are not in step.")
    return selection


def selection_to_dict(selection: Selection | None) -> dict[str, Any] | None:
    """A selection as plain data."""
    if selection is None:
        return None
    outcomes = [[o.cost, o.asked, o.removed, o.total, o.tolerance] for o in selection.outcomes]
    return {"plan": selection.plan.to_dict(), "outcomes": outcomes, "error": selection.error}


def selection_from_dict(data: Mapping[str, Any] | None) -> Selection | None:
    """The selection that `selection_to_dict` described."""
    if data is None:
        return None
    outcomes = tuple(Outcome(*outcome) for outcome in data["outcomes"])
    return Selection(Plan.from_dict(data["plan"]), outcomes, float(data["error"]))


def make_chooser(
    model: PreTrainedModel,
    sites: Sequence[Site],
    stage: Prune,
    table: LatencyTable | None = None,
) -> Chooser:
    """What turns rankings into selections, its goals and latency table made once.

    Args:
        model: to be trained, no gate of it closed.
        sites: of it.
        stage: with a sparsity or a target.
        table: from an earlier run, where the target is one of time; else it is measured.
    """
    timed = stage.target is not None and stage.target.timed
    return Chooser(model, sites, {}, stage, table if timed else None)


def select(chooser: Chooser, rankings: Mapping[str, Ranking], share: float) -> Selection:
    """What stays at a share of what the stage asks for, the same on all processes.

    Where time is asked for, the last selection is timed beside the dense model, and chosen again
    where the table was wrong; so no gate may be closed then.

    Args:
        chooser: from `make_chooser`.
        rankings: in which order the units of each site go.
        share: in [0, 1].
    """
    chooser.rankings = rankings
    if chooser.table is None or share < 1:
        return same_on_all_processes(chooser.predict(share))
    return same_on_all_processes(chooser.choose(share).selection)


def table_to_dict(chooser: Chooser) -> dict[str, Any] | None:
    """The latency table of a chooser as plain data; None where no time is asked for."""
    return None if chooser.table is None else asdict(chooser.table)


def table_from_dict(data: Mapping[str, Any] | None) -> LatencyTable | None:
    """The table that `table_to_dict` described.

    Raises:
        CheckpointError: when it is none.
    """
    if data is None:
        return None
    try:
        points = {
            str(group): {int(width): int(cost) for width, cost in each.items()}
            for group, each in data["points"].items()
        }
        return LatencyTable(int(data["total_ns"]), int(data["fixed_ns"]), points)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"the latency table there is damaged: {error}") from error
