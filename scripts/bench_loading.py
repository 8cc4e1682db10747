"""What loading a pruned checkpoint costs over loading the dense one.

A BERT of the base size with random weights: dense, with one unit of every site gone (as many bytes,
and every module narrowed), and with half of the units gone. Loads in turn, from warm files.
"""

import json
import statistics
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

import click
import torch
from transformers import AutoModel, BertConfig, BertModel

from hf_prune.plan import Plan, SitePlan
from hf_prune.report.result import environment
from hf_prune.sites import find_sites
from hf_prune.surgery.remove import remove_units

ROUNDS = 15


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


def loading_cost() -> Mapping[str, object]:
    """Milliseconds of `from_pretrained`, and ratios to the dense model of the same round."""
    shares = {"dense": None, "one_unit_less": 1.0, "half": 0.5}
    times: dict[str, list[float]] = {name: [] for name in shares}
    with tempfile.TemporaryDirectory() as root:
        for name, share in shares.items():
            _save(Path(root, name), share)
        for turn in range(ROUNDS + 2):
            for name, values in times.items():
                start = time.perf_counter()
                AutoModel.from_pretrained(Path(root, name))
                if turn >= 2:
                    values.append((time.perf_counter() - start) * 1e3)
    ratios = {
        name: statistics.median(a / b for a, b in zip(values, times["dense"], strict=True))
        for name, values in times.items()
    }
    medians = {name: statistics.median(values) for name, values in times.items()}
    return {"median_ms": medians, "ratio_to_dense": ratios, "rounds": ROUNDS}


@click.command()
@click.argument("out", type=click.Path(path_type=Path, dir_okay=False))
def command(out: Path) -> None:
    """Loading a pruned checkpoint over loading the dense one, written to OUT."""
    torch.set_num_threads(1)
    report = {"environment": environment(), "loading": loading_cost()}
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(report["loading"], indent=1))
