"""A folder in which every finished layer of a walk is kept, so that an interrupted run goes on."""

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from hf_prune.errors import CheckpointError, ConfigError


def digest_of(values: Iterable[Any]) -> str:
    """SHA-256 of tensors, in dicts and tuples or not, and of text: what a run is made of."""
    digest = hashlib.sha256()
    for value in values:
        if isinstance(value, Tensor):
            digest.update(f"{list(value.shape)} {value.dtype}\n".encode())
            data = value.detach().cpu().contiguous().view(-1)
            digest.update(data.view(torch.uint8).numpy().tobytes())
        elif isinstance(value, Mapping):
            digest.update(
                digest_of(part for name in sorted(value) for part in (name, value[name])).encode()
            )
        elif isinstance(value, tuple | list):
            digest.update(digest_of(value).encode())
        else:
            digest.update(f"{value}\n".encode())
    return digest.hexdigest()


def check_alone() -> None:
    """Refuse to keep progress of several processes.

    Raises:
        ConfigError: when there are some.
    """
    if PartialState().num_processes > 1:
        raise ConfigError("progress is kept on one process: leave it out on several.")


@dataclass(frozen=True)
class Progress:
    """Where finished layers are kept.

    `key` says what the run is; what another run left is refused.
    """

    folder: Path
    key: str

    def _path(self, layer: str) -> Path:
        return self.folder / f"{layer}.safetensors"

    def save(self, layer: str, tensors: Mapping[str, Tensor], errors: Mapping[str, float]) -> None:
        """Keep what a layer became; complete or absent, whatever happens."""
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self._path(layer)
        notes = {"key": self.key, "errors": json.dumps(errors)}
        save_file({k: v.contiguous() for k, v in tensors.items()}, path.with_suffix(".part"), notes)
        path.with_suffix(".part").replace(path)

    def load(self, layer: str) -> tuple[dict[str, Tensor], dict[str, float]] | None:
        """What an earlier run made of a layer, if it got that far.

        Raises:
            CheckpointError: when that run was another one.
        """
        path = self._path(layer)
        if not path.is_file():
            return None
        with safe_open(path, framework="pt") as file:
            notes = file.metadata() or {}
            if notes.get("key") != self.key:
                raise CheckpointError(
                    f"{path} is from a run with another model, recipe or data. Empty the folder, "
                    "or go on with the same ones."
                )
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # no dict
            return tensors, json.loads(notes["errors"])
