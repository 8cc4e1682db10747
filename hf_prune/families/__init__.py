"""Where things are: one description per `model_type` of transformers."""

from hf_prune.errors import ConfigError, UnsupportedModelError
from hf_prune.families import bart, bert, gpt2, llama, phi, vit
from hf_prune.families.albert import ALBERT
from hf_prune.families.deberta_v2 import DEBERTA_V2
from hf_prune.families.distilbert import DISTILBERT
from hf_prune.families.gpt_neox import GPT_NEOX
from hf_prune.families.modernbert import MODERNBERT
from hf_prune.families.mpnet import MPNET
from hf_prune.families.opt import OPT
from hf_prune.families.spec import Family
from hf_prune.families.t5 import T5

FAMILIES: dict[str, Family] = {
    family.model_type: family
    for family in (
        *(bert.BERT, bert.ROBERTA, bert.XLM_ROBERTA, bert.CAMEMBERT, bert.ELECTRA),
        *(DISTILBERT, ALBERT, MPNET, DEBERTA_V2, MODERNBERT),
        *(gpt2.GPT2, GPT_NEOX, OPT, phi.PHI, phi.PHI3),
        *(llama.LLAMA, llama.MISTRAL, llama.QWEN2, llama.QWEN3, llama.SMOLLM3),
        *(llama.GEMMA, llama.GEMMA2, llama.GEMMA3, llama.GEMMA3_TEXT),
        *(llama.MIXTRAL, llama.QWEN3_MOE),
        *(T5, bart.BART, bart.WHISPER),
        *(vit.VIT, vit.CLIP, vit.CLIP_TEXT, vit.CLIP_VISION, vit.WAV2VEC2),
    )
}
"""Every family there is. The contract tests run over it."""


def get_family(model_type: str) -> Family:
    """The description of a `model_type`.

    Raises:
        UnsupportedModelError: listing the known families. A family is never guessed.
    """
    if model_type not in FAMILIES:
        raise UnsupportedModelError(
            f"model_type {model_type!r} has no description. Known: {', '.join(sorted(FAMILIES))}. "
            "Describe it (register_family), or let infer_family find and prove a description."
        )
    return FAMILIES[model_type]


def register_family(family: Family) -> None:
    """Make a description of one's own known, in this process.

    Args:
        family: of a `model_type` that has no description, or the one that it has.

    Raises:
        ConfigError: when there is another description of this `model_type`.
    """
    if FAMILIES.setdefault(family.model_type, family) != family:
        raise ConfigError(f"model_type {family.model_type!r} has another description already.")
