"""Templates: which units stay by a pattern, and not by a budget alone. Plain data."""

from typing import Annotated, Any, Literal, Union

from pydantic import Field, model_validator

from hf_prune.recipe.model import Model


class AlternateLayers(Model):
    """Of every so many layers the first stays whole; nothing stays of the others."""

    pattern: Literal["alternate_layers"] = "alternate_layers"
    """The name of this pattern."""
    every: int = Field(default=2, ge=2)
    """Layers 0, `every`, 2 * `every`, ... of each stack stay."""


class EveryHead(Model):
    """Every so many heads stay in each attention; neurons are left to the budget."""

    pattern: Literal["every_head"] = "every_head"
    """The name of this pattern."""
    every: int = Field(default=2, ge=2)
    """Heads 0, `every`, 2 * `every`, ... stay."""


class Ends(Model):
    """The first and the last layers of each stack stay whole; nothing stays of those between."""

    pattern: Literal["ends"] = "ends"
    """The name of this pattern."""
    first: int = Field(default=1, ge=0)
    """Layers that stay at the start."""
    last: int = Field(default=1, ge=0)
    """Layers that stay at the end."""


class UniformWidth(Model):
    """The same share of every site, the best units of each, at widths that suit the hardware."""

    pattern: Literal["uniform_width"] = "uniform_width"
    """The name of this pattern."""
    multiple: int = Field(default=64, ge=1)
    """Neurons kept are a multiple of this, unless all stay: 8, 16 or 64."""
    share: float | None = Field(default=None, ge=0, le=1)
    """Of the units that stay; as many as `sparsity` or `target` allow, if not given."""


class Rule(Model):
    """What stays of the sites that it names. Give one of `count`, `share`, `units` and `every`."""

    sites: str = "*"
    """A shell pattern of site names: `encoder.layer.0.*`."""
    kind: Literal["heads", "query_heads", "neurons", "experts", "expert_neurons"] | None = None
    """Units that it is about; of every kind, if not given."""
    layers: tuple[int, ...] | None = None
    """Numbers of layers within their stack, from the end where negative; all, if not given."""
    count: int | None = Field(default=None, ge=0)
    """So many stay, the best ones; all, where there are fewer."""
    share: float | None = Field(default=None, ge=0, le=1)
    """This share stays, the best ones, rounded down to a width that is allowed."""
    units: tuple[Annotated[int, Field(ge=0)], ...] | None = None
    """Exactly these stay."""
    every: int | None = Field(default=None, ge=2)
    """Units 0, `every`, 2 * `every`, ... stay."""

    @model_validator(mode="after")
    def _one_saying(self) -> "Rule":
        said = (self.count, self.share, self.units, self.every)
        if sum(value is not None for value in said) != 1:
            raise ValueError("give exactly one of count, share, units and every")
        if self.units is not None and len(set(self.units)) < len(self.units):
            raise ValueError("units must name each unit once")
        return self


class Rules(Model):
    """Rules of one's own: of several that name a site the last one holds; of none, the budget."""

    pattern: Literal["rules"] = "rules"
    """The name of this pattern."""
    rules: tuple[Rule, ...] = Field(min_length=1)
    """In order."""


PATTERNS: dict[str, type[Model]] = {
    "alternate_layers": AlternateLayers,
    "ends": Ends,
    "every_head": EveryHead,
    "rules": Rules,
    "uniform_width": UniformWidth,
}
"""Every pattern, by the name that recipes use."""


Template = Annotated[
    Union[AlternateLayers, Ends, EveryHead, Rules, UniformWidth],  # noqa: UP007  # pydantic reads it
    Field(discriminator="pattern"),
]
"""A pattern and its options."""


def known_keys(location: tuple[Any, ...]) -> list[str]:
    """The keys that may stand at a place below `template`, for suggestions."""
    if "rules" in location[1:]:
        return list(Rule.model_fields)
    model = PATTERNS.get(str(location[0])) if location else None
    return list(model.model_fields) if model else ["pattern"]
