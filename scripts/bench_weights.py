"""Single weights on real models: every solver, pattern and sparsity in one table.

Rows are kept as they come, so that an interrupted run goes on where it was.
"""

import time
from pathlib import Path
from typing import Any

import click
from bench_models import LanguageCase, language_case, language_options, perplexity
from bench_rows import LIGHT, peak_bytes
from torch import nn

from hf_prune.recipe import RIDGE
from hf_prune.statistics.batches import one_by_one
from hf_prune.statistics.ridge import DECODER_RIDGE
from hf_prune.training.polish import polish_, with_judges
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
KNAPSACK = {"admm, knapsack": {"budget": "knapsack", **METHODS["admm"]}}
"""The default with budgets by layer errors, for one more backward pass."""
ORDER = ("2:4", "0.7", "0.5", "0.6", "4:8")


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


@click.command()
@language_options
@click.option("--levels", default=",".join(ORDER), show_default=True)
@click.option("--methods", default="", help="Some of the methods, by name; default: all.")
@click.option("--polish", default=0, show_default=True, help="Steps on norms alone, afterwards.")
def language_model(out: Path, levels: str, methods: str, polish: int, **about: Any) -> None:
    """Perplexity of a causal language model on WikiText-2, calibrated on its valid split."""
    case, sequences = language_case(out, **about), about["sequences"]
    known = METHODS | KNAPSACK
    chosen = methods.split(";") if methods else list(METHODS)
    for level in levels.split(","):
        for name in chosen:
            key = f"{level} {name}" + (f" {sequences} sequences" if sequences != 32 else "")
            method = dict(known[name.removesuffix(LIGHT)])
            heavy = method["dense_target"] and not name.endswith(LIGHT)
            method |= {"rows": True, "ridge": DECODER_RIDGE if heavy else RIDGE}
            if polish:
                add_polished(case, key, level, method, polish)
            elif key not in case.rows:
                model = case.model()
                row = prune_copy(model, case.calibration, level, method, ())
                case.rows.add(key, {"perplexity": perplexity(model, case.test), **row})


def add_polished(
    case: LanguageCase, key: str, level: str, method: dict[str, Any], steps: int
) -> None:
    """The rows of a model before and after a polish of its norms, one sequence a step.

    Nothing is fitted to the sequences that judge the polish.
    """
    polished = f"{key}, {steps} steps on norms"
    if polished in case.rows:
        return
    model, dense = case.model(), case.model()
    fitted, judges = with_judges(dense, case.calibration)
    row = prune_copy(model, fitted, level, method, ())
    case.rows.add(f"{key}, judges held out", {"perplexity": perplexity(model, case.test), **row})
    start = time.process_time()
    single = [example for batch in fitted for example in one_by_one(dense, batch)]
    found = polish_(model, dense, single, judges, steps=steps)
    row = {"cpu_seconds": time.process_time() - start, **found}
    case.rows.add(polished, {"perplexity": perplexity(model, case.test), **row})
