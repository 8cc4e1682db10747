"""Where things are: one description per `model_type` of transformers."""

from hf_prune.errors import UnsupportedModelError
from hf_prune.families.bert import BERT, ELECTRA, ROBERTA
from hf_prune.families.distilbert import DISTILBERT
from hf_prune.families.gpt2 import GPT2
from hf_prune.families.llama import LLAMA
from hf_prune.families.spec import Family

FAMILIES: dict[str, Family] = {
    family.model_type: family for family in (BERT, ROBERTA, ELECTRA, DISTILBERT, GPT2, LLAMA)
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
            "CONTRIBUTING.md shows how to add one: a file with one value."
        )
    return FAMILIES[model_type]
