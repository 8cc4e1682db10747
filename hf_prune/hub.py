"""Sharing: a complete local result goes to the Hub in one commit."""

import json
import re
import tempfile
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, HfApi
from transformers import PreTrainedTokenizerBase

from hf_prune.checkpoint.manifest import verify
from hf_prune.errors import CheckpointError
from hf_prune.report.card import render_card
from hf_prune.report.result import Result, save_result

PARTS = ("plan.json", "recipe.yaml", "report.json", "units.svg")
"""What lies beside the model in a result."""
_NEVER = ("training_args.bin", "optimizer.pt", "scheduler.pt", "rng_state.pth", ".env")
_ALLOWED = (".json", ".safetensors", ".txt", ".jinja", ".model", ".yaml", ".svg", ".md")
_TEXT = (".json", ".txt", ".jinja", ".yaml", ".svg", ".md")
_SECRETS = {
    "a token": re.compile(r"\bhf_[A-Za-z0-9]{30,}"),
    "an access key": re.compile(r"\bAKIA[0-9A-Z]{16}\b"),
    "a home path": re.compile(r"(?:/home/|/Users/|/root/|[A-Z]:\\Users\\)[^\s\"']*"),
}


def check_no_secrets(path: Path) -> None:
    """Refuse a text file with a token, a key or a home path in it.

    Raises:
        CheckpointError: naming the file, and not what was found.
    """
    if path.suffix not in _TEXT:
        return
    text = path.read_text(encoding="utf-8", errors="replace")
    for what, pattern in _SECRETS.items():
        if pattern.search(text):
            raise CheckpointError(
                f"{path.name} has {what} in it: nothing was sent. Remove it first."
            )


def _operations(folder: Path, card: str) -> list[CommitOperationAdd]:
    model = folder / "model"
    verify(model)
    paths = {p.name: p for p in sorted(model.iterdir()) if p.is_file()}
    paths |= {name: folder / name for name in PARTS if (folder / name).is_file()}
    operations = [CommitOperationAdd("README.md", card.encode())]
    for name, path in paths.items():
        if (
            name in _NEVER
            or path.is_symlink()
            or path.suffix not in _ALLOWED
            or name == "README.md"
        ):
            continue
        if name not in ("tokenizer.json", "vocab.txt", "vocab.json", "merges.txt"):
            check_no_secrets(path)  # a vocabulary is not ours, and may hold anything
        operations.append(CommitOperationAdd(name, path))
    return operations


def push_folder(folder: "str | Path", repo_id: str, *, private: bool | None = None) -> str:
    """Push what `save_result` wrote, in one commit. It can be run again after a failure.

    Args:
        folder: with `model/`, `plan.json`, `recipe.yaml` and `report.json`.
        repo_id: `user/name`; created if it is not there.
        private: of a new repository.

    Returns:
        The address of the commit.

    Raises:
        CheckpointError: when the folder is not complete, is damaged, or holds a secret: nothing was
            sent.
    """
    folder = Path(folder)
    try:
        report: dict[str, Any] = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{folder} is not a complete result: {error}") from error
    card = render_card({**report, "repo_id": repo_id}, repo_id)
    operations = _operations(folder, card)
    api = HfApi(library_name="hf_prune")
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    commit = api.create_commit(
        repo_id, operations, commit_message="Upload a model pruned by hf_prune"
    )
    return str(commit.commit_url)


def push_to_hub(
    result: "Result | str | Path",
    repo_id: str,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    private: bool | None = None,
) -> str:
    """Push model, tokenizer, plan, recipe, report, picture and card in one commit.

    Everything is complete on disk before the first request. Log in with `hf auth login`, or set
    `HF_TOKEN`; a token is never an argument, and never in what is sent.

    Args:
        result: of `compress`, or the folder that `save_result` wrote.
        repo_id: `user/name`; created if it is not there.
        tokenizer: of a result in memory that has none.
        private: of a new repository.

    Returns:
        The address of the commit.

    Raises:
        CheckpointError: when a folder is not complete or damaged, or holds a secret: nothing was
            sent.
    """
    if not isinstance(result, Result):
        return push_folder(result, repo_id, private=private)
    with tempfile.TemporaryDirectory() as parent:
        out = Path(parent) / "result"
        if tokenizer is not None:
            result.tokenizer = tokenizer
        save_result(result, out)
        return push_folder(out, repo_id, private=private)
