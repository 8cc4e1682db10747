"""A saved model with a smaller vocabulary: read, narrowed, proved to say the same, written."""

from pathlib import Path

from transformers import AutoTokenizer

from hf_prune.checkpoint.folder import check_output
from hf_prune.checkpoint.inspect import load_saved
from hf_prune.checkpoint.save import save_model
from hf_prune.checkpoint.standalone import is_standalone
from hf_prune.errors import CheckpointError
from hf_prune.measure.counts import count_parameters
from hf_prune.surgery.vocabulary import Vocabulary
from hf_prune.surgery.vocabulary_stage import prune_checked


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
    done, difference = prune_checked(model, tokenizer, lines, at_least=at_least, at_most=at_most)
    standalone = is_standalone(model)
    save_model(model, out, tokenizer=done.tokenizer, overwrite=overwrite, standalone=standalone)
    return done, [
        f"{len(done.kept)} of {done.before} tokens",
        f"{count_parameters(model)} of {size} parameters",
        f"outputs differ by {difference:.1e} on tokens that are left",
    ]
