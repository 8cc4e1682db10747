"""`DistillCallback`: the dense model teaches the pruned one, inside any Trainer."""

import hashlib
import json
import os
from typing import Any

import torch
from accelerate import PartialState
from pydantic import ValidationError
from torch import Tensor
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel, TrainerCallback

from hf_prune.errors import CheckpointError, ConfigError, DataError
from hf_prune.recipe import Distill, Train, explain
from hf_prune.sites import ALL_KINDS, find_sites, hidden_width
from hf_prune.statistics.batches import (
    counted_positions,
    is_causal_lm,
    main_input,
    token_mask,
)
from hf_prune.statistics.collect import sum_over_processes
from hf_prune.statistics.logits import kind_of
from hf_prune.training.losses import distillation_loss
from hf_prune.training.projection import Projections
from hf_prune.training.sharded import refuse_sharded
from hf_prune.training.state import (
    checkpoint_of,
    note_part,
    parts_of,
    read_state,
    write_state,
)
from hf_prune.training.taps import attach_taps, check_plain_attention, real_tokens
from hf_prune.training.teacher import CachedLogits, check_teacher, teacher_inputs
from hf_prune.training.terms import InnerTerms

PART = "distill"
"""Name of the state beside a checkpoint."""


def _stage(fields: dict[str, Any]) -> Distill:
    try:
        return Distill(**fields)
    except ValidationError as error:
        raise ConfigError(f"DistillCallback: {explain(error)}") from error


def distill_fields(stage: Distill) -> dict[str, Any]:
    """The fields of a stage that are about the teacher: what `DistillCallback` takes."""
    return stage.model_dump(exclude={*Train.model_fields, "data", "teacher", "teacher_logits"})


def distribution(output: Any) -> Tensor:
    """The logits of a model, `[B, C]` or `[B, T, C]`.

    Where it answers questions, start and end are two distributions over tokens: `[2 * B, T]`.
    """
    if output.get("logits") is not None:
        logits: Tensor = output["logits"]
        return logits
    return torch.cat([output["start_logits"], output["end_logits"]])


def _release(student: PreTrainedModel, training: Any) -> None:
    """Take away what teachers of trainings that were broken off have left at a student.

    Args:
        student: to be trained.
        training: state of the Trainer that begins; its other teachers stay.
    """
    for hook in list(student._forward_hooks.values()):
        earlier = getattr(hook, "__self__", None)
        if isinstance(earlier, DistillCallback) and earlier.training is not training:
            earlier._detach()


class DistillCallback(TrainerCallback):
    """Adds the loss of a teacher to that of the labels while any Trainer trains a model.

    The loss becomes `alpha * distillation + (1 - alpha) * labels`, in training only; evaluation
    reports the loss of the labels. The teacher runs in eval mode, without gradients, on the
    student's device. The student may be pruned: fewer heads, other widths in every layer. In causal
    language models all terms weigh tokens as the loss of the labels does, so that gradient
    accumulation changes nothing.

    Args:
        teacher: the dense model, any other with the same classes and tokens, or the path of a file
            that `cache_logits` wrote. It is not changed and not saved.
        temperature: softens both distributions.
        alpha: share of the distillation, in [0, 1].
        resume_from: folder of the checkpoint, when training resumes from another output folder.
        fields: further fields of `hf_prune.recipe.Distill`, such as `hidden=1.0`.

    Raises:
        ConfigError: when a field is not valid, or the teacher has other labels or tokens.
    """

    def __init__(
        self,
        teacher: "PreTrainedModel | str | os.PathLike[str]",
        temperature: float = 2.0,
        alpha: float = 0.9,
        *,
        resume_from: "str | os.PathLike[str] | None" = None,
        **fields: Any,
    ) -> None:
        self.stage = _stage({"temperature": temperature, "alpha": alpha, **fields})
        self.teacher = teacher if isinstance(teacher, PreTrainedModel) else CachedLogits(teacher)
        if isinstance(self.teacher, CachedLogits) and self.stage.inner:
            raise ConfigError("cached logits cannot teach hidden, embeddings, attention, relations")
        self.resume_from = resume_from
        self.weights = self.stage.at(0.0)
        self.inner: InnerTerms | None = None
        self.handle: RemovableHandle | None = None
        self.training: Any = None
        self.sums: dict[str, Tensor] = {}
        self.passes = 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Attach the teacher to the student's loss."""
        refuse_sharded(args, "DistillCallback")
        smoothing = getattr(args, "label_smoothing_factor", 0.0)
        if smoothing:
            raise ConfigError(
                f"label_smoothing_factor={smoothing}: the Trainer then keeps the labels from the "
                "model and replaces its loss, and with it the teacher. Set it to 0; a teacher's "
                "distribution is soft already."
            )
        self.training = state
        self._attach(kwargs["model"])
        if state is None:
            return
        note_part(state, PART)
        if state.global_step > 0:
            self._resume(checkpoint_of(args, state, self.resume_from), state.max_steps)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Set the share of the distillation, and the weights of its terms."""
        self.weights = self.stage.at(state.global_step / max(state.max_steps - 1, 1))

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Let the projections learn."""
        if self.inner is not None:
            self.inner.projections.step()

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Add each term's mean since the last log."""
        logs = kwargs.get("logs") or {}
        if "loss" in logs and self.passes:
            self._log(logs, state)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Keep what the projections have learned, once all processes have written theirs."""
        PartialState().wait_for_everyone()
        if state.is_world_process_zero:
            tensors = self.inner.projections.state() if self.inner is not None else {}
            data = {
                "recipe": self._fingerprint(state.max_steps),
                "pairs": self.inner.pairs if self.inner is not None else None,
            }
            write_state(checkpoint_of(args, state, None), PART, data, tensors, parts_of(state))

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Let the student go."""
        self._detach()

    def _detach(self) -> None:
        if self.handle is not None:
            self.handle.remove()
            self.handle = None
        if self.inner is not None:
            self.inner.student.remove()
            self.inner.teacher.remove()
            self.inner = None

    def _attach(self, student: PreTrainedModel) -> None:
        self._detach()
        _release(student, self.training)
        if isinstance(self.teacher, CachedLogits):
            self.teacher.check(student)
        else:
            check_teacher(student, self.teacher)
            torch.nn.Module.to(self.teacher, student.device).eval()
            if self.stage.inner:
                self.inner = self._inner(student, self.teacher)
        self.sums, self.passes = {}, 0
        self.handle = student.register_forward_hook(self._add_loss, with_kwargs=True)

    def _inner(self, student: PreTrainedModel, teacher: PreTrainedModel) -> InnerTerms:
        stage = self.stage
        if stage.weighs("attention"):
            check_plain_attention(student)
            check_plain_attention(teacher)
        searches = stage.layers in ("closest", "ordered")
        named = stage.weighs("hidden") or searches
        hidden = named or stage.weighs("embeddings")
        attention = stage.weighs("attention") or stage.weighs("relations")
        ours = attach_taps(student, hidden=hidden, attention=attention, training_only=True)
        theirs = attach_taps(teacher, hidden=hidden, attention=attention)
        needed = {"hidden": named, "embeddings": stage.weighs("embeddings")}
        widths: dict[str, tuple[int, int]] = {}
        if any(needed.values()):
            own, other = (hidden_width(m, find_sites(m, ALL_KINDS)) for m in (student, teacher))
            widths = {name: (own, other) for name, wanted in needed.items() if wanted}
        rate = stage.projection_learning_rate
        return InnerTerms(stage, ours, theirs, Projections(widths, rate, student.device))

    def _fingerprint(self, max_steps: int) -> str:
        """Of what a training that goes on must have in common with the one that was broken off."""
        moves = max_steps if self.stage.ends else None  # they are reached when training ends
        text = json.dumps([distill_fields(self.stage), moves])
        return hashlib.sha256(text.encode()).hexdigest()

    def _resume(self, checkpoint: Any, max_steps: int) -> None:
        data, tensors = read_state(checkpoint, PART)
        if data.get("recipe") != self._fingerprint(max_steps):
            raise CheckpointError(
                f"{checkpoint} was written with another distillation (other fields of the stage, "
                "or with ends another number of steps): resume with the same recipe and "
                "arguments, or start anew."
            )
        if self.inner is None:
            return
        try:
            self.inner.projections.load(tensors)
        except (KeyError, RuntimeError) as error:
            raise CheckpointError(
                f"{checkpoint}: the projections there are of another distillation: {error}"
            ) from error
        pairs = data["pairs"]
        self.inner.pairs = None if pairs is None else tuple((i, j) for i, j in pairs)

    def _log(self, logs: dict[str, float], state: Any) -> None:
        world = sum_over_processes(torch.ones(1, device=next(iter(self.sums.values())).device))
        found = {}
        for name, value in sorted(self.sums.items()):
            mean = sum_over_processes(value) / world / self.passes
            found[f"distill/{name}"] = round(float(mean), 6)
        found["distill/alpha"] = self.weights["alpha"]
        found |= {f"distill/weight_of_{name}": self.weights[name] for name in self.stage.ends}
        logs.update(found)
        state.log_history[-1].update(found)
        self.sums, self.passes = {}, 0

    def _teacher_logits(
        self, student: PreTrainedModel, args: tuple[Any, ...], kwargs: dict[str, Any], like: Tensor
    ) -> Tensor:
        with torch.no_grad():
            if isinstance(self.teacher, CachedLogits):
                mask = token_mask(student, kwargs)
                return self.teacher(main_input(student, kwargs), mask, like)
            return distribution(self.teacher(*args, **teacher_inputs(self.teacher, kwargs)))

    def _add_loss(
        self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> Any:
        if not module.training:
            return output
        self._check_loss(output)
        labels = kwargs.get("labels")
        logits = distribution(output)
        teacher = self._teacher_logits(module, args, kwargs, logits)
        # Causal language models divide a sum by the number of items; others take a mean.
        items = kwargs.get("num_items_in_batch") if is_causal_lm(module) else None
        counted = None
        if logits.ndim == 3:
            counted = (
                counted_positions(module, labels)
                if labels is not None
                else real_tokens(kwargs, logits)
            )
        terms = {}
        stage = self.stage
        if self.weights["logits"]:
            kind = kind_of(module, output)
            terms["logits"] = distillation_loss(
                logits, teacher, stage.temperature, counted, items, kind
            )
        if self.inner is not None:
            share = 1.0 if items is None or counted is None else counted.sum() / items
            mask = real_tokens(kwargs, self._like())
            terms |= {name: value * share for name, value in self.inner(mask).items()}
            self.inner.student.clear()
            self.inner.teacher.clear()
        self._mix(output, terms)
        return output

    def _check_loss(self, output: Any) -> None:
        least = min(self.stage.alpha, self.stage.at(1.0)["alpha"])
        if output.get("loss") is None and least < 1:
            raise DataError(
                f"DistillCallback: the model gave no loss of labels to mix with the teacher's, of "
                f"which alpha={least:g} asks. Its batches need labels (a Trainer with a loss of "
                "its own takes them out); or learn from the teacher alone, with alpha=1."
            )

    def _like(self) -> Tensor:
        assert self.inner is not None  # noqa: S101  # only called when layers are compared
        taps = self.inner.student
        recorded = [*taps.hidden.values(), *taps.parts.values()]
        return recorded[0]

    def _mix(self, output: Any, terms: dict[str, Tensor]) -> None:
        """Put the mixed loss into the output, and note its parts."""
        weighted = [self.weights[name] * value for name, value in terms.items()]
        # Without labels nothing else reaches the logits, and DDP waits for every gradient.
        labels = distribution(output).sum() * 0.0 if output.get("loss") is None else output.loss
        distilled = torch.stack(weighted).sum() if weighted else labels * 0.0
        alpha = self.weights["alpha"]
        output["loss"] = (1 - alpha) * labels + alpha * distilled
        for name, value in {**terms, "labels": labels}.items():
            value = value.detach()
            self.sums[name] = self.sums[name] + value if name in self.sums else value
        self.passes += 1
