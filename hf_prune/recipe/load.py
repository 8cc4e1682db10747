"""A `Recipe` of ordered stages, from YAML, plain data, or another recipe."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args

from pydantic import BaseModel, Field, ValidationError, model_validator

from hf_prune.errors import ConfigError
from hf_prune.recipe.model import Model
from hf_prune.recipe.names import did_you_mean
from hf_prune.recipe.prune import Prune
from hf_prune.recipe.schedule import Schedule
from hf_prune.recipe.target import Floor, Target
from hf_prune.recipe.template import PATTERNS
from hf_prune.recipe.template import known_keys as known_template_keys
from hf_prune.recipe.text import dump_yaml, parse_yaml
from hf_prune.recipe.train import Distill, Student, Train
from hf_prune.recipe.vocabulary import Vocabulary
from hf_prune.recipe.weights import Weights

FILES = (".yaml", ".yml")
"""How the name of a template ends that is read from a file."""
MAX_RECIPE_BYTES = 1 << 20
"""A recipe file larger than this is refused before it is parsed."""

_AnyStage = Union[Prune, Train, Distill, Student, Vocabulary]  # noqa: UP007  # pydantic reads it
Stage = Annotated[_AnyStage, Field(discriminator="stage")]


def _joint(stage: Prune, following: object) -> bool:
    """Whether single weights tighten together with the units of a stage, on one schedule."""
    if not isinstance(following, Prune) or following.structural:
        return False
    return stage.structural and following.schedule == stage.schedule


class Recipe(Model):
    """An ordered list of stages."""

    hf_prune: Literal[1] = 1
    """Version of the format."""
    seed: int = Field(default=0, ge=0)
    """Seed of everything random."""
    stages: tuple[Stage, ...]
    """What happens, in this order."""
    standalone: bool = False
    """Save a module beside the weights: it loads without hf_prune, by `trust_remote_code=True`."""

    portable: bool = False
    """Write a plain config, which loads with no plugin at all. Needs `even: true` in each stage
    that removes units; most configs can say a number of neurons only."""

    @model_validator(mode="after")
    def _even(self) -> "Recipe":
        stages = [s for s in self.stages if isinstance(s, Prune) and s.structural]
        if self.portable and not all(s.even and not s.schedule for s in stages):
            raise ValueError("portable: true needs even: true, and no schedule, in each stage")
        return self

    @model_validator(mode="after")
    def _order(self) -> "Recipe":
        if not self.stages:
            raise ValueError("stages is empty: write at least one.")
        if any(isinstance(stage, Vocabulary) for stage in self.stages[:-1]):
            raise ValueError("vocabulary is the last stage: write it once, at the end")
        zeros = False
        for stage, following in zip(self.stages, (*self.stages[1:], None), strict=True):
            if not isinstance(stage, Prune):
                continue
            if stage.structural and zeros:
                raise ValueError("prune heads and neurons before single weights")
            zeros = zeros or "weights" in stage.units
            if stage.schedule and isinstance(following, Train) and following.lora_rank:
                raise ValueError("lora_rank is for recovery, after the masks have closed")
            if stage.schedule and not isinstance(following, Train) and not _joint(stage, following):
                raise ValueError(
                    "a prune stage with a schedule needs a train or distill stage after it, or "
                    "between them one of single weights with the same schedule"
                )
        return self

    @property
    def prune_stages(self) -> tuple[Prune, ...]:
        """The stages that remove something."""
        return tuple(stage for stage in self.stages if isinstance(stage, Prune))

    @property
    def vocabulary(self) -> Vocabulary | None:
        """The stage that removes tokens."""
        last = self.stages[-1]
        return last if isinstance(last, Vocabulary) else None

    def to_yaml(self) -> str:
        """This recipe as YAML that `load_recipe` reads back to an equal recipe."""
        return dump_yaml(self.model_dump(mode="json"))


def _read(path: Path, what: str = "recipe") -> str:
    try:
        size = path.stat().st_size
        if size > MAX_RECIPE_BYTES:
            raise ConfigError(f"{path} has {size} bytes; a {what} has at most {MAX_RECIPE_BYTES}.")
        return path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise ConfigError(f"cannot read the {what} {path}: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not UTF-8 text.") from error


def _known_keys(location: tuple[int | str, ...], root: type[BaseModel]) -> list[str]:
    if "template" in location:
        return known_template_keys(location[location.index("template") + 1 :])
    models: tuple[type[BaseModel], ...] = (root,)
    nested: dict[str, type[BaseModel]] = {
        "schedule": Schedule,
        "target": Target,
        "floor": Floor,
        "weights": Weights,
    }
    inner = [model for name, model in nested.items() if name in location]
    if inner:
        models = tuple(inner)
    elif location and location[0] == "stages":
        models = tuple(m for m in get_args(_AnyStage) if m.__name__.lower() in location)
    return [name for model in models for name in model.model_fields]


def explain(error: ValidationError, root: "type[BaseModel] | None" = None) -> str:
    """What is wrong with plain data: one line for each mistake, with its place.

    Args:
        error: of validation.
        root: what was validated; a recipe, if it is not given.
    """
    lines = []
    for item in error.errors(include_url=False):
        if item["type"] == "default_factory_not_called":
            continue  # because another field is wrong, which says so itself
        location = item["loc"]
        where = ".".join(
            str(part) for part in location if part not in ("prune", "train", "distill", "student")
        )
        message = item["msg"].removeprefix("Value error, ")
        if item["type"] == "extra_forbidden":
            known = _known_keys(location[:-1], root or Recipe)
            message = f"unknown key{did_you_mean(str(location[-1]), known)}"
        if item["type"] == "union_tag_invalid" and location[-1] == "template":
            tag = str(item["ctx"]["tag"])
            message = f"unknown pattern {tag!r}{did_you_mean(tag, sorted(PATTERNS))}"
        lines.append(f"{where}: {message}" if where else message)
    return "\n".join(lines)


def _written_out(name: str, folder: Path) -> Any:
    """The data of a template that is given by its name, or by the path of a file."""
    if not name.lower().endswith(FILES):
        return {"pattern": name}
    try:
        data = parse_yaml(_read(folder / name, "template"))
    except ConfigError as error:
        raise ConfigError(f"template {name}: {error}") from error
    if not isinstance(data, Mapping) or "pattern" not in data:
        raise ConfigError(
            f"template {name}: it must say pattern: ..., one of {', '.join(sorted(PATTERNS))}."
        )
    return data


def _with_templates(data: Any, folder: Path) -> tuple[Any, dict[Any, str]]:
    """The data of a recipe in which templates that are named are written out.

    Also the file of each that was read from one, by the number of its stage.
    """
    stages = data.get("stages") if isinstance(data, Mapping) else None
    if not isinstance(stages, list | tuple):
        return data, {}
    written, files = [], {}
    for index, stage in enumerate(stages):
        name = stage.get("template") if isinstance(stage, Mapping) else None
        if not isinstance(name, str):
            written.append(stage)
            continue
        written.append({**stage, "template": _written_out(name, folder)})
        if name.lower().endswith(FILES):
            files[index] = name
    return {**data, "stages": written}, files


def load_recipe(source: "Recipe | str | os.PathLike[str] | Mapping[str, Any]") -> Recipe:
    """A `Recipe` from a recipe, the path of a YAML file, or plain data.

    A `template` may be the name of a pattern, or the path of a YAML file from the folder of the
    recipe (the current one for plain data): the recipe then holds what is in it.

    Raises:
        ConfigError: naming the file, the key and what is wrong with it.
    """
    if isinstance(source, Recipe):
        return source
    name, folder = "recipe", Path()
    data: Any = source
    if not isinstance(source, Mapping):
        name = os.fspath(source)
        folder = Path(name).parent
        try:
            data = parse_yaml(_read(Path(name)))
        except ConfigError as error:
            raise ConfigError(f"{name}: {error}") from error
    data, files = _with_templates(data, folder)
    try:
        return Recipe.model_validate_json(json.dumps(data))
    except ValidationError as error:
        wrong = {item["loc"][1] for item in error.errors() if "template" in item["loc"]}
        read = [f"stages.{at}.template was read from {files[at]}" for at in wrong & files.keys()]
        raise ConfigError("\n".join([f"{name}: {explain(error)}", *sorted(read)])) from error
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{name}: only plain values are allowed ({error}).") from error
