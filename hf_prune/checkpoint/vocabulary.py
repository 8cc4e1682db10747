"""A saved model with a smaller vocabulary: read, narrowed, proved to say the same, written."""

from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedModel

from hf_prune.checkpoint.folder import check_output
from hf_prune.checkpoint.inspect import load_saved
from hf_prune.checkpoint.save import save_model
from hf_prune.checkpoint.standalone import is_standalone
from hf_prune.errors import CheckpointError, NumericsError
from hf_prune.measure.counts import count_parameters
from hf_prune.statistics.example import example_batch
from hf_prune.surgery.vocabulary import Vocabulary, choose_tokens, count_tokens, prune_vocabulary

_PROBE = 16
_OUTPUTS = ("logits", "logits_per_image", "last_hidden_state")


def _say(model: PreTrainedModel, tokens: list[int]) -> Tensor:
    """What a model says about some tokens: logits or hidden states."""
    batch = example_batch(model, 1, len(tokens))
    for name in ("input_ids", "decoder_input_ids"):
        if name in batch:
            batch[name] = torch.tensor([tokens], device=model.device)  # [1, T]
    with torch.no_grad():
        output = model.eval()(**batch)
    found: Tensor = next(output[key] for key in _OUTPUTS if key in output)
    return found


def _check_same(before: Tensor, after: Tensor, kept: tuple[int, ...]) -> float:
    """The largest difference between two outputs, those of tokens that went left out.

    Raises:
        NumericsError: when it is not small.
    """
    if before.shape != after.shape:
        before = before[..., list(kept)]
    difference = float((before - after).abs().max())
    tolerance = 1e-4 if before.dtype == torch.float32 else 2e-2
    if not difference <= tolerance * max(1.0, float(before.abs().max())):
        raise NumericsError(
            f"with the smaller vocabulary the model says something else: outputs differ by "
            f"{difference:.2e}. Nothing was written."
        )
    return difference


def prune_saved_vocabulary(
    source: "str | Path",
    texts: Path,
    out: "str | Path",
    *,
    at_least: int = 1,
    at_most: int | None = None,
    overwrite: bool = False,
) -> tuple[Vocabulary, list[str]]:
    """Remove from a saved model, and from its tokenizer, the tokens that some texts do not need.

    Before it is written, the model is run on tokens that are left, and compared with what it was.

    Args:
        source: folder, or repository on the Hub, of a model with its fast tokenizer.
        texts: a file with one text a line, in UTF-8.
        out: folder for model and tokenizer; complete or absent.
        at_least: a token that occurs as often stays.
        at_most: of these, only the most frequent stay.
        overwrite: replace an existing folder.

    Returns:
        What is left, and what was found, one line each.

    Raises:
        CheckpointError: when the model, its tokenizer or the texts cannot be read.
        NumericsError: when the model would say something else: nothing was written.
        OutputExistsError: when `out` exists and `overwrite` is off.
    """
    check_output(Path(out), overwrite=overwrite)
    model = load_saved(source)
    size = count_parameters(model)
    try:
        tokenizer = AutoTokenizer.from_pretrained(source)
        lines = texts.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as error:
        raise CheckpointError(f"tokenizer or texts cannot be read: {error}") from error
    counts = count_tokens(tokenizer, lines)
    chosen = set(choose_tokens(tokenizer, counts, at_least=at_least, at_most=at_most))
    probe = [token for token, _ in counts.most_common() if token in chosen][:_PROBE]
    before = _say(model, probe)
    done = prune_vocabulary(model, tokenizer, counts, at_least=at_least, at_most=at_most)
    new = {old: index for index, old in enumerate(done.kept)}
    probe = [new[token] for token in probe]
    difference = _check_same(before, _say(model, probe), done.kept)
    standalone = is_standalone(model)
    save_model(model, out, tokenizer=done.tokenizer, overwrite=overwrite, standalone=standalone)
    return done, [
        f"{len(done.kept)} of {done.before} tokens",
        f"{count_parameters(model)} of {size} parameters",
        f"outputs differ by {difference:.1e} on tokens that are left",
    ]
