"""Adapters: only they are trained, and merging them gives an ordinary model with its zeros."""

import copy

import pytest
import torch
from test_resume import trainer

from hf_prune import DistillCallback, remove_units
from hf_prune.training.lora import add_lora, merge_lora
from hf_prune.weights.find import find_weights
from hf_prune.weights.masks import apply_masks_, magnitude_masks

pytest.importorskip("peft")


# PEFT reads what transformers has deprecated.
@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
def test_adapters_recover_a_pruned_model_and_zeros_stay(tiny, uneven_plan, tmp_path):
    teacher = tiny("bert")
    model = copy.deepcopy(teacher)
    remove_units(model, uneven_plan(model))
    masks = magnitude_masks(find_weights(model), 0.5)
    apply_masks_(model, masks)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    adapted = add_lora(model, 4)
    trained = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    assert trained < 0.5 * sum(p.numel() for p in teacher.parameters())
    trainer(adapted, tmp_path, DistillCallback(teacher), save_strategy="no").train()
    merged = merge_lora(adapted, masks)
    assert type(merged) is type(teacher)
    after = dict(merged.named_parameters())
    assert after.keys() == before.keys()
    assert all(p.requires_grad for p in after.values())
    for name, mask in masks.items():
        assert not after[name][~mask].any()
        assert not torch.equal(after[name], before[name])
    name = "bert.embeddings.word_embeddings.weight"
    assert torch.equal(after[name], before[name])
