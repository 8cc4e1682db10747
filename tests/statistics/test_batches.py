"""Calibration batches: what is taken, and what is refused before anything runs."""

import pytest
import torch
import transformers as hf
from tinies import TINY

from hf_prune.errors import ConfigError, DataError
from hf_prune.statistics.batches import (
    by_token,
    check_batch,
    example_seed,
    forward_kwargs,
    is_causal_lm,
    sequence_mask,
    take,
    token_mask,
)


def rows(batches):
    return [len(batch["input_ids"]) for batch in batches]


def test_take_cuts_to_size(tiny, inputs_for):
    model, batch = tiny("bert"), inputs_for("bert")
    assert rows(take(model, iter([batch] * 5), at_least=8, at_most=10)) == [4, 4, 2]
    assert rows(take(model, [batch], at_least=1, at_most=4)) == [4]
    last = take(model, [batch], at_least=1, at_most=3)[0]
    for key, value in last.items():
        assert torch.equal(value, batch[key][:3])


def test_take_reads_no_more_than_it_needs(tiny, inputs_for):
    source = iter([inputs_for("bert")] * 5)
    take(tiny("bert"), source, at_least=1, at_most=8)
    assert len(list(source)) == 3


@pytest.mark.parametrize("batches", [None, [], iter(())])
def test_empty(tiny, batches):
    with pytest.raises(DataError, match=r"the calibration set is empty\. Pass batches"):
        take(tiny("bert"), batches, at_least=1, at_most=4)


def test_too_few(tiny, inputs_for):
    with pytest.raises(DataError, match="has 4 examples to fit to, fewer than min_calib"):
        take(tiny("bert"), [inputs_for("bert")], at_least=8, at_most=512)


def test_fewer_are_asked_for_than_would_do(tiny, inputs_for):
    text = "asks for 4 examples, fewer than min_calibration_samples=8: raise the one"
    with pytest.raises(ConfigError, match=text):
        take(tiny("bert"), [inputs_for("bert")] * 10, at_least=8, at_most=4)


@pytest.mark.parametrize(
    ("key", "change", "text"),
    [
        ("input_ids", lambda v: v.tolist(), r'is a list; expected a tensor.*return_tensors="pt"'),
        ("input_ids", lambda v: v.numpy(), "is a ndarray; expected a tensor"),
        ("text", lambda v: ["a"] * 4, "is a list; expected a tensor. Remove the column of texts"),
        ("text", lambda v: "a", "is a str; expected a tensor. Remove the column of texts 'text'"),
        ("length", lambda v: 9, "is a int; expected a tensor"),
    ],
)
def test_what_is_no_tensor(tiny, inputs_for, key, change, text):
    batch = inputs_for("bert")
    batch[key] = change(batch["input_ids"])
    with pytest.raises(DataError, match=rf"batch 2: '{key}' {text}"):
        check_batch(tiny("bert"), batch, 2)


def test_label_of_a_transcript_is_a_token(inputs_for):
    config = TINY["wav2vec2"]()
    model, batch = hf.Wav2Vec2ForCTC(config), inputs_for("wav2vec2")
    batch["labels"] = torch.full((4, 5), 71)
    check_batch(model, batch, 0)
    batch["labels"][1, 2] = 99
    with pytest.raises(DataError, match=r"batch 5, row 1: label 99 is outside \[0, 99\)"):
        check_batch(model, batch, 5)


def test_label_of_several_choices_is_one_of_them():
    model = hf.BertForMultipleChoice(TINY["bert"]())
    batch = {"input_ids": torch.full((2, 4, 9), 7), "labels": torch.tensor([3, 0])}
    check_batch(model, batch, 0)
    batch["labels"][1] = 4
    with pytest.raises(DataError, match=r"batch 0, row 1: label 4 is outside \[0, 4\)"):
        check_batch(model, batch, 0)
    batch["input_ids"][1, 2, 3] = 99
    with pytest.raises(DataError, match=r"batch 0, row 1: token id 99 is outside \[0, 99\)"):
        check_batch(model, batch, 0)


def test_who_predicts_the_next_token(tiny):
    assert is_causal_lm(tiny("gpt2"))
    bert = TINY["bert"]()
    for auto in (hf.BertForMaskedLM, hf.BertForPreTraining, hf.BertForSequenceClassification):
        assert not is_causal_lm(auto(bert))
    assert not is_causal_lm(tiny("t5"))


@pytest.mark.parametrize(("label", "row"), [(3, 2), (-1, 0), (99, 3)])
def test_label_out_of_range(tiny, inputs_for, label, row):
    good, bad = inputs_for("bert"), inputs_for("bert")
    bad["labels"][row] = label
    text = rf"batch 1, row {row}: label {label} is outside \[0, 3\)"
    with pytest.raises(DataError, match=text):
        take(tiny("bert"), [good, bad], at_least=1, at_most=100)


def test_label_of_a_decoder_is_a_token(tiny, inputs_for):
    batch = inputs_for("gpt2")
    check_batch(tiny("gpt2"), batch, 0)
    batch["labels"][1, 2] = 99
    with pytest.raises(DataError, match=r"batch 5, row 1: label 99 is outside \[0, 99\)"):
        check_batch(tiny("gpt2"), batch, 5)


@pytest.mark.parametrize(("token", "row"), [(99, 3), (-5, 1), (10**6, 0)])
def test_token_out_of_range(tiny, inputs_for, token, row):
    batch = inputs_for("bert")
    batch["input_ids"][row, 1] = token
    text = rf"batch 0, row {row}: token id {token} is outside \[0, 99\)"
    with pytest.raises(DataError, match=text):
        take(tiny("bert"), [batch], at_least=1, at_most=100)


def test_only_what_is_used_is_checked(tiny, inputs_for):
    bad = inputs_for("bert")
    bad["labels"][0] = 7
    taken = take(tiny("bert"), [inputs_for("bert"), bad], at_least=1, at_most=4)
    assert rows(taken) == [4]


@pytest.mark.parametrize("batch", [(1, 2), [torch.ones(2, 3)], "text", torch.ones(2)])
def test_not_a_dict(tiny, batch):
    with pytest.raises(DataError, match=f"batch 4 is a {type(batch).__name__}; expected a dict"):
        check_batch(tiny("bert"), batch, 4)


def test_no_input(tiny):
    with pytest.raises(DataError, match=r"has no 'input_ids'; its keys are \['labels', 'x'\]"):
        check_batch(tiny("bert"), {"x": torch.ones(1), "labels": torch.ones(1)}, 0)


def test_no_rows(tiny):
    empty = torch.ones(0, 5, dtype=torch.long)
    with pytest.raises(DataError, match=r"batch 3 is empty: its input has shape \[0, 5\]"):
        check_batch(tiny("bert"), {"input_ids": empty}, 3)


def test_token_mask(tiny, inputs_for):
    model, batch = tiny("bert"), inputs_for("bert")
    mask = token_mask(model, batch)
    assert mask.dtype == torch.bool
    assert mask.sum(dim=1).tolist() == [9, 6, 4, 7]
    assert token_mask(model, {"input_ids": batch["input_ids"]}).all()


def test_token_mask_of_several_choices():
    model = hf.BertForMultipleChoice(TINY["bert"]())
    mask = torch.tensor([[[1, 1, 0], [1, 0, 0]], [[1, 1, 1], [1, 1, 0]]])
    batch = {"input_ids": torch.full((2, 2, 3), 7), "attention_mask": mask}
    assert torch.equal(token_mask(model, batch), mask.bool())
    seen = torch.arange(12.0).view(4, 3, 1)  # [B * choices, T, E]
    rows = by_token(seen, sequence_mask(model, batch, "encoder.layer.0", seen))
    assert torch.equal(rows, seen[mask.view(4, 3).bool()])


def test_a_mask_of_frames_is_not_one_of_bins(tiny, inputs_for):
    model, batch = tiny("whisper"), inputs_for("whisper")
    plain = token_mask(model, batch)
    batch["attention_mask"] = torch.ones(4, 24, dtype=torch.long)
    assert torch.equal(token_mask(model, batch), plain)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_seed_of_an_image_in_any_precision(dtype):
    image, other = torch.linspace(-1, 1, 12).view(3, 2, 2), torch.ones(3, 2, 2)
    mask = torch.ones(3, dtype=torch.bool)
    seeds = {example_seed(values.to(dtype), mask, 1) for values in (image, other, image.clone())}
    assert len(seeds) == 2


def test_seed_of_an_example_does_not_see_padding():
    ids, mask = torch.tensor([5, 6, 0, 0]), torch.tensor([True, True, False, False])
    short = example_seed(torch.tensor([5, 6]), torch.tensor([True, True]), 1)
    assert example_seed(ids, mask, 1) == short
    assert example_seed(ids, mask, 2) != short
    assert example_seed(torch.tensor([6, 5]), torch.tensor([True, True]), 1) != short


def test_forward_kwargs(tiny, inputs_for):
    batch = inputs_for("gpt2")
    assert set(forward_kwargs(tiny("gpt2"), batch, labels=True)) == {*batch, "use_cache"}
    kwargs = forward_kwargs(tiny("gpt2"), batch, labels=False)
    assert "labels" not in kwargs
    assert kwargs["use_cache"] is False
