"""A saved model with a smaller vocabulary: by function, by command, and of real models."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from tokenizer_kinds import TEXTS, make
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
)

import hf_prune.surgery.vocabulary_stage as room
from hf_prune.checkpoint.inspect import check_model
from hf_prune.checkpoint.save import save_model
from hf_prune.checkpoint.vocabulary import prune_saved_vocabulary
from hf_prune.errors import CheckpointError, NumericsError
from hf_prune.plan import Plan, SitePlan
from hf_prune.sites import find_sites
from hf_prune.surgery.remove import remove_units
from hf_prune_cli import main

sys.path.append(str(Path(__file__).parents[2] / "scripts"))
PLAIN = """
import sys
sys.modules["hf_prune"] = None  # cannot be imported
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
ids = tokenizer(sys.argv[2], return_tensors="pt").input_ids
print(tokenizer.decode(model.generate(ids, max_new_tokens=6, do_sample=False)[0]))
"""

TRUSTING = PLAIN.replace(
    "LM.from_pretrained(sys.argv[1])", "LM.from_pretrained(sys.argv[1], trust_remote_code=True)"
)


@pytest.fixture
def saved(tmp_path):
    tokenizer = make("bytes")
    torch.manual_seed(0)
    names = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    sizes = {"vocab_size": len(tokenizer), "n_embd": 32, "n_layer": 2, "n_head": 4}
    model = GPT2LMHeadModel(GPT2Config(**sizes, **names)).eval()
    model.save_pretrained(tmp_path / "old")
    tokenizer.save_pretrained(tmp_path / "old")
    (tmp_path / "texts.txt").write_text("\n".join(TEXTS[:9]))
    return model, tokenizer, tmp_path


@pytest.mark.slow
def test_command(saved):
    """The result loads where there is no hf_prune, with the tokenizer that goes with it."""
    _, tokenizer, folder = saved
    arguments = [str(folder / name) for name in ("old", "texts.txt", "new")]
    result = CliRunner().invoke(main, ["vocabulary", *arguments, "--at-least", "2"])
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert lines[0].endswith(f" of {len(tokenizer)} tokens")
    assert lines[2].startswith("outputs differ by ")
    assert len(check_model(folder / "new")) == 4
    command = [sys.executable, "-c", PLAIN, str(folder / "new"), TEXTS[0]]
    stranger = subprocess.run(command, capture_output=True, text=True, check=False)
    assert stranger.returncode == 0, stranger.stderr[-2000:]
    assert stranger.stdout.startswith(TEXTS[0])
    again = CliRunner().invoke(main, ["vocabulary", *arguments])
    assert (again.exit_code, "--overwrite" in again.output) == (1, True)


@pytest.mark.slow
def test_a_standalone_model_stays_one(saved):
    model, tokenizer, folder = saved
    sites = find_sites(model, ["neurons"])
    plan = Plan("gpt2", {s.name: SitePlan("neurons", s.units, tuple(range(9))) for s in sites})
    remove_units(model, plan)
    save_model(model, folder / "alone", tokenizer=tokenizer, standalone=True)
    prune_saved_vocabulary(folder / "alone", folder / "texts.txt", folder / "new")
    command = [sys.executable, "-c", TRUSTING, str(folder / "new"), TEXTS[0]]
    stranger = subprocess.run(command, capture_output=True, text=True, check=False)
    assert stranger.returncode == 0, stranger.stderr[-2000:]
    assert stranger.stdout.startswith(TEXTS[0])


def test_a_model_that_would_say_something_else_is_not_written(saved, monkeypatch):
    _, _, folder = saved
    plain = room.prune_vocabulary

    def wrong(model, *rest, **options):
        done = plain(model, *rest, **options)
        with torch.no_grad():
            model.transformer.wte.weight.copy_(model.transformer.wte.weight.roll(1, 0))
        return done

    monkeypatch.setattr(room, "prune_vocabulary", wrong)
    with pytest.raises(NumericsError, match="says something else: outputs differ"):
        prune_saved_vocabulary(folder / "old", folder / "texts.txt", folder / "new")
    assert not (folder / "new").exists()


def test_what_cannot_be_read(saved):
    _, _, folder = saved
    (folder / "texts.txt").write_bytes(b"\xff\xfe\xff")
    with pytest.raises(CheckpointError, match="texts cannot be read"):
        prune_saved_vocabulary(folder / "old", folder / "texts.txt", folder / "new")
    with pytest.raises(CheckpointError, match="config of"):
        prune_saved_vocabulary(folder / "none", folder / "texts.txt", folder / "new")


def _reviews(count):
    packaged = pytest.importorskip("packaged")
    try:
        return packaged, packaged.rotten_tomatoes()["train"]["text"][:count]
    except SystemExit as missing:
        pytest.skip(str(missing))


def _compare(auto, folder, out, texts):
    """Both folders about texts of which all tokens stay; sizes of their weights."""
    old, new = auto.from_pretrained(folder).eval(), auto.from_pretrained(out).eval()
    before, after = AutoTokenizer.from_pretrained(folder), AutoTokenizer.from_pretrained(out)
    table = after.get_vocab()
    for text in texts:
        ids = before(text)["input_ids"]
        names = before.convert_ids_to_tokens(ids)
        assert all(name in table for name in names)
        assert after(text)["input_ids"] == [table[name] for name in names]
        with torch.no_grad():
            expected = old(torch.tensor([ids])).logits
            found = new(torch.tensor([after(text)["input_ids"]])).logits
        kept = [index for name, index in before.get_vocab().items() if name in table]
        order = sorted(kept)
        torch.testing.assert_close(found, expected[..., order], atol=1e-4, rtol=0)
    return [(f / "model.safetensors").stat().st_size for f in (folder, out)]


@pytest.mark.slow
def test_the_packaged_model_on_reviews(tmp_path):
    """MiniLM with a head of masked language models, whose bias is of the vocabulary too."""
    packaged, texts = _reviews(2000)
    source = packaged.packaged_model()
    torch.manual_seed(0)
    AutoModelForMaskedLM.from_pretrained(source).save_pretrained(tmp_path / "old")
    AutoTokenizer.from_pretrained(source).save_pretrained(tmp_path / "old")
    (tmp_path / "texts.txt").write_text("\n".join(texts), encoding="utf-8")
    done, _ = prune_saved_vocabulary(tmp_path / "old", tmp_path / "texts.txt", tmp_path / "new")
    assert len(done.kept) < done.before / 3
    sizes = _compare(AutoModelForMaskedLM, tmp_path / "old", tmp_path / "new", texts[:10])
    assert sizes[1] < 0.7 * sizes[0]


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # reading GGUF warns inside of transformers and numpy
def test_a_real_decoder_on_reviews(tmp_path):
    """SmolLM2-135M: tied, a BPE of bytes."""
    from test_real_decoder import MISSING, load

    if MISSING:
        pytest.skip(f"not installed: {', '.join(MISSING)}")
    _, texts = _reviews(1000)
    model, tokenizer = load()
    model.save_pretrained(tmp_path / "old")
    tokenizer.save_pretrained(tmp_path / "old")
    (tmp_path / "texts.txt").write_text("\n".join(texts), encoding="utf-8")
    done, _ = prune_saved_vocabulary(tmp_path / "old", tmp_path / "texts.txt", tmp_path / "new")
    assert len(done.kept) < done.before / 5
    sizes = _compare(AutoModelForCausalLM, tmp_path / "old", tmp_path / "new", texts[:3])
    assert sizes[1] < 0.9 * sizes[0]
