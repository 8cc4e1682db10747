"""Accuracy and loss of labelled batches."""

import pytest
import torch
import transformers as hf
from tinies import TINY

from hf_prune.errors import DataError, NumericsError
from hf_prune.measure.metrics import evaluate


def test_accuracy_and_loss_by_hand(tiny, inputs_for):
    model = tiny("bert")
    batches = [inputs_for("bert", 0), inputs_for("bert", 1, (5, 3))]
    right, loss, rows = 0, 0.0, 0
    with torch.no_grad():
        for batch in batches:
            for row in range(len(batch["labels"])):
                output = model(**{k: v[row : row + 1] for k, v in batch.items()})
                right += int(output.logits[0].argmax() == batch["labels"][row])
                loss += output.loss.item()
                rows += 1
    model.train()
    found = evaluate(model, iter(batches))
    assert model.training
    assert found["examples"] == rows == 6
    assert found["accuracy"] == right / rows
    assert found["loss"] == pytest.approx(loss / rows, rel=1e-5)


def test_perfect_and_hopeless(tiny, inputs_for):
    model, batch = tiny("bert"), inputs_for("bert")
    with torch.no_grad():
        best = model(**batch).logits.argmax(dim=-1)
    assert evaluate(model, [{**batch, "labels": best}])["accuracy"] == 1
    assert evaluate(model, [{**batch, "labels": (best + 1) % 3}])["accuracy"] == 0


def test_nothing_to_evaluate(tiny):
    with pytest.raises(DataError, match="nothing to evaluate: no batch"):
        evaluate(tiny("bert"), [])


def test_label_out_of_range(tiny, inputs_for):
    batch = inputs_for("bert")
    batch["labels"][3] = 8
    with pytest.raises(DataError, match=r"batch 0, row 3: label 8 is outside \[0, 3\)"):
        evaluate(tiny("bert"), [batch])


def test_no_labels(tiny, inputs_for):
    batch = inputs_for("bert")
    del batch["labels"]
    with pytest.raises(DataError, match="label"):
        evaluate(tiny("bert"), [batch])


def test_loss_that_is_not_finite(tiny, inputs_for):
    model = tiny("bert")
    with torch.no_grad():
        model.classifier.bias[0] = float("nan")
    with pytest.raises(NumericsError, match="the evaluation loss is not finite"):
        evaluate(model, [inputs_for("bert")])


def test_a_causal_model_is_right_about_the_next_token(tiny, inputs_for):
    model, batch = tiny("llama"), inputs_for("llama")
    with torch.no_grad():
        best = model(**batch).logits.argmax(dim=-1)
    padded = batch["attention_mask"] == 0
    shifted = best.roll(1, dims=1).masked_fill(padded, -100)
    assert evaluate(model, [{**batch, "labels": shifted}])["accuracy"] == 1
    assert evaluate(model, [{**batch, "labels": (shifted + 1) % 99}])["accuracy"] == 0


@pytest.mark.parametrize(
    ("problem", "labels"), [("regression", 1), ("multi_label_classification", 3)]
)
def test_numbers_and_flags_have_no_accuracy(inputs_for, problem, labels):
    config = TINY["bert"]()
    config.num_labels, config.problem_type = labels, problem
    model, batch = hf.BertForSequenceClassification(config), inputs_for("bert")
    batch["labels"] = torch.ones(4, labels).squeeze(-1)
    assert set(evaluate(model, [batch])) == {"loss", "examples"}


@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_the_loss_of_transcripts_does_not_depend_on_batches(inputs_for, reduction):
    config = TINY["wav2vec2"]()
    config.ctc_loss_reduction, config.pad_token_id = reduction, 0
    model, batch = hf.Wav2Vec2ForCTC(config), inputs_for("wav2vec2")
    batch["labels"] = torch.tensor([[5, 7, 9]] * 2 + [[5, -100, -100]] * 2)
    parts = [{k: v[i : i + 1] for k, v in batch.items()} for i in range(4)]
    one, each = evaluate(model, [batch]), evaluate(model, parts)
    assert set(one) == {"loss", "examples"}
    assert one["loss"] == pytest.approx(each["loss"], rel=1e-4)


def test_a_loss_that_needs_more_labels(inputs_for):
    model, batch = hf.BertForPreTraining(TINY["bert"]()), inputs_for("bert")
    batch["labels"] = batch["input_ids"]
    with pytest.raises(DataError, match="BertForPreTraining gave no loss for batch 0"):
        evaluate(model, [batch])
