"""What can go: the sites of a model, with the slices of the weights that their units own."""

from hf_prune.sites.find import find_layers, find_sites, layer_modules
from hf_prune.sites.hidden import find_module, hidden_width, norms, readers
from hf_prune.sites.modules import (
    base_model,
    check_not_quantized,
    gate_weight,
    get_module,
    get_parameter,
    has_module,
    logical_weight,
    out_features,
    projection,
)
from hf_prune.sites.place import join
from hf_prune.sites.site import (
    ALL_KINDS,
    EXPERT_KINDS,
    HIDDEN,
    KINDS,
    QUERY_HEADS,
    Attribute,
    Layer,
    Site,
    Slice,
)

__all__ = [
    "ALL_KINDS",
    "EXPERT_KINDS",
    "HIDDEN",
    "KINDS",
    "QUERY_HEADS",
    "Attribute",
    "Layer",
    "Site",
    "Slice",
    "base_model",
    "check_not_quantized",
    "find_layers",
    "find_module",
    "find_sites",
    "gate_weight",
    "get_module",
    "get_parameter",
    "has_module",
    "hidden_width",
    "join",
    "layer_modules",
    "logical_weight",
    "norms",
    "out_features",
    "projection",
    "readers",
]
