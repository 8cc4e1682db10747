"""The store of past searches: what it remembers, what it refuses, and that it saves trials."""

import dataclasses
import math
import sqlite3

import pytest
import torch

from hf_prune import compress
from hf_prune.budget.costs import make_goal
from hf_prune.criteria.ranking import Ranking
from hf_prune.errors import CheckpointError
from hf_prune.measure.counts import count_parameters
from hf_prune.recipe import Floor, Prune
from hf_prune.search.experience import (
    APPLICATION_ID,
    STORE_VERSION,
    Case,
    Experience,
    case_of,
    distance,
)
from hf_prune.sites import find_sites

CASE = Case("bert", "parameters", "a b c", {"layers": 6.0}, [0.5, 0.5], 0.01, 0.9)


def changed(**what):
    return dataclasses.replace(CASE, **what)


@pytest.fixture
def store(tmp_path):
    return Experience(tmp_path / "folder" / "experience.sqlite")


def test_nothing_is_known_and_nothing_is_made(store):
    assert store.start_for(CASE) is None
    assert not store.path.exists(), "asking makes no file"


def test_the_nearest_run_of_the_family_says_where_to_start(store):
    store.add(changed(features={"layers": 12.0}), removed=0.3, trials=8)
    store.add(CASE, removed=0.45, trials=8)
    store.add(changed(family="gpt2"), removed=0.8, trials=8)
    store.add(changed(cost="macs"), removed=0.7, trials=8)
    store.add(changed(allowed_drop=0.1), removed=0.6, trials=8)
    store.add(changed(sensitivities=[0.0, 1.0]), removed=0.2, trials=8)
    assert store.start_for(CASE) == pytest.approx(0.5)
    assert store.start_for(changed(asked=0.6)) == pytest.approx(0.75)
    assert store.start_for(changed(asked=0.3)) == 1.0
    assert store.start_for(changed(features={"layers": 24.0})) == pytest.approx(0.3 / 0.9)
    assert store.start_for(changed(allowed_drop=0.09)) == pytest.approx(0.6 / 0.9)
    assert store.start_for(changed(family="opt")) is None
    assert len(store.runs("bert", "parameters")) == 4


def test_of_equal_runs_the_newest(store):
    store.add(CASE, removed=0.3, trials=8)
    store.add(CASE, removed=0.45, trials=2)
    assert store.start_for(CASE) == pytest.approx(0.5)


def test_names_are_data(store):
    """Whatever stands in a name, it is stored and asked for as it is."""
    name = "x'); DROP TABLE runs; --"
    store.add(changed(family=name), removed=0.3, trials=1)
    store.add(CASE, removed=0.4, trials=1)
    assert [removed for _, removed in store.runs(name, "parameters")] == [0.3]
    assert len(store.runs("bert", "parameters")) == 1


def test_distance_is_a_distance():
    others = [
        changed(features={"layers": 12.0}),
        changed(allowed_drop=0.02),
        changed(sensitivities=[0.4, 0.6]),
        changed(sensitivities=[1.0]),
        changed(method="other"),
    ]
    assert distance(CASE, CASE) == 0
    for other in others:
        assert distance(CASE, other) == distance(other, CASE) > 0


def test_a_torn_file_is_an_error_and_left_alone(store):
    store.add(CASE, removed=0.3, trials=1)
    whole = store.path.read_bytes()
    for data in (b"not a database, but long enough to be one" * 40, whole[:5000], whole[:100]):
        store.path.write_bytes(data)
        with pytest.raises(CheckpointError, match=r"sqlite (cannot be used|is damaged)"):
            store.start_for(CASE)
        with pytest.raises(CheckpointError, match=r"sqlite (cannot be used|is damaged)"):
            store.add(CASE, removed=0.3, trials=1)
        assert store.path.read_bytes() == data


def test_somebody_elses_database_is_left_alone(store):
    store.path.parent.mkdir()
    with sqlite3.connect(store.path) as connection:
        connection.execute("CREATE TABLE runs (id INTEGER)")
    connection.close()
    data = store.path.read_bytes()
    for call in (lambda: store.start_for(CASE), lambda: store.add(CASE, removed=0.1, trials=1)):
        with pytest.raises(CheckpointError, match="no experience store of version 1"):
            call()
    assert store.path.read_bytes() == data


@pytest.mark.parametrize(
    ("column", "value"),
    [
        ("features", "{"),
        ("features", '{"layers": -1}'),
        ("features", "[" * 100_000),
        ("sensitivities", "[NaN]"),
        ("sensitivities", "3"),
        ("removed", "much"),
    ],
)
def test_a_run_that_cannot_be_read(store, column, value):
    store.add(CASE, removed=0.3, trials=1)
    with sqlite3.connect(store.path) as connection:
        connection.execute(f"UPDATE runs SET {column} = ?", (value,))
    connection.close()
    with pytest.raises(CheckpointError, match="has a run that cannot be read"):
        store.start_for(CASE)


def test_all_of_a_run_or_nothing(store, monkeypatch):
    """Broken off between table and row, there is no file of ours with half of it."""
    monkeypatch.setattr("hf_prune.search.experience.json.dumps", lambda value: object())
    with pytest.raises(CheckpointError, match="cannot be used"):
        store.add(CASE, removed=0.3, trials=1)
    monkeypatch.undo()
    assert store.start_for(CASE) is None
    store.add(CASE, removed=0.45, trials=1)
    assert store.start_for(CASE) == pytest.approx(0.5)


def test_the_file_says_what_it_is(store):
    store.add(CASE, removed=0.3, trials=1)
    connection = sqlite3.connect(store.path)
    assert connection.execute("PRAGMA application_id").fetchone() == (APPLICATION_ID,)
    assert connection.execute("PRAGMA user_version").fetchone() == (STORE_VERSION,)
    connection.close()


def test_cases_compare_models(tiny):
    def of(name, drop=0.01):
        model = tiny(name)
        sites = find_sites(model)
        rankings = {s.name: Ranking.from_scores(torch.ones(s.units)) for s in sites}
        goal = make_goal(sites, "parameters", 0.5)
        stage = Prune(sparsity=0.5, floor=Floor(drop=drop))
        return case_of(model.config.model_type, sites, rankings, goal, stage)

    case = of("bert")
    assert case.features["layers"] == 2
    assert sum(case.sensitivities) == pytest.approx(1)
    assert case.asked == pytest.approx(0.5, abs=1e-4)
    assert distance(case, of("roberta")) == pytest.approx(0)
    assert distance(case, of("distilbert")) > distance(case, of("bert", drop=0.011))


@pytest.mark.parametrize("search", ["bisection", "optuna"])
def test_the_next_search_starts_from_it(tiny, inputs_for, tmp_path, search):
    """A second model of the family needs a fraction of the trials for as small a result."""
    model, batches = tiny("bert"), [inputs_for("bert", s) for s in range(4)]
    total = count_parameters(model)
    floor = {"drop": 0.25, "trials": 9, "search": search}
    stage = {"stage": "prune", "criterion": "magnitude", "sparsity": 0.9, "sequence_length": 16}
    path = tmp_path / "experience.sqlite"

    def run(candidate, experience):
        return compress(
            candidate,
            {"stages": [{**stage, "floor": floor}]},
            batches,
            metric=lambda m: count_parameters(m) / total,
            experience=experience,
        )

    alone, first = run(model, None), run(model, path)
    assert alone.plan == first.plan, "the first search finds nothing to start from"
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.01)
    second = run(model, path)
    entries = [r.report["pruning"][0]["floor"] for r in (first, second)]
    assert entries[0]["started_from"] is None
    good = [t for t in entries[0]["trials"] if t["metric"] >= entries[0]["least"]]
    reached = max(good, key=lambda trial: trial["removed"])["scale"]
    assert math.isclose(entries[1]["started_from"], reached, rel_tol=1e-3)
    assert entries[1]["trials"][0]["scale"] == entries[1]["started_from"]
    if search == "bisection":
        assert len(entries[0]["trials"]) == 9
        assert len(entries[1]["trials"]) <= 4
        sizes = [count_parameters(r.model) for r in (first, second)]
        assert sizes[1] <= 1.01 * sizes[0]


def test_a_search_that_found_nothing_is_remembered(tiny, inputs_for, tmp_path):
    model, batches = tiny("bert"), [inputs_for("bert", s) for s in range(4)]
    total, path = count_parameters(model), tmp_path / "experience.sqlite"
    stage = {"stage": "prune", "sparsity": 0.9, "sequence_length": 16, "criterion": "magnitude"}

    def trials(most):
        floor = {"drop": 0.5, "trials": most}
        result = compress(
            model,
            {"stages": [{**stage, "floor": floor}]},
            batches,
            metric=lambda m: float(count_parameters(m) == total),
            experience=path,
        )
        assert count_parameters(result.model) == total
        return len(result.report["pruning"][0]["floor"]["trials"])

    assert trials(3) == 3
    assert not path.exists(), "what it would have come to is not known"
    assert trials(9) > 5
    assert trials(9) < 4
