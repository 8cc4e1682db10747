"""Single weights on real models: every solver, pattern and sparsity in one table.

Rows are kept as they come, so that an interrupted run goes on where it was.
"""

import json
import resource
import time
from pathlib import Path
from typing import Any

import click
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from hf_prune.measure.counts import count_parameters
from hf_prune.report.result import environment
from hf_prune.weights.budgets import allot
from hf_prune.weights.find import find_matrices
from hf_prune.weights.patterns import parse_pattern
from hf_prune.weights.problem import Options
from hf_prune.weights.prune import prune_weights_

METHODS: dict[str, dict[str, Any]] = {
    "admm": {"criterion": "admm", "dense_target": True, "refit_steps": 10},
    "admm, own inputs": {"criterion": "admm", "dense_target": False, "refit_steps": 10},
    "sparsegpt": {"criterion": "sparsegpt", "dense_target": False, "refit_steps": 0},
    "sparsegpt, dense target": {"criterion": "sparsegpt", "dense_target": True, "refit_steps": 10},
    "wanda": {"criterion": "wanda", "dense_target": False, "refit_steps": 0},
    "wanda, re-fitted": {"criterion": "wanda", "dense_target": False, "refit_steps": 10},
    "wanda, dense target": {"criterion": "wanda", "dense_target": True, "refit_steps": 10},
    "magnitude": {"criterion": "magnitude", "dense_target": False, "refit_steps": 0},
    "magnitude, re-fitted": {"criterion": "magnitude", "dense_target": False, "refit_steps": 10},
    "magnitude, dense target": {"criterion": "magnitude", "dense_target": True, "refit_steps": 10},
}
"""What is compared, best first, so that an interrupted run has the most telling rows."""
ORDER = ("2:4", "0.7", "0.5", "0.6", "4:8")


class Rows:
    """A JSON file of rows by name; a row that is there is not computed again."""

    def __init__(self, out: Path) -> None:
        self.out = out
        self.data: dict[str, Any] = {"environment": environment(), "rows": {}}
        if out.is_file():
            self.data = json.loads(out.read_text(encoding="utf-8"))

    def __contains__(self, key: str) -> bool:
        return key in self.data["rows"]

    def add(self, key: str, row: dict[str, Any]) -> None:
        """Write a row at once."""
        self.data["rows"][key] = row
        self.out.parent.mkdir(parents=True, exist_ok=True)
        part = self.out.with_suffix(".part")
        part.write_text(json.dumps(self.data, indent=1) + "\n", encoding="utf-8")
        part.replace(self.out)
        print(key, row, flush=True)


def peak_bytes() -> int:
    """Largest resident memory of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def prune_copy(
    model: nn.Module,
    batches: list[Any],
    level: str,
    method: dict[str, Any],
    ignore: tuple[str, ...],
) -> dict[str, Any]:
    """Prune a model in place by one method, per row or not as it says; and what it cost."""
    method = dict(method)
    by_row, budget = method.pop("rows", False), method.pop("budget", "uniform")
    pattern = parse_pattern(level if ":" in level or "x" in level else "unstructured", rows=by_row)
    sparsity = float(level) if pattern.kind == "unstructured" else 0.0
    matrices = find_matrices(model, ignore=ignore)
    wall, cpu = time.perf_counter(), time.process_time()
    options = Options(pattern=pattern, **method)
    removed = allot(model, matrices, budget, sparsity, options, batches)
    result = prune_weights_(model, matrices, removed, options, batches)
    total = sum(mask.numel() for mask in result.masks.values())
    kept = sum(int(mask.sum()) for mask in result.masks.values())
    errors = list(result.errors.values())
    return {
        "sparsity": 1 - kept / total,
        "pruned_parameters": total,
        "seconds": time.perf_counter() - wall,
        "cpu_seconds": time.process_time() - cpu,
        "mean_relative_error": sum(errors) / len(errors) if errors else None,
        "peak_bytes": peak_bytes(),
    }


def _tokens(folder: Path, tokenizer: Any, split: str, sequences: int, length: int) -> Tensor:
    text = (folder / f"{split}.txt").read_text(encoding="utf-8")
    ids = tokenizer(text, return_tensors="pt").input_ids[0][: sequences * length]
    rows: Tensor = ids.view(-1, length)  # [sequences, length]
    return rows


def language_batches(
    folder: Path, tokenizer: Any, split: str, sequences: int, length: int
) -> list[dict[str, Tensor]]:
    """Calibration batches of four sequences each."""
    tokens = _tokens(folder, tokenizer, split, sequences, length)
    return [{"input_ids": part} for part in tokens.split(4)]


@torch.inference_mode()
def perplexity(model: PreTrainedModel, rows: Tensor) -> float:
    """Exponential of the mean loss of every token but the first of each sequence."""
    model.eval()
    losses = [float(model(input_ids=row[None], labels=row[None]).loss) for row in rows]
    return float(torch.tensor(losses).mean().exp())


@click.command()
@click.argument("out", type=click.Path(path_type=Path, dir_okay=False))
@click.option("--model", "folder", required=True, type=click.Path(path_type=Path, exists=True))
@click.option("--text", required=True, type=click.Path(path_type=Path, exists=True))
@click.option("--sequences", default=32, show_default=True, help="Calibration sequences.")
@click.option("--length", default=512, show_default=True, help="Tokens of a sequence.")
@click.option("--levels", default=",".join(ORDER), show_default=True)
@click.option("--methods", default="", help="Some of the methods, by name; default: all.")
def language_model(
    out: Path, folder: Path, text: Path, sequences: int, length: int, levels: str, methods: str
) -> None:
    """Perplexity of a causal language model on WikiText-2, calibrated on its valid split."""
    torch.set_num_threads(1)
    rows = Rows(out)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    test = _tokens(text, tokenizer, "test", 8, length)
    batches = language_batches(text, tokenizer, "valid", sequences, length)
    chosen = methods.split(";") if methods else list(METHODS)
    dense = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    if "dense" not in rows:
        rows.add("dense", {"perplexity": perplexity(dense, test), "all": count_parameters(dense)})
    for level in levels.split(","):
        for name in chosen:
            key = f"{level} {name}" + (f" {sequences} sequences" if sequences != 32 else "")
            if key in rows:
                continue
            model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
            row = prune_copy(model, batches, level, {**METHODS[name], "rows": True}, ())
            rows.add(key, {"perplexity": perplexity(model, test), **row})
