"""Plans: plain data, checked, and the same after a round trip."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_prune import plan as plan_module
from hf_prune.errors import PlanError
from hf_prune.plan import Plan, SitePlan, rename_layers


@st.composite
def site_plans(draw):
    units = draw(st.integers(1, 20))
    kept = draw(st.sets(st.integers(0, units - 1)))
    return SitePlan(draw(st.sampled_from(["heads", "neurons"])), units, tuple(sorted(kept)))


NAMES = st.text(max_size=20)
PLANS = st.builds(
    Plan, NAMES, st.dictionaries(NAMES, site_plans()), st.dictionaries(NAMES, st.integers(0, 2**40))
)


@settings(max_examples=100, deadline=None)
@given(plan=PLANS)
def test_round_trip(plan):
    again = Plan.from_dict(json.loads(plan.to_json()))
    assert again == plan
    assert json.loads(plan.to_json()) == plan.to_dict()
    assert again.fingerprint() == plan.fingerprint()


def test_file_round_trip(tmp_path):
    plan = Plan("bert", {"a": SitePlan("heads", 4, (0, 3))}, {"w": 7})
    (tmp_path / "plan.json").write_text(plan.to_json())
    assert Plan.load(tmp_path / "plan.json") == plan
    assert '\n  "a": {"kind": "heads", "units": 4, "kept": [0, 3]}\n' in plan.to_json()


def test_fingerprint_tells_plans_apart():
    one, two = (Plan("bert", {"a": SitePlan("heads", 4, kept)}) for kept in ((0, 3), (0, 2)))
    assert one.fingerprint() != two.fingerprint()
    assert len({one.fingerprint(), Plan("gpt2", one.sites).fingerprint()}) == 2


@given(site=site_plans())
def test_removed_is_the_rest(site):
    assert sorted((*site.kept, *site.removed)) == list(range(site.units))


@pytest.mark.parametrize(
    ("units", "kept", "text"),
    [
        (0, (), "units=0 is not a count"),
        (-3, (), "units=-3 is not a count"),
        (True, (), "units=True is not a count"),
        (2.0, (), r"units=2\.0 is not a count"),
        (10**9, (), "units=1000000000 is not a count"),
        (4, (1, 0), "must be sorted, each of them once"),
        (4, (1, 1), "must be sorted, each of them once"),
        (4, (4,), r"must lie in \[0, 4\)"),
        (4, (-1, 2), r"must lie in \[0, 4\)"),
        (4, (1.0,), "must be integers"),
        (4, (True,), "must be integers"),
        (4, ("1",), "must be integers"),
    ],
)
def test_sites_that_are_none(units, kept, text):
    with pytest.raises(PlanError, match=text):
        SitePlan("heads", units, kept)


GOOD = Plan("bert", {"a": SitePlan("heads", 4, (0, 3))}, {"w": 7}).to_dict()


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"version": 2}, "not a plan of version 1"),
        ({"version": None}, "not a plan of version 1"),
        ({"more": 1}, r"unknown keys in the plan: \['more'\]"),
        ({"sites": []}, "missing or of the wrong kind"),
        ({"sites": {"a": {"kind": "heads", "units": 4}}}, "missing or of the wrong kind: 'kept'"),
        ({"sites": {"a": {"kind": "heads", "units": 4, "kept": 3}}}, "of the wrong kind"),
        ({"sites": {"a": {"kind": "heads", "units": 4, "kept": [9]}}}, r"must lie in \[0, 4\)"),
        ({"model_type": 3}, "model_type must be text"),
        ({"weights": {"w": -1}}, "weights must be counts"),
        ({"weights": {"w": True}}, "weights must be counts"),
        ({"weights": {"w": 1.5}}, "weights must be counts"),
    ],
)
def test_data_that_is_no_plan(change, text):
    with pytest.raises(PlanError, match=text):
        Plan.from_dict({**GOOD, **change})


@pytest.mark.parametrize("key", sorted(set(GOOD) - {"version"}))
def test_a_missing_key(key):
    with pytest.raises(PlanError, match=f"missing or of the wrong kind: '{key}'"):
        Plan.from_dict({k: v for k, v in GOOD.items() if k != key})


@pytest.mark.parametrize("data", [None, [], "plan", 3])
def test_something_else(data):
    with pytest.raises(PlanError, match="not a plan of version 1"):
        Plan.from_dict(data)


@pytest.mark.parametrize("text", ["", "{", "[]", "[" * 10**5, "\udcff"])
def test_a_file_that_is_no_plan(tmp_path, text):
    path = tmp_path / "plan.json"
    path.write_text(text, encoding="utf-8", errors="surrogateescape")
    with pytest.raises(PlanError, match=r"plan\.json: "):
        Plan.load(path)


def test_a_file_that_is_too_large_or_missing(tmp_path, monkeypatch):
    path = tmp_path / "plan.json"
    with pytest.raises(PlanError, match=r"plan\.json: .*No such file"):
        Plan.load(path)
    path.write_text(Plan("bert").to_json())
    monkeypatch.setattr(plan_module, "MAX_PLAN_BYTES", 5)
    with pytest.raises(PlanError, match=r"plan\.json: larger than 5 bytes"):
        Plan.load(path)


def test_then():
    first = Plan("bert", {"a": SitePlan("heads", 6, (1, 3, 5)), "b": SitePlan("heads", 2, (0,))})
    later = Plan("bert", {"a": SitePlan("heads", 3, (0, 2)), "c": SitePlan("neurons", 9, (8,))})
    both = first.then(later)
    assert both.sites["a"] == SitePlan("heads", 6, (1, 5))
    assert (both.sites["b"], both.sites["c"]) == (first.sites["b"], later.sites["c"])
    with pytest.raises(PlanError, match="a: 3 units are left, not 4"):
        first.then(Plan("bert", {"a": SitePlan("heads", 4, (0,))}))


def test_names_of_layers_are_replaced_as_a_whole():
    layers = {"layers.1": "layers.3", "layers.10": "layers.12"}
    assert rename_layers("layers.1.mlp", layers) == "layers.3.mlp"
    assert rename_layers("layers.10.mlp", layers) == "layers.12.mlp"
    assert rename_layers("layers.1", layers) == "layers.3"
    assert rename_layers("layers.2.mlp", layers) == "layers.2.mlp"


def test_a_plan_after_layers_have_left():
    first = Plan("llama", {"layers.1.mlp": SitePlan("neurons", 4, ()), "layers.2.mlp": whole(4)})
    later = Plan("llama", {"layers.1.mlp": SitePlan("neurons", 4, (1, 3))})
    both = first.then(later.moved({"layers.0": "layers.0", "layers.1": "layers.2"}))
    assert both.sites["layers.1.mlp"].kept == ()
    assert both.sites["layers.2.mlp"].kept == (1, 3)


def whole(units):
    return SitePlan("neurons", units, tuple(range(units)))
