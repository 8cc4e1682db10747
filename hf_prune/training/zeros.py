"""Single weights that become zero while a model trains, and stay zero."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, TrainerCallback

from hf_prune.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    NumericsError,
    UnsupportedModelError,
)
from hf_prune.plan import Plan
from hf_prune.recipe import Prune, count_to_remove, did_you_mean
from hf_prune.sites import find_sites
from hf_prune.statistics.collect import sum_over_processes
from hf_prune.surgery.dead import remove_dead_
from hf_prune.training.optimizer import mask_gradients_, mask_states_
from hf_prune.training.sharded import refuse_sharded
from hf_prune.weights.find import find_weights
from hf_prune.weights.masks import (
    WEIGHT_SOLVERS,
    Masks,
    ZeroWriter,
    apply_masks_,
    count_kept,
    magnitude_masks,
)
from hf_prune.weights.patterns import Pattern, keep, parse_pattern, room_of
from hf_prune.weights.stage import find_stage

TRAINING_CRITERIA = ("magnitude", "movement")
"""Criteria of single weights that `PruneCallback` knows. `movement` keeps what training moves away
from zero: the sum over steps of `-w * dL/dw` (Sanh et al. 2020, arXiv:2005.07683; here an entry
that is gone does not come back)."""
MOVEMENT = "movement:"
"""What stands before the names of sums among the tensors of a state."""


@dataclass
class WeightPruning:
    """The state of a stage of single weights in a running training.

    Attributes:
        overflows: steps whose gradients were not finite.
        write: writes the zeros after each step.
        inside: by parameter name, flat positions of the entries among which is chosen, where units
            go in the same training; all others stay as they are. Empty = all entries.
    """

    stage: Prune
    model: nn.Module | None = None
    masks: Masks = field(default_factory=dict)
    sums: dict[str, Tensor] = field(default_factory=dict)
    inside: dict[str, Tensor] = field(default_factory=dict)
    overflows: int = 0
    write: ZeroWriter = field(default_factory=ZeroWriter, repr=False)

    def __post_init__(self) -> None:
        for kind, name, known in (
            ("criterion", self.stage.criterion, TRAINING_CRITERIA),
            ("solver", self.stage.solver, WEIGHT_SOLVERS),
        ):
            if name not in known:
                raise ConfigError(
                    f"{kind} {name!r} is not for single weights while training"
                    f"{did_you_mean(name, known)}"
                )
        if self.stage.projections > 1:
            raise ConfigError("projections are of one shot: training draws none, leave them out.")
        if self.pattern.kind != "unstructured" and self.stage.solver != "uniform":
            raise ConfigError(
                f"pattern {self.pattern} grows with a schedule in every matrix alike: write "
                "solver: uniform."
            )

    @property
    def pattern(self) -> Pattern:
        """Where zeros may be in the end."""
        return parse_pattern(self.stage.single.pattern)

    def start(self, model: nn.Module) -> None:
        """Nothing is masked yet.

        Raises:
            ConfigError: when the stage names what the model does not have, or leaves nothing.
        """
        self.model, self.masks, self.sums, self.inside = model, {}, {}, {}
        self.overflows = 0
        if self.stage.criterion == "movement":
            frozen = [name for name, value in self.matrices().items() if not value.requires_grad]
            if frozen:
                raise ConfigError(
                    f"movement is read off gradients, and {', '.join(frozen)} have none: train "
                    "them, or leave them out with ignore."
                )
        else:
            find_stage(model, self.stage)

    def matrices(self) -> dict[str, Tensor]:
        """What is pruned, by parameter name."""
        assert self.model is not None  # noqa: S101  # start() came first
        return {matrix.name: matrix.parameter for matrix in find_stage(self.model, self.stage)}

    @torch.no_grad()
    def observe(self) -> None:
        """Add what this step moves away from zero; magnitudes are in the weights themselves.

        A step that overflowed is passed over, as the optimizer does.
        """
        if self.stage.criterion != "movement":
            return
        moved = {
            name: weight.float() * weight.grad.float()
            for name, weight in self.matrices().items()
            if weight.grad is not None
        }
        if not _finite(moved.values()):
            self.overflows += 1
            return
        for name, value in moved.items():
            if name in self.sums:
                self.sums[name].sub_(value)
            else:
                self.sums[name] = value.neg_()

    def _scores(self) -> dict[str, Tensor]:
        """What is ranked: never negative, and zero where nothing stays already.

        Sums are shifted in float64, on the CPU: in float32 small ones would become equal.
        """
        weights = self.matrices()
        if self.stage.criterion != "movement":
            return weights
        if self.overflows and not self.sums:
            raise NumericsError(
                f"the gradient was not finite in {self.overflows} steps: training diverged."
            )
        if not self.sums:
            raise DataError("training ended before a single optimizer step: nothing was pruned.")
        unread = weights.keys() - self.sums.keys()
        if unread:
            raise DataError(
                f"no gradient reached {', '.join(sorted(unread))}: leave them out with ignore."
            )
        totals = {name: sum_over_processes(v).cpu().double() for name, v in self.sums.items()}
        least = min(float(value.min()) for value in totals.values())
        span = max(float(value.max()) for value in totals.values()) - least
        scores = {name: value - least + (span or 1.0) for name, value in totals.items()}
        return {n: s * self.masks[n].cpu() if n in self.masks else s for n, s in scores.items()}

    def decide(self, share: float) -> None:
        """Choose the entries that stay at `share` of the final sparsity. Zeros never come back."""
        assert self.model is not None  # noqa: S101  # start() came first
        sparsity = self.stage.fraction * share
        scores = self._scores()
        inside = {
            name: scores[name].flatten()[places.to(scores[name].device)]
            for name, places in self.inside.items()
        }
        if self.pattern.kind == "unstructured":
            chosen = magnitude_masks(inside or scores, sparsity, self.stage.solver)
        else:
            chosen = self._in_pattern(scores, sparsity, share)
        self.masks = {
            name: (self._whole(name, mask) if inside else mask).to(self._device())
            for name, mask in chosen.items()
        }
        apply_masks_(self.model, self.masks)

    def _in_pattern(self, scores: Mapping[str, Tensor], sparsity: float, share: float) -> Masks:
        """Masks of a pattern: more blocks go at each decision, and n of `n:m` falls from m."""
        assert self.model is not None  # noqa: S101  # start() came first
        pattern, chosen = self.pattern, Masks()
        if pattern.kind == "n:m":
            n, m = pattern.first, pattern.second
            pattern = replace(pattern, first=m - int(share * (m - n)))
        for matrix in find_stage(self.model, self.stage):
            values = matrix.view(scores[matrix.name].detach().abs())
            earlier = self.masks.get(matrix.name)
            whole = torch.ones_like(matrix.parameter, dtype=torch.bool, device=values.device)
            allowed = matrix.view(whole if earlier is None else earlier.to(values.device)).clone()
            for group, value in enumerate(values):
                room = room_of(pattern, (value.shape[0], value.shape[1]))
                removed = min(count_to_remove(sparsity, value.numel()), room)
                if pattern.kind == "n:m" and pattern.first == pattern.second:
                    continue  # nothing goes yet
                matrix.write_(whole, group, keep(value, removed, pattern, allowed[group]))
            chosen[matrix.name] = whole
        return chosen

    def _whole(self, name: str, mask: Tensor) -> Tensor:
        """A mask of the entries inside as one of the whole matrix."""
        shape = self.matrices()[name].shape
        whole = torch.ones(shape.numel(), dtype=torch.bool, device=mask.device)
        whole[self.inside[name].flatten().to(mask.device)] = mask.flatten()
        return whole.view(shape)

    def after_step(self) -> None:
        """Write the zeros again: the optimizer has just moved them."""
        assert self.model is not None  # noqa: S101  # start() came first
        self.write(self.model, self.masks)

    def before_step(self) -> None:
        """Masks hold from step to step."""

    def settle(self) -> None:
        """Nothing more to do once everything is decided."""

    def finish(self) -> None:
        """The zeros are in the weights already."""

    def remove_dead(self) -> Plan:
        """Really remove units that the zeros have left without effect; which ones stayed.

        Nothing goes where the stage says so, or the model is of no known family.
        """
        model = self.model
        if not isinstance(model, PreTrainedModel):
            return Plan("")
        if not self.stage.single.removes_dead:
            return Plan(model.config.model_type)
        try:
            find_sites(model)
        except UnsupportedModelError:
            return Plan(model.config.model_type)
        plan, self.masks = remove_dead_(model, self.masks)
        return plan

    def entry(self) -> dict[str, Any]:
        """For the report, of the matrices as they were while training."""
        total = sum(mask.numel() for mask in self.masks.values())
        removed = total - sum(count_kept(self.masks).values())
        return {
            "kind": "weights",
            "criterion": self.stage.criterion,
            "pattern": self.stage.single.pattern,
            "total": total,
            "removed": removed,
            "sparsity": removed / total if total else 0.0,
        }

    def state(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """What must survive a restart."""
        return {"overflows": self.overflows}, {
            **self.masks,
            **{f"{MOVEMENT}{n}": s for n, s in self.sums.items()},
        }

    def load(self, data: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        """Go on from what `state` gave.

        Raises:
            CheckpointError: when a mask there does not fit this model.
        """
        assert self.model is not None  # noqa: S101  # start() came first
        shapes = {name: p.shape for name, p in self.model.named_parameters()}
        masks = {name: mask for name, mask in tensors.items() if name in shapes}
        for name, mask in masks.items():
            if mask.shape != shapes[name] or mask.dtype != torch.bool:
                raise CheckpointError(f"the mask of {name} does not fit this model.")
        self.masks = {name: mask.to(self._device()) for name, mask in masks.items()}
        self.overflows = int(data.get("overflows", 0))
        sums = {name: tensors.get(f"{MOVEMENT}{name}") for name in shapes}
        self.sums = {
            name: value.to(self._device())
            for name, value in sums.items()
            if value is not None and value.shape == shapes[name]
        }
        apply_masks_(self.model, self.masks)

    def _device(self) -> torch.device:
        assert self.model is not None  # noqa: S101  # start() came first
        return next(self.model.parameters()).device

    def kept(self) -> dict[str, int]:
        """Entries kept, for logs."""
        return {"weights": sum(count_kept(self.masks).values())}


def _finite(values: Iterable[Tensor]) -> bool:
    """Whether nothing is infinite or not a number; sums tell it faster, and may overflow."""
    return all(bool(value.sum().isfinite()) or bool(value.isfinite().all()) for value in values)


def zeros_of(model: nn.Module) -> Masks:
    """Masks of the exact zeros in the prunable matrices of a model, where there are some."""
    masks = {name: weight.detach() != 0 for name, weight in find_weights(model).items()}
    return {name: mask for name, mask in masks.items() if not bool(mask.all())}


class KeepZeros(TrainerCallback):
    """Keeps single weights at exactly zero while any Trainer trains, whatever its optimizer.

    Args:
        masks: by parameter name, True = keep; `compress(...).masks`, or from `magnitude_masks`. If
            not given, every exact zero of a prunable matrix stays zero: of a pruned model that was
            loaded, these are the ones.
    """

    def __init__(self, masks: Mapping[str, Tensor] | None = None) -> None:
        self.given = masks
        self.masks = dict(masks or {})
        self._write = ZeroWriter()

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Write the zeros.

        Raises:
            ConfigError: for sharded training, where masks do not fit the parts of parameters.
        """
        refuse_sharded(args, "KeepZeros")
        if self.given is None:
            self.masks = zeros_of(kwargs["model"])
        apply_masks_(kwargs["model"], self.masks)
        mask_states_(kwargs.get("optimizer"), kwargs["model"], self.masks)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Keep them in the weights that the optimizer has for itself."""
        mask_gradients_(kwargs.get("optimizer"), kwargs["model"], self.masks)

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Write them again."""
        self._write(kwargs["model"], self.masks)


def merge_adapter(model: Any, masks: Mapping[str, Tensor] | None = None) -> nn.Module:
    """Merge a PEFT adapter into its sparse base, and keep the zeros: the update is masked.

    Args:
        model: a `PeftModel` whose adapter can be merged, such as LoRA.
        masks: by parameter name of the base model; if not given, every exact zero of the matrices
            that the adapter changes, or trains as a whole (`modules_to_save`), stays zero.

    Returns:
        The base model, its adapter merged.

    Raises:
        ConfigError: for a model that has no adapter to merge.
    """
    merge = getattr(model, "merge_and_unload", None)
    if merge is None:
        raise ConfigError(f"{type(model).__name__} has no adapter to merge: pass a PeftModel.")
    if masks is not None:
        found = dict(masks)
    else:
        found = {
            name.replace("base_layer.", "").replace("original_module.", ""): value.detach() != 0
            for name, value in model.get_base_model().named_parameters()
            if ("base_layer." in name or "original_module." in name) and value.ndim > 1
        }
    merged = merge()
    assert isinstance(merged, nn.Module)  # noqa: S101  # what PEFT gives back
    if masks is None:  # an adapter around an adapter holds matrices of its own
        left = {name for name, _ in merged.named_parameters()}
        found = {name: mask for name, mask in found.items() if name in left}
    apply_masks_(merged, found)
    return merged
