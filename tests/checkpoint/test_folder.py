"""Old or new, never half."""

import json
import os
import random
import signal
import time

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification
from transformers.utils.logging import disable_progress_bar

from hf_prune.checkpoint import folder as folder_module
from hf_prune.checkpoint.folder import STALE_SECONDS, check_output, staged_folder
from hf_prune.checkpoint.manifest import verify
from hf_prune.checkpoint.save import save_model
from hf_prune.errors import CheckpointError, OutputExistsError
from hf_prune.surgery.remove import remove_units


def content(path):
    return {p.name: p.read_bytes() for p in path.iterdir()}


def write(path, text, **options):
    with staged_folder(path, **options) as stage:
        (stage / "a.txt").write_text(text)
        (stage / "b.txt").write_text(text)


def write_half(path, error, **options):
    with staged_folder(path, **options) as stage:
        (stage / "a.txt").write_text("half")
        raise error


def test_new_folder_appears_when_complete(tmp_path):
    out = tmp_path / "deep" / "out"
    with staged_folder(out) as stage:
        (stage / "a.txt").write_text("new")
        assert not out.exists()
    assert content(out) == {"a.txt": b"new"}
    assert list(out.parent.iterdir()) == [out]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_error_leaves_nothing(tmp_path, error):
    out = tmp_path / "out"
    with pytest.raises(error):
        write_half(out, error)
    assert list(tmp_path.iterdir()) == []


def test_an_error_leaves_the_old(tmp_path):
    out = tmp_path / "out"
    write(out, "old")
    with pytest.raises(RuntimeError):
        write_half(out, RuntimeError, overwrite=True)
    assert content(out) == {"a.txt": b"old", "b.txt": b"old"}
    assert list(tmp_path.iterdir()) == [out]


def test_existing_output_is_refused(tmp_path):
    out = tmp_path / "out"
    write(out, "old")
    with pytest.raises(OutputExistsError, match=r"out exists and is not empty.*overwrite=True"):
        write(out, "new")
    assert content(out) == {"a.txt": b"old", "b.txt": b"old"}
    assert list(tmp_path.iterdir()) == [out]


@pytest.mark.parametrize("exchange", [True, False])
def test_overwrite_replaces_all_of_it(tmp_path, exchange, monkeypatch):
    if not exchange:  # as on systems that cannot swap two folders
        monkeypatch.setattr(folder_module, "_exchange", lambda new, old: False)
    out = tmp_path / "out"
    write(out, "old")
    (out / "more.txt").write_text("old")
    write(out, "new", overwrite=True)
    assert content(out) == {"a.txt": b"new", "b.txt": b"new"}
    assert list(tmp_path.iterdir()) == [out]


def test_an_empty_folder_needs_no_permission(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    write(out, "new")
    assert content(out) == {"a.txt": b"new", "b.txt": b"new"}


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o027, 0o640)])
def test_modes_follow_the_umask(tiny, tmp_path, umask, mode):
    old = os.umask(umask)
    try:
        save_model(tiny("bert"), tmp_path / "out")
    finally:
        os.umask(old)
    modes = {p.name: p.stat().st_mode & 0o777 for p in (tmp_path / "out").iterdir()}
    assert modes["model.safetensors"] == mode
    assert set(modes.values()) == {mode}


def test_a_link_is_refused(tmp_path):
    target, link = tmp_path / "target", tmp_path / "link"
    write(target, "old")
    link.symlink_to(target)
    with pytest.raises(CheckpointError, match="link is a symbolic link"):
        write(link, "new", overwrite=True)
    assert link.is_symlink()
    assert content(target) == {"a.txt": b"old", "b.txt": b"old"}


def test_a_file_is_refused(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(CheckpointError, match="file exists and is not a folder"):
        write(path, "new", overwrite=True)
    assert path.read_text() == "old"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_without_permission_is_refused(tmp_path):
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(CheckpointError, match="cannot be written by this user"):
            check_output(tmp_path / "out", overwrite=False)
    finally:
        tmp_path.chmod(0o700)


def gone():
    """The number of a process that has ended."""
    child = os.fork()
    if not child:
        os._exit(0)
    os.waitpid(child, 0)
    return child


def leave(path, age):
    """A folder that was last changed so many seconds ago."""
    path.mkdir()
    (path / "a.txt").write_text("left")
    for item in (path / "a.txt", path):
        os.utime(item, (time.time() - age, time.time() - age))


def test_stages_of_killed_processes_are_removed(tmp_path):
    out = tmp_path / "out"
    dead, old = gone(), STALE_SECONDS + 60
    leave(tmp_path / f"out.tmp-{dead}-0123abcd", old)
    stays = {f"out.tmp-{dead}-2123abcd", f"out.tmp-{os.getpid()}-3123abcd", "out.tmp-x", "out2"}
    leave(tmp_path / f"out.tmp-{dead}-2123abcd", 10)  # its process may live on another machine
    leave(tmp_path / f"out.tmp-{os.getpid()}-3123abcd", old)
    leave(tmp_path / "out.tmp-x", old)
    leave(tmp_path / "out2", old)
    write(out, "old")
    leave(tmp_path / f"out.tmp-{dead}-1123abcd.old", old)
    write(out, "new", overwrite=True)
    assert {path.name for path in tmp_path.iterdir()} == {"out", *stays}
    assert content(out) == {"a.txt": b"new", "b.txt": b"new"}


def test_a_kill_between_two_renames_is_undone(tmp_path, monkeypatch):
    """Where folders cannot be swapped: the old folder lies beside, and none is in its place."""
    monkeypatch.setattr(folder_module, "_exchange", lambda new, old: False)
    out = tmp_path / "out"
    write(out, "old")
    aside = tmp_path / f"out.tmp-{gone()}-0123abcd.old"
    os.replace(out, aside)
    with pytest.raises(OutputExistsError, match="out exists and is not empty"):
        write(out, "new")
    assert content(out) == {"a.txt": b"old", "b.txt": b"old"}
    assert list(tmp_path.iterdir()) == [out]


def _save_for_ever(models, out):
    while True:
        for model in models:
            save_model(model, out, overwrite=True)


def test_killed_at_any_moment(tiny, uneven_plan, tmp_path):
    """`kill -9` while two shapes are saved in turn: what is there loads and verifies."""
    dense, pruned = tiny("bert"), tiny("bert")
    remove_units(pruned, uneven_plan(pruned))
    out = tmp_path / "out"
    save_model(dense, out)
    counts = {sum(p.numel() for p in model.parameters()) for model in (dense, pruned)}
    assert len(counts) == 2
    generator = random.Random(0)
    seen = set()
    for turn in range(100):
        if turn >= 12 and seen == counts:  # a busy machine may need more turns to replace anything
            break
        child = os.fork()
        if not child:
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            signal.alarm(10)  # never outlive the test
            disable_progress_bar()  # its lock is shared with the parent: killed, it stays locked
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, 1)
            os.dup2(null, 2)
            try:
                _save_for_ever((pruned, dense), out)
            finally:
                os._exit(1)
        time.sleep(generator.uniform(0.005, 0.2))
        os.kill(child, signal.SIGKILL)
        assert os.waitpid(child, 0)[1] == signal.SIGKILL, "the child had to be saving until then"
        assert "model.safetensors" in verify(out)
        saved = load_file(out / "model.safetensors")
        shapes = json.loads((out / "config.json").read_text()).get("quantization_config", {})
        for name, size in shapes.get("modules", {}).items():
            assert list(saved[f"bert.{name}.weight"].shape) == [size["out"], size["in"]]
        loaded = AutoModelForSequenceClassification.from_pretrained(out)
        assert all(torch.equal(saved[name], p) for name, p in loaded.named_parameters())
        seen.add(sum(p.numel() for p in loaded.parameters()))
        assert seen <= counts
    assert seen == counts, "both shapes were met, so something was replaced"
