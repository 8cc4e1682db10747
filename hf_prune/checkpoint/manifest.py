"""The manifest: size and SHA-256 of every file of a saved model, written last."""

import hashlib
import json
from pathlib import Path
from typing import Any

from hf_prune.errors import CheckpointError

MANIFEST = "hf_prune_manifest.json"
"""Name of the manifest in a saved model."""
MAX_MANIFEST_BYTES = 1 << 24
"""A manifest larger than this is refused before it is parsed."""
_BLOCK = 1 << 20


def sha256(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()


def write_manifest(folder: Path) -> None:
    """Describe all files that lie in a folder now."""
    files = {
        path.name: {"bytes": path.stat().st_size, "sha256": sha256(path)}
        for path in sorted(folder.iterdir())
        if path.is_file() and path.name != MANIFEST
    }
    text = json.dumps({"version": 1, "files": files}, indent=1)
    (folder / MANIFEST).write_text(text + "\n", encoding="utf-8")


def _read(folder: Path) -> dict[str, Any]:
    path = folder / MANIFEST
    try:
        if path.stat().st_size > MAX_MANIFEST_BYTES:
            raise CheckpointError(f"{path} is larger than {MAX_MANIFEST_BYTES} bytes.")
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    files = data.get("files") if isinstance(data, dict) and data.get("version") == 1 else None
    if not isinstance(files, dict):
        raise CheckpointError(f"{path} is not a manifest of version 1.")
    return files


def verify(folder: "str | Path") -> list[str]:
    """Compare a saved model with its manifest.

    Returns:
        The names of the files that were checked.

    Raises:
        CheckpointError: naming the first file that is missing, of another size or content, or whose
            name would leave the folder.
    """
    folder = Path(folder)
    files = _read(folder)
    for name, expected in files.items():
        path = folder / name
        if Path(name).name != name or "\0" in name or path.is_symlink() or "\\" in name:
            raise CheckpointError(
                f"{MANIFEST}: {name!r} is not the plain name of a file in the folder."
            )
        if not isinstance(expected, dict) or not path.is_file():
            raise CheckpointError(f"{path} is in the manifest and not in the folder.")
        if path.stat().st_size != expected.get("bytes"):
            raise CheckpointError(
                f"{path} has {path.stat().st_size} bytes, the manifest says "
                f"{expected.get('bytes')}: it was cut short or changed. Save or download it again."
            )
        if sha256(path) != expected.get("sha256"):
            raise CheckpointError(
                f"{path} has another SHA-256 than the manifest says: it was damaged or changed."
            )
    return list(files)
