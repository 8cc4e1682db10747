"""Which tokens stay: the stage `vocabulary`."""

from typing import Literal

from pydantic import Field

from hf_prune.recipe.model import Model


class Vocabulary(Model):
    """Remove tokens that texts do not need, from the model and from its tokenizer.

    It is the last stage. A text of which all tokens stay gives the same logits as before, less the
    columns of tokens that went, so that no other stage is any better for coming after it.
    """

    stage: Literal["vocabulary"] = "vocabulary"
    """Tells this stage from the others."""
    texts: str | None = None
    """A file in UTF-8 with one text a line: what the model is to be used for. If not given, what is
    passed to `compress`, and in scripts the training data, as far as the model reads it."""
    at_least: int = Field(default=1, ge=1)
    """A token that occurs as often stays."""
    at_most: int | None = Field(default=None, ge=1)
    """Of these only so many stay, the most frequent."""
