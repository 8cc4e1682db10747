"""What loading a pruned checkpoint costs over loading the dense one.

A BERT of the base size with random weights: dense, with one unit of every site gone (as many bytes,
and every module narrowed), and with half of the units gone. Loads in turn, from warm files, each
after the garbage of the one before was collected; by the clock, and again in processor time, which
other work on the machine changes less.
"""

import gc
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import click
import torch
from bench_rows import Rows, in_turn
from transformers import AutoModel, BertConfig, BertModel

from hf_prune.plan import Plan, SitePlan
from hf_prune.sites import find_sites
from hf_prune.surgery.remove import remove_units

ROUNDS = 25


def _save(folder: Path, share: float | None) -> None:
    """A model of which so many units of every site stay; all, or all but one."""
    torch.manual_seed(0)
    model = BertModel(BertConfig())
    sites = {}
    for site in find_sites(model) if share is not None else ():
        kept = site.units - 1 if share == 1.0 else int(share * site.units)  # type: ignore[operator]  # given
        sites[site.name] = SitePlan(site.kind, site.units, tuple(range(kept)))
    remove_units(model, Plan("bert", sites))
    model.save_pretrained(folder)


def _load_ms(folder: Path, clock: Callable[[], float]) -> float:
    gc.collect()
    start = clock()
    model = AutoModel.from_pretrained(folder)
    elapsed = (clock() - start) * 1e3
    del model
    return elapsed


def loading_cost() -> dict[str, dict[str, float]]:
    """Milliseconds of `from_pretrained`, and ratios to the dense model of the same round."""
    shares = {"dense": None, "one_unit_less": 1.0, "half": 0.5}
    clocks = {"": time.perf_counter, " (processor)": time.process_time}
    rows: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as root:
        for name, share in shares.items():
            _save(Path(root, name), share)
        for suffix, clock in clocks.items():
            loads = {
                f"{name}{suffix}": partial(_load_ms, Path(root, name), clock) for name in shares
            }
            rows |= in_turn(loads, rounds=ROUNDS, warm_up=2)
    return rows


@click.command()
@click.argument("out", type=click.Path(path_type=Path, dir_okay=False))
def command(out: Path) -> None:
    """Loading a pruned checkpoint over loading the dense one, written to OUT."""
    torch.set_num_threads(1)
    rows = Rows(out)
    for name, row in loading_cost().items():
        rows.add(name, row)
