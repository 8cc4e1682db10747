"""What pruning single weights costs: seconds per layer, peak memory, and Wanda over forward passes.

Rows are kept as they come, so that an interrupted run goes on where it was.
"""

import json
import tempfile
import time
from pathlib import Path
from typing import Any

import click
import torch
from bench_models import language_case, language_options
from bench_rows import Rows, peak_bytes
from bench_weights import METHODS
from safetensors.torch import save_file
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from hf_prune.measure.counts import count_parameters
from hf_prune.ondisk import INDEX, prune_folder
from hf_prune.recipe import Prune, Weights
from hf_prune.sites import base_model, find_sites
from hf_prune.statistics.streams import Stream, by_layer, run_layer, start_streams
from hf_prune.weights.budgets import uniform
from hf_prune.weights.find import find_matrices
from hf_prune.weights.patterns import Pattern
from hf_prune.weights.problem import Options
from hf_prune.weights.prune import Job, prune_layers


def _clock(streams: list[Stream], model: Any, layers: list[str]) -> float:
    """CPU seconds of the dense network's forward passes through some layers."""
    start = time.process_time()
    for stream in streams:
        hidden: Tensor = stream.dense
        for layer in layers:
            hidden = run_layer(base_model(model), layer, hidden, stream.calls[layer])
    return time.process_time() - start


@click.command()
@language_options
@click.option("--count", default=2, show_default=True, help="Layers, from the first on.")
def layers(out: Path, count: int, **about: Any) -> None:
    """CPU seconds per layer of every method, beside those of its own forward passes."""
    case = language_case(out, **about)
    tokens = f"{about['sequences']} x {about['length']} tokens"
    for name, method in METHODS.items():
        if f"{name}, {tokens}" in case.rows:
            continue
        model = case.model()
        chosen = dict(list(by_layer(find_sites(model)).items())[:count])
        matrices = find_matrices(model)
        options = Options(pattern=Pattern(rows=True), **method)
        job = Job(uniform(matrices, 0.5, options.pattern), options)
        with torch.inference_mode():
            streams = start_streams(model, model, case.calibration, list(chosen))
            forward = _clock(streams, model, list(chosen))
            start = time.process_time()
            prune_layers(model, chosen, matrices, streams, job)
            total = time.process_time() - start
        row = {
            "cpu_seconds_per_layer": total / count,
            "cpu_seconds_of_one_forward_per_layer": forward / count,
            "over_two_forward_passes": total / (2 * forward),
            "peak_bytes": peak_bytes(),
        }
        case.rows.add(f"{name}, {tokens}", row)


@click.command()
@click.argument("out", type=click.Path(path_type=Path, dir_okay=False))
@click.option("--layers", "depth", default=22, show_default=True, help="Layers of the model.")
@click.option("--sequences", default=4, show_default=True, help="Calibration sequences.")
@click.option("--method", default="admm", show_default=True, help="One of the methods.")
def memory(out: Path, depth: int, sequences: int, method: str) -> None:
    """Peak memory while a random Llama of a billion parameters is pruned from disk to disk."""
    torch.set_num_threads(1)
    rows = Rows(out)
    config = LlamaConfig(
        vocab_size=32000,
        hidden_size=2048,
        intermediate_size=5632,
        num_hidden_layers=depth,
        num_attention_heads=32,
        num_key_value_heads=4,
        max_position_embeddings=2048,
        dtype="bfloat16",
    )
    told = dict(METHODS[method])
    stage = Prune(
        units=("weights",),
        sparsity=0.5,
        criterion=told["criterion"],
        reconstruct=told["refit_steps"] > 0,
        weights=Weights(dense_target=told["dense_target"]),
        ignore=("lm_head*",),
        min_calibration_samples=1,
    )
    with tempfile.TemporaryDirectory() as folder:
        parameters = _random_checkpoint(config, Path(folder) / "dense")
        before = peak_bytes()
        batches = [{"input_ids": torch.randint(32000, (1, 512))} for _ in range(sequences)]
        start, cpu = time.perf_counter(), time.process_time()
        figures = prune_folder(Path(folder) / "dense", Path(folder) / "out", stage, batches)
        seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
    row: dict[str, Any] = {
        "parameters": parameters,
        "tokens": sequences * 512,
        "peak_bytes": peak_bytes(),
    }
    row |= {"peak_bytes_before": before, "seconds": seconds, "cpu_seconds": cpu, **figures}
    rows.add(f"{method}, {depth} layers", row)


def _random_checkpoint(config: LlamaConfig, folder: Path) -> int:
    """Write random weights shard by shard, without holding the model; how many parameters."""
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    folder.mkdir()
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(folder)
    groups: dict[str, list[str]] = {}
    for name, _ in model.named_parameters():
        part = name.split(".")[2] if ".layers." in name else "rest"
        groups.setdefault(f"{part}.safetensors", []).append(name)
    where: dict[str, str] = {}
    for file, names in groups.items():
        shapes = {name: model.get_parameter(name).shape for name in names}
        made = {n: (torch.randn(s) * 0.02).bfloat16() for n, s in shapes.items() if len(s) > 1}
        made |= {n: torch.ones(s).bfloat16() for n, s in shapes.items() if len(s) == 1}
        save_file(made, folder / file, {"format": "pt"})
        where |= dict.fromkeys(names, file)
    index = json.dumps({"metadata": {}, "weight_map": where})
    (folder / INDEX).write_text(index, encoding="utf-8")
    return count_parameters(model)
