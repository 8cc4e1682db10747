"""Families that nobody wrote: proposed, proved, refused, read from a file."""

import dataclasses

import pytest
import torch
import transformers as hf
from tinies import _LLAMA, _SIZES, _SPECIAL
from transformers import AutoModel, AutoModelForCausalLM

from hf_prune.errors import ConfigError, UnsupportedModelError
from hf_prune.families import FAMILIES, register_family
from hf_prune.families.llama import LLAMA
from hf_prune.gates.plans import masked
from hf_prune.infer import TOLERANCE, dump_family, infer_family, load_family, prove_family
from hf_prune.sites import find_sites
from hf_prune.surgery.remove import remove_units

GPT = {"vocab_size": 99, "hidden_size": 32, "max_position_embeddings": 140, **_SPECIAL}
UNKNOWN = {
    "starcoder2": lambda: hf.Starcoder2Config(**_LLAMA),
    "nemotron": lambda: hf.NemotronConfig(**_LLAMA),
    "cohere": lambda: hf.CohereConfig(**_LLAMA),
    "glm": lambda: hf.GlmConfig(**_LLAMA, head_dim=8),
    "megatron-bert": lambda: hf.MegatronBertConfig(**_SIZES),
    "esm": lambda: hf.EsmConfig(**_SIZES, pad_token_id=1),
    "gpt_neo": lambda: hf.GPTNeoConfig(
        **GPT,
        num_layers=2,
        num_heads=4,
        intermediate_size=48,
        attention_types=[[["global", "local"], 1]],
    ),
}


def build(name, head=AutoModel):
    torch.manual_seed(0)
    model = head.from_config(UNKNOWN[name]()).eval()
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model


@pytest.fixture
def registered():
    before = dict(FAMILIES)
    yield register_family
    FAMILIES.clear()
    FAMILIES.update(before)


@pytest.mark.parametrize("name", sorted(UNKNOWN))
def test_a_family_is_inferred_and_proved(name):
    model = build(name)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    family = infer_family(model)
    assert family.model_type == name
    assert name not in FAMILIES, "it is not trusted before it is registered"
    assert prove_family(model, family) <= TOLERANCE
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("name", ["starcoder2", "nemotron", "gpt_neo"])
def test_an_inferred_family_prunes_saves_and_loads(
    name, registered, uneven_plan, logits, inputs_for, tmp_path
):
    model = build(name, AutoModelForCausalLM)
    registered(infer_family(model))
    assert len(find_sites(model)) == 4
    batch, plan = inputs_for("llama"), uneven_plan(model)
    with masked(model, plan):
        zeroed = logits(model, batch)
    remove_units(model, plan)
    torch.testing.assert_close(logits(model, batch), zeroed, atol=1e-5, rtol=0)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits(loaded, batch), logits(model, batch))


def test_known_families_are_found_again(tiny):
    """What is inferred owns the same rows and columns as what was written by hand."""
    for name in ("bert", "llama", "gpt_neox", "modernbert", "opt", "phi"):
        model = tiny(name)
        inferred = infer_family(model)
        expected = find_sites(model)
        FAMILIES[name], kept = inferred, FAMILIES[name]
        try:
            found = find_sites(model)
        finally:
            FAMILIES[name] = kept
        for ours, theirs in zip(found, expected, strict=True):
            assert set(ours.slices) == set(theirs.slices), name
            assert (ours.sum_module, ours.units) == (theirs.sum_module, theirs.units), name


@pytest.mark.parametrize(
    ("config", "text"),
    [
        # each head has a slope of its own, by its number: a model with fewer has other slopes
        (
            hf.BloomConfig(vocab_size=99, hidden_size=32, n_layer=2, n_head=4),
            r"no description of 'bloom' could be proved \(the shrunken model does not run",
        ),
        # a norm spans all heads: without some of them it gives the others something else
        (hf.Olmo2Config(**_LLAMA), "no description of 'olmo2' could be proved"),
        (
            hf.FNetConfig(vocab_size=99, hidden_size=32, num_hidden_layers=2),
            "the config does not say num_attention_heads",
        ),
        (hf.T5Config(vocab_size=99, num_layers=1), "encoder-decoders cannot be inferred"),
    ],
    ids=["bloom", "olmo2", "fnet", "t5"],
)
def test_what_cannot_be_proved_is_refused(config, text):
    with pytest.raises(UnsupportedModelError, match=text):
        infer_family(AutoModel.from_config(config))


def test_a_wrong_description_is_refused(tiny):
    model = tiny("gpt_neox")
    stack = FAMILIES["gpt_neox"].stacks[0]
    attention = dataclasses.replace(stack.attention, interleaved=False)
    wrong = dataclasses.replace(
        FAMILIES["gpt_neox"],
        stacks=(dataclasses.replace(stack, attention=attention),),
    )
    with pytest.raises(UnsupportedModelError, match="masked and shrunken model differ by"):
        prove_family(model, wrong)
    assert FAMILIES["gpt_neox"] != wrong


@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_every_description_survives_yaml(name, tmp_path):
    path = tmp_path / "family.yaml"
    path.write_text(dump_family(FAMILIES[name]))
    assert load_family(path) == FAMILIES[name]


@pytest.mark.parametrize(
    ("old", "new", "text"),
    [
        ("q: q_proj", "qq: q_proj", r"attention: unknown key 'qq'; did you mean 'q'"),
        ("model_type: llama\n", "", r"family\.model_type is missing"),
        ("q: q_proj", "q: 3", r"family\.stacks\[0\]\.attention\.q = 3 is not of the right kind"),
        ("packed: 1", "packed: yes", r"ffn\.packed = 'yes' is not of the right kind"),
        ("shared_bias: ''", "shared_bias: own", r"shared_bias = 'own' is not of the right kind"),
        ("variants: []", "variants: 1", r"family\.variants is not a list"),
        ("cross: null", "cross: 1", r"cross is not a table"),
        ("q: q_proj", "q: !!python/name:os.system", "tags such as"),
    ],
)
def test_a_file_that_is_wrong(old, new, text, tmp_path):
    written = dump_family(LLAMA)
    assert old in written
    path = tmp_path / "family.yaml"
    path.write_text(written.replace(old, new, 1))
    with pytest.raises(ConfigError, match=text):
        load_family(path)


def test_no_file(tmp_path):
    with pytest.raises(ConfigError, match="cannot read the family"):
        load_family(tmp_path / "none.yaml")


def test_another_description_of_a_known_family_is_refused(registered):
    registered(LLAMA)
    with pytest.raises(ConfigError, match="model_type 'llama' has another description already"):
        registered(dataclasses.replace(LLAMA, stacks=()))
