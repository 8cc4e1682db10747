"""The description of a pruned model in its config, checked by itself.

It is keyed by module path from the base model, with absolute sizes.

This module is also saved beside models that are to load without hf_prune. So it imports nothing of
ours but an error, and what is saved with it.
"""

from collections.abc import Mapping
from itertools import pairwise
from typing import Any

from hf_prune.errors import CheckpointError
from hf_prune.surgery.remade import KEPT_HEADS, NO_HEADS

QUANT_METHOD = "hf_prune"
"""The name under which transformers finds our loader."""
SHAPES_VERSION = 1
"""Version of the description."""
MAX_ENTRIES = 1 << 20
"""More modules, and more heads, than any model has."""
TABLES = ("modules", "attributes", "parameters", "heads", "empty", "groups")
"""The tables that a description may have."""
PACKED = "packed"
"""The key under which the name of one weight stands that is stored in parts, where some are."""
KEY = "quantization_config"
"""The key of the config under which the description stands."""


class Shapes(dict[str, Any]):
    """A description as it stands in a config: not to be changed in place, and shared by copies.

    transformers copies whole configs in every forward pass that makes a cache, and copying each
    entry of a large description would take longer than what was saved. Pickled it is a plain dict.
    """

    def __deepcopy__(self, memo: dict[int, Any]) -> "Shapes":
        return self

    def __reduce__(self) -> tuple[type, tuple[dict[str, Any]]]:
        return dict, (dict(self),)


def is_size(value: object) -> bool:
    """Whether it is an integer, which a bool is not."""
    return isinstance(value, int) and not isinstance(value, bool)


def _is_selection(value: object) -> bool:
    """Whether it is a list of sorted indices, each of them once."""
    if not isinstance(value, list) or len(value) > MAX_ENTRIES or not all(map(is_size, value)):
        return False
    return min(value, default=0) >= 0 and all(a < b for a, b in pairwise(value))


def _table(shapes: Mapping[str, Any], key: str, kind: type) -> dict[str, Any]:
    """One table of a description, with entries of one kind."""
    value = shapes.get(key, {})
    if not isinstance(value, dict) or len(value) > MAX_ENTRIES:
        raise CheckpointError(f"{KEY}.{key} is not a table of modules.")
    for name, entry in value.items():
        if not isinstance(name, str) or not isinstance(entry, kind):
            what = "table" if kind is dict else "list"
            raise CheckpointError(f"{KEY}.{key}[{name!r}] is not a {what}.")
    return value


def _check_sizes(where: str, entry: Mapping[Any, Any]) -> None:
    for name, size in entry.items():
        if not isinstance(name, str) or not is_size(size):
            raise CheckpointError(f"{where}.{name} = {size!r} is not an integer.")
        if size < 0:
            raise CheckpointError(f"{where}.{name} = {size} is negative.")


def _check_heads(where: str, entry: Mapping[Any, Any]) -> None:
    bias, kept = entry.get("bias"), entry.get("kept")
    if set(entry) != {"bias", "kept"} or not isinstance(bias, str) or bias not in KEPT_HEADS:
        raise CheckpointError(f"{where} must have 'kept' and a 'bias' of {sorted(KEPT_HEADS)}.")
    if not _is_selection(kept):
        raise CheckpointError(f"{where}.kept is not a sorted list of heads, each of them once.")


def _check_empty(where: str, entry: Mapping[Any, Any]) -> None:
    kind, out, cross = entry.get("kind"), entry.get("out"), entry.get("cross")
    good = set(entry) == {"kind", "out", "cross"} and isinstance(kind, str) and kind in NO_HEADS
    if not good or not isinstance(out, str) or not isinstance(cross, bool):
        raise CheckpointError(
            f"{where} must have a 'kind' of {sorted(NO_HEADS)}, 'out' and 'cross'."
        )


def _check_groups(where: str, entry: Mapping[Any, Any]) -> None:
    reads = entry.get("reads")
    good = set(entry) == {"reads"} and isinstance(reads, list) and 0 < len(reads) <= MAX_ENTRIES
    good = good and all(map(is_size, reads)) and reads[0] == 0  # type: ignore[arg-type,index]  # a list
    if not good or not all(b - a in (0, 1) for a, b in pairwise(reads)):  # type: ignore[arg-type]  # as above
        raise CheckpointError(
            f"{where}.reads must give each query head the key/value head that it reads, in order, "
            "from 0 on and with none left out."
        )


def check_shapes(shapes: Mapping[str, Any]) -> None:
    """Check a description by itself: version, tables, kinds of value, signs.

    Raises:
        CheckpointError: naming the key.
    """
    version = shapes.get("version")
    if type(version) is not int or version != SHAPES_VERSION:
        raise CheckpointError(
            f"{KEY}.version is {shapes.get('version')!r}; this hf_prune reads "
            f"version {SHAPES_VERSION}. A newer checkpoint needs a newer hf_prune."
        )
    if not isinstance(shapes.get(PACKED, ""), str):
        raise CheckpointError(f"{KEY}.{PACKED} = {shapes[PACKED]!r} is not the name of a weight.")
    for name, entry in _table(shapes, "modules", dict).items():
        _check_sizes(f"{KEY}.modules[{name!r}]", entry)
        if set(entry) != {"out", "in"}:
            raise CheckpointError(f"{KEY}.modules[{name!r}] must have 'out' and 'in'.")
    for name, entry in _table(shapes, "attributes", dict).items():
        _check_sizes(f"{KEY}.attributes[{name!r}]", entry)
    for name, sizes in _table(shapes, "parameters", list).items():
        _check_sizes(f"{KEY}.parameters[{name!r}]", {str(i): s for i, s in enumerate(sizes)})
    for name, entry in _table(shapes, "heads", dict).items():
        _check_heads(f"{KEY}.heads[{name!r}]", entry)
    for name, entry in _table(shapes, "empty", dict).items():
        _check_empty(f"{KEY}.empty[{name!r}]", entry)
    for name, entry in _table(shapes, "groups", dict).items():
        _check_groups(f"{KEY}.groups[{name!r}]", entry)
