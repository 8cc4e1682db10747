"""Gates on a model: as masks, and for scores."""

from collections.abc import Sequence

from transformers import PreTrainedModel

from hf_prune.gates.experts import expert_gate, neuron_gate, scored_experts
from hf_prune.gates.gate import Gates
from hf_prune.gates.hidden import hidden_gate
from hf_prune.gates.linear import linear_gate
from hf_prune.sites import EXPERT_KINDS, HIDDEN, Site, base_model, get_module, projection


def attach_gates(model: PreTrainedModel, sites: Sequence[Site]) -> Gates:
    """Put a gate before each site's output projection; all open until `values` says otherwise."""
    base = base_model(model)
    gates = Gates()
    for site in sites:
        if site.kind == "expert_neurons":
            gates.handles += neuron_gate(get_module(base, site.gate.module), gates, site)
        elif site.kind == "experts":
            gates.handles += expert_gate(get_module(base, site.core), gates, site)
        elif site.kind == HIDDEN:
            gates.handles += hidden_gate(model, gates, site)
        else:
            gates.handles += linear_gate(projection(base, site.gate.module), gates, site)
    return gates


def attach_scoring_gates(model: PreTrainedModel, sites: Sequence[Site]) -> Gates:
    """Gates whose gradients are scores, all open. Those of experts are `[U]`, not `[B, 1, U]`."""
    gates = attach_gates(model, [site for site in sites if site.kind not in EXPERT_KINDS])
    modules: dict[str, list[Site]] = {}
    for site in sites:
        if site.kind in EXPERT_KINDS:
            modules.setdefault(site.gate.module, []).append(site)
    for name, group in modules.items():
        gates.handles += scored_experts(get_module(base_model(model), name), gates, group)
    return gates
