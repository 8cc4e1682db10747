"""Recipes: strict, frozen, and the same after a round trip through YAML."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from hf_prune.errors import ConfigError
from hf_prune.recipe import (
    MAX_RECIPE_BYTES,
    MAX_RECIPE_DEPTH,
    Distill,
    Prune,
    Recipe,
    Schedule,
    Train,
    load_recipe,
    parse_yaml,
)

FRACTION = st.floats(0, 1, exclude_max=True)
POSITIVE = st.floats(1e-12, 1e12)
SCHEDULES = st.builds(
    Schedule, start=st.floats(0, 0.4), end=st.floats(0.5, 1), every=st.integers(1, 10**6)
)
BOTH_KINDS = [("heads", "neurons"), ("neurons", "heads")]
COMMON = {
    "criterion": st.text(max_size=12),
    "cost": st.sampled_from(["parameters", "macs"]),
    "sparsity": FRACTION,
    "ignore": st.lists(st.text(max_size=12), max_size=3).map(tuple),
    "floors": st.dictionaries(st.text(max_size=12), st.integers(0, 9), max_size=2),
}
STRUCTURE = st.builds(
    Prune,
    **COMMON,
    units=st.sampled_from([("heads",), *BOTH_KINDS]),
    min_heads=st.integers(0, 9),
    ridge=POSITIVE,
) | st.builds(
    Prune,
    **COMMON,
    units=st.sampled_from([("neurons",), *BOTH_KINDS]),
    min_neurons=st.integers(0, 9),
    reconstruct=st.booleans(),
)
WEIGHTS = st.builds(Prune, units=st.just(("weights",)), sparsity=FRACTION)
TRAIN = st.builds(Train, num_train_epochs=POSITIVE, learning_rate=POSITIVE)
DISTILL = st.builds(Distill, temperature=POSITIVE, alpha=st.floats(0, 1))


@st.composite
def recipes(draw):
    stages = draw(st.lists(STRUCTURE | TRAIN | DISTILL, max_size=3))
    if draw(st.booleans()):
        stage = draw(STRUCTURE).model_copy(update={"schedule": draw(SCHEDULES)})
        stages += [stage, draw(TRAIN | DISTILL)]
    stages += draw(st.lists(WEIGHTS | DISTILL, min_size=0 if stages else 1, max_size=2))
    return Recipe(seed=draw(st.integers(0, 2**40)), stages=tuple(stages))


def test_one_wrong_key_is_one_line():
    """Defaults that depend on it say nothing of themselves."""
    with pytest.raises(ConfigError) as error:
        load_recipe({"stages": [{"stage": "prune", "units": "heads", "sparsity": 0.5}]})
    assert str(error.value) == "recipe: stages.0.units: Input should be a valid array"


@settings(max_examples=50, deadline=None)
@given(recipe=recipes())
def test_round_trip(recipe):
    assert load_recipe(parse_yaml(recipe.to_yaml())) == recipe
    assert load_recipe(recipe.model_dump()) == recipe
    assert load_recipe(recipe) is recipe


def test_file_round_trip(tmp_path):
    recipe = Recipe(stages=(Prune(sparsity=0.5, ignore=("yes", "null", "1e-3", "0x1", "a: b")),))
    path = tmp_path / "recipe.yaml"
    path.write_text("\ufeff" + recipe.to_yaml(), encoding="utf-8")
    assert load_recipe(path) == load_recipe(str(path)) == recipe


def test_frozen():
    stage = Prune(sparsity=0.5)
    with pytest.raises(ValidationError, match="frozen"):
        stage.sparsity = 0.6


PRUNE = {"stage": "prune", "sparsity": 0.5}


BOTH = {"stage": "prune", "units": ["heads", "neurons", "weights"]}


def one(**change):
    return {"stages": [{**PRUNE, **change}]}


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (one(sparsity=50), r"stages\.0\.sparsity: sparsity=50 is outside \[0, 1\)\. It is a fra"),
        (one(sparsity=1), r"sparsity=1 is outside \[0, 1\)"),
        (one(sparsity=-0.1), r"sparsity=-0\.1 is outside \[0, 1\)"),
        (one(sparsity="0.5"), r"stages\.0\.sparsity: .*valid number"),
        (one(sparsity=True), r"stages\.0\.sparsity: .*valid number"),
        (one(sparsity=float("nan")), r"stages\.0\.sparsity"),
        (one(units=["weights"], sparsity=None, weights={"pattern": "4:4"}), "keeps 4 of 4: noth"),
        (one(units=["weights"], sparsity=None, weights={"pattern": "0:4"}), "write unstructured"),
        (one(sparsty=0.5), r"stages\.0\.sparsty: unknown key; did you mean 'sparsity'\? Known: "),
        (one(schedule={"stat": 0.1}), r"schedule\.stat: unknown key; did you mean 'start'\?"),
        ({**one(), "sed": 3}, r"sed: unknown key; did you mean 'seed'\? Known: hf_prune, seed, st"),
        (one(zzzz=1), r"stages\.0\.zzzz: unknown key\. Known: stage, units"),
        (one(units=["head"]), r"stages\.0\.units\.0: Input should be 'heads', 'neurons', 'qu"),
        (one(units=[]), "units must name each kind once"),
        (one(units=["heads", "heads"]), "units must name each kind once"),
        (one(units=["experts", "weights"]), "weights share a stage with heads, query_heads and n"),
        (one(units=["heads", "weights"], schedule={}), "two stages of the same schedule"),
        (one(units=["heads", "weights"], floor={"drop": 0.1}), "leave target, floor and template"),
        (
            {"stages": [{**BOTH, "target": {"macs": "0.5x"}}]},
            "have one sparsity: leave target, floor and template",
        ),
        (
            {"stages": [{**BOTH, "weights": {"pattern": "2:4"}}]},
            "2:4 says by itself how much goes, so that no split is",
        ),
        (one(units=["heads", "weights"], cost="macs"), "no cost in MACs"),
        ({"stages": [{**BOTH, "sparsity": 0.5}, PRUNE]}, "before single weights"),
        (
            one(units=["weights"], weights={"criterion": "wanda"}),
            "criterion and solver of the stag",
        ),
        (one(units=["weights"], cost="macs"), "single weights have no cost in MACs"),
        (one(of="layers", cost="macs"), "of: layers is for cost: parameters"),
        (one(min_heads=-1), r"stages\.0\.min_heads: .*greater than or equal to 0"),
        (one(floors={"*": -1}), r"stages\.0\.floors\.\*: .*greater than or equal to 0"),
        (one(units=["weights"], floors={"*": 1}), "leave weights out with ignore"),
        (one(floors=3), r"stages\.0\.floors: Input should be an object"),
        (one(units=["experts", "expert_neurons"]), "share their parameters.*write two stages"),
        (one(units=["experts"], schedule={}), "experts and their neurons go in one shot"),
        (one(even=True, search_trials=3), "search_trials makes layers differ"),
        (one(reconstruction="parallel", schedule={}), "parallel is for one shot: leave it out"),
        (one(coarse=["layers"]), "coarse gates are for masks: l0"),
        (
            one(coarse=["layers"], masks="l0", min_heads=0),
            "set min_heads and min_neurons to 0",
        ),
        (one(min_heads=1.5), r"stages\.0\.min_heads: .*valid integer"),
        (one(ridge=0), r"stages\.0\.ridge: .*greater than 0"),
        (one(schedule={"start": 0.7, "end": 0.6}), r"start=0\.7 must be smaller than end=0\.6"),
        (one(schedule={}), "schedule needs a train or distill stage after it"),
        ({"stages": []}, "stages is empty"),
        ({"stages": [{"stage": "vocabulary"}, PRUNE]}, "vocabulary is the last stage"),
        ({"stages": [PRUNE, {"stage": "vocabulary", "at_most": 0}]}, "at_most: .*greater than or"),
        (
            {"stages": [{"stage": "vocabulary", "atleast": 2}]},
            "unknown key; did you mean 'at_least'",
        ),
        ({}, "stages: Field required"),
        ({"stages": [{"stage": "prun"}]}, r"stages\.0: .*'prun'.*'prune', 'train', 'distill'"),
        ({"stages": [PRUNE], "hf_prune": 2}, "hf_prune: Input should be 1"),
        ({"stages": [one(units=["weights"])["stages"][0], PRUNE]}, "before single weights"),
        ({"stages": [PRUNE], "seed": -1}, "seed: .*greater than or equal to 0"),
        ({"stages": {1}}, "only plain values are allowed"),
        ([1], "recipe|expected"),
    ],
)
def test_what_is_refused(data, text):
    with pytest.raises(ConfigError, match=text):
        load_recipe(data if isinstance(data, dict) else {"stages": data})


SINGLE = {"stage": "prune", "units": ["weights"], "sparsity": 0.5}


def gradual(stage, **schedule):
    return {"stages": [{**stage, "schedule": schedule}, {"stage": "train"}]}


@pytest.mark.parametrize(
    ("stages", "text"),
    [
        (one(search_trials=1, floor={"drop": 0.1}), "refines widths .*leave it out, or floor"),
        (gradual({**PRUNE, "search_trials": 1}), "is for one shot: leave it out, or schedule"),
        (one(units=["hidden"], search_trials=1), "search_trials is for heads and neurons"),
        (one(units=["hidden"], rescale=True), "rescale and reconstruction: parallel are for heads"),
        (
            one(units=["hidden"], reconstruction="parallel"),
            "rescale and reconstruction: parallel are for heads",
        ),
        (one(**SINGLE, search_trials=1), "search_trials is for heads and neurons"),
        (gradual({**PRUNE, "rescale": True}), "rescale is for heads and neurons in one shot"),
        (one(**SINGLE, rescale=True), "rescale is for heads and neurons in one shot"),
        (one(**SINGLE, reconstruction="parallel"), r"write weights: \{dense_target: false\}"),
        (one(**SINGLE, round_to=8), "round_to and even are for units that are removed"),
        (one(**SINGLE, even=True), "round_to and even are for units that are removed"),
        (one(**SINGLE, min_heads=3), "min_heads is for heads: leave it out"),
        (one(units=["neurons"], min_heads=3), "min_heads is for heads: leave it out"),
        (one(**SINGLE, min_neurons=7), "min_neurons is for neurons: leave it out"),
        (one(units=["heads"], min_neurons=7), "min_neurons is for neurons: leave it out"),
        (one(units=["heads"], round_to=8), "round_to is for neurons and channels"),
        (one(reconstruct=False, ridge=0.5), "ridge is of a re-fit"),
        (
            one(**SINGLE, reconstruction_samples=9),
            "of heads and neurons; single weights are chosen",
        ),
        (one(**SINGLE, weights={"pattern": "2x2", "rank": "row"}), "is for pattern: unstructured"),
        (
            {"stages": [{"stage": "prune", "target": {"macs": "0.5x", "batch_size": 2}}]},
            "batch_size is for latency_ms and speedup",
        ),
        (
            one(floor={"drop": 0.1, "search": "optuna", "precision": 0.1}),
            "precision is for search: bisection",
        ),
        (gradual({**SINGLE, "polish_steps": 1}), "polish_steps are of one shot"),
        (one(floor={"drop": 0.1}, polish_steps=1), "polish_steps come after a decision"),
        (gradual({**SINGLE, "weights": {"rank": "row"}}), "rank: row.* is for one shot"),
        (
            one(**SINGLE, criterion="wanda", weights={"iterations": 3}),
            "iterations, penalty.* are of criterion: admm",
        ),
        (
            one(
                units=["heads", "weights"],
                sparsity=0.5,
                weights={"criterion": "sparsegpt", "penalty": 2.0},
            ),
            "iterations, penalty.* are of criterion: admm",
        ),
        (one(**SINGLE, reconstruct=False, weights={"refit_steps": 4}), "refit_steps: .* re-fit"),
        (gradual({**SINGLE, "weights": {"refit_steps": 4}}), "refit_steps: .* in one shot"),
        (gradual({**PRUNE, "masks": "l0"}, regrow=True), "regrow is for masks: scored"),
    ],
)
def test_what_would_be_ignored_is_refused(stages, text):
    with pytest.raises(ConfigError, match=text):
        load_recipe(stages)


def test_defaults_written_out_are_not_refused():
    written = one(**SINGLE, search_trials=0, rescale=False, round_to=1, even=False)
    assert load_recipe(written) == load_recipe(one(**SINGLE))
    written = one(units=["experts"], min_heads=1, min_neurons=1, ridge=None, reconstruct=False)
    assert load_recipe(written) == load_recipe(one(units=["experts"], reconstruct=False))
    target = {"speedup": "2x", "batch_size": 4}
    told = load_recipe({"stages": [{"stage": "prune", "target": target, "ridge": 0.5}]})
    assert told.prune_stages[0].ridge == 0.5
    rank = {"rank": "matrix"}
    told = load_recipe(gradual({**SINGLE, "weights": rank, "reconstruction": "sequential"}))
    assert told.prune_stages[0].single.rank == "matrix"
    tuned = {"iterations": 12, "penalty": 0.5, "refit_steps": 10}
    assert load_recipe(one(**SINGLE, criterion="magnitude", reconstruct=False, weights=tuned))
    joint = {"units": ["heads", "weights"], "sparsity": 0.5, "weights": {"iterations": 3}}
    assert load_recipe(one(**joint)).prune_stages[0].weights_part(0.5).single.iterations == 3
    told = load_recipe(one(**SINGLE, weights={"rank": "row"}, polish_steps=3))
    assert told.prune_stages[0].polish_steps == 3
    told = load_recipe(one(search_trials=2, rescale=True, reconstruction="parallel"))
    assert told.prune_stages[0].reconstruction == "parallel"
    schedule = load_recipe(gradual(PRUNE, regrow=True)).prune_stages[0].schedule
    assert schedule is not None
    assert schedule.regrow


def test_the_file_is_named(tmp_path):
    path = tmp_path / "my.yaml"
    path.write_text("stages:\n- stage: prune\n  sparsity: 50\n")
    with pytest.raises(ConfigError, match=r"my\.yaml: stages\.0\.sparsity: sparsity=50"):
        load_recipe(path)
    path.write_text("a: &x 1")
    with pytest.raises(ConfigError, match=r"my\.yaml: line 1: anchors and aliases"):
        load_recipe(path)
    path.write_bytes(b"\xff\xfe\xff")
    with pytest.raises(ConfigError, match=r"my\.yaml is not UTF-8 text"):
        load_recipe(path)
    path.write_text("#" * (MAX_RECIPE_BYTES + 1))
    with pytest.raises(ConfigError, match=f"has {MAX_RECIPE_BYTES + 1} bytes"):
        load_recipe(path)
    with pytest.raises(ConfigError, match=r"cannot read the recipe .*nothing\.yaml: No such file"):
        load_recipe(tmp_path / "nothing.yaml")
    path.write_text("")
    with pytest.raises(ConfigError, match=r"my\.yaml: "):
        load_recipe(path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: &x [1]\nb: *x", "line 1: anchors and aliases are not allowed"),
        ("a: 1\nb: *x", "line 2: anchors and aliases are not allowed"),
        ("a: !!python/object/apply:os.system [ls]", "line 1: tags such as .*os.system"),
        ("a: !!str 1", "line 1: tags such as"),
        ("x: 1\na: !new 1", "line 2: tags such as"),
        ("a: 1\nb: 2\na: 3", "line 3: the key 'a' appears twice"),
        ("a:\n  b: 1\n  b: 1", "line 3: the key 'b' appears twice"),
        ("1: a", "line 1: the key 1 is not a string"),
        ("true: a", "the key True is not a string"),
        ("? [a]\n: b", r"the key \['a'\] is not a string"),
        ("[" * (MAX_RECIPE_DEPTH + 1), f"nested deeper than {MAX_RECIPE_DEPTH} levels"),
        ("[" * 10**5, "nested deeper than"),
        ("a: [1", "not valid YAML"),
        ("a: b: c", "not valid YAML"),
        ("\0", "not valid YAML"),
    ],
)
def test_hardened_yaml(text, message):
    with pytest.raises(ConfigError, match=message):
        parse_yaml(text)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-3", 1e-3),
        ("1E5", 1e5),
        ("-2.5e+3", -2.5e3),
        (".5", 0.5),
        ("3.", 3.0),
        ("12", 12),
        ("-7", -7),
        ("0", 0),
        ("010", "010"),
        ("0x10", "0x10"),
        ("1_000", "1_000"),
        ("yes", "yes"),
        ("no", "no"),
        ("on", "on"),
        ("True", "True"),
        ("true", True),
        ("false", False),
        ("null", None),
        ("~", None),
        ("", None),
        ("NULL", "NULL"),
        ("2024-01-01", "2024-01-01"),
        ("12:30:00", "12:30:00"),
        ("'1'", "1"),
        ("=", "="),
        ("<<", "<<"),
        (".nan", ".nan"),
    ],
)
def test_scalars(text, value):
    found = parse_yaml(f"a: {text}")["a"]
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize("text", ["010", "1_0", "0o7", "1e", "e3", "-", ".", "+.e1", "1:2"])
def test_text_that_looks_like_a_number_survives(text):
    recipe = Recipe(stages=(Prune(sparsity=0.5, ignore=(text,)),))
    assert load_recipe(parse_yaml(recipe.to_yaml())) == recipe


def test_units_and_weights_in_one_stage():
    """Each part is a stage of its own, with what the stage says of it."""
    told = {"criterion": "wanda", "pattern": "4x1", "rank": "matrix"}
    given = {"sparsity": 0.5, "even": True, "search_trials": 3, "ridge": 0.5, "weights": told}
    (stage,) = load_recipe({"stages": [{**BOTH, **given, "ignore": ["*x*"]}]}).prune_stages
    assert stage.structural
    assert stage.joint
    assert (stage.criterion, stage.solver) == ("kfac_obs", "knapsack")
    units, weights = stage.structure_part(0.2), stage.weights_part(0.3)
    for part, share in ((units, 0.2), (weights, 0.3)):
        assert not part.joint
        assert (part.sparsity, part.ridge, part.ignore) == (share, 0.5, ("*x*",))
        assert load_recipe({"stages": [part.model_dump(mode="json")]}).prune_stages == (part,)
    assert (units.units, units.criterion, units.even) == (("heads", "neurons"), "kfac_obs", True)
    assert (weights.units, weights.criterion, weights.solver) == (("weights",), "wanda", "uniform")
    assert (weights.single.pattern, weights.single.rank) == ("4x1", "matrix")
    (plain,) = load_recipe({"stages": [{**BOTH, "sparsity": 0.5}]}).prune_stages
    assert plain.weights_part(0.5).criterion == "admm"
    (alone,) = load_recipe(one(units=["weights"])).prune_stages
    assert not alone.structural
    assert not alone.joint
