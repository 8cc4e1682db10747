"""Removal: the rows and columns that units own are cut out, and the model says its new widths."""

from collections import defaultdict

from transformers import PreTrainedModel

from hf_prune.gates import check_plan
from hf_prune.plan import Plan
from hf_prune.sites import Site, Slice, base_model, find_sites, logical_weight, projection
from hf_prune.surgery.shapes import keep_index, narrow_, record_shapes_


def _positions(item: Slice, units: tuple[int, ...]) -> list[int]:
    starts = (item.offset + unit * item.width for unit in units)
    return [start + step for start in starts for step in range(item.width)]


def remove_units(model: PreTrainedModel, plan: Plan) -> None:
    """Really remove, in place, what a plan does not keep.

    The model gets smaller matrices (new parameters: make the optimizer afterwards), the attributes
    that hold widths follow, and its config describes the result, so that `save_pretrained` and then
    plain `from_pretrained` work. Everything is checked before anything is changed.

    Raises:
        PlanError: when the plan was made for another model or other widths.
        UnsupportedModelError: for an unknown family, a wrapper or adapters.
    """
    base = base_model(model)
    sites = check_plan(plan, find_sites(model), model.config.model_type)
    drop: dict[tuple[str, int], list[int]] = defaultdict(list)
    changed: list[Site] = []
    for site in sites:
        removed = plan.sites[site.name].removed
        if removed:
            changed.append(site)
            for item in site.slices:
                drop[item.module, item.axis] += _positions(item, removed)
    for (name, axis), positions in drop.items():
        module = projection(base, name)
        narrow_(module, axis, keep_index(logical_weight(module).shape[axis], positions))
    attributes: dict[str, dict[str, int]] = defaultdict(dict)
    for site in changed:
        kept = len(plan.sites[site.name].kept)
        for attribute in site.attributes:
            value = kept * attribute.per_unit
            setattr(base.get_submodule(attribute.module), attribute.name, value)
            attributes[attribute.module][attribute.name] = value
    if changed:
        record_shapes_(model, {name for name, _ in drop}, attributes)
