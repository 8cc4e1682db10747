"""The manifest finds what is damaged, and is not fooled."""

import json

import pytest

from hf_prune.checkpoint.manifest import MANIFEST, sha256, verify, write_manifest
from hf_prune.errors import CheckpointError


@pytest.fixture
def folder(tmp_path):
    path = tmp_path / "model"
    path.mkdir()
    (path / "config.json").write_text("{}")
    (path / "model.safetensors").write_bytes(bytes(range(256)) * 8)
    write_manifest(path)
    return path


def rewrite(folder, change):
    path = folder / MANIFEST
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))


def test_known_digest(tmp_path):
    path = tmp_path / "abc"
    path.write_bytes(b"abc")
    assert sha256(path) == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


def test_a_good_folder(folder):
    assert sorted(verify(folder)) == ["config.json", "model.safetensors"]
    assert sorted(verify(str(folder))) == ["config.json", "model.safetensors"]


@pytest.mark.parametrize("position", [0, 1000, 2047])
def test_a_flipped_bit(folder, position):
    path = folder / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match=r"model\.safetensors has another SHA-256"):
        verify(folder)


def test_a_truncation(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match="has 2047 bytes, the manifest says 2048"):
        verify(folder)


def test_a_missing_file(folder):
    (folder / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"config\.json is in the manifest and not in"):
        verify(folder)


@pytest.mark.parametrize(
    "name", ["../secret", "/etc/hostname", "a/b", "a\\b", "..", ".", "", "a\0b"]
)
def test_a_name_that_leaves_the_folder(folder, name):
    (folder.parent / "secret").write_text("x")
    rewrite(folder, lambda data: data["files"].update({name: {"bytes": 1, "sha256": "0"}}))
    with pytest.raises(CheckpointError, match=r"not the plain name of a file|not in the folder"):
        verify(folder)


def test_a_link_out_of_the_folder(folder):
    path = folder / "model.safetensors"
    target = folder.parent / "elsewhere"
    path.rename(target)
    path.symlink_to(target)
    with pytest.raises(CheckpointError, match="not the plain name of a file"):
        verify(folder)


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{}", '{"version": 2, "files": {}}', '{"version": 1, "files": []}', "[" * 10**5],
)
def test_something_else_than_a_manifest(folder, text):
    (folder / MANIFEST).write_text(text)
    with pytest.raises(CheckpointError, match=r"cannot be read|not a manifest of version 1"):
        verify(folder)


@pytest.mark.parametrize("entry", [None, 3, [], {}, {"bytes": "2048"}])
def test_an_entry_of_another_kind(folder, entry):
    rewrite(folder, lambda data: data["files"].update({"model.safetensors": entry}))
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        verify(folder)


def test_no_manifest(tmp_path):
    with pytest.raises(CheckpointError, match="cannot be read"):
        verify(tmp_path)
