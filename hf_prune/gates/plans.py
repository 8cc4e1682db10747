"""Gates closed by a plan, which has to fit the model."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor
from transformers import PreTrainedModel

from hf_prune.errors import PlanError
from hf_prune.gates.attach import attach_gates
from hf_prune.gates.gate import Gates
from hf_prune.plan import Plan
from hf_prune.sites import ALL_KINDS, HIDDEN, QUERY_HEADS, Site, find_sites


def sites_for(model: PreTrainedModel, plan: Plan) -> list[Site]:
    """All sites that a plan may speak of; single query heads and channels only where it does.

    Raises:
        PlanError: when it speaks of the heads of an attention and of its query heads.
    """
    named = {site.kind for site in plan.sites.values()} & {QUERY_HEADS, HIDDEN}
    sites = find_sites(model, (*ALL_KINDS, *sorted(named)))
    cores = [site.core for site in sites if site.kind in ("heads", QUERY_HEADS)]
    both = [site for site in sites if site.name in plan.sites and cores.count(site.core) > 1]
    if QUERY_HEADS in named and any(site.kind == "heads" for site in both):
        names = [site.name for site in both]
        raise PlanError(f"{names[0]}: plan heads or query heads of an attention, not both.")
    return sites


def check_plan(plan: Plan, sites: Sequence[Site], model_type: str) -> list[Site]:
    """The sites that a plan speaks of, in the order of the model.

    Raises:
        PlanError: when the plan is of another family, names an unknown site, was made for other
            widths, or would leave a site with nothing.
    """
    if plan.model_type != model_type:
        raise PlanError(f"the plan is for a {plan.model_type!r} model, this is {model_type!r}.")
    known = {site.name: site for site in sites}
    for name, item in plan.sites.items():
        if name not in known:
            raise PlanError(f"the model has no site {name!r}.")
        site = known[name]
        if (site.units, site.kind) != (item.units, item.kind):
            raise PlanError(
                f"{name}: the plan was made for {item.units} {item.kind}, the model has "
                f"{site.units} {site.kind}. A plan holds for the widths that it was made from."
            )
        if item.removed and (len(item.kept) < site.floor or len(item.kept) % site.multiple):
            raise PlanError(
                f"{name}: the plan keeps {len(item.kept)} {site.kind}. At least {site.floor} must "
                f"stay, and a multiple of {site.multiple}."
            )
    return [site for site in sites if site.name in plan.sites]


def plan_gates(plan: Plan) -> dict[str, Tensor]:
    """Closed gates for what a plan removes: `[U]` of 0 and 1 for each site that loses something."""
    values = {}
    for name, site in plan.sites.items():
        if len(site.kept) < site.units:
            gate = torch.zeros(site.units)
            gate[list(site.kept)] = 1.0
            values[name] = gate
    return values


def close_gates(model: PreTrainedModel, plan: Plan) -> Gates:
    """Mask what a plan removes, shapes unchanged, until `.remove()` is called on the result."""
    sites = check_plan(plan, sites_for(model, plan), model.config.model_type)
    gates = attach_gates(model, sites)
    gates.values.update(plan_gates(plan))
    return gates


@contextmanager
def masked(model: PreTrainedModel, plan: Plan) -> Iterator[PreTrainedModel]:
    """The model with the gates of a plan closed, inside a `with` block."""
    gates = close_gates(model, plan)
    try:
        yield model
    finally:
        gates.remove()
