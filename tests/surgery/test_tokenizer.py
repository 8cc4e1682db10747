"""Tokenizers with fewer tokens: texts of which all tokens stay are cut as before."""

import json
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizer_kinds import KINDS, TEXTS, make
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from hf_prune.errors import ConfigError, UnsupportedModelError
from hf_prune.surgery.tokenizer import (
    describe,
    narrow_tokenizer,
    needed,
    rewrite,
    tokens_of,
    with_ways,
)
from hf_prune.surgery.vocabulary import choose_tokens, count_tokens


@pytest.mark.parametrize("kind", KINDS)
def test_texts_are_cut_as_before(kind):
    tokenizer = make(kind)
    seen = TEXTS[: len(TEXTS) // 3]
    kept = choose_tokens(tokenizer, count_tokens(tokenizer, seen))
    small = narrow_tokenizer(tokenizer, kept)
    assert len(small) == len(kept) < len(tokenizer)
    same = 0
    for text in TEXTS:
        old = tokenizer(text)["input_ids"]
        if set(old) <= set(kept):
            same += 1
            assert small(text)["input_ids"] == [kept.index(token) for token in old], text
    assert same >= len(seen)
    for old in kept:
        assert small.convert_ids_to_tokens(kept.index(old)) == tokenizer.convert_ids_to_tokens(old)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_any_choice_of_tokens(kind, data):
    """However few are chosen: what is cut into tokens that stay is cut as before."""
    tokenizer = make(kind)
    description = describe(tokenizer)
    some = data.draw(st.sets(st.integers(0, len(tokenizer) - 1)))
    kept = sorted(with_ways(description, needed(description) | some))
    small = narrow_tokenizer(tokenizer, kept)
    names = {index: token for token, index in tokens_of(description).items()}
    text = " ".join(random.Random(len(some)).choices(" ".join(TEXTS).split(), k=12))
    text = data.draw(st.sampled_from([*TEXTS, text]))
    old = tokenizer(text)["input_ids"]
    new = [kept[token] for token in small(text)["input_ids"]]
    if set(old) <= set(kept):
        assert new == old, [names[token] for token in old]
    elif kind == "bytes":  # spelt otherwise, and nothing lost
        assert small.decode(small(text)["input_ids"]) == tokenizer.decode(old)


@pytest.mark.parametrize("kind", KINDS)
def test_a_text_of_other_tokens_is_spelt(kind):
    tokenizer = make(kind)
    kept = sorted(needed(describe(tokenizer)))
    small = narrow_tokenizer(tokenizer, kept)
    ids = small(TEXTS[0])["input_ids"]
    assert len(ids) > len(tokenizer(TEXTS[0])["input_ids"])
    assert tokenizer.unk_token is None or small.unk_token_id not in ids
    assert small.all_special_tokens == tokenizer.all_special_tokens


def test_special_tokens_around_a_text():
    tokenizer = make("wordpiece")
    kept = sorted(needed(describe(tokenizer)))
    small = narrow_tokenizer(tokenizer, kept)
    assert small.cls_token_id != tokenizer.cls_token_id
    ids = small("a", "b", padding="max_length", max_length=8)["input_ids"]
    names = small.convert_ids_to_tokens(ids)
    assert [names[0], names[2], names[4]] == ["[CLS]", "[SEP]", "[SEP]"]
    assert set(names[5:]) == {"[PAD]"}
    assert small.sep_token_id == kept.index(tokenizer.sep_token_id)


def test_added_tokens_stay_with_their_flags():
    tokenizer = make("bytes")
    tokenizer.add_tokens(["<more>"])
    tokenizer.add_tokens(["<very special>"], special_tokens=True)
    description = describe(tokenizer)
    small = narrow_tokenizer(tokenizer, sorted(needed(description)))
    ids = small("a<more>b<very special>c")["input_ids"]
    assert small.convert_ids_to_tokens(ids).count("<more>") == 1
    assert small.decode(ids, skip_special_tokens=True) == "a<more>bc"


def test_merges_whose_results_went_are_gone():
    tokenizer = make("bytes")
    description = describe(tokenizer)
    kept = with_ways(description, needed(description) | {len(tokenizer) - 3})
    model = rewrite(description, kept)["model"]
    assert 0 < len(model["merges"]) < len(description["model"]["merges"])
    for first, second in model["merges"]:
        assert {first, second, first + second} <= set(model["vocab"])


def test_of_equal_merges_the_first_is_made_first():
    """`aaaaa` is joined from the left, and so by way of `aaa`."""
    merges = [("a", "a"), ("aa", "a"), ("aa", "aaa")]
    vocabulary = {"a": 0, "aa": 1, "aaa": 2, "aaaaa": 3, "b": 4}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
    assert tokenizer("aaaaa")["input_ids"] == [3]
    assert with_ways(describe(tokenizer), {3}) == {0, 1, 2, 3}
    small = narrow_tokenizer(tokenizer, [0, 1, 2, 3, 4])
    assert small("aaaaa")["input_ids"] == [3]


def test_what_is_unknown_is_rated_as_before():
    """The lowest score says how bad an unknown character is: without it one would be preferred."""
    pieces = [("<unk>", 0.0), ("a", -9.0), ("b", -2.0), ("bb", -100.0), ("ac", -20.0)]
    backend = Tokenizer(models.Unigram(pieces, unk_id=0))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>")
    kept = choose_tokens(tokenizer, count_tokens(tokenizer, ["ac", "ab"]))
    assert 3 in kept, "the lowest score"
    small = narrow_tokenizer(tokenizer, kept)
    old = tokenizer("ac")["input_ids"]
    assert [kept[token] for token in small("ac")["input_ids"]] == old == [4]


def test_scores_stay():
    description = describe(make("unigram"))
    scores = dict(map(tuple, description["model"]["vocab"]))
    kept = sorted(needed(description))
    model = rewrite(description, kept)["model"]
    assert {token: scores[token] for token, _ in model["vocab"]} == dict(model["vocab"])
    assert min(s for _, s in model["vocab"]) == min(scores.values())
    assert model["vocab"][model["unk_id"]][0] == "<unk>"


def test_bytes_take_the_place_of_characters():
    """Where a BPE falls back to all 256 bytes, characters that no token needs may go."""
    description = describe(make("bytes"))
    model = description["model"]
    model["byte_fallback"] = True
    start = len(model["vocab"])
    model["vocab"] |= {f"<0x{byte:02X}>": start + byte for byte in range(256)}
    assert needed(description) >= set(range(start, start + 256))
    assert model["vocab"]["z"] not in needed(description)
    token = max(model["vocab"], key=len)
    ways = with_ways(description, {model["vocab"][token]})
    assert {model["vocab"][character] for character in token} <= ways


def test_saved_and_loaded(tmp_path):
    """Nothing of the old vocabulary is left beside the new one."""
    tokenizer = make("wordpiece")
    small = narrow_tokenizer(tokenizer, sorted(needed(describe(tokenizer))))
    small.save_pretrained(tmp_path)
    loaded = type(small).from_pretrained(tmp_path)
    assert loaded.get_vocab() == small.get_vocab()
    text = (tmp_path / "tokenizer_config.json").read_text()
    assert "/tmp" not in json.dumps(json.loads(text)), "no path of the machine"


def test_what_is_missing_is_said():
    tokenizer = make("bytes")
    with pytest.raises(ConfigError, match="cannot do without its special tokens"):
        narrow_tokenizer(tokenizer, [5, 6])


def test_a_slow_tokenizer_is_refused():
    with pytest.raises(UnsupportedModelError, match=r"has no tokenizer\.json"):
        describe(object())
