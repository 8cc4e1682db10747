"""Teaching what is inside: layers, attention, relations; in any Trainer, to any student."""

import copy

import pytest
import torch
from datasets import Dataset
from transformers import (
    BertConfig,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from hf_prune import DistillCallback, cache_logits, remove_units
from hf_prune.errors import CheckpointError, ConfigError, DataError
from hf_prune.plan import Plan, SitePlan
from hf_prune.sites import HIDDEN, find_sites
from hf_prune.statistics.batches import counted_positions
from hf_prune.training.losses import attention_maps, distillation_loss
from hf_prune.training.taps import attach_taps
from hf_prune.training.teacher import CachedLogits

ALL = {"hidden": 1.0, "embeddings": 1.0, "attention": 1.0, "relations": 1.0, "relation_heads": 4}


def still(model):
    """Without dropout, so that figures can be compared."""
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return model


def rows(name, inputs_for, count=16):
    lengths = tuple(5 + index % 4 for index in range(count))
    batch = inputs_for(name, lengths=lengths)
    return Dataset.from_dict({key: value.tolist() for key, value in batch.items()})


def trainer(model, data, folder, *callbacks, **options):
    arguments = {
        "per_device_train_batch_size": 8,
        "max_steps": 12,
        "learning_rate": 2e-3,
        "logging_steps": 3,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        **options,
    }
    job = TrainingArguments(folder, **arguments)
    return Trainer(model, job, train_dataset=data, callbacks=list(callbacks))


def small():
    """Another depth and width than the tiny BERT's."""
    torch.manual_seed(3)
    return BertForSequenceClassification(
        BertConfig(
            vocab_size=99,
            hidden_size=12,
            num_hidden_layers=1,
            num_attention_heads=3,
            intermediate_size=16,
            max_position_embeddings=140,
            num_labels=3,
        )
    )


@pytest.mark.parametrize("layers", ["uniform", "last", "closest", "ordered"])
def test_a_pruned_student_comes_closer_in_every_term(
    tiny, inputs_for, uneven_plan, tmp_path, layers
):
    teacher = tiny("bert")
    student = still(copy.deepcopy(teacher))
    remove_units(student, uneven_plan(student))
    callback = DistillCallback(teacher, alpha=1.0, layers=layers, **ALL)
    job = trainer(student, rows("bert", inputs_for), tmp_path, callback, max_steps=24)
    job.train()
    logs = [entry for entry in job.state.log_history if "distill/logits" in entry]
    for name in ("logits", "hidden", "attention", "relations"):
        assert logs[-1][f"distill/{name}"] < 0.9 * logs[0][f"distill/{name}"], name
    assert logs[-1]["distill/embeddings"] < 0.01  # the pruned student starts from the same table
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in student.modules())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in teacher.modules())
    assert all(p.grad is None for p in teacher.parameters())


@pytest.mark.parametrize("problem", ["regression", "multi_label_classification"])
def test_numbers_and_flags_are_taught(tiny, inputs_for, tmp_path, problem):
    """A softmax over one number, or over flags, would not tell how far they are."""
    config = copy.deepcopy(tiny("bert").config)
    config.num_labels, config.problem_type = (1 if problem == "regression" else 3), problem
    torch.manual_seed(0)
    teacher = BertForSequenceClassification(config)
    student = still(copy.deepcopy(teacher))
    with torch.no_grad():
        student.classifier.bias += 2.0  # to all alike
    callback = DistillCallback(teacher, alpha=1.0)
    data = rows("bert", inputs_for).remove_columns("labels")
    job = trainer(student, data, tmp_path, callback, max_steps=24, learning_rate=0.02)
    job.train()
    logs = [entry["distill/logits"] for entry in job.state.log_history if "distill/logits" in entry]
    assert logs[0] > 0.1
    assert logs[-1] < 0.5 * logs[0]


def test_a_student_of_other_depth_and_width(tiny, inputs_for, tmp_path):
    student = still(small())
    names = set(student.state_dict())
    callback = DistillCallback(tiny("bert"), alpha=1.0, logits=0.0, **ALL)
    job = trainer(student, rows("bert", inputs_for), tmp_path, callback, max_steps=24)
    seen = {}

    class Look(DistillCallback):
        def on_train_end(self, args, state, control, **kwargs):
            seen.update(self.inner.projections.weights)
            super().on_train_end(args, state, control, **kwargs)

    callback.__class__ = Look
    job.train()
    logs = [entry for entry in job.state.log_history if "distill/hidden" in entry]
    assert logs[-1]["distill/hidden"] < logs[0]["distill/hidden"]
    assert "distill/logits" not in logs[0]
    assert {name: tuple(w.shape) for name, w in seen.items()} == {
        "hidden": (32, 12),
        "embeddings": (32, 12),
    }
    assert set(student.state_dict()) == names, "projections are not saved with the model"


@pytest.mark.parametrize("pruned", ["teacher", "student", "both"])
def test_hidden_widths_are_those_that_are_left(pruned, tiny, inputs_for, tmp_path):
    """Channels of the hidden width can be gone, of which a config says nothing."""
    teacher, student = tiny("bert"), still(tiny("bert"))
    (site,) = find_sites(teacher, [HIDDEN])
    plan = Plan("bert", {site.name: SitePlan(HIDDEN, site.units, tuple(range(4, 28)))})
    for name, model in (("teacher", teacher), ("student", student)):
        if pruned in (name, "both"):
            remove_units(model, plan)
    callback = DistillCallback(teacher, **ALL, layers="closest", alpha=1.0)
    trainer(student, rows("bert", inputs_for), tmp_path, callback, max_steps=2).train()
    widths = {"teacher": (32, 24), "student": (24, 32), "both": (24, 24)}[pruned]
    callback._attach(student)
    shapes = {tuple(w.shape) for w in callback.inner.projections.weights.values()}
    assert shapes == {widths[::-1]}


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_accumulation_changes_nothing_in_a_language_model(tiny, inputs_for, tmp_path, name):
    """Rows of unlike length: a mean over micro-batches would weigh their tokens unlike."""
    teacher = tiny(name)
    with torch.no_grad():
        for parameter in teacher.parameters():
            parameter.mul_(1.05)
    data = rows(name, inputs_for)
    found = []
    for steps in (1, 4):
        student = still(tiny(name))
        callback = DistillCallback(teacher, alpha=0.7, hidden=0.5, relations=1.0)
        options = {
            "per_device_train_batch_size": 8 // steps,
            "gradient_accumulation_steps": steps,
            "max_steps": 3,
            "logging_steps": 1,
        }
        job = trainer(student, data, tmp_path, callback, **options)
        job.train()
        found.append([entry["loss"] for entry in job.state.log_history if "loss" in entry])
    assert len(found[0]) == 3
    # hidden states weigh by the tokens of their micro-batch: equal but for which ones count
    torch.testing.assert_close(torch.tensor(found[0]), torch.tensor(found[1]), atol=0, rtol=2e-2)


def test_logits_of_a_language_model_are_exact_under_accumulation(tiny, inputs_for):
    student, teacher = still(tiny("gpt2")).train(), tiny("gpt2")
    with torch.no_grad():
        for parameter in teacher.parameters():
            parameter.mul_(1.1)
    batch = inputs_for("gpt2")
    items = int(counted_positions(student, batch["labels"]).sum())
    callback = DistillCallback(teacher, alpha=1.0)
    callback.on_train_begin(None, None, None, model=student)
    whole = student(**batch, num_items_in_batch=items).loss
    parts = [
        student(**{k: v[i : i + 1] for k, v in batch.items()}, num_items_in_batch=items).loss
        for i in range(len(batch["labels"]))
    ]
    torch.testing.assert_close(sum(parts), whole)


def test_evaluation_sees_the_labels_alone_and_records_nothing(tiny, inputs_for):
    student, teacher, batch = tiny("bert"), tiny("bert"), inputs_for("bert")
    plain = student(**batch).loss
    callback = DistillCallback(teacher, **ALL)
    callback.on_train_begin(None, None, None, model=student)
    torch.testing.assert_close(student.eval()(**batch).loss, plain)
    assert not callback.inner.student.hidden
    assert not callback.inner.student.parts


def test_without_labels_the_teacher_is_enough(tiny, inputs_for):
    student, teacher, batch = still(tiny("bert")).train(), tiny("electra"), inputs_for("bert")
    inputs = {key: value for key, value in batch.items() if key != "labels"}
    callback = DistillCallback(teacher, 2.0, 1.0)
    callback.on_train_begin(None, None, None, model=student)
    output = student(**inputs)
    with torch.no_grad():
        expected = distillation_loss(output.logits, teacher(**inputs).logits, 2.0)
    torch.testing.assert_close(output["loss"].detach(), expected)


def test_weights_move_in_straight_lines(tiny, inputs_for, tmp_path):
    ends = {"alpha": 0.2, "hidden": 2.0, "logits": 0.0}
    callback = DistillCallback(tiny("electra"), alpha=1.0, ends=ends)
    job = trainer(
        tiny("bert"), rows("bert", inputs_for), tmp_path, callback, max_steps=5, logging_steps=1
    )
    job.train()
    logs = [entry for entry in job.state.log_history if "distill/alpha" in entry]

    def found(name):
        return [entry.get(f"distill/{name}", 0.0) for entry in logs]

    assert found("alpha") == pytest.approx([1.0, 0.8, 0.6, 0.4, 0.2])
    assert found("weight_of_hidden") == pytest.approx([0.0, 0.5, 1.0, 1.5, 2.0])
    assert found("weight_of_logits") == pytest.approx([1.0, 0.75, 0.5, 0.25, 0.0])
    for entry in logs:  # what was logged adds up to the loss
        alpha = entry["distill/alpha"]
        parts = (
            entry[f"distill/weight_of_{name}"] * entry.get(f"distill/{name}", 0.0)
            for name in ("hidden", "logits")
        )
        whole = alpha * sum(parts) + (1 - alpha) * entry["distill/labels"]
        assert entry["loss"] == pytest.approx(whole, abs=2e-4)


def test_ends_are_checked(tiny):
    with pytest.raises(ConfigError, match=r"alpha=1.5 is a share"):
        DistillCallback(tiny("bert"), ends={"alpha": 1.5})
    with pytest.raises(ConfigError, match="ends"):
        DistillCallback(tiny("bert"), ends={"temperature": 1.0})
    with pytest.raises(ConfigError, match="all distillation weights are 0"):
        DistillCallback(tiny("bert"), logits=0.0)
    assert DistillCallback(tiny("bert"), logits=0.0, ends={"relations": 1.0}).stage.inner


@pytest.mark.parametrize("name", ["bert", "gpt2"])
def test_cached_logits_are_those_of_the_teacher(tiny, inputs_for, tmp_path, name):
    teacher, batch = tiny(name), inputs_for(name)
    inputs = {key: value for key, value in batch.items() if key != "labels"}
    halves = [{k: v[rows] for k, v in inputs.items()} for rows in (slice(0, 3), slice(3, 4))]
    path = tmp_path / "logits.safetensors"
    assert cache_logits(teacher, halves, path) == 4
    turned = {key: value.flip(0) for key, value in batch.items()}  # another order
    losses = []
    for source in (teacher, path):
        student = still(tiny(name)).train()
        with torch.no_grad():
            for parameter in student.parameters():
                parameter.mul_(0.9)
        callback = DistillCallback(source, alpha=1.0)
        callback.on_train_begin(None, None, None, model=student)
        losses.append(student(**turned).loss.detach())
    torch.testing.assert_close(losses[1], losses[0])
    assert losses[0] > 1e-3
    with pytest.raises(DataError, match=r"row 0 of a batch is not in .*logits\.safetensors"):
        student(**inputs_for(name, seed=5))


def test_caches_that_do_not_fit(tiny, inputs_for, tmp_path):
    path = tmp_path / "logits.safetensors"
    with pytest.raises(DataError, match="nothing to cache"):
        cache_logits(tiny("bert"), [], path)
    cache_logits(tiny("bert"), [inputs_for("bert")], path)
    with pytest.raises(ConfigError, match="cached logits cannot teach hidden"):
        DistillCallback(path, hidden=1.0)
    with pytest.raises(ConfigError, match=r"the student has 99 classes, .* has 3"):
        DistillCallback(path).on_train_begin(None, None, None, model=tiny("gpt2"))
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(CheckpointError, match=r"logits\.safetensors"):
        DistillCallback(path)


def test_answers_to_questions_are_not_cached(tiny, inputs_for, tmp_path):
    config = copy.deepcopy(tiny("bert").config)
    config.num_labels = 2  # start and end
    teacher, path = BertForQuestionAnswering(config).train(), tmp_path / "logits.safetensors"
    batch = {key: value for key, value in inputs_for("bert").items() if key != "labels"}
    with pytest.raises(ConfigError, match=r"BertForQuestionAnswering gives no logits of classes"):
        cache_logits(teacher, [batch], path)
    assert teacher.training
    assert not path.exists()
    cache_logits(BertForSequenceClassification(config), [batch], path)
    with pytest.raises(ConfigError, match=r"gives no logits .* let the teacher itself run beside"):
        DistillCallback(path).on_train_begin(None, None, None, model=teacher)


def test_images_of_like_values_are_told_apart(tiny, inputs_for, tmp_path):
    """All pixels lie between -1 and 1: as integers most of them would be 0."""
    teacher, path = tiny("vit"), tmp_path / "logits.safetensors"
    images = inputs_for("vit")["pixel_values"].clamp(-0.9, 0.9)
    assert cache_logits(teacher, [{"pixel_values": images}], path) == len(images)
    assert len(CachedLogits(path).rows) == len(images)


def test_what_cannot_be_compared_is_refused(tiny):
    teacher = tiny("llama")
    with pytest.raises(ConfigError, match=r"attention maps of 'llama' also depend on positions"):
        DistillCallback(teacher, attention=1.0).on_train_begin(
            None, None, None, model=tiny("llama")
        )
    student = tiny("bert")
    student.bert.encoder.gradient_checkpointing = True
    with pytest.raises(ConfigError, match="gradient checkpointing hides the layers"):
        DistillCallback(tiny("bert"), hidden=1.0).on_train_begin(None, None, None, model=student)


@pytest.mark.parametrize("name", ["bert", "roberta", "distilbert", "gpt2"])
def test_recomputed_attention_maps_are_those_of_the_model(tiny, inputs_for, name):
    model, batch = tiny(name, "eager"), inputs_for(name)
    taps = attach_taps(model, hidden=True, attention=True)
    output = model(
        input_ids=batch["input_ids"],
        attention_mask=batch["attention_mask"],
        output_attentions=True,
        output_hidden_states=True,
    )
    mask = batch["attention_mask"].bool()
    for layer, expected in enumerate(output.attentions):
        queries, keys = taps.heads(layer, "queries"), taps.heads(layer, "keys")
        found = attention_maps(queries, keys, mask, causal=taps.causal).exp()
        real = mask[:, None, :, None].expand_as(found)  # rows of padding say nothing
        torch.testing.assert_close(found[real], expected[real], atol=1e-5, rtol=0)
    for layer in range(taps.layers):
        torch.testing.assert_close(taps.hidden[layer], output.hidden_states[layer])


def test_a_model_with_encoder_and_decoder_is_taught_by_its_logits(tiny, inputs_for):
    """Its logits at t are of the label at t: nothing is shifted, and the last one counts."""
    student, teacher, batch = still(tiny("t5")).train(), tiny("t5"), inputs_for("t5")
    with torch.no_grad():
        for parameter in teacher.parameters():
            parameter.mul_(1.1)
    callback = DistillCallback(teacher, alpha=1.0)
    callback.on_train_begin(None, None, None, model=student)
    output = student(**batch)
    with torch.no_grad():
        logits = teacher(**batch).logits
    counted = batch["labels"] != -100
    expected = distillation_loss(output.logits, logits, 2.0, counted)
    torch.testing.assert_close(output.loss, expected)
    with pytest.raises(ConfigError, match="taught by their logits only"):
        DistillCallback(teacher, hidden=1.0).on_train_begin(None, None, None, model=student)


def test_a_missing_loss_is_an_error_in_training_only(tiny, inputs_for):
    teacher, student = tiny("bert"), still(tiny("bert"))
    batch = inputs_for("bert")
    del batch["labels"]
    for fields in ({"alpha": 0.5}, {"alpha": 1.0, "ends": {"alpha": 0.0}}):
        callback = DistillCallback(teacher, **fields)
        callback._attach(student)
        student.eval()(**batch)
        with pytest.raises(DataError, match=r"no loss of labels .* alpha=0(\.5)? asks"):
            student.train()(**batch)
        callback.on_train_end(None, None, None)


def test_label_smoothing_is_refused(tiny, inputs_for, tmp_path):
    """The Trainer would take the labels out, compute its own loss, and forget the teacher's."""
    for alpha in (0.5, 1.0):
        callback = DistillCallback(tiny("bert"), alpha=alpha)
        job = trainer(
            tiny("bert"), rows("bert", inputs_for), tmp_path, callback, label_smoothing_factor=0.1
        )
        with pytest.raises(ConfigError, match=r"label_smoothing_factor=0\.1: .* Set it to 0"):
            job.train()


@pytest.mark.parametrize("same", [True, False])
def test_a_training_that_was_broken_off_leaves_one_teacher(tiny, inputs_for, tmp_path, same):
    class Break(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            raise KeyboardInterrupt

    teacher, student, data = tiny("bert"), still(tiny("bert")), rows("bert", inputs_for)
    first = DistillCallback(teacher, hidden=1.0)
    with pytest.raises(KeyboardInterrupt):
        trainer(student, data, tmp_path, first, Break()).train()
    assert len(student._forward_hooks) == 1
    callback = first if same else DistillCallback(teacher, hidden=1.0)
    other = DistillCallback(tiny("electra"))
    seen = []

    class Count(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            seen.append([hook.__self__ for hook in student._forward_hooks.values()])

    trainer(student, data, tmp_path, callback, other, Count(), max_steps=1).train()
    assert seen == [[callback, other]], "two teachers of one training stay, an old one goes"
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in student.modules())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in teacher.modules())
