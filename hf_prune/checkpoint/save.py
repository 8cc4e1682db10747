"""Saving: a complete model folder, or none."""

from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_prune.checkpoint.bitmask import pack_folder
from hf_prune.checkpoint.folder import staged_folder
from hf_prune.checkpoint.manifest import write_manifest
from hf_prune.checkpoint.standalone import write_standalone
from hf_prune.errors import CheckpointError
from hf_prune.statistics.score import check_weights

Storage = Literal["dense", "bitmask"]


def write_model(
    model: PreTrainedModel,
    folder: Path,
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    standalone: bool = False,
    storage: Storage = "dense",
) -> dict[str, int]:
    """Write model, tokenizer and manifest into a folder, whoever makes that atomic.

    Returns:
        With bitmask storage `bytes_dense` and `bytes_stored`; else nothing.

    Raises:
        NumericsError: when a weight is not finite.
        CheckpointError: for a standalone model in bitmask storage, which needs hf_prune to load.
    """
    if standalone and storage == "bitmask":
        raise CheckpointError(
            "bitmask storage is read by hf_prune: a standalone model needs storage='dense'."
        )
    check_weights(model)
    model.save_pretrained(folder)
    sizes = pack_folder(folder, model) if storage == "bitmask" else {}
    if standalone:
        write_standalone(model, folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    write_manifest(folder)
    return sizes


def save_model(
    model: PreTrainedModel,
    out: "str | Path",
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    overwrite: bool = False,
    extra: Mapping[str, str] | None = None,
    standalone: bool = False,
    storage: Storage = "dense",
) -> dict[str, int]:
    """Save a model so that anyone loads it with plain `from_pretrained` after `import hf_prune`.

    Args:
        model: pruned or not.
        out: folder; it is complete or absent at any moment, whatever happens.
        tokenizer: saved beside the model.
        overwrite: replace an existing folder.
        extra: more text files, by name.
        standalone: save a module beside the weights, so that the model also loads without hf_prune,
            by `trust_remote_code=True`.
        storage: `dense`, or `bitmask`: of weights with many zeros only the other values, and one
            bit for each entry.

    Returns:
        With bitmask storage the bytes of the weight files, `bytes_dense` and `bytes_stored`.

    Raises:
        OutputExistsError: when `out` exists and `overwrite` is off: nothing was written.
        NumericsError: when a weight is not finite: nothing was written.
        CheckpointError: when `standalone` cannot be had for such a model: nothing was written.
    """
    with staged_folder(Path(out), overwrite=overwrite) as stage:
        for name, text in (extra or {}).items():
            (stage / name).write_text(text, encoding="utf-8")
        return write_model(model, stage, tokenizer, standalone=standalone, storage=storage)
