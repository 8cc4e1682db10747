"""compress(): what it gives back, and what it refuses."""

import json

import pytest
import torch
import transformers
from hub_standin import HubStandIn
from transformers import AutoModelForSequenceClassification, AutoTokenizer
from words import word_tokenizer

import hf_prune
from hf_prune import compress, push_to_hub, save_result
from hf_prune.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    NumericsError,
    OutputExistsError,
    UnsupportedModelError,
)
from hf_prune.plan import Plan


def recipe(**stage):
    return {"stages": [{"stage": "prune", "sparsity": 0.5, "sequence_length": 16, **stage}]}


@pytest.mark.parametrize("name", ["bert", "distilbert", "gpt2", "llama"])
@pytest.mark.parametrize("criterion", ["fisher", "magnitude"])
def test_asked_is_got_and_the_given_model_is_not_changed(tiny, inputs_for, name, criterion):
    model = tiny(name)
    before = [p.detach().clone() for p in model.parameters()]
    result = compress(model, recipe(criterion=criterion), [inputs_for(name, s) for s in range(4)])
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    (entry,) = result.report["pruning"]
    assert entry["met"]
    stages = result.report["stages"]
    gone = stages["dense"]["encoder_parameters"] - stages["pruned"]["encoder_parameters"]
    assert gone == entry["removed"] >= entry["asked_to_remove"]
    assert sum(p.numel() for p in result.model.parameters()) == stages["pruned"]["parameters"]
    assert stages["pruned"]["macs"] < stages["dense"]["macs"]


@pytest.mark.parametrize("name", ["t5", "bart", "whisper", "vit", "clip", "wav2vec2"])
def test_the_default_recipe_on_every_kind_of_input(tiny, inputs_for, name):
    batches = [inputs_for(name, s) for s in range(6)]
    result = compress(tiny(name), recipe(), batches)
    (entry,) = result.report["pruning"]
    assert entry["met"]
    assert entry["refitted"] > 0
    stages = result.report["stages"]
    assert stages["pruned"]["macs"] < stages["dense"]["macs"]


WORDS = ["good", "bad", "film", "plot", "dull", "fine"]


def with_vocabulary(*before, **fields):
    return {"stages": [*before, {"stage": "vocabulary", **fields}]}


def test_the_vocabulary_goes_with_the_rest(tiny, inputs_for, tmp_path):
    """Texts of which all tokens stay give the same, by model and tokenizer as they are saved."""
    tokenizer, model = word_tokenizer(WORDS), tiny("bert")
    (prune,) = recipe(criterion="fisher")["stages"]
    batches = [inputs_for("bert", s) for s in range(3)]
    texts = ["good film", "bad film", "dull film"]
    without = compress(model, {"stages": [prune]}, batches, tokenizer=tokenizer)
    assert without.tokenizer is tokenizer
    told = with_vocabulary(prune, at_least=1)
    result = compress(model, told, batches, tokenizer=tokenizer, texts=texts)
    assert (len(result.tokenizer), len(tokenizer), model.config.vocab_size) == (9, 11, 99)
    entry = result.report["pruning"][1]
    assert (entry["kind"], entry["total"], entry["kept"], entry["removed"]) == (
        *("vocabulary", 99, 9, 90),
    )
    figures = [r.report["stages"]["pruned"] for r in (without, result)]
    assert figures[0]["parameters"] - figures[1]["parameters"] == 90 * 32
    assert figures[1]["parameters"] == sum(p.numel() for p in result.model.parameters())
    save_result(result, tmp_path / "out")
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out" / "model").eval()
    short = AutoTokenizer.from_pretrained(tmp_path / "out" / "model")
    expected = without.model.eval()(**tokenizer(texts, padding=True, return_tensors="pt")).logits
    found = loaded(**short(texts, padding=True, return_tensors="pt")).logits
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)


def test_masks_of_embeddings_follow_the_vocabulary(tiny, tmp_path):
    (tmp_path / "texts.txt").write_text("good film\ndull plot\n")
    weights = recipe(units=["weights"], criterion="magnitude", reconstruct=False)["stages"][0]
    weights |= {"weights": {"embeddings": True, "dense_target": False}}
    told = with_vocabulary(weights, texts=str(tmp_path / "texts.txt"))
    result = compress(tiny("bert"), told, tokenizer=word_tokenizer(WORDS))
    name = "bert.embeddings.word_embeddings.weight"
    assert result.masks[name].shape == (9, 32)
    for name, mask in result.masks.items():
        weight = result.model.get_parameter(name)
        assert torch.equal(weight != 0, mask), name


def test_the_vocabulary_alone(tiny):
    model = tiny("gpt2").train()
    told = with_vocabulary(at_most=4)  # two special ones, and two words
    texts = ["film film", "plot plot plot", "good"]
    result = compress(model, told, tokenizer=word_tokenizer(WORDS), texts=texts)
    assert result.model.training
    assert (model.config.vocab_size, result.model.config.vocab_size) == (99, 7)
    assert not hf_prune.report.card.needs_loader(result.report)
    assert result.report["left_to_trainer"] == []


def test_what_is_left_to_a_trainer_is_told(tiny):
    learned = {"masks": "l0", "coarse": ["layers", "hidden"], "schedule": {"every": 1}}
    stage = {"stage": "prune", "sparsity": 0.5, "criterion": "magnitude", "solver": "uniform"}
    stage |= {"reconstruct": False, "min_heads": 0, "min_neurons": 0, **learned}
    training = {"stage": "train", "num_train_epochs": 1}
    result = compress(tiny("bert"), {"stages": [stage, training]})
    assert result.report["left_to_trainer"] == ["schedule", "coarse", "train"]
    assert result.plan.sites


def test_a_vocabulary_needs_a_tokenizer_and_texts(tiny):
    with pytest.raises(ConfigError, match="pass the tokenizer of the model"):
        compress(tiny("bert"), with_vocabulary(), texts=["good"])
    with pytest.raises(ConfigError, match=r"Name a file in the stage \(texts: \.\.\.\)"):
        compress(tiny("bert"), with_vocabulary(), tokenizer=word_tokenizer(WORDS))
    with pytest.raises(DataError, match=r"texts of the vocabulary cannot be read.*nowhere"):
        compress(tiny("bert"), with_vocabulary(texts="nowhere"), tokenizer=word_tokenizer(WORDS))
    (prune,) = recipe()["stages"]
    with pytest.raises(ConfigError, match="leave the stage out"):
        hf_prune.compress_family(tiny("bert"), with_vocabulary(prune), targets=[0.5])


@pytest.mark.parametrize("criterion", sorted(hf_prune.criteria.CRITERIA))
@pytest.mark.parametrize("cost", ["parameters", "macs"])
def test_every_criterion_and_cost(tiny, inputs_for, criterion, cost):
    result = compress(
        tiny("bert"),
        recipe(criterion=criterion, cost=cost),
        [inputs_for("bert", s) for s in range(3)],
    )
    assert result.report["pruning"][0]["met"]


def test_reconstruction_repairs(tiny, inputs_for):
    model = tiny("bert")
    batches = [inputs_for("bert", s) for s in range(32)]
    distance = {}
    for on in (True, False):
        small = compress(model, recipe(reconstruct=on), batches).model.eval()
        with torch.no_grad():
            distance[on] = sum(
                float((small(**b).logits - model(**b).logits).square().sum()) for b in batches
            )
    assert distance[True] < 0.5 * distance[False]


def test_same_in_same_out(tiny, inputs_for):
    batches = [inputs_for("bert", s) for s in range(4)]
    plans = {compress(tiny("bert"), recipe(), batches).plan.fingerprint() for _ in range(2)}
    assert len(plans) == 1


def test_structure_then_weights(tiny, inputs_for):
    stages = recipe()["stages"]
    weights = {
        "stage": "prune",
        "units": ["weights"],
        "criterion": "magnitude",
        "solver": "uniform",
    }
    stages += [{**weights, "sparsity": 0.5, "ignore": ["classifier.*"]}]
    result = compress(tiny("bert"), {"stages": stages}, [inputs_for("bert", s) for s in range(3)])
    assert result.masks
    for name, mask in result.masks.items():
        assert not result.model.get_parameter(name)[~mask].any()
        assert result.plan.weights[name] == int(mask.sum())


def test_a_second_compression_composes(tiny, inputs_for):
    batches = [inputs_for("bert", s) for s in range(3)]
    stage = recipe(sparsity=0.3)["stages"][0]
    result = compress(tiny("bert"), {"stages": [stage, stage]}, batches)
    model = tiny("bert")
    hf_prune.remove_units(model, result.plan)
    shapes = [p.shape for p in model.parameters()]
    assert shapes == [p.shape for p in result.model.parameters()]


@pytest.mark.parametrize(
    ("stage", "batches", "error", "message"),
    [
        ({"sparsity": 50}, None, ConfigError, "sparsity=50 is outside"),
        ({"criterion": "tailor"}, None, ConfigError, "did you mean 'taylor'"),
        ({"solver": "globl"}, None, ConfigError, "did you mean 'global'"),
        ({"sparcity": 0.5}, None, ConfigError, "did you mean 'sparsity'"),
        ({}, [], DataError, "calibration set is empty"),
        ({}, None, DataError, "calibration set is empty"),
        ({"min_calibration_samples": 99}, "one", DataError, "has 4 examples to fit to, fewer than"),
        ({"ignore": ["*"]}, "one", ConfigError, "no site is left"),
        ({"criterion": "taylor", "projections": 2}, None, ConfigError, "'taylor' draws none"),
    ],
)
def test_bad_input(tiny, inputs_for, stage, batches, error, message):
    given = [inputs_for("bert")] if batches == "one" else batches
    stage = {"min_calibration_samples": 1, **stage}
    with pytest.raises(error, match=message):
        compress(tiny("bert"), recipe(**stage), given)


def test_nan_weights_labels_and_wrappers_are_named(tiny, inputs_for):
    model, batch = tiny("bert"), inputs_for("bert")
    wrong = {**batch, "labels": torch.tensor([0, 7, 1, 2])}
    with pytest.raises(DataError, match=r"batch 0, row 1: label 7 is outside \[0, 3\)"):
        compress(model, recipe(criterion="taylor", min_calibration_samples=1), [wrong])
    with pytest.raises(UnsupportedModelError, match="Unwrap it first"):
        compress(torch.nn.DataParallel(model), recipe(), [batch])
    model.bert.encoder.layer[1].output.dense.weight.data[0, 0] = float("nan")
    with pytest.raises(NumericsError, match=r"layer\.1\.output\.dense\.weight has 1 values"):
        compress(model, recipe(), [batch])


def test_a_result_is_written_whole_and_never_over_another(tiny, inputs_for, tmp_path):
    result = compress(tiny("bert"), recipe(), [inputs_for("bert", s) for s in range(3)])
    save_result(result, tmp_path / "out")
    expected = {"model", "plan.json", "recipe.yaml", "report.json", "README.md", "units.svg"}
    assert {p.name for p in (tmp_path / "out").iterdir()} == expected
    assert Plan.load(tmp_path / "out" / "plan.json") == result.plan
    assert hf_prune.load_recipe(tmp_path / "out" / "recipe.yaml") == result.recipe
    with pytest.raises(OutputExistsError, match="Nothing was written"):
        save_result(result, tmp_path / "out")
    save_result(result, tmp_path / "out", overwrite=True)
    assert "model.safetensors" in hf_prune.verify(tmp_path / "out" / "model")
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("alone", ["portable", "standalone"])
def test_a_result_with_zeros_as_bits(alone, tiny, inputs_for, tmp_path):
    stage = {"stage": "prune", "units": ["weights"], "criterion": "wanda", "sparsity": 0.7}
    result = compress(tiny("bert"), {"stages": [stage]}, [inputs_for("bert")] * 2)
    sizes = save_result(result, tmp_path / "out", storage="bitmask")
    assert 0 < sizes["bytes_stored"] < sizes["bytes_dense"]
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["storage"] == sizes
    assert "storage" not in result.report
    assert "import hf_prune" in (tmp_path / "out" / "README.md").read_text()
    loaded = type(result.model).from_pretrained(tmp_path / "out" / "model")
    for name, value in result.model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name
    result.recipe = result.recipe.model_copy(update={alone: True})
    with pytest.raises(CheckpointError, match=f"{alone}: true asks for a model that loads without"):
        save_result(result, tmp_path / "other", storage="bitmask")
    assert not (tmp_path / "other").exists()


@pytest.mark.filterwarnings("ignore:Use 'content=<:DeprecationWarning")
def test_push_is_one_commit_without_secrets(tiny, inputs_for, tmp_path, monkeypatch):
    result = compress(tiny("bert"), recipe(), [inputs_for("bert", s) for s in range(3)])
    save_result(result, tmp_path / "out")
    (tmp_path / "out" / "model" / "training_args.bin").write_bytes(b"pickle")
    with HubStandIn() as hub:
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hub.url)
        monkeypatch.setattr("huggingface_hub.hf_api.constants.ENDPOINT", hub.url)
        monkeypatch.setattr(
            "hf_prune.hub.HfApi",
            lambda **options: __import__("huggingface_hub").HfApi(
                endpoint=hub.url, token="hf_test", **options
            ),
        )
        push_to_hub(tmp_path / "out", "me/small")
        files = hub.files("me/small")
        assert len(hub.commits("me/small")) == 2  # the initial one, and ours
    assert {"model.safetensors", "config.json", "plan.json", "recipe.yaml", "report.json"} <= set(
        files
    )
    assert "training_args.bin" not in files
    assert b'from_pretrained("me/small")' in files["README.md"]
    assert b"import hf_prune  # registers" in files["README.md"]
    assert b"`pip install hf_prune` first" in files["README.md"]
    saved = (tmp_path / "out" / "model" / "model.safetensors").read_bytes()
    assert files["model.safetensors"] == saved


@pytest.mark.parametrize("text", ["hf_" + "a" * 34, "/home/" + "somebody/run"])
def test_secrets_are_not_sent(tiny, inputs_for, tmp_path, text):
    result = compress(tiny("bert"), recipe(), [inputs_for("bert", s) for s in range(3)])
    save_result(result, tmp_path / "out")
    path = tmp_path / "out" / "report.json"
    path.write_text(path.read_text().replace('"bert"', f'"{text}"', 1))
    with pytest.raises(CheckpointError, match="nothing was sent"):
        push_to_hub(tmp_path / "out", "me/small")


def test_every_public_name_is_documented():
    assert sorted(hf_prune.__all__) == list(hf_prune.__all__)
    for name in hf_prune.__all__:
        assert getattr(hf_prune, name).__doc__, name


@pytest.mark.parametrize(("name", "head"), [("bert", "classifier*"), ("mixtral", "lm_head*")])
def test_single_weights_by_default_and_what_they_leave_dead(
    name, head, tiny, inputs_for, tmp_path, logits
):
    """At high sparsity some neurons have no weight left that is read: they are really removed."""
    model, batches = tiny(name), [inputs_for(name, seed) for seed in range(4)]
    stage = {"stage": "prune", "units": ["weights"], "sparsity": 0.97, "solver": "knapsack"}
    recipe = {"stages": [{**stage, "ignore": [head]}]}
    result = compress(model, recipe, batches)
    entry = result.report["pruning"][0]
    assert (entry["criterion"], entry["sparsity"]) == ("admm", pytest.approx(0.97, abs=1e-3))
    removed = sum(len(site.removed) for site in result.plan.sites.values())
    assert entry["dead_units"] == removed > 0
    for name, mask in result.masks.items():
        weight = result.model.get_parameter(name)
        assert weight.shape == mask.shape
        assert not weight[~mask].any()
    assert result.plan.weights == {name: int(mask.sum()) for name, mask in result.masks.items()}
    save_result(result, tmp_path / "out")
    loaded = type(model).from_pretrained(tmp_path / "out" / "model")
    assert torch.equal(logits(loaded, batches[0]), logits(result.model, batches[0]))


@pytest.mark.parametrize("units", [["weights"], ["neurons", "weights"]])
def test_a_portable_model_keeps_its_dead_units(units, tiny, inputs_for, tmp_path, logits):
    model, batches = tiny("bert"), [inputs_for("bert", seed) for seed in range(4)]
    with torch.no_grad():
        model.bert.encoder.layer[0].output.dense.weight[:, :10] = 0
    stage = {"stage": "prune", "units": units, "sparsity": 0.5, "even": len(units) > 1}
    result = compress(model, {"portable": True, "stages": [stage]}, batches)
    assert not any("dead_units" in entry for entry in result.report["pruning"])
    widths = {layer.output.dense.in_features for layer in result.model.bert.encoder.layer}
    assert len(widths) == 1
    save_result(result, tmp_path / "out")
    config = transformers.BertConfig.from_pretrained(tmp_path / "out" / "model")
    assert not hasattr(config, "quantization_config")
    loaded = type(model).from_pretrained(tmp_path / "out" / "model").eval()
    torch.testing.assert_close(logits(loaded, batches[0]), logits(result.model, batches[0]))


def test_dead_units_are_reported_only_where_they_were_looked_for(tiny):
    single = {"dense_target": False}
    stage = {"stage": "prune", "units": ["weights"], "criterion": "magnitude", "reconstruct": False}
    stage |= {"weights": single, "sparsity": 0.97, "ignore": ["classifier*"]}
    model = tiny("bert")
    (entry,) = compress(model, {"stages": [stage]}).report["pruning"]
    assert entry["dead_units"] > 0
    single["remove_dead"] = False
    result = compress(model, {"stages": [stage]})
    assert "dead_units" not in result.report["pruning"][0]
    assert not result.plan.sites


@pytest.mark.parametrize("pattern", ["1:8", "1:16"])
def test_units_that_a_pattern_leaves_dead_stay(pattern, tiny, inputs_for):
    """Without them the neighbours of others would move, and be more than n of m."""
    model, batches = tiny("bert"), [inputs_for("bert", seed) for seed in range(2)]
    stage = {"stage": "prune", "units": ["weights"], "weights": {"pattern": pattern}}
    with torch.no_grad():
        model.bert.encoder.layer[0].output.dense.weight[:, 3] = 0
    result = compress(model, {"stages": [stage | {"ignore": ["classifier*"]}]}, batches)
    assert "dead_units" not in result.report["pruning"][0]
    m = int(pattern[2:])
    for name, mask in result.masks.items():
        assert mask.shape == model.get_parameter(name).shape
        groups = mask[:, : mask.shape[1] // m * m].reshape(len(mask), -1, m)
        assert int(groups.sum(-1).max()) == 1


@pytest.mark.parametrize("kind", ["bart", "t5"])
def test_classifiers_with_encoder_and_decoder(kind, inputs_for):
    """They read at the end of a text, exactly one in each row, and their decoder has padding."""
    sizes = {"vocab_size": 99, "d_model": 16, "eos_token_id": 2, "pad_token_id": 1}
    if kind == "bart":
        ends = {side: 1 for side in ("encoder_layers", "decoder_layers")}
        heads = {f"{side}_attention_heads": 2 for side in ("encoder", "decoder")}
        widths = {f"{side}_ffn_dim": 24 for side in ("encoder", "decoder")}
        config = transformers.BartConfig(**sizes, **ends, **heads, **widths, num_labels=3)
        model = transformers.BartForSequenceClassification(config)
    else:
        config = transformers.T5Config(
            **sizes, d_ff=24, d_kv=8, num_heads=2, num_layers=1, decoder_start_token_id=1
        )
        model = transformers.T5ForSequenceClassification(config)
    batches = []
    for seed in range(3):
        batch = inputs_for("t5", seed)
        ids = batch["input_ids"].where(batch["attention_mask"] == 1, 1)
        last = batch["attention_mask"].sum(dim=1, keepdim=True) - 1
        ids = ids.scatter(1, last, 2)
        labels = torch.tensor([0, 1, 0, 1])[: len(ids)]
        batches.append({**batch, "input_ids": ids, "labels": labels})
    result = compress(model.eval(), recipe(sparsity=0.4), batches)
    stages = result.report["stages"]
    assert stages["pruned"]["macs"] < stages["dense"]["macs"]
    assert result.model(**batches[0]).logits.shape == (4, model.config.num_labels)


def test_a_length_that_is_not_named_fits_the_model(inputs_for):
    """A text model of 77 positions is no mistake of who wrote a recipe without a length."""
    config = transformers.BertConfig(
        **{"vocab_size": 99, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1},
        num_attention_heads=2,
        max_position_embeddings=77,
    )
    model = transformers.BertForSequenceClassification(config).eval()
    batches = [{k: v for k, v in inputs_for("bert", s).items() if k != "labels"} for s in range(3)]
    result = compress(model, {"stages": [{"stage": "prune", "sparsity": 0.5}]}, batches)
    assert result.report["sequence_length"] == 77
    told = {"stages": [{"stage": "prune", "sparsity": 0.5, "sequence_length": 128}]}
    with pytest.raises(ConfigError, match="more than the 77 positions"):
        compress(model, told, batches)


def test_several_choices_of_one_example(tiny):
    """Each choice is a text of its own, with padding of its own; figures are of one choice."""
    torch.manual_seed(0)
    model = transformers.BertForMultipleChoice(tiny("bert").config)
    batch = {"input_ids": torch.randint(5, 99, (16, 4, 9)), "labels": torch.full((16,), 3)}
    batch["attention_mask"] = torch.ones(16, 4, 9, dtype=torch.long)
    batch["attention_mask"][:, 1:, 7:] = 0
    dense = compress(tiny("bert"), recipe(criterion="magnitude", reconstruct=False), None)
    for units in (["heads", "neurons"], ["weights"]):
        result = compress(model, recipe(units=units, min_calibration_samples=1), [batch])
        assert result.report["pruning"][0]["removed"] > 0
        assert result.model(**batch).logits.shape == (16, 4)
    ours, theirs = (r.report["stages"]["dense"]["macs"] for r in (result, dense))
    assert 0 <= theirs - ours <= 3 * 32  # but for the head, which has one class, not three


def test_sound_with_a_mask_of_its_frames(tiny, inputs_for):
    model, batch = tiny("whisper"), inputs_for("whisper")
    stage = {"stage": "prune", "sparsity": 0.4, "min_calibration_samples": 1}
    plain = compress(model, {"stages": [stage]}, [batch])  # no longer than 40 positions
    assert plain.report["sequence_length"] == 40
    batch["attention_mask"] = torch.ones(4, 24, dtype=torch.long)
    assert compress(model, {"stages": [stage]}, [batch]).plan == plain.plan
    batch["attention_mask"][0, 16:] = 0
    with pytest.raises(DataError, match="does not say which of them are padding"):
        compress(model, {"stages": [stage]}, [batch])
