"""Tiny models and their data, made from a seed: a whole training takes a second."""

import torch
from transformers import BertConfig, BertForSequenceClassification, GPT2Config, GPT2LMHeadModel

STEPS = 24
"""Optimizer steps of a training."""


def tiny_bert(seed: int = 0, dropout: float = 0.1) -> BertForSequenceClassification:
    """Two layers, four heads, hidden width 32; weights large enough that all of them matter."""
    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=99,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=48,
        max_position_embeddings=64,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
        initializer_range=0.3,
    )
    return BertForSequenceClassification(config)


def rows_of(count: int) -> dict[str, list[int] | list[list[int]]]:
    """So many texts of eight random tokens, of two classes."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(5, 99, (count, 8), generator=generator)
    return {"input_ids": ids.tolist(), "labels": (ids[:, 0] % 2).tolist()}


def tiny_gpt2(seed: int = 0, dropout: float = 0.1) -> GPT2LMHeadModel:
    """The same sizes, as a causal language model."""
    torch.manual_seed(seed)
    config = GPT2Config(
        vocab_size=99,
        n_embd=32,
        n_layer=2,
        n_head=4,
        n_inner=48,
        n_positions=64,
        resid_pdrop=dropout,
        embd_pdrop=dropout,
        attn_pdrop=dropout,
        initializer_range=0.3,
        bos_token_id=0,
        eos_token_id=0,
    )
    return GPT2LMHeadModel(config)


def texts_of(count: int) -> dict[str, list[list[int]]]:
    """So many texts of 3 to 12 tokens, padded, with labels for what is real."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(5, 99, (count, 12), generator=generator)
    real = torch.arange(12) < torch.randint(3, 13, (count, 1), generator=generator)
    return {
        "input_ids": ids.masked_fill(~real, 0).tolist(),
        "attention_mask": real.long().tolist(),
        "labels": ids.masked_fill(~real, -100).tolist(),
    }
