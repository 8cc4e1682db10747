"""A plain config: one that says all widths by itself, so that a model loads with no loader of ours.

Every layer must have as many units of a kind as the others, and the config must have a key for
that number. Whether it has is not taken from the description of the family: the model is built
again from the new config, and compared.
"""

import copy

import torch
from torch import nn
from transformers import PreTrainedModel

from hf_prune.errors import UnsupportedModelError
from hf_prune.sites import ALL_KINDS, Site, base_model, find_sites
from hf_prune.surgery.rebuild import (
    ConfigView,
    MPNetKeptHeads,
    NoHeads,
    NoInputs,
    T5KeptHeads,
)
from hf_prune.surgery.shapes import forget_shapes_, set_key_


def _sizes(model: PreTrainedModel) -> dict[str, int]:
    """The keys of the config and what they must say.

    Raises:
        UnsupportedModelError: when layers differ, or units of a kind are all gone somewhere.
    """
    counts: dict[str, set[int]] = {}
    for site in find_sites(model, ALL_KINDS):
        for key, per_unit in site.sizes:
            counts.setdefault(key, set()).add(per_unit * site.units)
    for key, found in counts.items():
        if len(found) > 1:
            raise UnsupportedModelError(
                f"layers differ: {key} would have to be {sorted(found)}. A plain config has one "
                "number for all of them: prune with even: true."
            )
    return {key: found.pop() for key, found in counts.items()}


def _integers(module: nn.Module, site: Site) -> dict[str, object]:
    return {a.name: vars(module).get(a.name) for a in site.attributes}


def _check_same(model: PreTrainedModel, built: PreTrainedModel) -> None:
    """Compare a model with what a plain config builds: shapes, classes, and numbers."""
    theirs = dict(built.named_parameters())
    for name, parameter in model.named_parameters():
        other = theirs.get(name)
        if other is None or other.shape != parameter.shape:
            there = None if other is None else list(other.shape)
            raise UnsupportedModelError(
                f"a plain config cannot say what is left of {name}: it would build {there}, not "
                f"{list(parameter.shape)}. Prune units: [neurons] only."
            )
    for name, module in model.named_modules():
        if isinstance(module, (NoHeads, NoInputs, T5KeptHeads, MPNetKeptHeads)):
            raise UnsupportedModelError(f"a plain config cannot say what {name} has become.")
    ours, others = base_model(model), base_model(built)
    for site, other_site in zip(
        find_sites(model, ALL_KINDS), find_sites(built, ALL_KINDS), strict=True
    ):
        module, other_module = ours.get_submodule(site.core), others.get_submodule(site.core)
        if site.units != other_site.units or _integers(module, site) != _integers(
            other_module, other_site
        ):
            raise UnsupportedModelError(f"a plain config would build {site.name} otherwise.")


def make_plain_(model: PreTrainedModel) -> None:
    """Let the config of a pruned model say its widths by itself, and take our description away.

    After this `save_pretrained` writes a model that loads anywhere, with no plugin.

    Raises:
        UnsupportedModelError: when layers differ, or the config has no key for what was pruned.
            The model is not changed.
    """
    sizes = _sizes(model)
    config = copy.deepcopy(model.config)
    forget_shapes_(config)
    text = config.get_text_config(decoder=True)
    if any("head" in key for key in sizes) and getattr(text, "head_dim", None) is None:
        text.head_dim = text.hidden_size // text.num_attention_heads
    try:
        for key, value in sizes.items():
            set_key_(config, key, value)
        with torch.device("meta"):
            built = type(model)(config)
    except (ValueError, AttributeError) as error:
        raise UnsupportedModelError(f"a plain config cannot say the widths: {error}") from error
    _check_same(model, built)
    old = model.config
    model.config = config
    for module in model.modules():
        own = vars(module).get("config")
        if own is old:
            vars(module)["config"] = config
        elif isinstance(own, ConfigView):
            vars(module)["config"] = config.get_text_config(decoder=True)
