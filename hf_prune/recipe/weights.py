"""How single weights are chosen, and what the others become."""

import re
from typing import Literal

from pydantic import Field, field_validator

from hf_prune.recipe.model import Model

ITERATIONS = 12
"""Default iterations of ADMM."""
PENALTY = 0.5
"""Default penalty of ADMM, where every input has mean square one."""
REFIT_STEPS = 10
"""Default conjugate-gradient steps of a re-fit."""


def split_pattern(text: str) -> tuple[str, int, int]:
    """The kind of a pattern, `unstructured`, `n:m` or `block`, and its two numbers, or zeros.

    Raises:
        ValueError: for anything else, or an n that is not in [1, m).
    """
    if text == "unstructured":
        return text, 0, 0
    match = re.fullmatch(r"([1-9][0-9]{0,3})([:x])([1-9][0-9]{0,3})", text)
    if match is None:
        raise ValueError(
            f"unknown pattern {text!r}: write unstructured, n:m such as 2:4, or rows x columns of "
            "a block such as 4x4."
        )
    first, second = int(match[1]), int(match[3])
    if match[2] == "x":
        return "block", first, second
    if first >= second:
        raise ValueError(f"pattern {text!r} keeps {first} of {second}: nothing would go.")
    return "n:m", first, second


class Weights(Model):
    """How single weights are chosen, and what the others become."""

    criterion: str | None = None
    """Where weights share a stage with heads or neurons, whose `criterion` is that of the stage: a
    key of `hf_prune.weights.problem.CRITERIA`; `admm`, if not given."""
    solver: str | None = None
    """In such a stage, as `solver` of a stage of weights alone; `uniform`, if not given."""
    pattern: str = "unstructured"
    """Where zeros may be: `unstructured`, `n:m` (`2:4`: two of four neighbours stay), or blocks of
    rows x columns (`4x1`). Neighbours are those of a row of `[outputs, inputs]`; of a convolution
    `[outputs, inputs x kernel]`, as it is stored."""
    threshold_std: float | None = Field(default=None, gt=0)
    """In the place of `sparsity`, with `criterion: magnitude` or `magnitude_sigma`: every weight
    goes that is smaller than this many standard deviations of its matrix (arXiv:1506.02626). The
    report says which sparsity follows."""
    rank: Literal["auto", "row", "matrix"] = "auto"
    """Which entries of a matrix are ranked together. `auto`: rows in models that generate, where
    that was measured to be better, else the whole matrix."""
    dense_target: bool = True
    """Fit to what the dense network computed from its own inputs, so that what earlier layers lost
    is repaired too."""
    targets: tuple[str, ...] = ()
    """Shell patterns of the parameters, modules or classes to prune; all linear layers,
    convolutions, recurrent matrices, torch's attention and packed experts, if none is given."""
    embeddings: bool = False
    """Prune embeddings too, and what shares their matrix; by magnitude."""
    remove_dead: bool = True
    """Really remove neurons and heads that are left without effect; the outputs do not change. Not
    with a pattern `n:m`, whose neighbours would move, and not with `portable: true`: layers would
    differ."""
    iterations: int = Field(default=ITERATIONS, ge=0)
    """Iterations of `admm`."""
    penalty: float = Field(default=PENALTY, gt=0)
    """Penalty of `admm`, where every input has mean square one."""
    refit_steps: int = Field(default=REFIT_STEPS, ge=1)
    """Conjugate-gradient steps of the re-fit that `reconstruct` turns on."""

    @field_validator("pattern")
    @classmethod
    def _check_pattern(cls, pattern: str) -> str:
        split_pattern(pattern)
        return pattern

    @property
    def removes_dead(self) -> bool:
        """Whether units without effect really go."""
        return self.remove_dead and ":" not in self.pattern

    @property
    def tunes_admm(self) -> bool:
        """Whether something is said that only ADMM reads."""
        return (self.iterations, self.penalty) != (ITERATIONS, PENALTY)
