"""Other ways to use a pruned model that was loaded: adapters, int8, compile, export, drafts."""

import copy
import importlib.util
import json

import pytest
import torch
from tinies import auto_class
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    Trainer,
    TrainingArguments,
    pipeline,
)

from hf_prune.checkpoint.hook import HfPruneConfig
from hf_prune.checkpoint.save import save_model
from hf_prune.errors import CheckpointError
from hf_prune.surgery.remove import remove_units
from hf_prune.training.trainer import prepare_trainer


@pytest.fixture
def loaded(tiny, uneven_plan, tmp_path):
    def make(name, **options):
        model = tiny(name)
        remove_units(model, uneven_plan(model))
        model.save_pretrained(tmp_path / "pruned")
        return auto_class(name).from_pretrained(tmp_path / "pruned", **options).eval()

    return make


def needs(package):
    missing = importlib.util.find_spec(package) is None
    return pytest.mark.skipif(missing, reason=f"{package} is not installed")


@needs("peft")
@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # of peft's own
@pytest.mark.parametrize(
    ("name", "targets"), [("bert", ["query", "dense"]), ("llama", ["q_proj", "down_proj"])]
)
def test_lora(name, targets, loaded, inputs_for, tmp_path):
    """On top, saved and loaded; merged, saved and loaded."""
    from peft import LoraConfig, PeftModel, get_peft_model

    batch = {key: value for key, value in inputs_for(name).items() if key != "labels"}

    def say(model):
        with torch.no_grad():
            return model(**batch).logits

    model = loaded(name)
    plain = say(model)
    torch.manual_seed(0)
    settings = LoraConfig(r=2, target_modules=targets, init_lora_weights=False)
    adapted = get_peft_model(model, settings).eval()
    expected = say(adapted)
    assert (expected - plain).abs().max() > 1e-3
    adapted.save_pretrained(tmp_path / "lora")
    base = auto_class(name).from_pretrained(tmp_path / "pruned")
    again = PeftModel.from_pretrained(base, tmp_path / "lora").eval()
    torch.testing.assert_close(say(again), expected, atol=1e-6, rtol=0)
    merged = again.merge_and_unload()
    torch.testing.assert_close(say(merged), expected, atol=1e-5, rtol=0)
    merged.save_pretrained(tmp_path / "merged")
    last = auto_class(name).from_pretrained(tmp_path / "merged")
    assert torch.equal(say(last), say(merged))


@needs("torchao")
@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # of torchao's own
@pytest.mark.parametrize("name", ["bert", "llama"])
def test_int8_on_top(name, loaded, inputs_for, logits):
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    model, batch = loaded(name), inputs_for(name)
    expected = logits(model, batch)
    quantize_(model, Int8WeightOnlyConfig())
    found = logits(model, batch)
    assert 0 < (found - expected).abs().max() < 0.1 * expected.abs().max()


@needs("torchao")
@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # of torchao's own
@pytest.mark.parametrize("storage", ["dense", "bitmask"])
@pytest.mark.parametrize("name", ["bert", "llama", "t5"])
def test_int8_on_load(name, storage, loaded, inputs_for, logits, tmp_path):
    """Narrowed, then quantized while it is read: as if it had been loaded and then quantized."""
    from torchao.quantization import Int8WeightOnlyConfig, quantize_
    from torchao.utils import TorchAOBaseTensor
    from transformers import TorchAoConfig

    plain, batch = loaded(name), inputs_for(name)
    with torch.no_grad():
        for module in plain.modules():
            if isinstance(module, torch.nn.Linear):
                module.weight[:, ::2] = 0
    folder = tmp_path / storage
    save_model(plain, folder, storage=storage)
    settings = HfPruneConfig(inner=TorchAoConfig(Int8WeightOnlyConfig()))
    model = auto_class(name).from_pretrained(folder, quantization_config=settings).eval()
    small = {n for n, p in model.named_parameters() if isinstance(p, TorchAOBaseTensor)}
    assert len(small) >= 10
    assert {n: p.shape for n, p in model.named_parameters()} == {
        n: p.shape for n, p in plain.named_parameters()
    }
    quantize_(plain, Int8WeightOnlyConfig(), filter_fn=lambda module, n: f"{n}.weight" in small)
    torch.testing.assert_close(logits(model, batch), logits(plain, batch), atol=1e-5, rtol=0)
    with pytest.raises(ValueError, match="not serializable"):
        model.save_pretrained(tmp_path / "int8")


@needs("torchao")
@pytest.mark.filterwarnings("default")  # of torchao's own
def test_int8_on_load_of_a_dense_model(tiny, tmp_path):
    """Where there is nothing to narrow, the configuration within is all there is."""
    from torchao.quantization import Int8WeightOnlyConfig
    from torchao.utils import TorchAOBaseTensor
    from transformers import TorchAoConfig

    tiny("bert").save_pretrained(tmp_path)
    settings = HfPruneConfig(inner=TorchAoConfig(Int8WeightOnlyConfig()))
    model = auto_class("bert").from_pretrained(tmp_path, quantization_config=settings)
    query = model.bert.encoder.layer[0].attention.self.query.weight
    assert isinstance(query, TorchAOBaseTensor)


def test_what_to_quantize_by_is_not_read_from_a_file(loaded, tmp_path):
    loaded("bert")
    path = tmp_path / "pruned" / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"]["inner"] = {"quant_method": "torchao"}
    path.write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="inner is a dict, and no quantization config"):
        auto_class("bert").from_pretrained(tmp_path / "pruned")


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # of the compiler's own
@pytest.mark.parametrize("name", ["bert", "llama", "t5", "phi3"])
def test_compiled_in_one_graph(name, loaded, inputs_for, logits):
    from tinies import without_labels

    model, batch = loaded(name), inputs_for(name)
    inputs = {**without_labels(model, batch)}
    if name != "bert":
        inputs["use_cache"] = False
    with torch.no_grad():
        expected = model(**inputs).logits
        found = torch.compile(model, backend="aot_eager")(**inputs).logits
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # of the exporter's own
@pytest.mark.parametrize("name", ["bert", "distilbert", "gpt2"])
def test_exported(name, loaded, inputs_for):
    model, batch = loaded(name), inputs_for(name)
    inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}
    options = {} if name in ("bert", "distilbert") else {"use_cache": False}
    with torch.no_grad():
        program = torch.export.export(model, (), {**inputs, **options})
        found = program.module()(**inputs, **options).logits
        torch.testing.assert_close(found, model(**inputs, **options).logits, atol=1e-5, rtol=0)


def test_a_pruned_draft_gives_the_text_of_the_dense_model(loaded, tiny, inputs_for):
    """Assisted generation: whatever the draft proposes, the dense model decides."""
    dense, draft = tiny("llama"), loaded("llama")
    prompt = {k: v[:1] for k, v in inputs_for("llama").items() if k != "labels"}
    options = {"max_new_tokens": 10, "do_sample": False}
    expected = dense.generate(**prompt, **options)
    found = dense.generate(**prompt, **options, assistant_model=draft)
    assert torch.equal(found, expected)


def test_device_map(loaded, inputs_for, logits, tmp_path):
    model, batch = loaded("bert"), inputs_for("bert")
    for device_map in ("cpu", "auto"):
        placed = AutoModelForSequenceClassification.from_pretrained(
            tmp_path / "pruned", device_map=device_map
        )
        assert torch.equal(logits(placed, batch), logits(model, batch))


def test_pipeline(loaded):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(99)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="w0")
    classify = pipeline("text-classification", model=loaded("bert"), tokenizer=tokenizer, device=-1)
    (answer,) = classify("w7 w8 w9")
    assert answer["label"].startswith("LABEL_")
    assert 1 / 3 <= answer["score"] <= 1


class Rows(torch.utils.data.Dataset):
    def __init__(self, batch):
        self.batch = batch

    def __len__(self):
        return len(self.batch["labels"])

    def __getitem__(self, index):
        return {key: value[index] for key, value in self.batch.items()}


@pytest.mark.parametrize("name", ["bert", "vit"])
def test_trainer_resumes_a_pruned_model(name, loaded, inputs_for, tmp_path):
    """Four steps; or two, and two more by a model loaded from the checkpoint: the same weights.

    The names of ViT's weights on disk differ from those in memory, and the Trainer's own loading
    leaves such weights as they are, so a model is loaded from the checkpoint first.
    """
    data = Rows(inputs_for(name, lengths=(9, 6, 4, 7) * 2))
    options = {
        "per_device_train_batch_size": 4,
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "save_steps": 2,
        "learning_rate": 1e-3,
        "lr_scheduler_type": "constant",
        "seed": 0,
    }

    def arguments(steps):
        return TrainingArguments(str(tmp_path / "run"), max_steps=steps, **options)

    whole = copy.deepcopy(loaded(name))
    Trainer(whole, arguments(4), train_dataset=data).train()
    checkpoint = tmp_path / "run" / "checkpoint-2"
    resumed = auto_class(name).from_pretrained(checkpoint)
    Trainer(resumed, arguments(4), train_dataset=data).train(resume_from_checkpoint=str(checkpoint))
    for (key, ours), theirs in zip(whole.named_parameters(), resumed.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-5, msg=key)


@pytest.mark.parametrize("name", ["bert", "vit"])
def test_the_best_model_and_resuming_whatever_names_are_on_disk(name, loaded, inputs_for, tmp_path):
    """The rate is so large that the last checkpoint is not the best: another comes back."""
    data = Rows(inputs_for(name, lengths=(9, 6, 4, 7) * 2))
    options = {"save_strategy": "steps", "save_steps": 1, "eval_strategy": "steps", "eval_steps": 1}
    options |= {"per_device_train_batch_size": 8, "report_to": [], "use_cpu": True}
    options |= {"disable_tqdm": True, "lr_scheduler_type": "constant", "max_steps": 3}

    def trainer(model, rate, **more):
        args = TrainingArguments(str(tmp_path / "run"), learning_rate=rate, **options, **more)
        return prepare_trainer(Trainer(model, args, train_dataset=data, eval_dataset=data))

    model = loaded(name)
    job = trainer(model, 0.3, load_best_model_at_end=True)
    job.train()
    assert not job.state.best_model_checkpoint.endswith("checkpoint-3")
    best = auto_class(name).from_pretrained(job.state.best_model_checkpoint)
    for (key, ours), theirs in zip(model.named_parameters(), best.parameters(), strict=True):
        assert torch.equal(ours, theirs), key
    last = auto_class(name).from_pretrained(tmp_path / "run" / "checkpoint-3")
    resumed = loaded(name)
    trainer(resumed, 0.3).train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-1"))
    for (key, ours), theirs in zip(resumed.named_parameters(), last.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4, msg=key)


def test_from_config_is_the_dense_model(loaded, tiny):
    """A config alone builds full sizes: weights that are pruned do not fit, and that is said."""
    model = loaded("llama")
    built = AutoModelForCausalLM.from_config(model.config)
    assert built.num_parameters() == tiny("llama").num_parameters()
    with pytest.raises(RuntimeError, match="size mismatch"):
        built.load_state_dict(model.state_dict())
