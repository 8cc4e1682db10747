"""What a stage says that nothing would read: refused, each with what to leave out.

Defaults that are written out say nothing.
"""

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from hf_prune.recipe.weights import REFIT_STEPS

if TYPE_CHECKING:
    from hf_prune.recipe.prune import Prune


def unread(stage: "Prune") -> Iterator[str]:
    """Why a stage of pruning is refused, reason by reason."""
    for reasons in (_of_searches(stage), _of_units(stage), _of_fits(stage), _of_weights(stage)):
        yield from (text for text, wrong in reasons.items() if wrong)


def _of_searches(stage: "Prune") -> Mapping[str, bool]:
    gradual, search = stage.schedule is not None, stage.search_trials > 0
    regrow = stage.schedule is not None and stage.schedule.regrow
    weights, target = not stage.structural, stage.target is not None
    return {
        "search_trials refines widths for a budget: leave it out, or floor": search
        and stage.floor is not None,
        "search_trials is for one shot: leave it out, or schedule": search and gradual,
        "search_trials is for heads and neurons: leave it out": search
        and (weights or "hidden" in stage.units),
        "of: layers is for a sparsity: a target is one of the whole model": target
        and stage.of == "layers",
        "cost is what a sparsity counts: name parameters or macs in the target": target
        and stage.cost == "macs",
        "regrow is for masks: scored; learned masks open again by themselves": regrow
        and stage.masks != "scored",
    }


def _of_units(stage: "Prune") -> Mapping[str, bool]:
    kinds, weights = set(stage.units), not stage.structural
    return {
        "round_to and even are for units that are removed: leave them out": weights
        and (stage.round_to > 1 or stage.even),
        "round_to is for neurons and channels: leave it out": stage.round_to > 1
        and not kinds & {"neurons", "expert_neurons", "hidden"},
        "ignore is of sites and parameters, and the hidden width is one for all: leave it out": (
            kinds == {"hidden"} and bool(stage.ignore)
        ),
        "min_heads is for heads: leave it out": stage.min_heads != 1
        and not kinds & {"heads", "query_heads"},
        "min_neurons is for neurons: leave it out": stage.min_neurons != 1
        and not kinds & {"neurons", "expert_neurons"},
    }


def _of_fits(stage: "Prune") -> Mapping[str, bool]:
    gradual, weights = stage.schedule is not None, not stage.structural
    parallel, refits = stage.reconstruction == "parallel", stage.reconstruct or stage.rescale
    samples, polish = stage.reconstruction_samples is not None, stage.polish_steps > 0
    return {
        "rescale is for heads and neurons in one shot: leave it out": stage.rescale
        and (gradual or weights),
        "reconstruction: parallel is for heads and neurons; to fit single weights to what they got "
        "themselves write weights: {dense_target: false}": parallel and weights,
        "reconstruction: parallel is for one shot: leave it out": parallel and gradual,
        "ridge is of a re-fit: leave it out, or reconstruct: false": stage.ridge is not None
        and not (refits or "weights" in stage.units),
        "reconstruction_samples are of a re-fit: leave them out, or reconstruct: false": samples
        and not refits,
        "reconstruction_samples are of heads and neurons; single weights are chosen and fitted on "
        "calibration_samples: write more of them": samples and weights,
        "polish_steps are of one shot: leave them out, the training after the schedule moves norms "
        "and biases too": polish and gradual,
        "polish_steps come after a decision, and a floor decides by what it measured before: leave "
        "one of them out": polish and stage.floor is not None,
    }


def _of_weights(stage: "Prune") -> Mapping[str, bool]:
    gradual, single = stage.schedule is not None, stage.single
    return {
        "weights: {iterations, penalty} are of criterion: admm: leave them out": single.tunes_admm
        and "weights" in stage.units
        and not stage.by_admm,
        "weights: {refit_steps: ...} is of a re-fit in one shot: leave it out": (
            gradual or not stage.reconstruct
        )
        and single.refit_steps != REFIT_STEPS,
        "weights: {rank: row} is for one shot: with a schedule matrices are ranked": gradual
        and single.rank == "row",
        "weights: {rank: row} is for pattern: unstructured: leave one of them out": (
            single.rank == "row" and single.pattern != "unstructured"
        ),
    }
