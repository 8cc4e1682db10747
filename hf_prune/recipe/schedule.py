"""How sparsity grows while a model trains."""

from typing import Literal

from pydantic import Field, model_validator

from hf_prune.recipe.model import Model


class Schedule(Model):
    """How sparsity grows while a model trains."""

    kind: Literal["one_shot", "linear", "cubic", "exponential", "step"] = "cubic"
    """`cubic`: fast at first, slow at the end (Zhu and Gupta 2017, arXiv:1710.01878); `exponential`
    likewise; `step`: in equal steps; `one_shot`: all at the first decision."""
    start: float = Field(default=0.0, ge=0, lt=1)
    """When masks begin to close, as a fraction of all training steps: before it is warm-up."""
    end: float = Field(default=0.6, gt=0, le=1)
    """When the full sparsity is reached, as a fraction of all steps: after it is cool-down."""
    every: int = Field(default=20, ge=1)
    """Optimizer steps (or epochs, see `per`) between two decisions."""
    per: Literal["steps", "epochs"] = "steps"
    """What `every` counts."""
    levels: int = Field(default=4, ge=1)
    """Of `step`: into how many equal steps the way is cut."""
    rate: float = Field(default=3.0, gt=0)
    """Of `exponential`: how much faster the start is; `exp(rate)` times the end."""
    regrow: bool = False
    """Whether heads and neurons that went can come back: closed gates are scored too."""
    rewind: bool = False
    """At the full sparsity, put the weights that stay back to what they were when masks began to
    close (arXiv:1803.03635, 1903.01611)."""
    stop_metric: str | None = None
    """A metric of evaluation, without `eval_`. Once it is below `stop_below` nothing more goes, and
    the last plan that was good enough comes back. Heads and neurons only."""
    stop_below: float | None = None
    """See `stop_metric`."""

    @model_validator(mode="after")
    def _ordered(self) -> "Schedule":
        if self.start >= self.end:
            raise ValueError(f"start={self.start} must be smaller than end={self.end}")
        if (self.stop_metric is None) != (self.stop_below is None):
            raise ValueError("stop_metric and stop_below belong together: give both or none")
        return self
