"""What a saved model is, and whether it is whole; by function and by command."""

import json
import os
import subprocess
import sys

import pytest
import torch
from click.testing import CliRunner
from hub_standin import HubStandIn
from huggingface_hub import HfApi
from safetensors.torch import load_file, save_file
from tinies import TINY
from transformers import PreTrainedModel

from hf_prune.checkpoint.inspect import check_model, inspect_model
from hf_prune.checkpoint.manifest import write_manifest
from hf_prune.checkpoint.save import save_model
from hf_prune.errors import CheckpointError, NumericsError
from hf_prune.measure.counts import count_nonzero, count_parameters
from hf_prune.surgery.remove import remove_units
from hf_prune.weights.find import find_weights
from hf_prune_cli import main


@pytest.fixture
def saved(tiny, uneven_plan, tmp_path):
    def make(name):
        model = tiny(name)
        plan = uneven_plan(model)
        remove_units(model, plan)
        save_model(model, tmp_path / "out")
        return model, plan, tmp_path / "out"

    return make


@pytest.mark.parametrize("name", sorted(TINY))
def test_what_was_removed_without_reading_weights(name, saved, tiny, monkeypatch):
    model, plan, folder = saved(name)

    def read(*args, **kwargs):
        raise RuntimeError("weights were read")

    monkeypatch.setattr(PreTrainedModel, "_load_pretrained_model", read)
    found = inspect_model(folder)
    kept = {site.site: (site.kind, site.kept, site.units) for site in found.sites}
    assert kept == {n: (s.kind, len(s.kept), s.units) for n, s in plan.sites.items()}
    assert found.architecture == type(model).__name__
    assert found.parameters == count_parameters(model)
    assert found.dense_parameters == count_parameters(tiny(name))


@pytest.mark.parametrize("storage", ["dense", "bitmask"])
def test_zeros_are_counted_when_asked_for(storage, tiny, tmp_path):
    model = tiny("vit")
    name, weight = list(find_weights(model).items())[1]
    weight.data[:, ::2] = 0
    save_model(model, tmp_path / "out", storage=storage)
    assert inspect_model(tmp_path / "out").nonzero is None
    found = inspect_model(tmp_path / "out", zeros=True)
    assert found.zeros == {name: 0.5}
    assert found.nonzero == count_nonzero(model) < found.parameters
    shown = CliRunner().invoke(main, ["inspect", str(tmp_path / "out"), "--zeros"])
    assert f"{name}   50.0 % zero" in shown.output
    assert f"{found.nonzero:,} parameters are not zero" in shown.output
    assert "zero" not in CliRunner().invoke(main, ["inspect", str(tmp_path / "out")]).output


@pytest.mark.parametrize("name", ["bert", "gpt2", "mixtral", "t5", "vit"])
def test_a_whole_model(name, saved):
    _, _, folder = saved(name)
    done = check_model(folder)
    assert "manifest" in done[0]
    assert len(done) == (4 if name in ("gpt2", "t5") else 3), (
        "ties are checked where there are some"
    )


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Use 'content=<:DeprecationWarning")
def test_a_repository_without_its_weights(saved, tmp_path):
    """What is asked of the Hub is the config, and nothing of the weights."""
    model, plan, folder = saved("bert")
    with HubStandIn() as hub:
        api = HfApi(endpoint=hub.url, token="hf_standin")
        api.create_repo("me/small")
        api.upload_folder(repo_id="me/small", folder_path=folder)
        assert "model.safetensors" in hub.files("me/small")
        hub.requests.clear()
        command = [sys.executable, "-m", "hf_prune_cli", "inspect", "me/small"]
        environment = {**os.environ, **hub.environment(tmp_path / "home")}
        run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        asked = [request.path for request in hub.requests]
    assert run.returncode == 0, run.stderr[-2000:]
    assert len(run.stdout.splitlines()) == 1 + len(plan.sites)
    assert f"{count_parameters(model):,} of " in run.stdout
    assert any("config.json" in path for path in asked)
    assert not any("safetensors" in path for path in asked)
    assert not list((tmp_path / "home").rglob("*.safetensors"))


def change_weights(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    write_manifest(folder)


QUERY = "bert.encoder.layer.0.attention.self.query.weight"


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        (lambda t: t[QUERY].fill_(float("nan")), NumericsError, "query.weight has"),
        (lambda t: t.pop(QUERY), CheckpointError, "missing keys"),
        (lambda t: t.update(more=torch.ones(2)), CheckpointError, r"unexpected keys: \['more'\]"),
        (lambda t: t.update({QUERY: t[QUERY][:1]}), CheckpointError, "cannot be loaded"),
    ],
)
def test_damage_that_the_manifest_does_not_show(saved, change, error, text):
    _, _, folder = saved("bert")
    change_weights(folder, change)
    with pytest.raises(error, match=text):
        check_model(folder)


def test_damage_that_the_manifest_shows(saved):
    _, _, folder = saved("bert")
    data = bytearray((folder / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (folder / "model.safetensors").write_bytes(data)
    with pytest.raises(CheckpointError, match="another SHA-256"):
        check_model(folder)


def edit(folder, change):
    config = json.loads((folder / "config.json").read_text())
    change(config)
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda c: c.update(architectures=["Trainer"]), "no class of transformers"),
        (lambda c: c.update(architectures=["../x"]), "no class of transformers"),
        (lambda c: c.update(model_type="t6"), "cannot be read"),
        (
            lambda c: c["quantization_config"]["modules"].update(x={"out": 1, "in": 1}),
            "no such module",
        ),
        (lambda c: c["quantization_config"].update(version=9), r"version is 9"),
    ],
)
def test_a_config_that_is_wrong(saved, change, text):
    _, _, folder = saved("bert")
    edit(folder, change)
    with pytest.raises(CheckpointError, match=text):
        inspect_model(folder)


def test_commands(saved):
    _, plan, folder = saved("bert")
    run = CliRunner().invoke
    result = run(main, ["inspect", str(folder)])
    assert result.exit_code == 0
    assert result.output.startswith("BertForSequenceClassification: ")
    for name, site in plan.sites.items():
        line = next(line for line in result.output.splitlines() if line.startswith(f"{name} "))
        assert line.split()[1:] == [str(len(site.kept)), "of", str(site.units), site.kind]
    result = run(main, ["verify", str(folder)])
    assert result.exit_code == 0
    assert "numbers are finite" in result.output
    (folder / "config.json").write_text("{}")
    result = run(main, ["verify", str(folder)])
    assert (result.exit_code, "CheckpointError" in result.output) == (4, True)
