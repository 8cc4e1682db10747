"""Gates of fused experts and of their neurons: there is no input to multiply."""

from collections.abc import Sequence

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from hf_prune.errors import UnsupportedModelError
from hf_prune.gates.gate import Gates, swapped
from hf_prune.sites import Site


def _flat_gate(gates: Gates, site: Site) -> Tensor | None:
    gate = gates.values.get(site.name)
    if gate is not None and gate.ndim > 1:
        raise UnsupportedModelError(
            f"{site.name}: fused experts have no gate for each example. Score them by what needs "
            "none, such as 'magnitude' or 'random'."
        )
    return gate


def neuron_gate(module: nn.Module, gates: Gates, site: Site) -> list[RemovableHandle]:
    """Fused experts have no input to gate: scale the columns of their parameter instead."""
    name, kept = site.gate.parameter, []

    def before(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        gate = _flat_gate(gates, site)
        if gate is not None:
            kept.append(swapped(module, name, lambda weight: weight * gate.to(weight)))

    def after(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        if kept:
            module._parameters[name] = kept.pop()  # type: ignore[assignment]  # what it was

    return [
        module.register_forward_pre_hook(before),
        module.register_forward_hook(after, always_call=True),
    ]


def expert_gate(router: nn.Module, gates: Gates, site: Site) -> list[RemovableHandle]:
    """A router that does not know the closed experts: it chooses among the others."""
    kept: list[Tensor] = []

    def before(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        gate = _flat_gate(gates, site)
        if gate is not None:
            open_ = gate.nonzero().flatten()
            kept.append(swapped(module, "weight", lambda weight: weight[open_.to(weight.device)]))

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


def scored_experts(module: nn.Module, gates: Gates, sites: Sequence[Site]) -> list[RemovableHandle]:
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

        kept.append(swapped(module, name, scaled))

    def after(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        module._parameters[name] = kept.pop()  # type: ignore[assignment]  # what it was

    return [
        module.register_forward_pre_hook(before),
        module.register_forward_hook(after, always_call=True),
    ]
