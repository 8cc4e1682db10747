"""Vocabulary entries: what is left of a model says the same about the tokens that stay."""

import copy

import pytest
import torch
import transformers as hf
from tinies import ENCODERS, TINY, without_labels
from tokenizer_kinds import TEXTS, make

from hf_prune.checkpoint.hook import QUANT_METHOD
from hf_prune.errors import ConfigError, DataError, UnsupportedModelError
from hf_prune.measure.counts import count_parameters
from hf_prune.surgery.remove import remove_units
from hf_prune.surgery.shapes import Changes, record_shapes_
from hf_prune.surgery.vocabulary import (
    choose_tokens,
    count_tokens,
    keep_tokens,
    prune_vocabulary,
)

NO_TOKENS = ("vit", "clip_vision_model", "wav2vec2")
KEPT = [*range(6), *range(9, 99, 3)]
HEADS = ("logits", "logits_per_image", "last_hidden_state")


def say(model, batch):
    with torch.no_grad():
        output = model.eval()(**without_labels(model, batch))
    return next(output[key] for key in HEADS if key in output)


def in_kept(batch, numbers):
    """The same batch of tokens that stay, in old or in new numbers."""
    batch = copy.deepcopy(batch)
    for key in ("input_ids", "labels"):
        if key in batch and batch[key].ndim == 2:
            places = batch[key].clamp(min=0) % len(KEPT)
            places[batch[key] < 6] = batch[key][batch[key] < 6].clamp(min=0)  # padding and the like
            batch[key] = torch.tensor(numbers)[places]
    return batch


def check(model, batch):
    """Old and new outputs, the columns of tokens that went left out."""
    old = say(model, in_kept(batch, KEPT))
    before = count_parameters(model)
    keep_tokens(model, KEPT)
    new = say(model, in_kept(batch, range(len(KEPT))))
    if old.shape != new.shape:
        old = old[..., KEPT]
    torch.testing.assert_close(new, old, atol=1e-5, rtol=0)
    assert count_parameters(model) < before
    assert model.config.get_text_config().vocab_size == len(KEPT)


def check_loaded(model, batch, folder):
    model.save_pretrained(folder)
    loaded, info = type(model).from_pretrained(folder, output_loading_info=True)
    assert not any(info[key] for key in info if key.endswith("_keys"))
    batch = in_kept(batch, range(len(KEPT)))
    assert torch.equal(say(loaded, batch), say(model, batch))
    return loaded


@pytest.mark.parametrize("name", sorted(set(TINY) - set(NO_TOKENS)))
def test_every_family(name, tiny, inputs_for, tmp_path):
    model, batch = tiny(name), inputs_for(name)
    check(model, batch)
    assert getattr(model.config, "quantization_config", None) is None, "the config says it"
    check_loaded(model, batch, tmp_path)


@pytest.mark.parametrize("name", ["bert", "llama", "gpt2", "t5", "mixtral", "roberta"])
def test_of_a_pruned_model(name, tiny, inputs_for, uneven_plan, tmp_path):
    model, batch = tiny(name), inputs_for(name)
    remove_units(model, uneven_plan(model))
    check(model, batch)
    assert model.config.quantization_config["quant_method"] == QUANT_METHOD
    check_loaded(model, batch, tmp_path)


def test_a_description_that_speaks_of_the_vocabulary_follows(tiny, inputs_for, tmp_path):
    model, batch = tiny("llama"), inputs_for("llama")
    record_shapes_(model, Changes({"/lm_head"}, parameters={"embed_tokens.weight"}))
    check(model, batch)
    shapes = model.config.quantization_config
    assert shapes["modules"] == {"/lm_head": {"out": len(KEPT), "in": 32}}
    assert shapes["parameters"] == {"embed_tokens.weight": [len(KEPT), 32]}
    check_loaded(model, batch, tmp_path)


@pytest.mark.parametrize("name", ENCODERS)
def test_masked_language_models(name, tiny, inputs_for, tmp_path):
    """Their head has a bias of the vocabulary, and is tied."""
    torch.manual_seed(0)
    model = hf.AutoModelForMaskedLM.from_config(TINY[name]()).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    batch = {key: value for key, value in inputs_for(name).items() if key != "labels"}
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    tied = head.weight is embedding.weight
    check(model, batch)
    assert (head.weight is embedding.weight) is tied
    loaded = check_loaded(model, batch, tmp_path)
    assert (loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight) is tied


def test_an_untied_head_and_a_second_time(tiny, inputs_for):
    model, batch = tiny("llama"), inputs_for("llama")
    assert model.lm_head.weight is not model.model.embed_tokens.weight
    expected = say(model, in_kept(batch, KEPT))
    keep_tokens(model, KEPT)
    half = [*range(6), *range(6, len(KEPT), 2)]
    keep_tokens(model, half)
    assert model.lm_head.weight.shape[0] == model.config.vocab_size == len(half)
    found = say(model, {**batch, "input_ids": batch["input_ids"].clamp(max=5)})
    assert found.shape[-1] == len(half)
    assert expected.shape[-1] == 99


def test_generation_goes_on_as_before(tiny, inputs_for):
    """Where the tokens that went have no chance: the same text, and it ends at the same token."""
    model = tiny("llama")
    gone = sorted(set(range(99)) - set(KEPT))
    model.generation_config.suppress_tokens = gone
    batch = {k: v for k, v in in_kept(inputs_for("llama"), KEPT).items() if k != "labels"}
    prompt = {k: v[:1, :5] for k, v in batch.items()}
    model.generation_config.eos_token_id = [
        2,
        int(model.generate(**prompt, max_new_tokens=4)[0, -1]),
    ]
    old = model.generate(**prompt, max_new_tokens=8)
    keep_tokens(model, KEPT)
    assert model.generation_config.suppress_tokens == []
    prompt["input_ids"] = torch.tensor([[KEPT.index(t) for t in prompt["input_ids"][0].tolist()]])
    new = model.generate(**prompt, max_new_tokens=8)
    assert [KEPT[token] for token in new[0].tolist()] == old[0].tolist()
    assert len(new[0]) == 9, "ended early"


def test_configs_follow(tiny):
    model = tiny("bart")
    model.generation_config.forced_bos_token_id = 60
    model.generation_config.bad_words_ids = [[9, 12], [7, 9]]
    model.generation_config.lang_to_id = {"<en>": 63}
    model.config.decoder_start_token_id = 66
    keep_tokens(model, KEPT)
    place = KEPT.index
    assert model.config.vocab_size == len(KEPT)
    assert model.config.decoder_start_token_id == place(66)
    assert model.config.pad_token_id == 0
    assert model.generation_config.forced_bos_token_id == place(60)
    assert model.generation_config.bad_words_ids == [[place(9), place(12)]]
    assert model.generation_config.lang_to_id == {"<en>": place(63)}
    assert model.final_logits_bias.shape == (1, len(KEPT))


def test_padding_by_which_positions_are_counted_keeps_its_number(tiny):
    model = tiny("roberta")
    with pytest.raises(ConfigError, match=r"\[0\] are missing"):
        keep_tokens(model, range(1, 99))
    model = tiny("bert")
    model.config.pad_token_id = 3
    model.get_input_embeddings().padding_idx = 3
    keep_tokens(model, [3, *range(5, 99)])
    assert model.config.pad_token_id == 0
    assert model.get_input_embeddings().padding_idx == 0


def test_gradients_and_dtype_stay(tiny):
    model = tiny("gpt2").half()
    model.transformer.wte.weight.requires_grad_(False)
    keep_tokens(model, KEPT)
    assert model.transformer.wte.weight.dtype == torch.float16
    assert not model.transformer.wte.weight.requires_grad
    assert model.lm_head.weight is model.transformer.wte.weight


def test_all_tokens_change_nothing(tiny):
    model = tiny("bert")
    state = {name: value.data_ptr() for name, value in model.state_dict().items()}
    keep_tokens(model, range(99))
    assert {name: value.data_ptr() for name, value in model.state_dict().items()} == state


@pytest.mark.parametrize("kept", [[], [*range(5), 99], [-1, *range(5)], [1, 2, 3]])
def test_refused_before_anything_is_changed(kept, tiny):
    model = tiny("llama")
    with pytest.raises(ConfigError, match="must be within 0 and 98"):
        keep_tokens(model, kept)
    assert model.config.vocab_size == 99
    assert model.lm_head.weight.shape[0] == 99


def test_a_model_without_tokens_is_refused(tiny):
    with pytest.raises(UnsupportedModelError, match="has 0 vocabularies"):
        keep_tokens(tiny("vit"), KEPT)


def model_for(tokenizer):
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    names = {f"{n}_token_id": getattr(tokenizer, f"{n}_token_id") for n in ("bos", "eos", "pad")}
    config = hf.LlamaConfig(vocab_size=len(tokenizer) + 5, intermediate_size=48, **sizes, **names)
    return hf.LlamaForCausalLM(config).eval()


@pytest.mark.parametrize("kind", ["wordpiece", "bytes", "ends", "unigram"])
def test_model_and_tokenizer(kind):
    tokenizer = make(kind)
    model = model_for(tokenizer)
    batch = tokenizer(TEXTS[0], return_tensors="pt", return_token_type_ids=False)
    old = say(model, dict(batch))
    done = prune_vocabulary(model, tokenizer, TEXTS[:9])
    batch = done.tokenizer(TEXTS[0], return_tensors="pt", return_token_type_ids=False)
    new = say(model, dict(batch))
    torch.testing.assert_close(new, old[..., list(done.kept)], atol=1e-6, rtol=0)
    assert done.before == len(tokenizer) + 5
    assert len(done.tokenizer) == len(done.kept) == model.config.vocab_size < len(tokenizer)
    for name in ("bos", "eos", "pad"):
        key = f"{name}_token_id"
        assert getattr(model.config, key) == getattr(done.tokenizer, key)


def test_limits():
    tokenizer = make("wordpiece")
    counts = count_tokens(tokenizer, iter(TEXTS))
    assert sum(counts.values()) == sum(len(tokenizer(text)["input_ids"]) for text in TEXTS)
    few = set(choose_tokens(tokenizer, {}))
    often = choose_tokens(tokenizer, counts, at_least=9)
    assert set(often) - few == {token for token in counts if counts[token] >= 9} - few
    top = choose_tokens(tokenizer, counts, at_most=3)
    best = sorted(counts, key=lambda token: (-counts[token], token))[:3]
    assert set(top) == few | set(best)
    for limits in ({"at_least": 0}, {"at_most": 0}):
        with pytest.raises(ConfigError, match="must be positive"):
            choose_tokens(tokenizer, counts, **limits)
    with pytest.raises(DataError, match="there is no text"):
        count_tokens(tokenizer, [])


def test_a_tokenizer_of_another_model_is_refused():
    tokenizer = make("bytes")
    model = model_for(make("unigram"))
    with pytest.raises(UnsupportedModelError, match="not the tokenizer of this model"):
        prune_vocabulary(model, tokenizer, TEXTS)
