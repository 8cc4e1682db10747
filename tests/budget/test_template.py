"""Templates: named patterns and rules of one's own, on every family, with scores and floors."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tinies import CORE, TINY

from hf_prune import compress, load_recipe
from hf_prune.budget.costs import make_goal
from hf_prune.budget.selection import decide
from hf_prune.criteria.ranking import Ranking
from hf_prune.errors import ConfigError
from hf_prune.measure.counts import count_parameters
from hf_prune.recipe import Prune
from hf_prune.sites import find_sites

STAGE = {"stage": "prune", "solver": "template", "sequence_length": 16}
NONE = {"min_heads": 0, "min_neurons": 0}


def stage(template, **rest):
    (made,) = load_recipe({"stages": [{**STAGE, "template": template, **rest}]}).prune_stages
    return made


def ranked(sites, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {s.name: Ranking.from_scores(torch.rand(s.units, generator=generator)) for s in sites}


def kept(sites, template, rankings=None, sparsity=0.0, **rest):
    made = stage(template, **({"sparsity": sparsity} if sparsity else {}), **rest)
    goal = make_goal(sites, "parameters", sparsity)
    found = decide(sites, rankings or ranked(sites), made, [goal], model_type="x")
    return {name: site.kept for name, site in found.plan.sites.items()}


@pytest.fixture
def sites(tiny):
    return find_sites(tiny("gpt2"))  # three layers of 4 heads and 48 neurons


def counts(found):
    return [len(units) for units in found.values()]


def test_alternate_layers(sites):
    assert counts(kept(sites, "alternate_layers", **NONE)) == [4, 48, 0, 0, 4, 48]
    third = {"pattern": "alternate_layers", "every": 3}
    assert counts(kept(sites, third, **NONE)) == [4, 48, 0, 0, 0, 0]


def test_ends(sites):
    assert counts(kept(sites, "ends", **NONE)) == [4, 48, 0, 0, 4, 48]
    assert counts(kept(sites, {"pattern": "ends", "first": 2, "last": 0}, **NONE)) == [
        *(4, 48, 4, 48, 0, 0)
    ]
    assert counts(kept(sites, {"pattern": "ends", "first": 0, "last": 1}, **NONE)) == [
        *(0, 0, 0, 0, 4, 48)
    ]


def test_every_head_names_units_and_leaves_neurons_alone(sites):
    found = kept(sites, {"pattern": "every_head", "every": 3})
    assert [units for name, units in found.items() if "attn" in name] == [(0, 3)] * 3
    assert [len(units) for name, units in found.items() if "ffn" in name] == [48] * 3


def test_every_head_is_about_heads(tiny):
    neurons = find_sites(tiny("gpt2"), ("neurons",))
    with pytest.raises(ConfigError, match="every_head is about heads"):
        kept(neurons, {"pattern": "every_head"})
    single = find_sites(tiny("llama"), ("query_heads",))
    found = kept(single, {"pattern": "every_head", "every": 2})
    assert all(
        units == tuple(range(0, s.units, 2))
        for s, units in zip(single, found.values(), strict=True)
    )


@pytest.mark.parametrize(("multiple", "width"), [(8, 32), (16, 32), (64, 48), (1, 33)])
def test_uniform_width_keeps_the_best_units(sites, multiple, width):
    rankings = ranked(sites)
    template = {"pattern": "uniform_width", "multiple": multiple, "share": 0.7}
    for name, units in kept(sites, template, rankings).items():
        assert units == rankings[name].kept(2 if "attn" in name else width if width < 48 else 48)


def test_uniform_width_within_a_budget(sites):
    template = {"pattern": "uniform_width", "multiple": 16}
    found = kept(sites, template, sparsity=0.5)
    widths = [len(units) for name, units in found.items() if "ffn" in name]
    assert all(width % 16 == 0 for width in widths)
    assert min(widths) < 48
    goal = make_goal(sites, "parameters", 0.5)
    assert goal.removed({name: len(units) for name, units in found.items()}) >= goal.asked
    with pytest.raises(ConfigError, match="either sparsity or target"):
        stage(template)


def test_rules_of_ones_own(sites):
    rules = [
        {"share": 0.5},
        {"kind": "heads", "layers": [-1], "units": [3, 1]},
        {"sites": "h.0.*", "kind": "neurons", "count": 5},
        {"layers": [1], "kind": "heads", "every": 2},
    ]
    rankings = ranked(sites)
    found = kept(sites, {"pattern": "rules", "rules": rules}, rankings)
    (a0, f0), (a1, f1), (a2, f2) = (list(found)[i : i + 2] for i in (0, 2, 4))
    assert found[a0] == rankings[a0].kept(2)
    assert found[f0] == rankings[f0].kept(5)
    assert found[a1] == (0, 2)
    assert found[f1] == rankings[f1].kept(24)
    assert found[a2] == (1, 3)
    assert found[f2] == rankings[f2].kept(24)


def test_what_a_template_leaves_open_goes_within_the_budget(sites):
    rules = [{"kind": "heads", "units": [0, 1, 2]}]
    found = kept(sites, {"pattern": "rules", "rules": rules}, sparsity=0.6)
    assert {units for name, units in found.items() if "attn" in name} == {(0, 1, 2)}
    widths = {len(units) for name, units in found.items() if "ffn" in name}
    assert max(widths) <= 14, "neurons pay for the heads that stay"


@pytest.mark.parametrize(
    ("template", "rest", "text"),
    [
        (
            "alternate_layers",
            {},
            r"keeps 0 of 4 heads of h\.1\.attn.*1 is the closest.*min_heads: 0",
        ),
        ("ends", {**NONE, "floors": {"h.1.mlp*": 0, "h.1.ffn": 8}}, "matches no site"),
        (
            "ends",
            {**NONE, "floors": {"h.1.ffn": 8}},
            r"keeps 0 of 48 neurons of h\.1\.ffn.*8 is the",
        ),
        (
            {"pattern": "rules", "rules": [{"units": [7]}]},
            {},
            "names unit 7 of h.0.attn, which has 4",
        ),
        (
            {"pattern": "rules", "rules": [{"kind": "neurons", "count": 20}]},
            {"round_to": 16},
            "keeps 20 of 48 neurons .* 16 is the closest",
        ),
        (
            {"pattern": "rules", "rules": [{"sites": "h.0.atn", "count": 1}]},
            {},
            r"'h\.0\.atn' matches no site; did you mean 'h\.0\.attn'",
        ),
        (
            {"pattern": "rules", "rules": [{"layers": [7], "count": 1}]},
            {},
            r"no site of '\*' has kind=None and is in layers=\[7\]",
        ),
    ],
)
def test_what_does_not_fit_the_model(sites, template, rest, text):
    with pytest.raises(ConfigError, match=text):
        kept(sites, template, **rest)


@pytest.mark.parametrize(
    ("data", "text"),
    [
        ({"template": "alternate_layer"}, "unknown pattern 'alternate_layer'; did you mean 'alter"),
        (
            {"template": {"pattern": "ends", "fist": 2}},
            r"unknown key; did you mean 'first'\? Known: ",
        ),
        (
            {"template": {"pattern": "rules", "rules": [{"cont": 2}]}},
            r"rules\.0\.cont: unknown key; did you mean 'count'",
        ),
        ({"template": {"pattern": "rules", "rules": []}}, "at least 1 item"),
        ({"template": {"pattern": "rules", "rules": [{}]}}, "exactly one of count, share, units"),
        ({"template": {"pattern": "rules", "rules": [{"units": [1, 1]}]}}, "each unit once"),
        ({"template": {}}, "Unable to extract tag using discriminator 'pattern'"),
        ({"template": "ends", "solver": "knapsack"}, "belong together"),
        ({"template": None}, "belong together"),
        ({"template": "ends", "sparsity": 0.5, "target": {"macs": "0.5x"}}, "either sparsity or"),
        ({"template": "ends", "schedule": {}}, "one shot"),
        (
            {"template": "ends", "floor": {"drop": 0.1}, "sparsity": None},
            "a floor needs sparsity or target",
        ),
        ({"template": "../none.yaml"}, r"template \.\./none\.yaml: cannot read"),
    ],
)
def test_what_a_recipe_refuses(data, text):
    with pytest.raises(ConfigError, match=text):
        load_recipe({"stages": [{**STAGE, "sparsity": 0.5, **data}]})


def test_a_template_of_ones_own_in_a_file(tmp_path):
    """The recipe holds what is in the file, and so survives a round trip without it."""
    (tmp_path / "mine.yaml").write_text(
        "pattern: rules\nrules:\n- kind: heads\n  units: [0, 2]\n", encoding="utf-8"
    )
    path = tmp_path / "recipe.yaml"
    path.write_text(
        "stages:\n- stage: prune\n  solver: template\n  template: mine.yaml\n", encoding="utf-8"
    )
    recipe = load_recipe(path)
    path.write_text(recipe.to_yaml(), encoding="utf-8")
    (tmp_path / "mine.yaml").unlink()
    assert load_recipe(path) == recipe
    assert recipe.prune_stages[0].template.rules[0].units == (0, 2)
    (tmp_path / "mine.yaml").write_text("pattern: !!python/object:os.system x", encoding="utf-8")
    path.write_text(
        "stages:\n- stage: prune\n  solver: template\n  template: mine.yaml\n", encoding="utf-8"
    )
    with pytest.raises(ConfigError, match=r"template mine\.yaml: line 1: tags such as"):
        load_recipe(path)
    (tmp_path / "mine.yaml").write_text("pattern: ends\nfrist: 2\n", encoding="utf-8")
    wrong = r"(?s)recipe\.yaml: .*frist: unknown key; did you mean 'first'.*read from mine\.yaml"
    with pytest.raises(ConfigError, match=wrong):
        load_recipe(path)
    for text in ("", "ends", "- ends", "first: 2"):
        (tmp_path / "mine.yaml").write_text(text, encoding="utf-8")
        with pytest.raises(ConfigError, match=r"template mine\.yaml: it must say pattern: \.\.\."):
            load_recipe(path)
    (tmp_path / "mine.yaml").unlink()
    with pytest.raises(ConfigError, match=r"template mine\.yaml: cannot read the template"):
        load_recipe(path)


@settings(max_examples=60, deadline=None)
@given(data=st.data(), sparsity=st.sampled_from([0.0, 0.3, 0.7]))
def test_floors_and_named_units_hold_in_any_mixture(tiny, data, sparsity):
    sites = find_sites(tiny("llama"), ("heads", "neurons"))
    rules = data.draw(
        st.lists(
            st.fixed_dictionaries(
                {"kind": st.sampled_from(["heads", "neurons"])},
                optional={"layers": st.lists(st.sampled_from([0, 1, -1]), max_size=2)},
            ),
            max_size=3,
        )
    )
    rules = [{**rule, "share": data.draw(st.floats(0, 1))} for rule in rules] or [{"share": 1.0}]
    rules = [rule for rule in rules if rule.get("layers", [0])]
    if not rules:
        return
    template = {"pattern": "rules", "rules": rules}
    found = kept(sites, template, sparsity=sparsity, round_to=8, min_neurons=10)
    for site in sites:
        width = len(found[site.name])
        assert width >= (16 if site.kind == "neurons" else 1)
        assert site.kind == "heads" or width % 8 == 0


@pytest.mark.parametrize("name", sorted(TINY))
def test_every_family_loses_alternate_layers(tiny, name):
    """Every second layer of every stack goes as a whole, and exactly that."""
    model = tiny(name)
    template = {**STAGE, "template": "alternate_layers", **NONE, "criterion": "magnitude"}
    result = compress(model, {"stages": [{**template, "reconstruct": False}]})
    (entry,) = result.report["pruning"]
    gone = count_parameters(model) - count_parameters(result.model)
    # where a layer is then left with nothing but norms, they go with it
    assert entry["removed"] < gone if result.layers else entry["removed"] == gone
    for site in find_sites(model):
        expected = 0 if site.layer % 2 else site.units
        assert len(result.plan.sites[site.name].kept) == expected


@pytest.mark.parametrize("name", CORE)
def test_a_template_is_re_fitted(tiny, inputs_for, name):
    batches = [inputs_for(name, s) for s in range(3)]
    template = {"pattern": "every_head", "every": 2}
    result = compress(tiny(name), {"stages": [{**STAGE, "template": template}]}, batches)
    (entry,) = result.report["pruning"]
    assert entry["refitted"] > 0
    assert entry["removed"] > 0
    assert entry["met"]


def test_a_template_alone_has_no_sparsity():
    assert stage("ends").fraction == 0.0
    with pytest.raises(ConfigError, match="has no sparsity, but a target"):
        _ = stage("ends", target={"macs": "0.5x"}).fraction
    assert Prune(sparsity=0.5).template is None
