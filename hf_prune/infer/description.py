"""The description of a family as YAML, checked key by key."""

import dataclasses
import json
import os
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from hf_prune.errors import ConfigError
from hf_prune.families.spec import Family
from hf_prune.recipe import did_you_mean, parse_yaml


def _read(kind: Any, data: Any, where: str) -> Any:
    """A value of a description from plain data."""
    if dataclasses.is_dataclass(kind):
        return _read_table(kind, data, where)
    options = [option for option in typing.get_args(kind) if option is not type(None)]
    if data is None and type(None) in typing.get_args(kind):
        return None
    lists = [o for o in (kind, *options) if typing.get_origin(o) is tuple]
    if lists:
        items = typing.get_args(lists[0])
        if not isinstance(data, list) or (Ellipsis not in items and len(data) != len(items)):
            raise ConfigError(f"{where} is not a list of the right length.")
        return tuple(_read(items[0], item, f"{where}[{i}]") for i, item in enumerate(data))
    tables = [option for option in options if dataclasses.is_dataclass(option)]
    if tables:
        return _read_table(tables[0], data, where)
    allowed = options if typing.get_origin(kind) is typing.Literal else None
    kinds = tuple(o for o in (options or [kind]) if isinstance(o, type) and o is not object)
    fits = data in allowed if allowed else kind is object or type(data) in kinds
    if not fits:
        raise ConfigError(f"{where} = {data!r} is not of the right kind.")
    return data


def _read_table(kind: Any, data: Any, where: str) -> Any:
    if not isinstance(data, Mapping):
        raise ConfigError(f"{where} is not a table.")
    hints, fields = typing.get_type_hints(kind), {f.name: f for f in dataclasses.fields(kind)}
    for key in data:
        if key not in fields:
            raise ConfigError(f"{where}: unknown key {key!r}{did_you_mean(key, list(fields))}")
    for name, item in fields.items():
        if item.default is dataclasses.MISSING and name not in data:
            raise ConfigError(f"{where}.{name} is missing.")
    return kind(**{key: _read(hints[key], value, f"{where}.{key}") for key, value in data.items()})


def load_family(path: "str | os.PathLike[str]") -> Family:
    """The description of a family in a YAML file, whose keys are those of `families.spec`.

    Raises:
        ConfigError: naming the key that is unknown, missing or of the wrong kind.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read the family {os.fspath(path)}: {error}") from error
    family: Family = _read(Family, parse_yaml(text), "family")
    return family


def dump_family(family: Family) -> str:
    """A description as YAML that `load_family` reads back to an equal one."""
    plain = json.loads(json.dumps(dataclasses.asdict(family)))  # tuples become lists
    text: str = yaml.safe_dump(plain, sort_keys=False)
    return text
