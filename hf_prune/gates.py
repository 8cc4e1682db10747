"""Gates: one number per unit, multiplied into the input of the output projection.

The same object gives scores (its gradient) and masks (0 or 1). A gate changes no parameter and no
parameter name, needs nothing after an optimizer step, and leaves no trace in what is saved.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from hf_prune.errors import PlanError, UnsupportedModelError
from hf_prune.plan import Plan
from hf_prune.sites import (
    ALL_KINDS,
    EXPERT_KINDS,
    HIDDEN,
    QUERY_HEADS,
    Site,
    base_model,
    find_module,
    find_sites,
    get_module,
    norms,
    projection,
    readers,
)


@dataclass
class Gates:
    """The gates of some sites. `values[name]` is `[U]` (or `[B, 1, U]`); absent = all open.

    `evaluation` takes their place in eval mode, where it names a site.
    """

    values: dict[str, Tensor] = field(default_factory=dict)
    evaluation: dict[str, Tensor] = field(default_factory=dict)
    handles: list[RemovableHandle] = field(default_factory=list)

    def remove(self) -> None:
        """Take the hooks away: the model is as it was."""
        for handle in self.handles:
            handle.remove()
        self.handles.clear()


def expand_gate(gate: Tensor, width: int) -> Tensor:
    """One number for each column that a unit feeds: `[..., U]` to `[..., U * D]`."""
    return gate.repeat_interleave(width, dim=-1) if width > 1 else gate


class _Wide:
    """A gate with one number for each column; made once, where no gradient flows through it."""

    def __init__(self, width: int) -> None:
        self.width = width
        self.held: tuple[Tensor, int, Tensor] | None = None  # gate, its version, what it became

    def __call__(self, gate: Tensor, like: Tensor) -> Tensor:
        """`[..., U]` to `[..., U * D]`, on the device and in the dtype of `like`."""
        version = -1 if gate.is_inference() else gate._version
        if self.held is not None and self.held[0] is gate and self.held[1] == version:
            wide = self.held[2]
            if (wide.dtype, wide.device) == (like.dtype, like.device):
                return wide
        wide = expand_gate(gate.to(device=like.device, dtype=like.dtype), self.width)
        self.held = None if gate.requires_grad else (gate, version, wide)
        return wide


def _gated(inputs: Tensor, wide: Tensor) -> Tensor:
    if wide.ndim > inputs.ndim:  # tokens of all examples in one row: [B * T, U * D]
        by_example = inputs.view(wide.shape[0], -1, inputs.shape[-1])  # [B, T, U * D]
        return (by_example * wide).flatten(0, 1)
    return inputs * wide


class _Columns(torch.autograd.Function):
    """Multiply the columns of a weight, into memory that is kept from step to step.

    Fresh memory for each step would cost ten times as much as the multiplication.
    """

    @staticmethod
    def forward(ctx: Any, weight: Tensor, columns: Tensor, memory: Tensor) -> Tensor:
        """The product, which lies in `memory`."""
        ctx.save_for_backward(weight, columns)  # so that a change before backward is an error
        # not seen as a change: another call with equal weights may be waiting for its backward
        torch.mul(weight, columns, out=memory.data)
        return memory.detach()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        """The gradient of the weight: zero in closed columns."""
        _, columns = ctx.saved_tensors
        gradient = gradients[0]
        if torch.is_grad_enabled():  # it is to be differentiated again
            return gradient * columns, None, None
        return gradient.mul_(columns), None, None  # nobody else has it


class _GatedWeight:
    """A weight with its columns multiplied, in the same memory as long as the gate is the same."""

    def __init__(self) -> None:
        self.gate: Tensor | None = None
        self.memory = torch.empty(0)

    def __call__(self, weight: Tensor, wide: Tensor, columns: Tensor) -> Tensor:
        """The product, with the graph by which gradients reach the weight.

        Args:
            weight: of the layer.
            wide: the gate, one number for each column; the same object as long as it is the same.
            columns: a view of it that multiplies the stored weight.
        """
        if wide.requires_grad or not weight.requires_grad or not torch.is_grad_enabled():
            return weight * columns
        as_before = wide is self.gate and self.memory.shape == weight.shape
        if not as_before or self.memory.dtype != weight.dtype:
            self.gate, self.memory = wide, torch.empty_like(weight, requires_grad=False)
        return _Columns.apply(weight, columns, self.memory)  # type: ignore[no-any-return]


def _linear_gate(module: nn.Module, gates: Gates, site: Site) -> list[RemovableHandle]:
    """Multiply the input of a linear layer, or its weight where that is the smaller of the two.

    Both give the same output and the same gradients.
    """
    expand, product, kept = _Wide(site.gate.width), _GatedWeight(), []

    def before(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        gate = None if module.training else gates.evaluation.get(site.name)
        gate = gates.values.get(site.name) if gate is None else gate
        if gate is None:
            return None
        inputs, weight = args[0], module.weight  # [..., U * D]
        assert isinstance(weight, Tensor)  # noqa: S101  # what a linear layer has
        small = gate.ndim == 1 and weight.numel() < inputs.numel()
        if not small or torch.compiler.is_compiling():
            return (_gated(inputs, expand(gate, inputs)), *args[1:])
        wide = expand(gate, weight)
        columns = wide.unsqueeze(1) if isinstance(module, Conv1D) else wide
        kept.append(_swapped(module, "weight", lambda parameter: product(parameter, wide, columns)))
        return None

    def after(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        if kept:
            module._parameters["weight"] = kept.pop()  # type: ignore[assignment]  # what it was

    return [
        module.register_forward_pre_hook(before),
        module.register_forward_hook(after, always_call=True),
    ]


def _flat_gate(gates: Gates, site: Site) -> Tensor | None:
    gate = gates.values.get(site.name)
    if gate is not None and gate.ndim > 1:
        raise UnsupportedModelError(
            f"{site.name}: fused experts have no gate for each example. Score them by what needs "
            "none, such as 'magnitude' or 'random'."
        )
    return gate


def _swapped(module: nn.Module, name: str, make: Callable[[Tensor], Tensor]) -> Tensor:
    """Let a module work with a value made from its parameter; the parameter is returned."""
    parameter = module._parameters[name]
    assert parameter is not None  # noqa: S101  # the site was built from it
    module._parameters[name] = make(parameter)  # type: ignore[assignment]  # until the call ends
    return parameter


def _neuron_gate(module: nn.Module, gates: Gates, site: Site) -> list[RemovableHandle]:
    """Fused experts have no input to gate: scale the columns of their parameter instead."""
    name, kept = site.gate.parameter, []

    def before(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        gate = _flat_gate(gates, site)
        if gate is not None:
            kept.append(_swapped(module, name, lambda weight: weight * gate.to(weight)))

    def after(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        if kept:
            module._parameters[name] = kept.pop()  # type: ignore[assignment]  # what it was

    return [
        module.register_forward_pre_hook(before),
        module.register_forward_hook(after, always_call=True),
    ]


def _expert_gate(router: nn.Module, gates: Gates, site: Site) -> list[RemovableHandle]:
    """A router that does not know the closed experts: it chooses among the others."""
    kept: list[Tensor] = []

    def before(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        gate = _flat_gate(gates, site)
        if gate is not None:
            open_ = gate.nonzero().flatten()
            kept.append(_swapped(module, "weight", lambda weight: weight[open_.to(weight.device)]))

    def after(
        module: nn.Module, args: tuple[Tensor, ...], output: tuple[Tensor, ...]
    ) -> tuple[Tensor, ...] | None:
        if not kept:
            return None
        module._parameters["weight"] = kept.pop()  # type: ignore[assignment]  # what it was
        gate = gates.values[site.name]
        chosen = output[-1]
        return (*output[:-1], gate.nonzero().flatten().to(chosen.device)[chosen])

    return [router.register_forward_pre_hook(before), router.register_forward_hook(after)]


def _hidden_gate(model: PreTrainedModel, gates: Gates, site: Site) -> list[RemovableHandle]:
    """Scale the channels wherever they are read. Norms know nothing of the closed ones."""

    def before(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        gate = gates.values.get(site.name)
        if gate is None or args[0].shape[-1] != site.units:
            return None
        return (_gated(args[0], gate.to(args[0])), *args[1:])

    fused = {item.module for item in site.slices if item.parameter} & {
        path
        for other in find_sites(model, ("expert_neurons", "experts"))
        for path in (item.module for item in other.slices)
    }
    handles = [
        find_module(model, name).register_forward_pre_hook(before)
        for name in (*readers(site), *sorted(fused))
    ]
    for name in norms(model, site):
        handles += _norm_gate(find_module(model, name), gates, site)
    return handles


def _norm_gate(module: nn.Module, gates: Gates, site: Site) -> list[RemovableHandle]:
    """A norm over the open channels alone; the others become zero."""
    kept: list[tuple[dict[str, Any], Any, Tensor]] = []

    def before(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        gate = gates.values.get(site.name)
        if gate is None or gate.ndim > 1 or bool(gate.all()):
            return None
        open_ = gate.nonzero().flatten().to(args[0].device)
        shape = getattr(module, "normalized_shape", None)
        kept.append((dict(module._parameters), shape, open_))
        for name, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[name] = parameter[open_]  # type: ignore[assignment]  # until the call ends
        if shape is not None:
            module.normalized_shape = (len(open_),)  # type: ignore[assignment]  # of LayerNorm
        return (args[0][..., open_], *args[1:])

    def after(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
        if not kept:
            return None
        parameters, shape, open_ = kept.pop()
        module._parameters.update(parameters)
        if shape is not None:
            module.normalized_shape = shape
        wide = output.new_zeros(*output.shape[:-1], site.units)
        return wide.index_copy(-1, open_, output)

    return [module.register_forward_pre_hook(before), module.register_forward_hook(after)]


def _scored_experts(
    module: nn.Module, gates: Gates, sites: Sequence[Site]
) -> list[RemovableHandle]:
    """Scale what experts, or their neurons, give: a gate through which gradients flow.

    The router still sees all of them: scores are those of an expert that gives nothing.
    """
    name, kept = sites[0].gate.parameter, []

    def before(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        def scaled(weight: Tensor) -> Tensor:
            for site in sites:
                gate = _flat_gate(gates, site)
                if gate is not None:
                    shape = [-1 if axis == site.gate.axis else 1 for axis in range(weight.ndim)]
                    weight = weight * gate.to(weight).view(shape)
            return weight

        kept.append(_swapped(module, name, scaled))

    def after(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        module._parameters[name] = kept.pop()  # type: ignore[assignment]  # what it was

    return [
        module.register_forward_pre_hook(before),
        module.register_forward_hook(after, always_call=True),
    ]


def attach_scoring_gates(model: PreTrainedModel, sites: Sequence[Site]) -> Gates:
    """Gates whose gradients are scores, all open. Those of experts are `[U]`, not `[B, 1, U]`."""
    gates = attach_gates(model, [site for site in sites if site.kind not in EXPERT_KINDS])
    modules: dict[str, list[Site]] = {}
    for site in sites:
        if site.kind in EXPERT_KINDS:
            modules.setdefault(site.gate.module, []).append(site)
    for name, group in modules.items():
        gates.handles += _scored_experts(get_module(base_model(model), name), gates, group)
    return gates


def attach_gates(model: PreTrainedModel, sites: Sequence[Site]) -> Gates:
    """Put a gate before each site's output projection; all open until `values` says otherwise."""
    base = base_model(model)
    gates = Gates()
    for site in sites:
        if site.kind == "expert_neurons":
            gates.handles += _neuron_gate(get_module(base, site.gate.module), gates, site)
        elif site.kind == "experts":
            gates.handles += _expert_gate(get_module(base, site.core), gates, site)
        elif site.kind == HIDDEN:
            gates.handles += _hidden_gate(model, gates, site)
        else:
            gates.handles += _linear_gate(projection(base, site.gate.module), gates, site)
    return gates


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
