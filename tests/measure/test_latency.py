"""Latency: in turn, round by round, and the numbers of the clock."""

import itertools

import pytest

from hf_prune.measure import latency
from hf_prune.measure.latency import compare_latency


def test_models_take_turns(tiny, monkeypatch):
    turns = []
    times = {"slow": itertools.cycle([8.0, 10.0, 12.0]), "fast": itertools.cycle([4.0, 5.0, 3.0])}
    models = {"slow": tiny("bert"), "fast": tiny("distilbert")}
    names = {id(model): name for name, model in models.items()}

    def clock(model, batch):
        assert not model.training
        assert batch["input_ids"].shape == (2, 16)
        turns.append(names[id(model)])
        return next(times[turns[-1]])

    monkeypatch.setattr(latency, "_time_ms", clock)
    models["slow"].train()
    found = compare_latency(models, batch_size=2, sequence_length=16, rounds=3, warmup=3)
    assert turns == ["slow", "fast"] * 6
    assert models["slow"].training
    assert not models["fast"].training
    assert (found["slow"].median_ms, found["fast"].median_ms) == (10, 4)
    assert (found["slow"].ratio, found["fast"].ratio) == (1, 0.5)
    assert found["slow"].low_ms <= 10 <= found["slow"].high_ms
    assert set(found["slow"].to_dict()) == {"median_ms", "quartile_1_ms", "quartile_3_ms", "ratio"}


def test_a_real_clock(tiny):
    found = compare_latency(
        {"a": tiny("bert")}, batch_size=1, sequence_length=8, rounds=1, warmup=0
    )
    assert found["a"].median_ms > 0
    assert found["a"].ratio == pytest.approx(1)
