"""The table of latencies: measured once, adds up, and is read back."""

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.isotonic import IsotonicRegression

from hf_prune.measure import latency_table as module
from hf_prune.measure.counts import count_parameters
from hf_prune.measure.latency import Latency
from hf_prune.measure.latency_table import (
    LatencyTable,
    Shape,
    _group,
    _key,
    latency_table,
    measure_latency_table,
    shaped_like,
)
from hf_prune.plan import Plan, SitePlan
from hf_prune.sites import find_sites
from hf_prune.surgery.remove import remove_units

SHAPE = Shape(2, 16)


@pytest.fixture
def clock(monkeypatch):
    """A machine on which a head takes 0.7 ms, a neuron 0.01 ms, and everything else 3 ms."""
    calls = []

    def compare(models, **options):
        calls.append((list(models), options))
        times = {}
        for name, model in models.items():
            heads, neurons = (
                sum(s.units for s in find_sites(model, (kind,))) for kind in ("heads", "neurons")
            )
            times[name] = 3.0 + 0.7 * heads + 0.01 * neurons
        first = next(iter(times.values()))
        return {name: Latency(value, value, value, value / first) for name, value in times.items()}

    monkeypatch.setattr(module, "compare_latency", compare)
    return calls


def test_widths_that_were_held_up_are_smoothed(tiny, clock, monkeypatch):
    """Neighbours share a hiccup, in the place of all wider ones paying for it."""
    compare = module.compare_latency

    def held_up(models, **options):
        times = compare(models, **options)
        late = next(name for name in times if "heads" in name and name.endswith("@2"))
        value = times[late].median_ms + 2.2
        times[late] = Latency(value, value, value, value / times["full"].median_ms)
        return times

    monkeypatch.setattr(module, "compare_latency", held_up)
    model = tiny("bert")
    sites = find_sites(model)
    table = measure_latency_table(model, sites, SHAPE, rounds=2)
    heads = next(site for site in sites if site.kind == "heads")
    prices = [value / 1e6 for value in table.tables(sites)[heads.name]]
    assert prices[1:] == pytest.approx([0, 1.6, 1.6, 2.1], abs=1e-3)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(-10, 10), min_size=1, max_size=12))
def test_the_nearest_rising_numbers(values):
    found = module._rising(values)
    expected = IsotonicRegression().fit_transform(range(len(values)), values)
    assert found == pytest.approx(expected.tolist(), abs=1e-6)


def test_a_table_that_makes_no_sense_is_not_kept(tiny, clock, monkeypatch, tmp_path, caplog):
    model, tries = tiny("bert"), []
    sites = find_sites(model)
    compare = module.compare_latency

    def hiccup(models, **options):
        tries.append(1)
        times = compare(models, **options)
        slow = 2 * times["full"].median_ms
        return times | {"least": Latency(slow, slow, slow, 2.0)}

    monkeypatch.setenv("HF_PRUNE_CACHE", str(tmp_path))
    monkeypatch.setattr(module, "compare_latency", hiccup)
    latency_table(model, sites, SHAPE)
    assert len(tries) == module.TRIES
    assert "makes no sense" in caplog.text
    assert not list(tmp_path.rglob("*.json"))
    monkeypatch.setattr(module, "compare_latency", compare)
    assert latency_table(model, sites, SHAPE).makes_sense
    assert list(tmp_path.rglob("*.json"))


def test_a_linear_machine_is_learned_exactly(tiny, clock):
    model = tiny("bert")
    sites = find_sites(model)
    table = measure_latency_table(model, sites, SHAPE, rounds=2)
    full = {site.name: site.units for site in sites}
    some = {s.name: 2 if s.kind == "heads" else 20 for s in sites}
    assert table.total_ns == pytest.approx((3 + 0.7 * 8 + 0.01 * 96) * 1e6)
    assert table.predict_ns(sites, full) == pytest.approx(table.total_ns, rel=1e-6)
    assert table.predict_ns(sites, some) == pytest.approx((3 + 0.7 * 4 + 0.4) * 1e6, rel=1e-6)
    (names, options), *others = clock
    assert not others, "all models take turns in one measurement"
    assert options["batch_size"] == 2
    assert options["sequence_length"] == 16
    assert names[0] == "full"


def test_blocks_that_may_go_as_a_whole_are_timed_without_units(tiny, clock):
    model = tiny("bert")
    sites = find_sites(model)
    table = measure_latency_table(model, sites, SHAPE, empty=True, rounds=2)
    none = {site.name: 0 for site in sites}
    assert table.fixed_ns == pytest.approx(3e6)
    assert table.predict_ns(sites, none) == pytest.approx(3e6)
    some = {s.name: 1 if s.kind == "heads" else 16 for s in sites}
    assert table.predict_ns(sites, some) == pytest.approx((3 + 0.7 * 2 + 0.32) * 1e6, rel=1e-6)


@pytest.mark.parametrize("empty", [False, True])
def test_a_model_of_uneven_widths_is_learned_exactly(tiny, uneven_plan, clock, empty):
    model = tiny("bert")
    remove_units(model, uneven_plan(model))
    sites = find_sites(model)
    assert len({s.units for s in sites if s.kind == "neurons"}) > 1
    table = measure_latency_table(model, sites, SHAPE, empty=empty, rounds=2)

    def time_of(counts):
        heads, neurons = (
            sum(counts[s.name] for s in sites if s.kind == kind) for kind in ("heads", "neurons")
        )
        return (3 + 0.7 * heads + 0.01 * neurons) * 1e6

    full = {site.name: site.units for site in sites}
    assert table.total_ns == pytest.approx(time_of(full))
    assert table.predict_ns(sites, full) == pytest.approx(table.total_ns, rel=1e-6)
    some = {s.name: max(1, s.units - 1) if s.kind == "heads" else s.units - 5 for s in sites}
    assert table.predict_ns(sites, some) == pytest.approx(time_of(some), rel=1e-6)


@pytest.mark.parametrize("name", ["whisper", "t5"])
def test_encoder_decoder_and_cross_attention_have_their_own_prices(
    tiny, inputs_for, monkeypatch, name
):
    """A machine on which a head of the encoder takes 3, of the decoder 1, across 2 ms."""
    model = tiny(name)
    prices = {(True, False): 3.0, (False, False): 1.0, (False, True): 2.0}

    def price(site):
        return prices["encoder" in site.stack, site.cross] * (1 if site.kind == "heads" else 0.01)

    def compare(models, **_):
        times = {n: 5 + sum(s.units * price(s) for s in find_sites(m)) for n, m in models.items()}
        return {n: Latency(t, t, t, t / times["full"]) for n, t in times.items()}

    monkeypatch.setattr(module, "compare_latency", compare)
    sites = find_sites(model)
    assert len({_group(site) for site in sites}) == 5
    table = measure_latency_table(model, sites, SHAPE, rounds=2)
    for part in ("encoder", "decoder"):
        counts = {s.name: max(1, s.units // 2) if part in s.stack else s.units for s in sites}
        told = 1e6 * (5 + sum(counts[s.name] * price(s) for s in sites))
        assert table.predict_ns(sites, counts) == pytest.approx(told, rel=1e-6)


@pytest.mark.parametrize("name", ["bert", "gpt2", "vit", "modernbert"])
def test_one_stack_has_one_price_for_each_kind(tiny, name):
    assert len({_group(site) for site in find_sites(tiny(name))}) == 2


@pytest.mark.parametrize("kinds", [["experts"], ["heads", "expert_neurons"]])
def test_experts_are_timed_at_widths_that_they_can_have(tiny, clock, kinds):
    model = tiny("mixtral")
    sites = find_sites(model, kinds)
    table = measure_latency_table(model, sites, SHAPE, empty=True, rounds=2)
    widths = {site.kind: sorted(table.points[_group(site)]) for site in sites}
    expected = {"experts": [2, 3, 4], "expert_neurons": [8, 16, 24, 32, 40, 48], "heads": [0, 1, 2]}
    assert widths == {kind: expected[kind] for kind in kinds}


def test_tables_never_fall_however_noisy():
    table = LatencyTable(100, 10, {"heads-layers-8-1-1": {1: 0, 2: 50, 3: 40, 4: 90}})

    class Fake:
        name, kind, units, parameters, macs_per_token = "a", "heads", 4, 1, 1
        stack, cross = "layers", False

        class gate:
            width = 8

    assert table.tables([Fake]) == {"a": (0, 0, 50, 50, 90)}


def test_models_for_timing_share_what_is_not_narrowed(tiny):
    model = tiny("llama")
    before = {name: (id(p), p.clone()) for name, p in model.named_parameters()}
    sites = find_sites(model)
    small = shaped_like(model, {s.name: 1 if s.kind == "heads" else 16 for s in sites})
    assert {s.units for s in find_sites(small)} == {1, 16}
    assert count_parameters(small) < count_parameters(model)
    assert small.get_input_embeddings().weight is model.get_input_embeddings().weight
    for name, parameter in model.named_parameters():
        assert id(parameter) == before[name][0]
        assert torch.equal(parameter, before[name][1])
    assert getattr(model.config, "quantization_config", None) is None


@pytest.mark.parametrize("kind", ["query_heads", "hidden"])
def test_models_for_timing_have_other_query_heads_and_channels(tiny, kind):
    model, calls = tiny("llama"), []
    sites = find_sites(model, (kind,))
    model.register_forward_pre_hook(lambda *_: calls.append(1))
    narrow = shaped_like(model, {site.name: site.units // 2 for site in sites})
    assert [s.units for s in find_sites(narrow, (kind,))] == [s.units // 2 for s in sites]
    assert count_parameters(narrow) < count_parameters(model)
    ids = torch.ones(1, 4, dtype=torch.long)
    with torch.no_grad():
        narrow(ids)
    assert not calls, "hooks are not of the model"
    with torch.no_grad():
        model(ids)
    assert calls


def test_is_read_back_and_depends_on_what_matters(tiny, clock, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_PRUNE_CACHE", str(tmp_path))
    model = tiny("bert")
    sites = find_sites(model)
    one = latency_table(model, sites, SHAPE)
    assert latency_table(model, sites, SHAPE) == one
    assert len(clock) == 1
    latency_table(model, sites, Shape(4, 16))
    latency_table(model.half(), sites, SHAPE)
    assert len(clock) == 3
    files = sorted((tmp_path / "latency").iterdir())
    assert len(files) == 3
    assert all(path.suffix == ".json" for path in files)
    latency_table(tiny("bert"), sites, SHAPE, cache=False)
    assert len(clock) == 4


def key(model, kinds=("heads", "neurons")):
    return _key(model, find_sites(model, kinds), SHAPE, False)


def test_another_model_has_another_key(tiny):
    """Parts that no site is in, parts of the config that are configs, and words are of it, too."""
    narrow = tiny("bert")
    sites = find_sites(narrow, ("neurons",))
    remove_units(narrow, Plan("bert", {s.name: SitePlan(s.kind, s.units, (0,)) for s in sites}))
    assert key(narrow, ("heads",)) != key(tiny("bert"), ("heads",))
    other = tiny("bert")
    other.config.hidden_act = "relu"
    assert key(other) != key(tiny("bert"))
    nested = tiny("gemma3")
    nested.config.text_config.sliding_window = 3
    assert key(nested) != key(tiny("gemma3"))
    wide = tiny("bert")
    wide.resize_token_embeddings(120)
    wide.config.vocab_size = tiny("bert").config.vocab_size
    assert key(wide) != key(tiny("bert"))


def test_names_are_not_of_the_key(tiny):
    renamed = tiny("bert")
    labels = {i: f"class {i}" for i in range(renamed.config.num_labels)}
    renamed.config.id2label, renamed.config.label2id = labels, {v: k for k, v in labels.items()}
    renamed.config._name_or_path = renamed.name_or_path = "elsewhere/again"
    assert key(renamed) == key(tiny("bert"))


@pytest.mark.parametrize("place", ["file", "proc"])
def test_a_cache_that_cannot_be_written_is_no_loss(
    tiny, clock, tmp_path, monkeypatch, caplog, place
):
    (tmp_path / "file").write_text("no folder")
    places = {"file": tmp_path / "file" / "cache", "proc": "/proc/nope"}
    monkeypatch.setenv("HF_PRUNE_CACHE", str(places[place]))
    model = tiny("bert")
    table = latency_table(model, find_sites(model), SHAPE)
    assert table.total_ns == pytest.approx((3 + 0.7 * 8 + 0.01 * 96) * 1e6)
    (record,) = caplog.records
    assert "cannot be kept" in record.message
    assert "set HF_PRUNE_CACHE" in record.message


@pytest.mark.parametrize("damage", ["", "[]", "{}", '{"total_ns": 1, "fixed_ns": 1, "points": 3}'])
def test_a_damaged_cache_is_measured_again(tiny, clock, tmp_path, monkeypatch, damage):
    monkeypatch.setenv("HF_PRUNE_CACHE", str(tmp_path))
    model = tiny("bert")
    sites = find_sites(model)
    one = latency_table(model, sites, SHAPE)
    (path,) = (tmp_path / "latency").iterdir()
    path.write_text(damage)
    assert latency_table(model, sites, SHAPE) == one
    assert len(clock) == 2
    assert json.loads(path.read_text())["total_ns"] == one.total_ns


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama", "distilbert"])
def test_measures_real_models(tiny, name):
    model = tiny(name)
    sites = find_sites(model)
    table = measure_latency_table(model, sites, SHAPE, rounds=2)
    assert table.total_ns > 0
    assert table.fixed_ns > 0
    for site, entries in table.tables(sites).items():
        assert len(entries) == {s.name: s.units for s in sites}[site] + 1
        assert list(entries) == sorted(entries)
