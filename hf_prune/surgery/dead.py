"""Units that single zeros have left without effect: found, folded into a bias, really removed.

A neuron or a head whose columns in the output projection are all zero adds nothing. Neither does
one that gives zeros because one of its factors is zero: the values of a head, one of two rows of a
gated neuron. A neuron whose rows are all zero gives the same number for every token, which moves
into the bias of the output projection. A neuron of experts goes where it adds nothing in any of
them. What is left computes the same.
"""

from collections.abc import Mapping

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from hf_prune.plan import Plan, SitePlan
from hf_prune.sites import (
    EXPERT_KINDS,
    KINDS,
    Site,
    base_model,
    find_sites,
    gate_weight,
    get_module,
    get_parameter,
    logical_weight,
    projection,
)
from hf_prune.statistics.example import example_batch, tokens_up_to
from hf_prune.statistics.streams import in_eval
from hf_prune.surgery.remove import remove_units
from hf_prune.surgery.shapes import keep_index

Masks = Mapping[str, Tensor]
FOUND = (*KINDS, "expert_neurons")
"""Kinds of units that may be dead: without a whole expert the router would choose another one."""
LENGTH = 8
"""Tokens of the sequence that is run."""


def _zero_rows(model: PreTrainedModel, site: Site) -> tuple[Tensor, Tensor]:
    """Units none of whose rows counts, and units with a part that gives zeros; `[U]` both.

    A part is what a unit owns of one projection. Only of plain projections; the first of neurons.
    """
    base = base_model(model)
    slices = [item for item in site.slices if item.axis == 0]
    none = torch.zeros(site.units, dtype=torch.bool)
    if not slices or any(item.parameter for item in slices):
        return none, none
    every, some = ~none, none.clone()
    for item in slices:
        module = projection(base, item.module)
        own = slice(item.offset, item.offset + site.units * item.width)
        zero = (logical_weight(module).detach()[own] == 0).reshape(site.units, -1).all(dim=1).cpu()
        every &= zero
        if module.bias is not None:
            zero = zero & (module.bias.detach()[own] == 0).view(site.units, -1).all(dim=1).cpu()
        some |= zero
    return every if site.kind == "neurons" else none, some


@torch.no_grad()
def _constants(model: PreTrainedModel, sites: list[Site]) -> dict[str, Tensor]:
    """What enters the output projection of each site at the first token, `[U * D]`.

    Of made-up inputs: what is read of it is the same for all.
    """
    found: dict[str, Tensor] = {}
    handles = []
    for site in sites:

        def keep(module: object, args: tuple[Tensor, ...], name: str = site.name) -> None:
            found[name] = args[0].detach().flatten(0, -2)[0]

        module = projection(base_model(model), site.gate.module)
        handles.append(module.register_forward_pre_hook(keep))
    try:
        with in_eval(model):
            model(**example_batch(model, 1, tokens_up_to(model, LENGTH)))
    finally:
        for handle in handles:
            handle.remove()
    return found


@torch.no_grad()
def _idle_in_experts(model: PreTrainedModel, site: Site) -> Tensor:
    """Neurons that add nothing in any expert: read by zeros, or a factor of theirs is zero, `[U]`.

    Which of the factors passes the activation is not known: both count where it keeps zeros.
    """
    base = base_model(model)
    activation = getattr(get_module(base, site.gate.module), "act_fn", None)
    nothing = get_parameter(base, site.gate).new_zeros(1)
    keeps_zeros = activation is not None and not activation(nothing).any()
    idle = torch.zeros(0, dtype=torch.bool)
    for item in site.slices:
        if item != site.gate and not keeps_zeros:
            continue
        own = get_parameter(base, item).narrow(item.axis, item.offset, site.units * item.width)
        by_unit = own.movedim(item.axis, 1).flatten(2)  # [X, U, N]
        zero = (by_unit == 0).all(dim=2).cpu()
        idle = zero | idle if len(idle) else zero
    return idle.all(dim=0)


def _without(site: Site, gone: list[int]) -> SitePlan:
    return SitePlan(site.kind, site.units, tuple(sorted(set(range(site.units)) - set(gone))))


def _goes(site: Site, dead: Tensor) -> list[int]:
    """So many of the dead units, `[U]`, that as many stay as a site must keep."""
    gone: list[int] = dead.nonzero().flatten().tolist()
    stay = max(site.units - len(gone), site.floor, 1)
    stay += -stay % site.multiple
    return gone[: max(site.units - stay, 0)]


def find_dead(model: PreTrainedModel) -> tuple[Plan, dict[str, Tensor]]:
    """Which units have no effect but a constant one.

    Args:
        model: of a known family, in any mode. It is run once, to read constants.

    Returns:
        A plan that removes them, but keeps at least one unit of each site; and for each site what
        its output projection must add to its bias, `[E]`, zero where nothing is to be added.
    """
    found = [site for site in find_sites(model, FOUND) if site.runs == 1]
    sites = [site for site in found if site.kind not in EXPERT_KINDS]
    constants = _constants(model, sites)
    plans, folded = {}, {}
    for site in (site for site in found if site not in sites):
        gone = _goes(site, _idle_in_experts(model, site))
        if gone:
            plans[site.name] = _without(site, gone)
    for site in sites:
        weight = gate_weight(base_model(model), site).detach()  # [U, N]
        silent = (weight == 0).all(dim=1).cpu()
        still, part = _zero_rows(model, site)
        module = projection(base_model(model), site.gate.module)
        values = constants[site.name]
        nothing = (values == 0).view(site.units, -1).all(dim=1).cpu()
        silent |= part & nothing  # a factor is zero for every token, and so is the product
        still &= ~silent
        if module.bias is None:
            still &= nothing
        gone = _goes(site, silent | still)
        if not gone:
            continue
        plans[site.name] = _without(site, gone)
        columns = [unit for unit in gone if bool(still[unit])]
        matrix = logical_weight(module).detach()  # [E, U * D]
        folded[site.name] = matrix[:, columns] @ values[columns]
    return Plan(model.config.model_type, plans), folded


def _narrow_masks(
    model: PreTrainedModel, sites: list[Site], plan: Plan, masks: Masks
) -> dict[str, Tensor]:
    """The masks of the matrices that removal is going to leave."""
    names = {id(module): name for name, module in model.named_modules()}
    drop: dict[tuple[str, int], list[int]] = {}
    for site in (s for s in sites if s.name in plan.sites):
        for item in site.slices:
            gone = plan.sites[site.name].removed
            starts = [item.offset + unit * item.width for unit in gone]
            places = [start + step for start in starts for step in range(item.width)]
            module = get_module(base_model(model), item.module)
            stored = 1 - item.axis if isinstance(module, Conv1D) else item.axis
            name = f"{names[id(module)]}.{item.parameter or 'weight'}"
            drop.setdefault((name, stored), []).extend(places)
    result = dict(masks)
    for (name, stored), places in drop.items():
        if name not in result:
            continue
        index = keep_index(result[name].shape[stored], places).to(result[name].device)
        result[name] = result[name].index_select(stored, index)
    return result


@torch.no_grad()
def remove_dead_(
    model: PreTrainedModel, masks: Masks | None = None
) -> tuple[Plan, dict[str, Tensor]]:
    """Really remove, in place, units that single zeros have left without effect.

    Args:
        model: of a known family.
        masks: of single weights, by parameter name.

    Returns:
        What stayed, and the masks in the new shapes. The outputs of the model do not change.
    """
    plan, folded = find_dead(model)
    sites = {site.name: site for site in find_sites(model, FOUND)}
    narrowed = _narrow_masks(model, list(sites.values()), plan, masks or {})
    for name, value in folded.items():
        bias = projection(base_model(model), sites[name].gate.module).bias
        if isinstance(bias, Tensor):
            bias.data += value
    remove_units(model, plan)
    return plan, narrowed
