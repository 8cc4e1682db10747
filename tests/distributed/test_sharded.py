"""FSDP2 on two CPU processes: gates are exact, and whole parameters come back for removal."""

import json
import sys
from pathlib import Path

import pytest
import torch
from accelerate import PartialState, debug_launcher
from test_two_processes import data, model
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import Trainer, TrainingArguments

from hf_prune import close_gates, remove_units
from hf_prune.gates.attach import attach_gates
from hf_prune.plan import Plan, SitePlan
from hf_prune.sites import find_sites
from hf_prune.statistics.collect import sum_over_processes
from hf_prune.training.sharded import whole_copy


def shard(whole):
    mesh = init_device_mesh("cpu", (PartialState().num_processes,))
    for layer in whole.bert.encoder.layer:
        fully_shard(layer, mesh=mesh)
    return fully_shard(whole, mesh=mesh)


def gate_gradients(gated, batch):
    """Of random gates, the loss and their gradients."""
    sites = find_sites(gated)
    gates = attach_gates(gated, sites)
    generator = torch.Generator().manual_seed(0)
    for site in sites:
        gates.values[site.name] = torch.rand(site.units, generator=generator).requires_grad_()
    gated(**batch).loss.backward()
    gates.remove()
    return torch.cat([gates.values[site.name].grad for site in sites])


def job(folder):
    """What each process does."""
    state = PartialState(cpu=True)
    world, rank = state.num_processes, state.process_index
    ids, labels = data()
    mine = {"input_ids": ids[rank::world], "labels": labels[rank::world]}
    split, plain = shard(model()), model()
    parameter = split.bert.encoder.layer[0].output.dense.weight
    local = sum_over_processes(gate_gradients(split, mine)) / world
    alone = gate_gradients(plain, {"input_ids": ids, "labels": labels})
    optimizer = torch.optim.SGD(split.parameters(), lr=0.1)
    optimizer.step()  # so that the parameters are no longer those of a fresh model
    kept = {s.name: SitePlan(s.kind, s.units, tuple(range(1, s.units))) for s in find_sites(split)}
    plan = Plan("bert", kept)
    gates = close_gates(split.eval(), plan)
    with torch.no_grad():
        masked = split(ids[:8]).logits
    gates.remove()
    small = whole_copy(split)
    remove_units(small, plan)
    with torch.no_grad():
        removed = small(ids[:8]).logits
    moved, fresh = small.classifier.weight, plain.classifier.weight
    figures = {
        "world": world,
        "share": parameter.to_local().numel() / parameter.numel(),
        "kind": type(small).__name__,
        "gradients": float((local - alone).abs().max() / alone.abs().max()),
        "logits": float((removed - masked).abs().max()),
        "moved": float((moved - fresh).detach().abs().max()),
    }
    Path(folder, f"{rank}.json").write_text(json.dumps(figures))


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.skipif(sys.platform != "linux", reason="debug_launcher forks")
def test_gates_are_exact_and_parameters_whole_again(tmp_path):
    debug_launcher(job, args=(str(tmp_path),), num_processes=2)
    for rank in range(2):
        found = json.loads((tmp_path / f"{rank}.json").read_text())
        assert found["world"] == 2
        assert found["share"] == 0.5, "each process holds half of the matrix"
        assert found["kind"] == "BertForSequenceClassification"
        assert found["gradients"] < 1e-5
        assert found["logits"] < 1e-5
        assert found["moved"] > 1e-4


def ordinary_job(folder):
    """What a Trainer makes of `fsdp` where there is no accelerator."""
    arguments = TrainingArguments(
        f"{folder}/trainer", fsdp=True, fsdp_config={"version": 2}, use_cpu=True, report_to="none"
    )
    kind = Trainer(model(), arguments).accelerator.distributed_type
    Path(folder, f"kind-{PartialState().process_index}").write_text(str(kind))


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.skipif(sys.platform != "linux", reason="debug_launcher forks")
def test_accelerate_has_no_fsdp_on_a_cpu(tmp_path):
    """It falls back to DDP and says nothing: why the callbacks cannot be tried under it here."""
    debug_launcher(ordinary_job, args=(str(tmp_path),), num_processes=2)
    assert (tmp_path / "kind-1").read_text() == "DistributedType.MULTI_CPU"
