"""A plain config: one that says all widths by itself, so that a model loads with no loader of ours.

Every layer must have as many units of a kind as the others, and the config must have a key for
that number. Whether it has is not taken from the description of the family: the model is built
again from the new config, and compared.
"""

import copy

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from hf_prune.errors import UnsupportedModelError
from hf_prune.sites import ALL_KINDS, HIDDEN, Site, base_model, find_sites
from hf_prune.statistics.example import example_batch
from hf_prune.surgery.remade import (
    ConfigView,
    MPNetKeptHeads,
    NoHeads,
    NoInputs,
    T5KeptHeads,
    UnevenGroups,
)
from hf_prune.surgery.shapes import forget_shapes_, set_key_


def _hidden_width(model: PreTrainedModel) -> int | None:
    """The hidden width as it is; None where there is no single one."""
    try:
        (site,) = find_sites(model, [HIDDEN])
    except UnsupportedModelError:
        return None
    return site.units


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
    sizes = {key: found.pop() for key, found in counts.items()}
    width = _hidden_width(model)
    text = model.config.get_text_config(decoder=True)
    return sizes if width in (None, text.hidden_size) else {**sizes, "hidden_size": width}


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
        if isinstance(module, (NoHeads, NoInputs, T5KeptHeads, MPNetKeptHeads, UnevenGroups)):
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


@torch.no_grad()
def _check_outputs(model: PreTrainedModel, config: PreTrainedConfig) -> None:
    """Some models scale by the hidden width that their config says: compare what comes out."""
    built: PreTrainedModel = type(model)(copy.deepcopy(config)).eval()
    nn.Module.to(built, device=model.device, dtype=model.dtype)
    built.load_state_dict(model.state_dict())
    outputs = []
    for each in (model, built):
        training = each.training
        outputs.append(each.eval()(**example_batch(each, 2, 8))[0].double())
        each.train(training)
    allowed = 256 * torch.finfo(model.dtype).eps * float(outputs[0].abs().max())
    if float((outputs[0] - outputs[1]).abs().max()) > allowed:
        raise UnsupportedModelError(
            f"a plain config would build another {model.config.model_type}: it computes with the "
            "hidden width. Leave portable out."
        )


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
    if (
        any("head" in key or key == "hidden_size" for key in sizes)
        and getattr(text, "head_dim", None) is None
    ):
        text.head_dim = text.hidden_size // text.num_attention_heads
    try:
        for key, value in sizes.items():
            set_key_(config, key, value)
        with torch.device("meta"):
            built = type(model)(config)
    except (ValueError, AttributeError) as error:
        raise UnsupportedModelError(f"a plain config cannot say the widths: {error}") from error
    _check_same(model, built)
    if "hidden_size" in sizes:
        _check_outputs(model, config)
    old = model.config
    model.config = config
    for module in model.modules():
        own = vars(module).get("config")
        if own is old:
            vars(module)["config"] = config
        elif isinstance(own, ConfigView):
            vars(module)["config"] = config.get_text_config(decoder=True)
