"""Heads and neurons that go while a model trains: gates as masks, scores from its gradients.

Or, where calibration examples are given, by the step of one-shot pruning (`calibrated`).
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate import PartialState
from torch import Tensor
from transformers import PreTrainedModel

from hf_prune.budget.selection import Selection
from hf_prune.budget.solvers import get_solver
from hf_prune.criteria import get_criterion, needs
from hf_prune.criteria.ranking import Ranking
from hf_prune.errors import ConfigError, DataError, NumericsError
from hf_prune.gates.attach import attach_gates
from hf_prune.gates.gate import Gates
from hf_prune.gates.plans import check_plan, plan_gates
from hf_prune.recipe import Prune
from hf_prune.sites import Site, base_model, find_sites, logical_weight, projection
from hf_prune.statistics.batches import Batch, take
from hf_prune.statistics.collect import Statistics, sum_over_processes
from hf_prune.statistics.score import check_projections, score
from hf_prune.surgery.remove import remove_units
from hf_prune.targets import Chooser
from hf_prune.training.aim import (
    make_chooser,
    select,
    selection_from_dict,
    selection_to_dict,
    table_from_dict,
    table_to_dict,
)
from hf_prune.training.calibrated import narrowed, never_more, rank_what_is_left, refit_into_

TRAINING_STATISTICS = {"gate_grad", "generator"}
"""What training itself provides. Other statistics need a calibration pass: use `compress`."""

State = tuple[dict[str, Any], dict[str, Tensor]]
"""What must survive a restart: plain data, and tensors by name."""


def kept_by_kind(sites: Sequence[Site], selection: Selection | None) -> dict[str, int]:
    """Units kept, by kind."""
    result: dict[str, int] = {}
    for site in sites:
        plan = selection.plan.sites[site.name] if selection else None
        result[site.kind] = result.get(site.kind, 0) + (len(plan.kept) if plan else site.units)
    return result


def open_gates(
    model: PreTrainedModel, stage: Prune, earlier: Gates
) -> tuple[list[Site], Chooser, Gates]:
    """The sites of a stage, what chooses among their units, and new gates, all open.

    Args:
        model: to be trained.
        stage: units, and what to ignore.
        earlier: gates of a training that was broken off; they are taken away.
    """
    sites = find_sites(model, stage.units, stage.ignore)
    earlier.remove()
    chooser = make_chooser(model, sites, stage)
    return sites, chooser, attach_gates(model, sites)


@contextmanager
def all_open(gates: Gates) -> Iterator[None]:
    """Gates that let everything through in a `with` block: the model has other widths there."""
    values, evaluation = gates.values, gates.evaluation
    gates.values, gates.evaluation = {}, {}
    try:
        yield
    finally:
        gates.values, gates.evaluation = values, evaluation


def needs_calibration(stage: Prune) -> bool:
    """Whether a stage with a schedule needs more than the gradients of training."""
    if not stage.structural or stage.masks != "scored":
        return False
    return bool(set(needs(get_criterion(stage.criterion))) - TRAINING_STATISTICS)


@dataclass
class StructuredPruning:
    """The state of a structured stage in a running training.

    Attributes:
        calibration: examples, by which every decision is taken and re-fitted; None: by gradients.
    """

    stage: Prune
    seed: int
    calibration: Sequence[Batch] | None = None
    model: PreTrainedModel | None = None
    sites: list[Site] = field(default_factory=list)
    chooser: Chooser | None = None
    gates: Gates = field(default_factory=Gates)
    sums: dict[str, Tensor] = field(default_factory=dict)
    steps: int = 0
    overflows: int = 0
    last: Statistics = field(default_factory=dict)
    selection: Selection | None = None
    memory: Tensor = field(default_factory=lambda: torch.empty(0))

    def __post_init__(self) -> None:
        get_solver(self.stage.solver)
        check_projections(self.stage)
        if needs_calibration(self.stage) and self.calibration is None:
            missing = set(needs(get_criterion(self.stage.criterion))) - TRAINING_STATISTICS
            raise ConfigError(
                f"criterion {self.stage.criterion!r} needs {sorted(missing)}, which training "
                "does not provide. Pass calibration=batches to PruneCallback, or use 'taylor', "
                "'magnitude' or 'random' here."
            )

        schedule = self.stage.schedule
        refits = self.calibration is not None and self.stage.reconstruct
        if schedule is not None and refits and (schedule.rewind or schedule.stop_metric):
            raise ConfigError(
                "with calibration examples every decision re-fits weights to the units that are "
                "left. rewind would take that back, and the last good plan of stop_metric has "
                "other units: write reconstruct: false, or leave rewind and stop_metric out."
            )
        if schedule is not None and schedule.regrow and not self.needs_gradients():
            raise ConfigError(
                "regrow needs a criterion that reads the gradients of training, by which closed "
                f"gates are scored. {self.stage.criterion!r} does not, and with calibration "
                "examples none does. Use 'taylor' without them, or leave regrow out."
            )

    def start(self, model: PreTrainedModel) -> None:
        """Find the sites and attach gates, all open."""
        self.model = model
        if self.calibration is not None:
            self.calibration = take(
                model,
                self.calibration,
                at_least=self.stage.min_calibration_samples,
                at_most=max(self.stage.calibration_samples, self.stage.reconstruction_samples or 0),
            )
        self.sites, self.chooser, self.gates = open_gates(model, self.stage, self.gates)
        self.sums, self.steps, self.overflows, self.last, self.selection = {}, 0, 0, {}, None
        self._set_gates()

    @property
    def _regrows(self) -> bool:
        schedule = self.stage.schedule
        return schedule is not None and schedule.regrow and self.needs_gradients()

    def needs_gradients(self) -> bool:
        """Whether the gradients of training are read."""
        by_gradients = "gate_grad" in needs(get_criterion(self.stage.criterion))
        return self.calibration is None and by_gradients

    def before_step(self) -> None:
        """Gates hold from step to step."""

    def _gradients(self) -> list[Tensor]:
        """`|dL/dg|` of the step that has just been computed, `[U]` for each site.

        `dL/dg_u = sum(W_u * dL/dW_u)` over the columns of unit `u`: no further pass is needed. For
        a closed unit that is 0; where it may come back, the gate itself takes part in the graph.
        """
        if self._regrows:
            leaves = [self.gates.values[site.name] for site in self.sites]
            found = [torch.zeros_like(g) if g.grad is None else g.grad for g in leaves]
            for leaf in leaves:
                leaf.grad = None
            whole = sum_over_processes(torch.cat(found)).abs()  # gates are local to each process
            return list(whole.split([site.units for site in self.sites]))
        assert self.model is not None  # noqa: S101  # start() came first
        base = base_model(self.model)
        result = []
        for site in self.sites:
            module = projection(base, site.gate.module)
            weight, gradient = logical_weight(module), logical_weight(module, gradient=True)
            columns = self._product(weight, gradient).sum(dim=0)  # [E, U * D] -> [U * D]
            result.append(columns.view(site.units, site.gate.width).sum(dim=1).abs())  # [U]
        return result

    def _product(self, weight: Tensor, gradient: Tensor) -> Tensor:
        """`W * dL/dW` in float32, in memory that is kept: fresh memory would cost more.

        The sum over a unit of products of lower precision would be of that precision too.
        """
        if self.memory.device != weight.device or self.memory.numel() < weight.numel():
            self.memory = weight.new_empty(weight.numel(), dtype=torch.float32)
        place = self.memory[: weight.numel()].view(weight.shape)
        if weight.dtype == torch.float32:
            return torch.mul(weight, gradient, out=place)
        return place.copy_(weight).mul_(gradient)

    @torch.no_grad()
    def observe(self) -> None:
        """Add `|dL/dg|` of this step, as a share of its sum over all units.

        So a step counts as much as any other, whatever the scale of its loss, of mixed precision
        and of clipping. A step that overflowed is passed over, as the optimizer does.
        """
        if not self.needs_gradients():
            return
        found = self._gradients()
        total = torch.cat(found).float().sum()
        if not torch.isfinite(total):
            self.overflows += 1
            return
        total = total.clamp(min=torch.finfo(torch.float32).tiny)
        for site, values in zip(self.sites, found, strict=True):
            share = values.float() / total
            self.sums[site.name] = self.sums[site.name] + share if self.steps else share
        self.steps += 1

    def _statistics(self) -> Statistics:
        """The statistics since the last decision; those of it, if no step came between."""
        if self.steps == 0 and self.needs_gradients():
            if self.overflows:
                raise NumericsError(
                    f"the gradient was not finite in {self.overflows} steps: training diverged."
                )
            if not self.last:
                raise DataError(
                    "training ended before a single optimizer step: nothing was pruned."
                )
            return self.last
        result: Statistics = {site.name: {} for site in self.sites}
        for name, value in self.sums.items():
            total = sum_over_processes(value) / PartialState().num_processes
            result[name]["gate_grad"] = (total / max(self.steps, 1)).cpu()
        self.last = result
        return result

    def decide(self, share: float) -> None:
        """Choose what stays at `share` of the final sparsity, and close the other gates."""
        assert self.model is not None  # noqa: S101  # start() came first
        if self.calibration is not None:
            self._decide_calibrated(self.model, self.calibration, share)
            return
        rankings = score(
            self.model, self.sites, self.stage.criterion, self._statistics(), self.seed
        )
        self.take(self._select(rankings, share))
        self.sums, self.steps, self.overflows = {}, 0, 0

    def _decide_calibrated(
        self, model: PreTrainedModel, known: Sequence[Batch], share: float
    ) -> None:
        """Take the step of one-shot pruning from what has gone so far."""
        assert self.chooser is not None  # noqa: S101  # start() came first
        before = None if self.selection is None else self.selection.plan
        left = narrowed(model, before)
        rankings = rank_what_is_left(left, self.sites, before, self.stage, known, self.seed)
        chosen = never_more(self._select(rankings, share), before, rankings, self.chooser)
        if self.stage.reconstruct:
            refit_into_(model, left, before, chosen.plan, self.stage, known)
        self.take(chosen)

    def _select(self, rankings: Mapping[str, Ranking], share: float) -> Selection:
        assert self.chooser is not None  # noqa: S101  # start() came first
        with all_open(self.gates):
            return select(self.chooser, rankings, share)

    def take(self, selection: Selection | None) -> None:
        """Close the gates of what a selection removes, and open all others."""
        self.selection = selection
        self._set_gates()

    def _set_gates(self) -> None:
        assert self.model is not None  # noqa: S101  # start() came first
        closed = {} if self.selection is None else plan_gates(self.selection.plan)
        values = {name: gate.to(self.model.device) for name, gate in closed.items()}
        if self._regrows:
            for site in self.sites:
                gate = values.get(site.name, torch.ones(site.units, device=self.model.device))
                values[site.name] = gate.requires_grad_()
        self.gates.values = values

    def after_step(self) -> None:
        """Gates hold by themselves: nothing to do after the optimizer."""

    def settle(self) -> None:
        """The last decision has been taken: gates no longer take part in the graph."""
        self.gates.values = {name: gate.detach() for name, gate in self.gates.values.items()}

    def finish(self) -> None:
        """Open the gates and really remove what they had closed."""
        self.gates.remove()
        if self.model is not None and self.selection is not None:
            remove_units(self.model, self.selection.plan)

    def kept(self) -> dict[str, int]:
        """Units kept, by kind, for logs."""
        return kept_by_kind(self.sites, self.selection)

    def state(self) -> State:
        """What must survive a restart."""
        tensors = {f"sum.{name}": value for name, value in self.sums.items()}
        for name, values in self.last.items():
            tensors |= {f"last.{name}": value for value in values.values()}
        assert self.chooser is not None  # noqa: S101  # start() came first
        data = {
            "latency": table_to_dict(self.chooser),
            "selection": selection_to_dict(self.selection),
            "steps": self.steps,
            "overflows": self.overflows,
        }
        return data, tensors

    def load(self, data: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        """Go on from what `state` gave.

        Raises:
            PlanError: when the plan there does not fit this model.
        """
        assert self.model is not None  # noqa: S101  # start() came first
        table = table_from_dict(data["latency"])
        if table is not None:
            self.chooser = make_chooser(self.model, self.sites, self.stage, table)
        selection = selection_from_dict(data["selection"])
        if selection is not None:
            check_plan(selection.plan, self.sites, self.model.config.model_type)
        self.take(selection)
        self.steps, self.overflows = int(data["steps"]), int(data["overflows"])
        device = self.model.device
        self.sums = {
            name.removeprefix("sum."): value.to(device)
            for name, value in tensors.items()
            if name.startswith("sum.")
        }
        self.last = {
            name.removeprefix("last."): {"gate_grad": value}
            for name, value in tensors.items()
            if name.startswith("last.")
        }
