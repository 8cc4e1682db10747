"""Removal: the rows and columns that units own are cut out, and the model says its new widths."""

from collections import defaultdict
from collections.abc import Mapping, Sequence

from torch import nn
from transformers import PreTrainedModel

from hf_prune.gates.plans import check_plan, sites_for
from hf_prune.plan import Plan, SitePlan
from hf_prune.sites import (
    HIDDEN,
    QUERY_HEADS,
    Site,
    Slice,
    base_model,
    find_module,
    join,
    logical_weight,
)
from hf_prune.surgery.rebuild import update_sizes_
from hf_prune.surgery.remade import (
    UnevenGroups,
    empty_,
    get_attribute,
    keep_heads_,
    set_attribute_,
    spread_,
)
from hf_prune.surgery.shapes import (
    Changes,
    keep_index,
    narrow_,
    narrow_parameter_,
    record_caches_,
    record_shapes_,
)

Drop = Mapping[tuple[str, str, int], list[int]]
"""By module, parameter ("" = the weight and bias of a linear layer) and axis: positions that go."""


def _positions(item: Slice, units: Sequence[int]) -> list[int]:
    starts = (item.offset + unit * item.width for unit in units)
    return [start + step for start in starts for step in range(item.width)]


def _cut(model: PreTrainedModel, drop: Drop, changes: Changes) -> None:
    for (name, parameter, axis), positions in drop.items():
        if parameter:
            module = find_module(model, name)
            index = keep_index(getattr(module, parameter).shape[axis], positions)
            narrow_parameter_(module, parameter, axis, index)
            update_sizes_(module)
            changes.parameters.add(join(name, parameter))
        else:
            module = find_module(model, name)
            narrow_(module, axis, keep_index(logical_weight(module).shape[axis], positions))
            changes.modules.add(name)


def _gone(site: Site, plan: SitePlan) -> list[int]:
    """The key/value heads that no query head is left for."""
    return sorted(set(site.reads) - {site.reads[unit] for unit in plan.kept})


def _keep_groups_true(base: nn.Module, site: Site, plan: SitePlan, changes: Changes) -> None:
    """Say which key/value head each query head reads; a number, where groups are alike."""
    left = sorted({site.reads[unit] for unit in plan.kept})
    reads = [left.index(site.reads[unit]) for unit in plan.kept]
    size = len(reads) // max(len(left), 1)
    module = base.get_submodule(site.core)
    even = reads == [head for head in range(len(left)) for _ in range(size)]
    uneven = not even or isinstance(module, UnevenGroups)
    size = 1 if uneven else size
    if plan.kept:
        set_attribute_(module, "num_key_value_groups", size)
        changes.attributes[site.core]["num_key_value_groups"] = size
    if uneven:
        spread_(module, reads)
        changes.groups[site.core] = {"reads": list(reads)}
    for name in ("num_key_value_heads", "num_kv_heads"):
        if get_attribute(module, name) is not None:
            set_attribute_(module, name, len(left))
            changes.attributes[site.core][name] = len(left)


def _keep_attributes_true(base: nn.Module, site: Site, plan: SitePlan, changes: Changes) -> None:
    for attribute in site.attributes:
        value = len(plan.kept) * attribute.per_unit
        set_attribute_(base.get_submodule(attribute.module), attribute.name, value)
        changes.attributes[attribute.module][attribute.name] = value
    if site.reads:
        _keep_groups_true(base, site, plan, changes)
    if site.empty and not plan.kept:
        path = site.core
        out = "" if site.empty == "context" else site.gate.module.removeprefix(f"{path}.")
        empty_(base.get_submodule(path), site.empty, out, cross=site.cross)
        changes.empty[path] = {"kind": site.empty, "out": out, "cross": site.cross}
    elif site.shared_bias:
        module = base.get_submodule(site.core)
        before = getattr(module, "kept_heads", range(site.units))
        kept = [int(before[unit]) for unit in plan.kept]
        keep_heads_(module, site.shared_bias, kept)
        changes.heads[site.core] = {"bias": site.shared_bias, "kept": list(kept)}


def remove_units(model: PreTrainedModel, plan: Plan) -> None:
    """Really remove, in place, what a plan does not keep.

    A site may lose all of its units: then only the bias of its output is left. The model gets
    smaller matrices (new parameters: make the optimizer afterwards), the attributes that hold
    widths follow, and its config describes the result, so that `save_pretrained` and then plain
    `from_pretrained` work. Everything is checked before anything is changed.

    Raises:
        PlanError: when the plan was made for another model or other widths.
        UnsupportedModelError: for an unknown family, a wrapper or adapters.
    """
    base = base_model(model)
    sites = check_plan(plan, sites_for(model, plan), model.config.model_type)
    drop: dict[tuple[str, str, int], list[int]] = defaultdict(list)
    changed: list[Site] = []
    for site in sites:
        removed = plan.sites[site.name].removed
        if removed:
            changed.append(site)
            for item in site.slices:
                drop[item.module, item.parameter, item.axis] += _positions(item, removed)
            for item in site.read:
                positions = _positions(item, _gone(site, plan.sites[site.name]))
                drop[item.module, item.parameter, item.axis] += positions
    if not changed:
        return
    changes = Changes()
    _cut(model, drop, changes)
    for site in changed:
        _keep_attributes_true(base, site, plan.sites[site.name], changes)
    if HIDDEN in plan.sites:
        model.tie_weights()  # both got a new parameter
    record_shapes_(model, changes)
    if any(site.kind in ("heads", QUERY_HEADS) for site in changed):
        record_caches_(model)
