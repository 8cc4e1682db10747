"""YAML without surprises: JSON's idea of a scalar, and nothing that runs, repeats or refers."""

import re
from typing import Any

import yaml

from hf_prune.errors import ConfigError

MAX_RECIPE_DEPTH = 32
"""A recipe nested deeper than this is refused before it is composed."""


class _Loader(yaml.SafeLoader):
    """YAML with JSON's idea of a scalar: no octal, no dates, no `yes`, and `1e-3` is a number."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}  # noqa: RUF012  # PyYAML's name


for _tag, _pattern, _first in (
    ("bool", r"^(?:true|false)$", "tf"),
    ("null", r"^(?:null|~|)$", "n~"),
    ("int", r"^[-+]?(?:0|[1-9][0-9]*)$", "-+0123456789"),
    (
        "float",
        r"^[-+]?(?:[0-9]+\.[0-9]*|\.[0-9]+|[0-9]+(?=[eE]))(?:[eE][-+]?[0-9]+)?$",
        "-+.0123456789",
    ),
):
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(_pattern), list(_first))
_Loader.yaml_implicit_resolvers.setdefault("", []).append(
    ("tag:yaml.org,2002:null", re.compile(r"^$"))
)


class _Dumper(yaml.SafeDumper):
    """Quotes what `_Loader` would take for something else than text."""

    yaml_implicit_resolvers = _Loader.yaml_implicit_resolvers


def _unique_keys(loader: yaml.SafeLoader, node: yaml.MappingNode) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key_node, value_node in node.value:
        key = loader.construct_object(key_node, deep=True)
        if not isinstance(key, str) or key in result:
            why = "appears twice" if isinstance(key, str) else "is not a string"
            raise ConfigError(f"line {key_node.start_mark.line + 1}: the key {key!r} {why}.")
        result[key] = loader.construct_object(value_node, deep=True)
    return result


_Loader.add_constructor("tag:yaml.org,2002:map", _unique_keys)


def _check_events(text: str) -> None:
    """Refuse what a recipe never needs, before anything is composed or built."""
    depth = 0
    for event in yaml.parse(text, Loader=_Loader):
        line = event.start_mark.line + 1 if event.start_mark else 0
        if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None):
            raise ConfigError(f"line {line}: anchors and aliases are not allowed: write it out.")
        tag = getattr(event, "tag", None)
        if tag:
            raise ConfigError(f"line {line}: tags such as {tag!r} are not allowed.")
        if isinstance(event, yaml.CollectionStartEvent):
            depth += 1
        elif isinstance(event, yaml.CollectionEndEvent):
            depth -= 1
        if depth > MAX_RECIPE_DEPTH:
            raise ConfigError(f"line {line}: nested deeper than {MAX_RECIPE_DEPTH} levels.")


def parse_yaml(text: str) -> Any:
    """Plain data from YAML text, hardened.

    Raises:
        ConfigError: on aliases, tags, duplicate or non-string keys, deep nesting, or a syntax
            error.
    """
    try:
        _check_events(text)
        return yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        raise ConfigError(f"not valid YAML: {error}") from error


def dump_yaml(data: Any) -> str:
    """Plain data as YAML that `parse_yaml` reads back to the same."""
    return yaml.dump(data, Dumper=_Dumper, sort_keys=False)
