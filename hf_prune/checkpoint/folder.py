"""Folders written as a whole: the old or the new one is on disk at any moment, never a half.

What is written goes into a sibling folder first. When it is complete it is flushed to disk and
takes the place of the old one in one step.
"""

import ctypes
import os
import re
import secrets
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from hf_prune.errors import CheckpointError, OutputExistsError

STALE_SECONDS = 3600.0
"""A stage of a process that is gone is left alone for so long: it may live on another machine."""
_RENAME_EXCHANGE = 2
_AT_FDCWD = -100


def check_output(out: Path, *, overwrite: bool) -> None:
    """Refuse an output folder that must not be written, before hours of work.

    Raises:
        OutputExistsError: when it exists and `overwrite` is off.
        CheckpointError: when it is not a folder, or cannot be written.
    """
    if out.is_symlink():
        raise CheckpointError(f"{out} is a symbolic link: name the folder that it points to.")
    if out.exists() and not out.is_dir():
        raise CheckpointError(f"{out} exists and is not a folder: choose another output folder.")
    if out.exists() and any(out.iterdir()) and not overwrite:
        raise OutputExistsError(
            f"{out} exists and is not empty. Nothing was written. Choose another folder, or allow "
            "it to be replaced with overwrite=True (on the command line: --overwrite)."
        )
    parent = next(p for p in (out, *out.absolute().parents) if p.exists())
    if not os.access(parent, os.W_OK):
        raise CheckpointError(f"{parent} cannot be written by this user.")


def _exchange(new: Path, old: Path) -> bool:
    """Swap two folders in one step, where the system can (Linux)."""
    if sys.platform != "linux":
        return False
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if renameat2 is None:
        return False
    arguments = (_AT_FDCWD, os.fsencode(new), _AT_FDCWD, os.fsencode(old), _RENAME_EXCHANGE)
    return bool(renameat2(*arguments) == 0)


def _replace(new: Path, out: Path) -> None:
    if not out.exists():
        os.replace(new, out)
    elif _exchange(new, out):
        shutil.rmtree(new)
    else:
        aside = new.with_name(new.name + ".old")
        os.replace(out, aside)
        os.replace(new, out)
        shutil.rmtree(aside)


def _runs(pid: int) -> bool:
    """Whether there is a process of this number here."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:  # it runs, as another user
        return True
    return True


def _is_old(stage: Path) -> bool:
    """Whether nothing in it has changed for a while."""
    newest = max(path.lstat().st_mtime for path in (stage, *stage.rglob("*")))
    return time.time() - newest > STALE_SECONDS


def recover(out: Path) -> None:
    """Put right what a kill has left beside an output folder.

    Where folders cannot be swapped in one step, a kill between two renames leaves no folder: the
    old one lies beside, and comes back. Stages of processes that are long gone are removed.
    """
    pattern = re.compile(re.escape(out.name) + r"\.tmp-(\d+)-[0-9a-f]{8}(\.old)?")
    if not out.parent.is_dir():
        return
    for path in sorted(out.parent.iterdir()):
        match = pattern.fullmatch(path.name)
        if match is None or path.is_symlink() or not path.is_dir():
            continue
        if _runs(int(match[1])):
            continue
        if match[2] and not out.exists():
            os.replace(path, out)
        elif _is_old(path):
            shutil.rmtree(path)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _settle(folder: Path) -> None:
    """Give all files the mode that the umask asks for (safetensors writes 0600), and flush them."""
    probe = folder / ".mode"
    os.close(os.open(probe, os.O_CREAT | os.O_WRONLY, 0o666))
    mode = probe.stat().st_mode & 0o777
    probe.unlink()
    for path in sorted(folder.rglob("*"), reverse=True):
        if path.is_file():
            path.chmod(mode)
        _flush(path)
    _flush(folder)


@contextmanager
def staged_folder(out: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """A folder to write into, which becomes `out` when the block ends without an error.

    Raises:
        OutputExistsError: when `out` exists, is not empty, and `overwrite` is off.
        CheckpointError: when `out` cannot be written.
    """
    recover(out)
    check_output(out, overwrite=overwrite)
    out.parent.mkdir(parents=True, exist_ok=True)
    stage = out.parent / f"{out.name}.tmp-{os.getpid()}-{secrets.token_hex(4)}"
    stage.mkdir()
    try:
        yield stage
        _settle(stage)
        if out.exists() and not any(out.iterdir()):
            out.rmdir()
        _replace(stage, out)
        _flush(out.parent)
    finally:
        if stage.exists():
            shutil.rmtree(stage)
