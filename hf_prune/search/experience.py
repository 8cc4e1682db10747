"""Experience: past searches above a floor, in a SQLite file, from which the next one starts.

Off unless a file is named, and never sent anywhere. It holds no weights, no data and no paths.
"""

import json
import math
import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

from hf_prune.budget.costs import Goal
from hf_prune.criteria.ranking import Ranking
from hf_prune.errors import CheckpointError
from hf_prune.recipe import Prune
from hf_prune.sites import Site

APPLICATION_ID = 0x48465052
"""By which a file says that it is one of ours ("HFPR")."""
STORE_VERSION = 1
"""Version of the table."""
BUSY_SECONDS = 10.0
"""How long another process may write."""
MAX_RUNS = 1000
"""So many runs of a family are read, the newest ones."""
OTHER_METHOD = 1.0
"""How far apart two runs are, at least, that differ in criterion or solver."""

_TABLE = """
CREATE TABLE runs (
    id INTEGER PRIMARY KEY,
    family TEXT NOT NULL,
    cost TEXT NOT NULL,
    method TEXT NOT NULL,
    features TEXT NOT NULL,
    sensitivities TEXT NOT NULL,
    allowed_drop REAL NOT NULL,
    asked REAL NOT NULL,
    removed REAL NOT NULL,
    trials INTEGER NOT NULL
)
"""


@dataclass(frozen=True)
class Case:
    """What is known before a search.

    Attributes:
        family: the `model_type`.
        cost: what is counted, such as `parameters`.
        method: criterion, solver and re-fit, in words.
        features: sizes of the model, all positive.
        sensitivities: for each site, what is lost when half of it goes, as a share of all losses.
        allowed_drop: of the metric.
        asked: share of the whole that is to go at most.
    """

    family: str
    cost: str
    method: str
    features: Mapping[str, float]
    sensitivities: Sequence[float]
    allowed_drop: float
    asked: float


def case_of(
    family: str,
    sites: Sequence[Site],
    rankings: Mapping[str, Ranking],
    goal: Goal,
    stage: Prune,
) -> Case:
    """What a search is about, in numbers that can be compared between models.

    Args:
        family: the `model_type`.
        sites: what can go.
        rankings: of their units.
        goal: the first one of the stage.
        stage: with a floor.
    """
    half = [rankings[site.name].error_of(site.units // 2) for site in sites]
    whole = sum(half) or 1.0
    features = {
        "layers": float(len({(site.stack, site.layer) for site in sites})),
        "units": float(sum(site.units for site in sites)),
        "parameters": float(sum(site.units * site.parameters for site in sites)),
        "prunable": goal.prunable / max(goal.total, 1),
    }
    refit = stage.reconstruction if stage.reconstruct else "none"
    return Case(
        family,
        goal.cost,
        f"{stage.criterion} {stage.solver} {refit}",
        {name: max(value, 1e-12) for name, value in features.items()},
        [value / whole for value in half],
        stage.floor.drop if stage.floor else 0.0,
        goal.asked / max(goal.total, 1),
    )


def distance(one: Case, two: Case) -> float:
    """How little two cases have in common; 0 for equal ones."""
    sizes = sum(
        math.log(one.features[name] / two.features[name]) ** 2
        for name in one.features.keys() & two.features.keys()
    )
    drops = (one.allowed_drop - two.allowed_drop) / max(one.allowed_drop, two.allowed_drop, 1e-6)
    same_sites = len(one.sensitivities) == len(two.sensitivities)
    pairs = zip(one.sensitivities, two.sensitivities, strict=True) if same_sites else ()
    profile = sum((a - b) ** 2 for a, b in pairs) if same_sites else 1.0
    return sizes + drops**2 + profile + OTHER_METHOD * (one.method != two.method)


class Experience:
    """A file of past searches. It is made when the first one is added."""

    def __init__(self, path: "str | Path") -> None:
        self.path = Path(path)

    @contextmanager
    def _open(self) -> Iterator[sqlite3.Connection]:
        try:
            with closing(sqlite3.connect(self.path, timeout=BUSY_SECONDS)) as connection:
                yield connection
        except sqlite3.Error as error:
            raise CheckpointError(
                f"{self.path} cannot be used as an experience store: {error}. Move it away, or "
                "name another file: a new one is made."
            ) from error

    def _check(self, connection: sqlite3.Connection) -> bool:
        """Whether the table is there; an error if the file is torn, or somebody else's."""
        whole = connection.execute("PRAGMA quick_check(1)").fetchone()[0]
        found = [
            connection.execute("PRAGMA application_id").fetchone()[0],
            connection.execute("PRAGMA user_version").fetchone()[0],
        ]
        tables = connection.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]
        empty = found == [0, 0] and not tables
        if whole != "ok" or (empty and self.path.stat().st_size):  # a stub is taken for empty
            raise CheckpointError(
                f"{self.path} is damaged ({whole}), and was left alone. Move it away: a new "
                "experience store is made."
            )
        if empty:
            return False
        if found != [APPLICATION_ID, STORE_VERSION]:
            raise CheckpointError(
                f"{self.path} is a SQLite file, but no experience store of version "
                f"{STORE_VERSION}: it was left alone. Name another file."
            )
        return True

    def add(self, case: Case, *, removed: float, trials: int) -> None:
        """Remember a search, all of it or nothing.

        Args:
            case: what it was about.
            removed: share of the whole that is gone in the best model.
            trials: models that were built.

        Raises:
            CheckpointError: when the file is torn, locked, or somebody else's.
        """
        self.path.parent.mkdir(parents=True, exist_ok=True)
        row = (
            *(case.family, case.cost, case.method),
            *(json.dumps(dict(case.features)), json.dumps(list(case.sensitivities))),
            *(case.allowed_drop, case.asked, removed, trials),
        )
        with self._open() as connection:
            there = self._check(connection)
            connection.isolation_level = None  # we say where transactions begin
            connection.execute("BEGIN IMMEDIATE")
            if not there and not self._check(connection):  # nobody else has made it since
                connection.execute(_TABLE)
                connection.execute("PRAGMA application_id = 1212567634")  # takes no parameters
                connection.execute("PRAGMA user_version = 1")
            connection.execute(
                "INSERT INTO runs (family, cost, method, features, sensitivities, allowed_drop, "
                "asked, removed, trials) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
                row,
            )
            connection.execute("COMMIT")

    def runs(self, family: str, cost: str) -> list[tuple[Case, float]]:
        """Past searches of a family by one cost, newest first, and the share that was removed.

        Raises:
            CheckpointError: when the file is torn, locked, or somebody else's.
        """
        if not self.path.exists():
            return []
        with self._open() as connection:
            if not self._check(connection):
                return []
            rows = connection.execute(
                "SELECT method, features, sensitivities, allowed_drop, asked, removed FROM runs "
                "WHERE family = ? AND cost = ? ORDER BY id DESC LIMIT ?",
                (family, cost, MAX_RUNS),
            ).fetchall()
        try:
            return [(_case(family, cost, row), float(row[-1])) for row in rows]
        except (ValueError, TypeError, AttributeError, RecursionError) as error:
            raise CheckpointError(
                f"{self.path} has a run that cannot be read: {error}. Move the file away."
            ) from error

    def start_for(self, case: Case) -> float | None:
        """The scale at which a search is expected to end; None without a run of this family.

        That of the nearest run: the share that it removed, over the share that is asked for now.

        Raises:
            CheckpointError: when the file is torn, locked, or somebody else's.
        """
        runs = self.runs(case.family, case.cost)
        if not runs or not case.asked:
            return None
        _, removed = min(runs, key=lambda run: distance(case, run[0]))
        return min(removed / case.asked, 1.0)


def _case(family: str, cost: str, row: Sequence[object]) -> Case:
    method, features, sensitivities, drop, asked, removed = row
    sizes = {str(name): float(value) for name, value in json.loads(str(features)).items()}
    profile = [float(value) for value in json.loads(str(sensitivities))]
    numbers = [float(str(value)) for value in (drop, asked, removed)]
    if not all(math.isfinite(x) for x in (*sizes.values(), *profile, *numbers)):
        raise ValueError("a number is not finite")
    if min(sizes.values(), default=1.0) <= 0:
        raise ValueError("a size is not positive")
    return Case(family, cost, str(method), sizes, profile, numbers[0], numbers[1])
