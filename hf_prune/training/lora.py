"""Recovery through a few weights: low-rank adapters, merged into the pruned weights."""

from typing import TYPE_CHECKING, cast

import torch
from transformers import PreTrainedModel

from hf_prune.errors import ConfigError
from hf_prune.weights.masks import Masks, apply_masks_

if TYPE_CHECKING:
    from peft import PeftModel


def add_lora(model: PreTrainedModel, rank: int, seed: int = 0) -> "PeftModel":
    """A model whose linear layers have adapters; only these (and a task head) are trained.

    Args:
        model: pruned or not. It is changed in place, until `merge_lora`.
        rank: of the adapters. Their scale is 2.
        seed: of their start.

    Raises:
        ConfigError: when PEFT is not installed.
    """
    try:
        from peft import LoraConfig, get_peft_model  # an optional package
    except ImportError as error:
        raise ConfigError("lora_rank needs PEFT: pip install peft") from error
    heads = [
        name
        for name, _ in model.named_children()
        if name in ("classifier", "score", "qa_outputs", "pre_classifier")
    ]
    config = LoraConfig(
        r=rank,
        lora_alpha=2 * rank,
        lora_dropout=0.0,
        target_modules="all-linear",
        modules_to_save=heads or None,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return get_peft_model(model, config)


def merge_lora(adapted: "PeftModel", masks: Masks | None = None) -> PreTrainedModel:
    """The model with its adapters written into its weights: an ordinary model again.

    Args:
        adapted: from `add_lora`.
        masks: by parameter name, True = keep; what is False becomes zero again.
    """
    model = cast(PreTrainedModel, adapted.merge_and_unload())
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    if masks:
        apply_masks_(model, masks)
    return model
