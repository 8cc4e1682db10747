"""The gate of the hidden width: on whatever reads it, and in the norms."""

from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from hf_prune.gates.gate import Gates, gated
from hf_prune.sites import Site, find_module, find_sites, norms, readers


def hidden_gate(model: PreTrainedModel, gates: Gates, site: Site) -> list[RemovableHandle]:
    """Scale the channels wherever they are read. Norms know nothing of the closed ones.

    A head that shares its weight with the embeddings only sees whether a gate of `[U]` is closed.
    """
    tables = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}

    def before(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        gate = gates.of(site.name, training=module.training)
        if gate is None or args[0].shape[-1] != site.units:
            return None
        if gate.ndim == 1 and id(getattr(module, "weight", None)) in tables:
            gate = gate.detach() > 0
        return (gated(args[0], gate.to(args[0])), *args[1:])

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
        gate = gates.of(site.name, training=module.training)
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
