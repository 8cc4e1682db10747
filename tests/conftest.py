"""Tiny models, batches and plans for every family, without network."""

import os

os.environ["HF_HUB_DISABLE_XET"] = "1"  # read once, when huggingface_hub is first imported
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")

import copy
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BertConfig,
    DistilBertConfig,
    ElectraConfig,
    GPT2Config,
    LlamaConfig,
    PreTrainedModel,
    RobertaConfig,
)

from hf_prune.checkpoint.hook import register
from hf_prune.plan import Plan, SitePlan
from hf_prune.sites import find_sites

torch.set_num_threads(1)
register()

VOCABULARY = 99
LENGTHS = (9, 6, 4, 7)
_BERT = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 140,
    "num_labels": 3,
}
_SPECIAL = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}

TINY: dict[str, Callable[[], Any]] = {
    "bert": lambda: BertConfig(**_BERT),
    "roberta": lambda: RobertaConfig(**_BERT, pad_token_id=1),
    "electra": lambda: ElectraConfig(**_BERT, embedding_size=16),
    "distilbert": lambda: DistilBertConfig(
        vocab_size=VOCABULARY,
        dim=32,
        n_layers=3,
        n_heads=4,
        hidden_dim=48,
        max_position_embeddings=140,
        num_labels=3,
    ),
    "gpt2": lambda: GPT2Config(
        vocab_size=VOCABULARY,
        n_embd=32,
        n_layer=3,
        n_head=4,
        n_inner=48,
        n_positions=140,
        **_SPECIAL,
    ),
    "llama": lambda: LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=48,
        max_position_embeddings=140,
        **_SPECIAL,
    ),
}
"""A small configuration of every family."""
DECODERS = ("gpt2", "llama")


def _auto_class(name: str) -> Any:
    return AutoModelForCausalLM if name in DECODERS else AutoModelForSequenceClassification


def _randomise(model: PreTrainedModel, seed: int) -> None:
    """Make every parameter matter: large matrices, biases and norms that are not 0 and 1."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim > 1:
                parameter.copy_(0.15 * noise)
            elif name.endswith("bias"):
                parameter.copy_(0.3 * noise)
            else:
                parameter.copy_(1 + 0.3 * noise)


_CACHE: dict[tuple[str, str], PreTrainedModel] = {}


def _tiny(name: str, attention: str = "sdpa") -> PreTrainedModel:
    key = (name, attention)
    if key not in _CACHE:
        config = TINY[name]()
        model = _auto_class(name).from_config(config, attn_implementation=attention)
        _randomise(model, seed=7)
        _CACHE[key] = model.eval()
    return copy.deepcopy(_CACHE[key])


def _inputs_for(name: str, seed: int = 0, lengths: tuple[int, ...] = LENGTHS) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    rows, tokens = len(lengths), max(lengths)
    ids = torch.randint(5, VOCABULARY, (rows, tokens), generator=generator)
    mask = (torch.arange(tokens)[None] < torch.tensor(lengths)[:, None]).long()  # [B, T]
    ids = torch.where(mask.bool(), ids, TINY[name]().pad_token_id)
    if name in DECODERS:
        labels = ids.masked_fill(mask == 0, -100)
    else:
        labels = torch.randint(0, 3, (rows,), generator=generator)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def _logits(model: PreTrainedModel, batch: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        output = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
    logits = output.logits
    return logits[batch["attention_mask"].bool()] if logits.ndim == 3 else logits


def _uneven_plan(model: PreTrainedModel, seed: int = 0) -> Plan:
    """Another random width in every site, and at least one unit gone from the first two."""
    generator = random.Random(seed)
    sites = {}
    for index, site in enumerate(find_sites(model)):
        most = site.units - 1 if index < 2 and site.units > 1 else site.units
        kept = generator.sample(range(site.units), generator.randint(1, most))
        sites[site.name] = SitePlan(site.kind, site.units, tuple(sorted(kept)))
    return Plan(model.config.model_type, sites)


@pytest.fixture(scope="session")
def tiny() -> Callable[..., PreTrainedModel]:
    """`tiny(name, attention="sdpa")`: a fresh copy of the tiny model of a family, in eval mode."""
    return _tiny


@pytest.fixture(scope="session")
def tiny_families() -> set[str]:
    """The families that have a tiny model."""
    return set(TINY)


@pytest.fixture(scope="session")
def inputs_for() -> Callable[..., dict[str, Tensor]]:
    """`inputs_for(name, seed=0, lengths=...)`: a right-padded batch with labels."""
    return _inputs_for


@pytest.fixture(scope="session")
def logits() -> Callable[..., Tensor]:
    """`logits(model, batch)`: the logits of real tokens (or of the examples of a classifier)."""
    return _logits


@pytest.fixture(scope="session")
def uneven_plan() -> Callable[..., Plan]:
    """`uneven_plan(model, seed=0)`: a plan with another random width in every site."""
    return _uneven_plan
