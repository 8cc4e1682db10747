"""Names that nobody knows: a suggestion, and all the names there are."""

import difflib
import fnmatch
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from hf_prune.errors import ConfigError

TASK_PARTS = frozenset(
    {
        *("classification_head", "classifier", "cls", "embed_out", "lm_head", "pooler"),
        *("pre_classifier", "predictions", "qa_outputs", "score", "vocab_projector"),
    }
)
"""What transformers calls the parts that depend on the task. A pattern that speaks of one can be
meant for several tasks, and fits nothing in a model that has no such part."""


def did_you_mean(name: str, known: Sequence[str], others: Collection[str] = ()) -> str:
    """The end of a message about an unknown name: a suggestion, and all the names there are.

    Args:
        name: the unknown one.
        known: all are listed.
        others: are suggested too, but not listed.
    """
    close = difflib.get_close_matches(name, [*known, *others], n=1)
    hint = f"; did you mean {close[0]!r}?" if close else "."
    return f"{hint} Known: {', '.join(known)}."


def _fits(pattern: str, names: Collection[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for name in names)


@dataclass(frozen=True)
class Names:
    """What patterns can speak of in one model.

    Attributes:
        known: what can be left alone.
        also: other names of the same, such as classes.
        holding: modules that hold some of it, but are none: a pattern that fits nothing else
            protects nothing of what is in them.
        others: the rest of the model.
    """

    known: Sequence[str]
    also: Collection[str]
    holding: Collection[str]
    others: Collection[str]

    def check_ignored(self, patterns: Sequence[str]) -> None:
        """Refuse patterns that leave nothing alone, though they were meant to.

        A pattern may fit parts that are not prunable, or speak of a part of another task.

        Raises:
            ConfigError: naming the pattern, the closest name and what is known.
        """
        for pattern in patterns:
            if _fits(pattern, self.known) or _fits(pattern, self.also):
                continue
            others = {*self.also, *self.holding, *self.others} - {pattern}
            end = did_you_mean(pattern, self.known, others)
            if _fits(pattern, self.holding):
                inside = f"{pattern}.*"
                if _fits(inside, self.known):
                    end = f": write {inside!r}."
                raise ConfigError(
                    f"ignore: the pattern {pattern!r} fits something that holds what is pruned, "
                    f"but nothing that can be left alone by that name{end}"
                )
            task = TASK_PARTS & {part.strip("*?") for part in pattern.split(".")}
            if not task and not _fits(pattern, self.others):
                raise ConfigError(f"ignore: nothing is called {pattern!r}{end}")
