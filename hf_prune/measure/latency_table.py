"""What every width of every kind of block costs in time, measured on this machine.

The table holds the fixed costs of a forward pass too: embeddings, norms, head and the overhead of
calls. Without them a promised speed-up of 2 is measured as 1.6.
"""

import hashlib
import json
import logging
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel

from hf_prune.budget.levels import levels_of
from hf_prune.measure.latency import compare_latency
from hf_prune.plan import Plan, SitePlan
from hf_prune.sites import ALL_KINDS, HIDDEN, QUERY_HEADS, Site, find_sites
from hf_prune.surgery.remove import remove_units
from hf_prune.surgery.shared import shared_copy

logger = logging.getLogger(__name__)

TABLE_VERSION = 3
"""Version of the cached file."""
SHARES = (0.03, 0.06, 0.125, 0.25, 0.375, 0.5, 0.625, 0.75, 0.875, 1.0)
"""Widths to measure, as shares of a site's units."""
NS_PER_MS = 1_000_000
TRIES = 3
"""How often a table is measured that makes no sense, as on a machine that was held up."""
NO_SHAPES = (
    "_name_or_path",
    "architectures",
    "id2label",
    "label2id",
    "name_or_path",
    "problem_type",
    "task_specific_params",
    "transformers_version",
)
"""Keys of a config that say nothing about what a pass computes."""


@dataclass(frozen=True)
class Shape:
    """The input that is timed: sequences at once, and tokens of each."""

    batch_size: int
    sequence_length: int


@dataclass(frozen=True)
class LatencyTable:
    """Measured nanoseconds of a forward pass.

    Attributes:
        total_ns: of the whole model as it is.
        fixed_ns: of the model with every site at its least measured width.
        points: by kind and stack of block, the measured widths and what each adds to that, for one
            site.
    """

    total_ns: int
    fixed_ns: int
    points: Mapping[str, Mapping[int, int]]

    @property
    def makes_sense(self) -> bool:
        """Whether the whole model takes longer than the least, and units are worth something."""
        worth = any(value > 0 for each in self.points.values() for value in each.values())
        return 0 < self.fixed_ns < self.total_ns and worth

    def tables(self, sites: Sequence[Site]) -> dict[str, tuple[int, ...]]:
        """By site, what each number of kept units adds to `fixed_ns`; never falls."""
        return {site.name: _interpolate(self.points[_group(site)], site.units) for site in sites}

    def times(self, factor: float) -> "LatencyTable":
        """The table of a machine that is slower by a factor."""
        points = {
            group: {width: round(factor * value) for width, value in each.items()}
            for group, each in self.points.items()
        }
        return LatencyTable(round(factor * self.total_ns), round(factor * self.fixed_ns), points)

    def predict_ns(self, sites: Sequence[Site], counts: Mapping[str, int]) -> int:
        """The latency of the whole model when so many units of each site stay."""
        tables = self.tables(sites)
        return self.fixed_ns + sum(tables[site.name][counts[site.name]] for site in sites)


def _group(site: Site) -> str:
    """What sites must have in common for their widths to cost the same.

    Encoder and decoder have their own tokens, and so has what cross-attention looks at.
    """
    seen = f"{site.stack}{'.cross' if site.cross else ''}"
    shape = (site.kind, seen, site.gate.width, site.parameters, site.macs_per_token)
    return "-".join(str(part) for part in shape)


def _rising(values: Sequence[float]) -> list[float]:
    """The non-decreasing numbers nearest to some, by least squares: pools of neighbours."""
    pools: list[tuple[float, int]] = []  # mean, and of how many
    for value in values:
        mean, count = value, 1
        while pools and pools[-1][0] > mean:
            before, many = pools.pop()
            mean = (before * many + mean * count) / (many + count)
            count += many
        pools.append((mean, count))
    return [mean for mean, count in pools for _ in range(count)]


def _interpolate(points: Mapping[int, float], units: int) -> tuple[int, ...]:
    widths = sorted(points)
    result: list[int] = []
    for count in range(units + 1):
        right = next((i for i, w in enumerate(widths) if w >= count), len(widths) - 1)
        left = max(right - 1, 0)
        low, high = widths[left], widths[right]
        share = 0.0 if high == low else (count - low) / (high - low)
        value = round(points[low] + share * (points[high] - points[low]))
        result.append(max(0, value, result[-1] if result else 0))
    return tuple(result)


def _grid(site: Site, empty: bool) -> list[int]:
    """The widths of a site that are timed; with 0 only where it may be `empty`."""
    units = site.units
    wanted = {max(1, round(share * units / 8) * 8) for share in SHARES[:-1]} | {units}
    wanted = set(range(1, units + 1)) if units <= 16 else wanted
    allowed = levels_of(site, 1, 1)
    none = {0} if empty and not site.floor else set[int]()
    return sorted({next(level for level in allowed if level >= w) for w in wanted} | none)


def shaped_like(model: PreTrainedModel, counts: Mapping[str, int]) -> PreTrainedModel:
    """A model of the widths that keep so many units of each site, to be timed and counted.

    It shares what is not narrowed with the given model, which is not changed: no weight is copied.
    """
    shared = shared_copy(model)
    kinds = (*ALL_KINDS, QUERY_HEADS, *({HIDDEN} & counts.keys()))
    sites = {
        site.name: SitePlan(site.kind, site.units, tuple(range(counts[site.name])))
        for site in find_sites(model, kinds)
        if site.name in counts
    }
    remove_units(shared, Plan(model.config.model_type, sites))
    return shared


def _variants(
    sites: Sequence[Site], empty: bool
) -> tuple[dict[str, dict[str, int]], dict[str, tuple[str, int]]]:
    """The widths of every model to time, and which group and width each of them is about."""
    groups: dict[str, list[Site]] = {}
    for site in sites:
        groups.setdefault(_group(site), []).append(site)
    least = {site.name: _grid(site, empty)[0] for site in sites}
    counts = {"full": {site.name: site.units for site in sites}, "least": least}
    about: dict[str, tuple[str, int]] = {}
    for group, members in groups.items():
        for width in _grid(max(members, key=lambda site: site.units), empty)[1:]:
            name = f"{group}@{width}"
            wide = {s.name: min(width, s.units) for s in members}
            counts[name], about[name] = {**least, **wide}, (group, width)
    return counts, about


def _points(
    sites: Sequence[Site], added: Mapping[str, tuple[int, float]], empty: bool
) -> dict[int, float]:
    """What each width adds for one site, from what it adds where all sites of a kind have it.

    A site that is narrower than the width has all its units then, and adds what these do: a point
    between two others.

    Args:
        sites: of one kind.
        added: by model, the width of the widest sites and the time that all sites add.
        empty: whether sites may lose all units.
    """
    points = {_grid(site, empty)[0]: 0.0 for site in sites}
    for width, total in sorted(added.values()):
        alike = sum(1.0 for site in sites if site.units >= width)
        for units in (site.units for site in sites if site.units < width):
            left = max(w for w in points if w <= units)
            right = min((w for w in points if w > units), default=width)
            part = (units - left) / (right - left)
            total -= (1 - part) * points[left]
            if right == width:
                alike += part
            else:
                total -= part * points[right]
        points[width] = total / alike
    widths = sorted(points)
    first, *rest = (points[width] for width in widths)  # the least width adds nothing
    return dict(zip(widths, [first, *_rising([max(first, value) for value in rest])], strict=True))


def measure_latency_table(
    model: PreTrainedModel,
    sites: Sequence[Site],
    shape: Shape,
    *,
    empty: bool = False,
    rounds: int = 8,
) -> LatencyTable:
    """Time forward passes of models of many widths, in turn, with a progress bar.

    Each measured model has all sites of one kind at one width and all others at their least, so
    that what is timed are whole models, with their overheads and caches. What one site adds is the
    difference to the least model, shared among the sites of that kind, and scaled so that the table
    adds up to the time of the model as it is. A wider site is never cheaper: where times say so,
    the nearest ones that do not are taken. A table in which the least model is no faster than the
    whole is measured again.

    Args:
        model: not changed.
        sites: all sites that will be priced.
        shape: of the input.
        empty: whether sites may lose all units, so that the width 0 is timed too.
        rounds: over all models.
    """
    for _ in range(TRIES):
        table = _measured_once(model, sites, shape, empty=empty, rounds=rounds)
        if table.makes_sense:
            break
    return table


def _measured_once(
    model: PreTrainedModel, sites: Sequence[Site], shape: Shape, *, empty: bool, rounds: int
) -> LatencyTable:
    counts, about = _variants(sites, empty)
    models = {name: shaped_like(model, each) for name, each in counts.items()}
    times = compare_latency(
        models,
        batch_size=shape.batch_size,
        sequence_length=shape.sequence_length,
        rounds=rounds,
        progress="Measuring latency",
    )
    full = times["full"].median_ms * NS_PER_MS
    relative = {name: item.ratio * full for name, item in times.items()}  # fair to every model
    added: dict[str, dict[str, tuple[int, float]]] = {_group(site): {} for site in sites}
    for name, (group, width) in about.items():
        added[group][name] = width, relative[name] - relative["least"]
    points = {
        group: _points([site for site in sites if _group(site) == group], each, empty)
        for group, each in added.items()
    }
    whole = sum(_interpolate(points[_group(site)], site.units)[-1] for site in sites)
    scale = (full - relative["least"]) / whole if whole > 0 else 1.0
    return LatencyTable(
        round(full),
        round(relative["least"]),
        {
            group: {width: round(scale * value) for width, value in each.items()}
            for group, each in points.items()
        },
    )


def _processor() -> str:
    """The model of the processor: on Linux only this file says it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.processor())


def _told(config: Any) -> Any:
    """All of a config, with those of its parts, that can matter to time."""
    if isinstance(config, Mapping):
        return {str(key): _told(value) for key, value in config.items() if key not in NO_SHAPES}
    return [_told(value) for value in config] if isinstance(config, list | tuple) else config


def _key(model: PreTrainedModel, sites: Sequence[Site], shape: Shape, empty: bool) -> str:
    device = model.device
    named = torch.cuda.get_device_name(device) if device.type == "cuda" else _processor()
    parts = {
        "version": TABLE_VERSION,
        "model": type(model).__name__,
        "config": _told(model.config.to_dict()),
        "attention": model.config._attn_implementation,
        "parameters": [(name, [*p.shape], str(p.dtype)) for name, p in model.named_parameters()],
        "sites": [(site.name, site.units, _group(site)) for site in sites],
        "shape": asdict(shape),
        "device": [device.type, named, platform.machine(), os.cpu_count()],
        "threads": torch.get_num_threads(),
        "precision": torch.get_float32_matmul_precision(),
        "software": [torch.__version__, transformers.__version__],
        **({"empty": True} if empty else {}),
    }
    text = json.dumps(parts, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def cache_folder() -> Path:
    """Where tables are kept: `$HF_PRUNE_CACHE`, or `~/.cache/hf_prune`."""
    return Path(os.environ.get("HF_PRUNE_CACHE") or Path.home() / ".cache" / "hf_prune")


def _read(path: Path) -> LatencyTable | None:
    """The table in a file; None when there is none, or it is not one."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        points = {
            str(group): {int(width): int(value) for width, value in each.items()}
            for group, each in data["points"].items()
        }
        return LatencyTable(int(data["total_ns"]), int(data["fixed_ns"]), points)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        logger.warning("%s is not a latency table: it is measured again.", path)
        return None


def _keep(table: LatencyTable, path: Path) -> None:
    staged = path.with_suffix(f".{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        staged.write_text(json.dumps(asdict(table)) + "\n", encoding="utf-8")
        staged.replace(path)
    except OSError as error:
        logger.warning(
            "the latency table cannot be kept, and will be measured again next time (%s): set "
            "HF_PRUNE_CACHE to a folder that can be written to.",
            error,
        )


def latency_table(
    model: PreTrainedModel,
    sites: Sequence[Site],
    shape: Shape,
    *,
    empty: bool = False,
    cache: bool = True,
) -> LatencyTable:
    """The table of a model on this machine, measured once and then read from disk.

    The key holds the whole config but for names, the shape and dtype of every parameter, device,
    threads, attention, the shape of the input, and the versions of torch and transformers. Where
    the table cannot be written, a warning says so, and it serves this once.

    Args:
        model: not changed.
        sites: all sites that will be priced.
        shape: of the input.
        empty: as in `measure_latency_table`.
        cache: whether to read and write the cache folder.
    """
    path = cache_folder() / "latency" / f"{_key(model, sites, shape, empty)}.json"
    table = _read(path) if cache else None
    if table is not None:
        return table
    table = measure_latency_table(model, sites, shape, empty=empty)
    if not table.makes_sense:
        logger.warning(
            "the latency table makes no sense: the model takes %.2f ms, and %.2f ms with hardly a "
            "unit left. Time is not in what can be removed, or the machine is busy; the table is "
            "not kept.",
            table.total_ns / NS_PER_MS,
            table.fixed_ns / NS_PER_MS,
        )
    elif cache:
        _keep(table, path)
    return table
