"""Heads and neurons that go while a model trains: scores from its gradients, gates as masks."""

from dataclasses import dataclass, field

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from torch import Tensor
from transformers import PreTrainedModel

from hf_prune.budget.costs import make_goal
from hf_prune.budget.solvers import Selection, decide, get_solver
from hf_prune.criteria import get_criterion, needs
from hf_prune.errors import ConfigError, DataError, NumericsError, PlanError
from hf_prune.gates import Gates, attach_gates, plan_gates
from hf_prune.measure.counts import count_encoder_parameters
from hf_prune.recipe import Prune
from hf_prune.sites import Site, base_model, find_sites, logical_weight, projection
from hf_prune.statistics.collect import Statistics, sum_over_processes
from hf_prune.statistics.score import score
from hf_prune.surgery.remove import remove_units

TRAINING_STATISTICS = {"gate_grad", "generator"}
"""What training itself provides. Other statistics need a calibration pass: use `compress`."""


def same_on_all_processes(selection: Selection) -> Selection:
    """The selection, after all processes have compared theirs.

    Raises:
        PlanError: on every process, when two of them decided differently.
    """
    if PartialState().num_processes > 1:
        prints = gather_object([selection.plan.fingerprint()])
        if len(set(prints)) > 1:
            raise PlanError("processes decided differently: their data or weights are not in step.")
    return selection


@dataclass
class StructuredPruning:
    """The state of a structured stage in a running training."""

    stage: Prune
    seed: int
    model: PreTrainedModel | None = None
    sites: list[Site] = field(default_factory=list)
    gates: Gates = field(default_factory=Gates)
    sums: dict[str, Tensor] = field(default_factory=dict)
    steps: int = 0
    last: Statistics = field(default_factory=dict)
    selection: Selection | None = None

    def __post_init__(self) -> None:
        get_solver(self.stage.solver)
        missing = set(needs(get_criterion(self.stage.criterion))) - TRAINING_STATISTICS
        if missing:
            raise ConfigError(
                f"criterion {self.stage.criterion!r} needs {sorted(missing)}, which training "
                "does not provide. Use 'taylor', 'magnitude' or 'random' here, or prune in one "
                "shot with compress()."
            )

    def start(self, model: PreTrainedModel) -> None:
        """Find the sites and attach gates, all open."""
        self.model = model
        self.sites = find_sites(model, self.stage.units, self.stage.ignore)
        self.base = count_encoder_parameters(model)
        self.gates = attach_gates(model, self.sites)
        self.sums, self.steps, self.last, self.selection = {}, 0, {}, None

    def needs_gradients(self) -> bool:
        """Whether the criterion reads gradients."""
        return "gate_grad" in needs(get_criterion(self.stage.criterion))

    @torch.no_grad()
    def observe(self) -> None:
        """Add `|dL/dg|` of this step, read off the gradient of each output projection.

        `dL/dg_u = sum(W_u * dL/dW_u)` over the columns of unit `u`: no further pass is needed.
        """
        if not self.needs_gradients():
            return
        assert self.model is not None  # noqa: S101  # start() came first
        base = base_model(self.model)
        for site in self.sites:
            module = projection(base, site.gate.module)
            weight, gradient = logical_weight(module), logical_weight(module, gradient=True)
            columns = (weight * gradient).sum(dim=0)  # [E, U * D] -> [U * D]
            per_unit = columns.view(site.units, site.gate.width).sum(dim=1).abs()  # [U]
            self.sums[site.name] = self.sums.get(site.name, torch.zeros_like(per_unit)) + per_unit
        self.steps += 1

    def _statistics(self) -> Statistics:
        """The statistics since the last decision; those of it, if no step came between."""
        if self.steps == 0 and self.needs_gradients():
            if not self.last:
                raise DataError(
                    "training ended before a single optimizer step: nothing was pruned."
                )
            return self.last
        result: Statistics = {site.name: {} for site in self.sites}
        for name, value in self.sums.items():
            total = sum_over_processes(value) / PartialState().num_processes
            if not torch.isfinite(total).all():
                raise NumericsError(f"{name}: the gradient is not finite: training diverged.")
            result[name]["gate_grad"] = (total / max(self.steps, 1)).cpu()
        self.last = result
        return result

    def decide(self, share: float) -> None:
        """Choose what stays at `share` of the final sparsity, and close the other gates."""
        assert self.model is not None  # noqa: S101  # start() came first
        stage = self.stage.model_copy(update={"sparsity": self.stage.fraction * share})
        rankings = score(self.model, self.sites, stage.criterion, self._statistics(), self.seed)
        base = self.base if (stage.of, stage.cost) == ("layers", "parameters") else None
        goal = make_goal(
            self.sites,
            stage.cost,
            stage.fraction,
            sequence_length=stage.sequence_length,
            base=base,
        )
        model_type = self.model.config.model_type
        selection = decide(self.sites, rankings, stage, [goal], model_type=model_type)
        self.selection = same_on_all_processes(selection)
        device = self.model.device
        gates = {name: gate.to(device) for name, gate in plan_gates(selection.plan).items()}
        self.gates.values = gates
        self.sums, self.steps = {}, 0

    def after_step(self) -> None:
        """Gates hold by themselves: nothing to do after the optimizer."""

    def finish(self) -> None:
        """Open the gates and really remove what they had closed."""
        self.gates.remove()
        if self.model is not None and self.selection is not None:
            remove_units(self.model, self.selection.plan)

    def kept(self) -> dict[str, int]:
        """Units kept, by kind, for logs."""
        result: dict[str, int] = {}
        for site in self.sites:
            plan = self.selection.plan.sites[site.name] if self.selection else None
            result[site.kind] = result.get(site.kind, 0) + (len(plan.kept) if plan else site.units)
        return result
