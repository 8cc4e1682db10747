"""Augmentation: seeded by the text, only words change, labels stay."""

import pytest
import torch
from datasets import Dataset
from transformers import BertConfig, BertForMaskedLM
from words import word_tokenizer

from hf_prune.errors import ConfigError
from hf_prune.training.augment import Augmenter, augment

WORDS = ["good", "great", "fine", "bad", "awful", "poor", "film", "movie", "the", "is", "##ness"]


@pytest.fixture(scope="module")
def tokenizer():
    return word_tokenizer(WORDS)


@pytest.fixture(scope="module")
def embeddings():
    """Three groups of words, each around a direction of its own."""
    generator = torch.Generator().manual_seed(0)
    table = 0.05 * torch.randn(16, 4, generator=generator)
    for index, word in enumerate(WORDS):
        group = (
            0 if word in WORDS[:3] else 1 if word in WORDS[3:6] else 2 if word in WORDS[6:8] else 3
        )
        table[5 + index, group] += 1.0
    return table


def test_neighbours_are_of_the_same_group(tokenizer, embeddings):
    augmenter = Augmenter(tokenizer, embeddings, candidates=2, probability=1.0)
    assert set(augmenter._nearest("good")) == {"great", "fine"}
    assert set(augmenter._nearest("Bad")) == {"awful", "poor"}
    assert "##ness" not in augmenter.vocabulary.values()
    found = augmenter.variant("The film: GOOD, 10/10!", 0)
    assert found.endswith(", 10/10!")
    assert found != "The film: GOOD, 10/10!"
    assert "movie: " in found or "film" not in found


def test_variants_depend_on_text_seed_and_copy_alone(tokenizer, embeddings):
    text = "the good film is bad the film is awful and the movie is great"
    first, second = (Augmenter(tokenizer, embeddings, candidates=3) for _ in range(2))
    second.variant("something else", 0)
    assert [first.variant(text, i) for i in range(3)] == [second.variant(text, i) for i in range(3)]
    assert len({first.variant(text, i) for i in range(5)}) > 1
    other = Augmenter(tokenizer, embeddings, candidates=3, seed=1)
    assert [first.variant(text, i) for i in range(5)] != [other.variant(text, i) for i in range(5)]


def test_a_masked_language_model_gives_what_it_expects(tokenizer, embeddings):
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=16,
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=8,
    )
    masked = BertForMaskedLM(config).eval()
    with torch.no_grad():
        masked.cls.predictions.bias[5 + WORDS.index("poor")] = 50.0
    augmenter = Augmenter(tokenizer, embeddings, masked, candidates=1, probability=1.0)
    assert augmenter.variant("film is good", 0) == "poor poor poor"


def test_a_dataset_grows_by_variants_and_labels_stay(tokenizer, embeddings):
    rows = Dataset.from_dict({"text": ["good film", "bad movie"], "label": [1, 0]})
    augmenter = Augmenter(tokenizer, embeddings, candidates=2, probability=1.0)
    found = augment(rows, augmenter, copies=3)
    assert found["label"] == [1, 0] * 4
    assert found["text"][:2] == rows["text"][:]
    assert found["text"][2:] == [
        augmenter.variant(text, copy) for copy in range(3) for text in rows["text"]
    ]
    assert found.features == rows.features


def masked_model(word, seed=0):
    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=16,
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=8,
    )
    masked = BertForMaskedLM(config).eval()
    with torch.no_grad():
        masked.cls.predictions.bias[5 + WORDS.index(word)] = 50.0
    return masked


def test_variants_on_disk_are_those_of_the_same_models(tokenizer, embeddings, tmp_path):
    """`datasets` takes what it finds under the fingerprint, and does not ask the augmenter."""
    data = Dataset.from_dict({"text": ["good film", "bad movie"], "label": [1, 0]})
    data.save_to_disk(tmp_path / "rows")
    rows = Dataset.load_from_disk(tmp_path / "rows")
    for word in ("poor", "great", None):
        masked = None if word is None else masked_model(word)
        augmenter = Augmenter(tokenizer, embeddings, masked, candidates=1, probability=1.0)
        expected = [augmenter.variant(text, 0) for text in rows["text"]]
        assert augment(rows, augmenter, copies=1)["text"][2:] == expected, word


def test_a_fingerprint_is_of_models_and_tokenizer(tokenizer, embeddings):
    def name(words=tokenizer, table=embeddings, masked=None, **fields):
        return Augmenter(words, table, masked, **fields).fingerprint()

    turned = embeddings.flip(0)  # the same numbers in another order
    names = [
        name(),
        name(word_tokenizer(WORDS[::-1])),
        name(table=turned),
        name(masked=masked_model("poor")),
        name(masked=masked_model("great")),
        name(seed=1),
    ]
    assert len(set(names)) == len(names)
    assert name(masked=masked_model("poor")) == name(masked=masked_model("poor"))


def test_bad_numbers_are_refused(tokenizer, embeddings):
    with pytest.raises(ConfigError, match=r"probability=1\.5 must be in"):
        Augmenter(tokenizer, embeddings, probability=1.5)
