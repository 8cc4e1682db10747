"""How a model learns: the stages `train`, `distill` and `student`."""

from typing import Annotated, Literal, get_args

from pydantic import Field, model_validator

from hf_prune.recipe.model import Model

Scheduled = Literal["alpha", "logits", "hidden", "embeddings", "attention", "relations"]
SCHEDULED: tuple[str, ...] = get_args(Scheduled)
"""What can change in the course of a distillation."""


class Train(Model):
    """Fine-tuning. The names are those of `transformers.TrainingArguments`."""

    stage: Literal["train"] = "train"
    """Tells this stage from the others."""
    num_train_epochs: float = Field(default=1.0, gt=0)
    """Passes over the training data."""
    learning_rate: float = Field(default=5e-5, gt=0)
    """Peak learning rate."""
    per_device_train_batch_size: int = Field(default=32, ge=1)
    """Examples per process and step."""
    weight_decay: float = Field(default=0.0, ge=0)
    """Decay of weights (not of biases and norms)."""
    warmup_steps: int = Field(default=0, ge=0)
    """Steps until the learning rate is reached."""
    max_steps: int = Field(default=-1, ge=-1)
    """Optimizer steps, instead of `num_train_epochs`; -1: as many as these give."""
    gradient_accumulation_steps: int = Field(default=1, ge=1)
    """Batches for one optimizer step."""
    lora_rank: int = Field(default=0, ge=0)
    """0: all weights are trained. Otherwise low-rank adapters are, and then merged; needs PEFT."""


class Distill(Train):
    """Fine-tuning with the dense model as teacher."""

    stage: Literal["distill"] = "distill"  # type: ignore[assignment]  # the tag differs, by design
    """Tells this stage from the others."""
    data: Literal["task", "texts"] = "task"
    """What is learned from: the training data, or `texts` without labels, as in the general
    distillation of TinyBERT (arXiv:1909.10351), by the teacher alone: `alpha: 1`."""
    temperature: float = Field(default=2.0, gt=0)
    """Softens both distributions (Hinton et al. 2015, arXiv:1503.02531)."""
    alpha: float = Field(default=0.9, ge=0, le=1)
    """Share of the distillation loss; the rest is the loss of the labels."""
    logits: float = Field(default=1.0, ge=0)
    """Weight of the divergence between logits, within the distillation loss."""
    hidden: float = Field(default=0.0, ge=0)
    """Weight of the distance of hidden states, through a projection that is learned."""
    embeddings: float = Field(default=0.0, ge=0)
    """Weight of the distance of the embeddings, through a projection that is learned."""
    attention: float = Field(default=0.0, ge=0)
    """Weight of the divergence of attention maps."""
    relations: float = Field(default=0.0, ge=0)
    """Weight of the divergence of relations between tokens (arXiv:2002.10957, 2012.15828)."""
    relation_of: tuple[Literal["queries", "keys", "values"], ...] = ("values",)
    """What relations are of."""
    relation_heads: int = Field(default=12, ge=1)
    """Heads into which the width is split anew for relations."""
    ends: dict[Scheduled, Annotated[float, Field(ge=0)]] = Field(default_factory=dict)
    """Values at the end of the stage, reached in a straight line, of `alpha` and of weights:
    `{alpha: 0.5, hidden: 0}`. What is not named stays as it is."""
    layers: Literal["uniform", "last", "closest", "ordered"] = "uniform"
    """Which layer teaches which: at equal distances, the last alone, the closest of each batch, or
    the best assignment in order, found once on the first batch."""
    projection_learning_rate: float = Field(default=1e-3, gt=0)
    """Of the projections."""
    teacher: str | None = None
    """Hub name or folder of another teacher; None: the dense model."""
    teacher_logits: str | None = None
    """File with the logits of the teacher, which then need not run."""

    def weighs(self, name: str) -> bool:
        """Whether `alpha` or the weight of a term is more than 0 at any time of the stage."""
        return any(self.at(progress)[name] > 0 for progress in (0.0, 1.0))

    def at(self, progress: float) -> dict[str, float]:
        """`alpha` and all weights at a time of the stage.

        Args:
            progress: 0 at its first step, 1 at its last.
        """
        begins = {name: float(getattr(self, name)) for name in SCHEDULED}
        ends = begins | {str(name): value for name, value in self.ends.items()}
        return {name: begin + progress * (ends[name] - begin) for name, begin in begins.items()}

    @property
    def inner(self) -> bool:
        """Whether layers are compared, and not the logits alone."""
        return any(map(self.weighs, ("hidden", "embeddings", "attention", "relations")))

    @model_validator(mode="after")
    def _something_to_learn(self) -> "Distill":
        if self.weighs("alpha") and not (self.weighs("logits") or self.inner):
            raise ValueError("all distillation weights are 0: set at least one, or alpha to 0")
        if self.ends.get("alpha", 0.0) > 1:
            raise ValueError(f"ends: alpha={self.ends['alpha']:g} is a share: at most 1")
        if self.data == "texts" and min(self.at(end)["alpha"] for end in (0.0, 1.0)) < 1:
            raise ValueError("data: texts has no labels to learn from: set alpha to 1")
        if self.teacher_logits is not None and (self.inner or self.teacher is not None):
            raise ValueError(
                "teacher_logits holds logits only: set hidden, embeddings, attention and relations "
                "to 0, and no teacher"
            )
        if self.weighs("relations") and len(set(self.relation_of)) != max(len(self.relation_of), 1):
            raise ValueError("relation_of must name each part once, and at least one of them")
        return self


class Student(Model):
    """Make a smaller model of the teacher's kind, of any depth and width. What is 0 stays."""

    stage: Literal["student"] = "student"
    """Tells this stage from the others."""
    layers: int = Field(default=0, ge=0)
    """Layers."""
    hidden: int = Field(default=0, ge=0)
    """Hidden width."""
    heads: int = Field(default=0, ge=0)
    """Attention heads of each layer."""
    neurons: int = Field(default=0, ge=0)
    """Feed-forward neurons of each layer."""
    init: Literal["teacher", "normal", "xavier"] = "teacher"
    """Start from the best parts of the teacher, or at random."""
    pick_layers: Literal["uniform", "score"] = "uniform"
    """Which layers of the teacher to start from: at equal distances, or those that change most."""
