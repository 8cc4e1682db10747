"""How many tokens each site sees: patches, frames of sound, or one of two sequences."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_prune.budget.costs import Lengths
from hf_prune.sites import HIDDEN, Site, base_model, get_module, logical_weight
from hf_prune.statistics.example import example_batch, tokens_up_to


def _keep_rows(found: dict[str, int], name: str) -> Any:
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        values = (value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
        first = next(values, None)
        if first is not None:
            found.setdefault(name, first.numel() // first.shape[-1])

    return hook


def _lengths(base: nn.Module, site: Site, rows: dict[str, int], sequence_length: int) -> Lengths:
    own = rows.get(site.gate.module, sequence_length)
    others = [s for s in site.slices if s.axis == 0 and rows.get(s.module, own) != own]
    if not site.cross or not others:
        return Lengths(own, own)
    moved = sum(
        item.width * int(logical_weight(get_module(base, item.module)).shape[1]) for item in others
    )
    return Lengths(own, rows[others[0].module], site.runs * moved)


@torch.no_grad()
def site_lengths(
    model: PreTrainedModel, sites: Sequence[Site], sequence_length: int
) -> dict[str, Lengths]:
    """Tokens that each site sees, by its name, as one example passes through the model.

    Args:
        model: not changed.
        sites: from `find_sites`.
        sequence_length: tokens of a text, no more than the model has positions; images and sound
            have the size that the model takes.
    """
    base, rows = base_model(model), dict[str, int]()
    sequence_length = tokens_up_to(model, sequence_length)
    units = [site for site in sites if site.kind != HIDDEN]
    names = {item.module for site in units for item in site.slices}
    handles = [
        get_module(base, name).register_forward_pre_hook(_keep_rows(rows, name), with_kwargs=True)
        for name in names
    ]
    training = model.training
    model.eval()
    kwargs = {"use_cache": False} if hasattr(model.config, "use_cache") else {}
    try:
        model(**example_batch(model, 1, sequence_length), **kwargs)
    finally:
        model.train(training)
        for handle in handles:
            handle.remove()
    found = {site.name: Lengths(sequence_length, sequence_length) for site in sites}
    return found | {site.name: _lengths(base, site, rows, sequence_length) for site in units}
