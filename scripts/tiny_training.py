"""A tiny classifier and its data, made from a seed: a whole training takes a second."""

import torch
from transformers import BertConfig, BertForSequenceClassification

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
