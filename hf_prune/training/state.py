"""What must survive a restart, beside a checkpoint of the Trainer: JSON and safetensors.

Two files for each part: tensors first, then a JSON that holds their digest. So a state is complete
or refused, never half.
"""

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from hf_prune.errors import CheckpointError

FOLDER = "hf_prune"
"""Folder of a checkpoint that holds our states."""
STATE_VERSION = 1
"""Version of the format."""
MAX_STATE_BYTES = 1 << 26
"""A larger JSON is refused before it is parsed."""


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sizes(checkpoint: Path) -> dict[str, int]:
    """Sizes of the Trainer's own files."""
    return {
        path.name: path.stat().st_size for path in sorted(checkpoint.iterdir()) if path.is_file()
    }


def note_part(state: Any, part: str) -> None:
    """Tell all callbacks of a training that one of them will keep this part.

    Args:
        state: of the Trainer, which all its callbacks see.
        part: name of the part.
    """
    state.hf_prune_parts = sorted({*parts_of(state), part})


def parts_of(state: Any) -> list[str]:
    """What callbacks of a training keep: a checkpoint without one of them is not complete."""
    return list(getattr(state, "hf_prune_parts", []))


def _write(path: Path, data: bytes) -> None:
    stage = path.with_name(f"{path.name}.tmp-{os.getpid()}")
    with stage.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(stage, path)


def write_state(
    checkpoint: Path,
    part: str,
    data: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    parts: Sequence[str] = (),
) -> None:
    """Write the state of one part into a checkpoint that all processes have just written.

    Args:
        checkpoint: folder of the Trainer's checkpoint.
        part: name of the part.
        data: plain data.
        tensors: by name.
        parts: all parts that the checkpoint will have, from `parts_of`.
    """
    folder = checkpoint / FOLDER
    folder.mkdir(exist_ok=True)
    path = folder / f"{part}.safetensors"
    stage = path.with_name(f"{path.name}.tmp-{os.getpid()}")
    save_file({k: v.detach().cpu().contiguous() for k, v in tensors.items()}, stage)
    os.replace(stage, path)
    whole = {
        "version": STATE_VERSION,
        "tensors": _digest(path),
        "files": _sizes(checkpoint),
        "parts": list(parts),
        "data": dict(data),
    }
    _write(folder / f"{part}.json", json.dumps(whole, allow_nan=False).encode())


def read_state(checkpoint: Path, part: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The state of one part, checked.

    Raises:
        CheckpointError: when it is not there, torn or damaged, or the checkpoint is, or another
            part that belongs to it is not there.
    """
    path = checkpoint / FOLDER / f"{part}.json"
    try:
        if path.stat().st_size > MAX_STATE_BYTES:
            raise CheckpointError(f"{path} is larger than {MAX_STATE_BYTES} bytes.")
        whole = json.loads(path.read_text(encoding="utf-8"))
        if whole["version"] != STATE_VERSION:
            raise CheckpointError(f"{path} is of version {whole['version']}: upgrade hf_prune.")
        weights = path.with_suffix(".safetensors")
        if _digest(weights) != whole["tensors"]:
            raise CheckpointError(f"{weights} is damaged: its SHA-256 is not the one noted.")
        for name, size in whole["files"].items():
            if Path(name).name != name or (checkpoint / name).stat().st_size != size:
                raise CheckpointError(f"{checkpoint / name} is torn: {size} bytes were written.")
        for other in whole["parts"]:
            (checkpoint / FOLDER / f"{other}.json").stat()
        return dict(whole["data"]), load_file(weights)
    except FileNotFoundError as error:
        raise CheckpointError(
            f"{checkpoint} has no complete state of hf_prune ({Path(error.filename).name} is "
            "missing): it was written without the callback, or its writer was killed. Resume from "
            "another checkpoint (last_checkpoint() finds one), or start anew."
        ) from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{path} is damaged: {error}") from error


def _is_complete(checkpoint: Path, *, plain: bool) -> bool:
    states = sorted((checkpoint / FOLDER).glob("*.json"))
    try:
        for path in states:
            read_state(checkpoint, path.stem)
        json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
        for weights in checkpoint.glob("*.safetensors"):
            with safe_open(weights, framework="pt"):
                pass
    except (OSError, ValueError, SafetensorError):
        return False
    return plain or bool(states)


def last_checkpoint(output_dir: "str | os.PathLike[str]", *, plain: bool = False) -> str | None:
    """The newest complete checkpoint of a training with our callbacks, or None.

    Torn ones, which the Trainer would take and fail on, are passed over.

    Args:
        output_dir: of the training.
        plain: accept checkpoints without a state of ours too.
    """
    folders = [
        (int(path.name.rpartition("-")[2]), path)
        for path in Path(output_dir).glob(f"{PREFIX_CHECKPOINT_DIR}-*")
        if path.is_dir() and path.name.rpartition("-")[2].isdecimal()
    ]
    for _, path in sorted(folders, reverse=True):
        if _is_complete(path, plain=plain):
            return str(path)
    return None


def checkpoint_of(args: Any, state: Any, resume_from: "str | os.PathLike[str] | None") -> Path:
    """The folder of the checkpoint that a training resumes from, or has just written."""
    if resume_from is not None:
        return Path(resume_from)
    name = f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
    if getattr(state, "is_hyper_param_search", False):  # each trial has a folder of its own
        trials = Path(args.output_dir).glob(f"*/{name}")
        return max(trials, key=lambda path: path.stat().st_mtime_ns)
    return Path(args.output_dir) / name
