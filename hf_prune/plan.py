"""What stays: a `Plan`, plain data without tensors, written as JSON.

The plan is the hinge of the library. Everything before it decides, everything after it obeys. It
can be made on one machine and applied on another, and is the same for one process or sixteen.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hf_prune.errors import PlanError

PLAN_VERSION = 1
"""Version of the JSON format."""
MAX_PLAN_BYTES = 1 << 26
"""A plan file larger than this is refused before it is parsed."""
MAX_UNITS = 1 << 22
"""More units in one site than any model has."""


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def rename_layers(name: str, layers: Mapping[str, str]) -> str:
    """A path with the name of its layer replaced.

    Args:
        name: path from the base model.
        layers: by the path of a layer, its other path.
    """
    for old, new in layers.items():
        if name == old or name.startswith(f"{old}."):
            return new + name[len(old) :]
    return name


@dataclass(frozen=True)
class SitePlan:
    """What stays of one site: the sorted indices of the kept units, out of `units`."""

    kind: str
    units: int
    kept: tuple[int, ...]

    def __post_init__(self) -> None:
        if not _is_int(self.units) or not 0 < self.units <= MAX_UNITS:
            raise PlanError(f"units={self.units!r} is not a count of units.")
        if not all(_is_int(index) for index in self.kept):
            raise PlanError("kept indices must be integers.")
        if any(a >= b for a, b in zip(self.kept, self.kept[1:], strict=False)):
            raise PlanError("kept indices must be sorted, each of them once.")
        if self.kept and not (self.kept[0] >= 0 and self.kept[-1] < self.units):
            raise PlanError(f"kept indices must lie in [0, {self.units}).")

    @property
    def removed(self) -> tuple[int, ...]:
        """The indices that go."""
        return tuple(sorted(set(range(self.units)) - set(self.kept)))


@dataclass(frozen=True)
class Plan:
    """What stays of a model.

    `sites` are keyed by the name of the site from the base model (`encoder.layer.0.attention`), so
    that one plan fits the model with any head or none. `weights` counts the entries that stay
    different from zero, by the full name of the parameter; which ones is in the checkpoint itself.
    """

    model_type: str
    sites: Mapping[str, SitePlan] = field(default_factory=dict)
    weights: Mapping[str, int] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """This plan as plain data."""
        return {
            "version": PLAN_VERSION,
            "model_type": self.model_type,
            "sites": {
                name: {"kind": site.kind, "units": site.units, "kept": list(site.kept)}
                for name, site in self.sites.items()
            },
            "weights": dict(self.weights),
        }

    def to_json(self) -> str:
        """This plan as JSON, one site a line so that two plans can be compared with `diff`."""
        data = self.to_dict()
        sites = ",\n".join(
            f"  {json.dumps(name)}: {json.dumps(site)}" for name, site in data["sites"].items()
        )
        weights = ",\n".join(f"  {json.dumps(k)}: {v}" for k, v in data["weights"].items())
        return (
            f'{{"version": {PLAN_VERSION},\n"model_type": {json.dumps(self.model_type)},\n'
            f'"sites": {{\n{sites}\n}},\n"weights": {{\n{weights}\n}}}}\n'
        )

    @classmethod
    def from_dict(cls, data: Any) -> "Plan":
        """The plan that `to_dict` describes.

        Raises:
            PlanError: when a key is missing, unknown, or holds the wrong kind of value.
        """
        if not isinstance(data, dict) or data.get("version") != PLAN_VERSION:
            raise PlanError(f"not a plan of version {PLAN_VERSION}.")
        unknown = set(data) - {"version", "model_type", "sites", "weights"}
        if unknown:
            raise PlanError(f"unknown keys in the plan: {sorted(unknown)}.")
        try:
            sites = {
                str(name): SitePlan(str(site["kind"]), site["units"], tuple(site["kept"]))
                for name, site in data["sites"].items()
            }
            weights = dict(data["weights"].items())
            model_type = data["model_type"]
        except (AttributeError, KeyError, TypeError) as error:
            raise PlanError(
                f"a part of the plan is missing or of the wrong kind: {error}."
            ) from error
        if not isinstance(model_type, str) or not all(
            _is_int(v) and v >= 0 for v in weights.values()
        ):
            raise PlanError("model_type must be text, and weights must be counts.")
        return cls(model_type, sites, weights)

    @classmethod
    def load(cls, path: "str | Path") -> "Plan":
        """The plan in a JSON file.

        Raises:
            PlanError: naming the file, when it is too large, not JSON, or not a plan.
        """
        path = Path(path)
        try:
            if path.stat().st_size > MAX_PLAN_BYTES:
                raise PlanError(f"larger than {MAX_PLAN_BYTES} bytes.")
            return cls.from_dict(json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError, RecursionError) as error:
            raise PlanError(f"{path}: {error}") from error

    def fingerprint(self) -> str:
        """SHA-256 of the canonical JSON: equal on all processes, or something is wrong."""
        text = json.dumps(self.to_dict(), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()

    def then(self, later: "Plan") -> "Plan":
        """This plan followed by `later`, in the numbering of the model before this plan.

        Raises:
            PlanError: when `later` was made for other widths than this plan leaves.
        """
        sites = dict(self.sites)
        for name, site in later.sites.items():
            before = self.sites.get(name)
            if before is None:
                sites[name] = site
                continue
            if len(before.kept) != site.units:
                raise PlanError(f"{name}: {len(before.kept)} units are left, not {site.units}.")
            kept = tuple(before.kept[index] for index in site.kept)
            sites[name] = SitePlan(site.kind, before.units, kept)
        return Plan(self.model_type, sites, {**self.weights, **later.weights})

    def moved(self, layers: Mapping[str, str]) -> "Plan":
        """This plan with the names that layers had before some left their list.

        Args:
            layers: by the path of a layer now, its path before; none, if no layer has left.
        """
        return Plan(
            self.model_type,
            {rename_layers(name, layers): site for name, site in self.sites.items()},
            self.weights,
        )
