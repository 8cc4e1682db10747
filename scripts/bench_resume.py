"""Trainings that are killed at random moments and resumed, beside one that ran through.

A real process trains a tiny model, writes checkpoints all the time, and saves the small model at
its end. It is killed with SIGKILL, on two processes sometimes only one of the two; then another
process goes on from the newest complete checkpoint. Plan, weights and the saved file must be those
of the training that ran through, bit by bit.
"""

import hashlib
import json
import multiprocessing
import os
import random
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import click
import torch
from accelerate import PartialState, debug_launcher
from bench_rows import Rows
from datasets import Dataset
from safetensors.torch import load_file
from tiny_training import STEPS, rows_of, tiny_bert
from transformers import Trainer, TrainingArguments

from hf_prune import DistillCallback, PruneCallback, last_checkpoint, prepare_trainer, save_model

KINDS: dict[str, dict[str, Any]] = {
    "scored": {"criterion": "taylor", "solver": "global", "schedule": {"every": 2, "end": 0.7}},
    "l0": {"solver": "global", "masks": "l0", "schedule": {"every": 1, "end": 0.7}},
    "weights": {
        "units": ["weights"],
        "criterion": "magnitude",
        "solver": "global",
        "schedule": {"every": 2, "end": 0.7},
    },
}
"""Stages that are killed, with a criterion that training has at hand."""
PATIENCE = 300.0
"""Seconds after which a training is taken for stuck."""


def _recipe(kind: str) -> dict[str, Any]:
    stage = {"stage": "prune", "sparsity": 0.5, "criterion": "taylor", **KINDS[kind]}
    return {"stages": [stage, {"stage": "train"}]}


def _digest(tensors: dict[str, torch.Tensor]) -> str:
    found = hashlib.sha256()
    for name, value in sorted(tensors.items()):
        found.update(name.encode() + value.detach().contiguous().numpy().tobytes())
    return found.hexdigest()


def _write(path: Path, data: dict[str, str]) -> None:
    stage = path.with_suffix(".part")
    stage.write_text(json.dumps(data), encoding="utf-8")
    stage.replace(path)


def _job(folder: str, kind: str) -> None:
    """What each process does: resume if there is something to resume from, train, save."""
    torch.set_num_threads(1)
    state = PartialState(cpu=True)
    student: Any = tiny_bert()
    pruning = PruneCallback(_recipe(kind))
    teaching = DistillCallback(tiny_bert(seed=1), alpha=0.5, hidden=0.5, layers="ordered")
    arguments = TrainingArguments(
        f"{folder}/checkpoints",
        per_device_train_batch_size=16 // state.num_processes,
        max_steps=STEPS,
        learning_rate=1e-3,
        save_strategy="steps",
        save_steps=2,
        save_total_limit=3,
        logging_steps=5,
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
    )
    data = Dataset.from_dict(rows_of(96))
    trainer = Trainer(student, arguments, train_dataset=data, callbacks=[pruning, teaching])
    newest = last_checkpoint(f"{folder}/checkpoints")
    state.wait_for_everyone()  # nobody writes while another looks
    prepare_trainer(trainer).train(resume_from_checkpoint=newest)
    assert pruning.plan is not None  # noqa: S101  # training has ended
    if state.is_main_process:
        save_model(student, f"{folder}/model", overwrite=True)
    found = {"plan": pruning.plan.fingerprint(), "weights": _digest(student.state_dict())}
    _write(Path(folder, f"done-{state.process_index}.json"), found)


def _main(folder: str, kind: str, processes: int) -> None:
    """The process that is started, and killed: a group of its own, its words in a file."""
    os.setsid()
    log = os.open(f"{folder}/log.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    if processes == 1:
        _job(folder, kind)
    else:
        debug_launcher(_job, args=(folder, kind), num_processes=processes)


@contextmanager
def _started(folder: Path, kind: str, processes: int) -> Iterator[BaseProcess]:
    """A running training; nothing of it is left afterwards."""
    context = multiprocessing.get_context("fork")  # imports are done already
    folder.mkdir(exist_ok=True)
    process = context.Process(target=_main, args=(str(folder), kind, processes))
    process.start()
    try:
        yield process
    finally:
        _kill_all(process)


def _kill_all(process: BaseProcess) -> None:
    assert process.pid is not None  # noqa: S101  # it was started
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    if process.is_alive():
        os.kill(process.pid, signal.SIGKILL)
    process.join()


def _kill_one(process: BaseProcess, draw: random.Random) -> None:
    """Kill one of the ranks, if they run already; the others must end by themselves."""
    path = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    ranks = path.read_text(encoding="ascii").split() if path.exists() else []
    if ranks:
        with suppress(ProcessLookupError):
            os.kill(int(draw.choice(ranks)), signal.SIGKILL)
        process.join(PATIENCE)
        if process.is_alive():
            raise SystemExit(f"a rank died, and the other went on for {PATIENCE} s.")


def _result(folder: Path, processes: int) -> dict[str, str] | None:
    """What all ranks ended with, and what lies on disk; None as long as they have not ended."""
    found = []
    for rank in range(processes):
        path = folder / f"done-{rank}.json"
        if not path.is_file():
            return None
        found.append(json.loads(path.read_text(encoding="utf-8")))
    if any(each != found[0] for each in found):
        return {"ranks": "differ"}
    return {**found[0], "saved": _saved(folder)}


def _saved(folder: Path) -> str:
    """A digest of the saved model, or what is wrong with it."""
    if not (folder / "model").exists():
        return "missing"
    try:
        return _digest(load_file(folder / "model" / "model.safetensors"))
    except (OSError, ValueError) as error:
        return f"half: {error}"


def _through(folder: Path, kind: str, processes: int) -> dict[str, str]:
    """Train to the end."""
    with _started(folder, kind, processes) as process:
        process.join(PATIENCE)
    found = _result(folder, processes)
    if found is None:
        log = (folder / "log.txt").read_text(encoding="utf-8")
        raise SystemExit(f"{folder.name} did not end:\n{log[-3000:]}")
    return found


def _newest_is_torn(folder: Path) -> bool:
    """Whether the newest folder is not what the training is resumed from."""
    written = [int(path.name.rpartition("-")[2]) for path in folder.glob("checkpoints/*-*")]
    newest = last_checkpoint(folder / "checkpoints")
    return bool(written) and (newest is None or not newest.endswith(f"-{max(written)}"))


def killed_and_resumed(kind: str, processes: int, kills: int, seed: int) -> dict[str, Any]:
    """How many of so many killed and resumed trainings ended as the one that ran through."""
    draw = random.Random(seed)
    row = {"kills": 0, "identical": 0, "torn_checkpoints": 0, "half_models": 0, "too_late": 0}
    with tempfile.TemporaryDirectory() as root:
        start = time.monotonic()
        expected = _through(Path(root, "whole"), kind, processes)
        seconds = time.monotonic() - start
        for number in range(10 * kills):
            folder = Path(root, f"{number}")
            with _started(folder, kind, processes) as process:
                process.join(draw.uniform(0, seconds))
                if processes > 1 and number % 2:
                    _kill_one(process, draw)
            if _result(folder, processes) is not None:
                row["too_late"] += 1
                continue
            row["kills"] += 1
            row["torn_checkpoints"] += _newest_is_torn(folder)
            row["half_models"] += _saved(folder) not in ("missing", expected["saved"])
            found = _through(folder, kind, processes)
            row["identical"] += found == expected
            if found != expected:
                print(kind, processes, number, found, expected, file=sys.stderr)
            if row["kills"] == kills:
                break
    return {**row, "plan": expected["plan"], "weights": expected["weights"]}


def _forget_launcher() -> None:
    """Nothing that a process group of this shell set may reach the trainings."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        os.environ.pop(name, None)


@click.command()
@click.argument("out", type=click.Path(path_type=Path, dir_okay=False))
@click.option("--kills", default=10, show_default=True, help="Random moments of each kind.")
@click.option("--seed", default=0, show_default=True, help="Of these moments.")
def command(out: Path, kills: int, seed: int) -> None:
    """Killed and resumed trainings against one that ran through, written to OUT."""
    torch.set_num_threads(1)
    _forget_launcher()
    rows = Rows(out)
    for processes in (1, 2):
        for kind in KINDS:
            key = f"{processes} process{'es' if processes > 1 else ''}, {kind}"
            if key not in rows:
                rows.add(key, killed_and_resumed(kind, processes, kills, seed))
