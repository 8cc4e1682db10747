"""Masks that are learned by gradient while a model trains: movement and hard-concrete gates.

Each unit has one parameter. With L0 each layer and block can have one too, whose gate multiplies
those of its units, and so can each channel of the hidden width. They live beside the model, and
learn from the gradients of gates, which all processes share. At the end what stays is chosen by the
solver, so that the cost that was asked for is met exactly, and the gates are plain 0 and 1.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate import PartialState
from torch import Tensor
from transformers import PreTrainedModel

from hf_prune.budget.selection import Selection
from hf_prune.budget.solvers import get_solver
from hf_prune.criteria.ranking import Ranking
from hf_prune.errors import NumericsError
from hf_prune.gates.gate import Gates, expand_gate
from hf_prune.gates.hidden import hidden_gate
from hf_prune.gates.plans import check_plan, plan_gates
from hf_prune.recipe import Prune
from hf_prune.sites import HIDDEN, Site, base_model, logical_weight, projection
from hf_prune.statistics.collect import sum_over_processes
from hf_prune.surgery.remove import remove_units
from hf_prune.targets import Chooser
from hf_prune.training import hard_concrete
from hf_prune.training.aim import (
    make_chooser,
    same_on_all_processes,
    select,
    selection_from_dict,
    selection_to_dict,
    table_from_dict,
    table_to_dict,
)
from hf_prune.training.coarse import (
    coarse_members,
    coarse_product,
    expected_share,
    share_tables,
)
from hf_prune.training.structure import State, all_open, kept_by_kind, open_gates
from hf_prune.training.width import (
    counts_left,
    fold_width_,
    narrowed_chooser,
    width_plan,
    width_site,
    with_width,
)

L0_START = 2.5
"""Of `log_alpha`: a gate is open in 98 of 100 steps."""


@dataclass
class LearnedPruning:
    """The state of a stage with learned masks in a running training.

    Attributes:
        parameters: `[U + G + E]` of all units of all sites in a row, then of coarse gates, then of
            channels: scores, or `log_alpha`.
        multipliers: `[2]`, of the Lagrangian, linear and square.
        share: of the final sparsity, that is asked for now.
        sparsity: fraction of the base that the gates are expected to remove (of the first goal).
        target: that fraction in the end, as it is asked for.
        settled: whether the last decision was taken.
        width: the site of the hidden width, where its channels have gates.
        left: parameters, and MACs in units, that a selection with channels leaves.
    """

    stage: Prune
    seed: int
    model: PreTrainedModel | None = None
    sites: list[Site] = field(default_factory=list)
    gates: Gates = field(default_factory=Gates)
    parameters: Tensor = field(default_factory=lambda: torch.zeros(0))
    multipliers: Tensor = field(default_factory=lambda: torch.zeros(2))
    share: float = 0.0
    sparsity: float = 0.0
    target: float = 0.0
    settled: bool = False
    selection: Selection | None = None
    width: Site | None = None
    left: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        get_solver(self.stage.solver)

    def start(self, model: PreTrainedModel) -> None:
        """Attach gates, all open, and their parameters."""
        self.model = model
        self.sites, chooser, self.gates = open_gates(model, self.stage, self.gates)
        self._aim(chooser)
        self.units = len(self.costs)
        self.width = width_site(model) if "hidden" in self.stage.coarse else None
        if self.width is not None:
            self.gates.handles += hidden_gate(model, self.gates, self.width)
        count, self.members = coarse_members(self.sites, self.stage.coarse)
        self.channels = self.units + count  # where those of channels begin
        start = L0_START if self.stage.masks == "l0" else 0.0
        total = self.channels + (self.width.units if self.width is not None else 0)
        self.parameters = self.costs.new_full((total,), start)
        self.optimizer = torch.optim.Adam([self.parameters], lr=self.stage.mask_learning_rate)
        self.multipliers = torch.zeros(2, device=model.device)
        self.generator = torch.Generator().manual_seed(self.seed)
        self.share, self.sparsity, self.settled = 0.0, 0.0, False
        self.selection = self.left = None
        self._set(self._effective(torch.ones_like(self.parameters)))

    def _aim(self, chooser: Chooser) -> None:
        """Take the goals of a chooser: what each unit costs, and what is to go."""
        assert self.model is not None  # noqa: S101  # start() came first
        self.chooser, device = chooser, self.model.device
        self.tables = [share_tables(goal, self.sites, device) for goal in chooser.goals]
        first = chooser.goals[0]
        self.target = first.asked / first.total
        each = [(table[-1] / (len(table) - 1)).repeat(len(table) - 1) for table in self.tables[0]]
        self.costs = torch.cat(each)  # [U], shares of the base

    def _split(self, values: Tensor) -> dict[str, Tensor]:
        parts = values.split([site.units for site in self.sites])
        return {site.name: part for site, part in zip(self.sites, parts, strict=True)}

    def _by_site(self, values: Tensor) -> dict[str, Tensor]:
        """Gates by site, of `[U + E]`."""
        parts = self._split(values[: self.units])
        return parts if self.width is None else {**parts, HIDDEN: values[self.units :]}

    def _set(self, values: Tensor) -> None:
        """Gates with these values; their gradient is what the parameters learn from."""
        fresh = {k: v.detach().clone().requires_grad_() for k, v in self._by_site(values).items()}
        self.gates.values = fresh

    def _effective(self, values: Tensor) -> Tensor:
        """Gates of units with those of their layers and blocks, then of channels, `[U + E]`."""
        fine, coarse = values[: self.units], values[self.units : self.channels]
        units = fine * coarse_product(coarse, self.members, self.units)
        return torch.cat([units, values[self.channels :]])

    def before_step(self) -> None:
        """Draw new gates, where they are random; evaluation sees them without noise."""
        if self.settled or self.stage.masks != "l0":
            return
        noise = torch.rand(len(self.parameters), generator=self.generator)
        noise = noise.clamp(1e-6, 1 - 1e-6).to(self.parameters.device)  # same on all processes
        self.parameters.requires_grad_()
        self.drawn = self._effective(hard_concrete.sample(self.parameters, noise))
        self._set(self.drawn)
        self.gates.evaluation = self._by_site(self._let_through())

    def _let_through(self) -> Tensor:
        """The gate of each unit and channel without noise, `[U + E]`."""
        return self._effective(hard_concrete.expected(self.parameters.detach()))

    def observe(self) -> None:
        """Let the parameters learn from the gradients of the gates in this step."""
        if self.settled:
            return
        leaves = list(self.gates.values.values())
        found = [torch.zeros_like(g) if g.grad is None else g.grad for g in leaves]
        for leaf in leaves:
            leaf.grad = None
        gradient = sum_over_processes(torch.cat(found).float()) / PartialState().num_processes
        if not torch.isfinite(gradient).all():
            raise NumericsError("the gradient of a gate is not finite: training diverged.")
        if self.stage.masks == "l0":
            self._learn_l0(gradient)
        else:
            self._move(gradient)

    def _learn_l0(self, gradient: Tensor) -> None:
        self.drawn.backward(gradient)
        removed = self._expected_to_go()  # [goals]
        goals = self.chooser.goals
        asked = removed.new_tensor([goal.asked / goal.total for goal in goals]) * self.share
        missing = (asked - removed).max()  # the goal that is furthest away
        linear, square = self.multipliers
        (linear * missing + square * missing.square()).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        missing = missing.detach()
        steps = torch.stack([missing, missing.square()])
        self.multipliers += self.stage.mask_learning_rate * steps
        self.sparsity = float(removed[0].detach())

    def _expected_to_go(self) -> Tensor:
        """What gates are expected to remove, as a share of the total of each goal, `[goals]`."""
        probability = hard_concrete.open_probability(self.parameters)
        groups = probability[self.units : self.channels]
        coarse = coarse_product(groups, self.members, self.units)
        opened, whole = self._split(probability[: self.units]), self._split(coarse)
        removed = torch.stack(
            [
                goal.prunable / goal.total - expected_share(tables, opened, whole)
                for goal, tables in zip(self.chooser.goals, self.tables, strict=True)
            ]
        )
        if self.width is None:
            return removed
        return 1 - probability[self.channels :].mean() * (1 - removed)

    @torch.no_grad()
    def _move(self, gradient: Tensor) -> None:
        """Scores grow where the loss asks for a larger gate (straight-through)."""
        if self.stage.masks == "soft_movement":
            gates = torch.sigmoid(self.parameters)
            penalty = self.stage.mask_penalty * self.share / len(self.parameters)
            gradient = gradient + penalty * gates * (1 - gates)
        self.parameters -= self.stage.mask_learning_rate * gradient

    def _rankings(self) -> dict[str, Ranking]:
        """Parameters as losses: each kind in its own scale, times what a unit costs.

        So the order by loss per cost is that of the parameters.
        """
        values = self.parameters.detach().double().cpu()
        if self.stage.masks == "l0":
            scores = self._effective(hard_concrete.open_probability(values))[: self.units]
        else:
            scores = torch.empty_like(values)
            for kind in {site.kind for site in self.sites}:
                mine = torch.cat([torch.full((s.units,), s.kind == kind) for s in self.sites])
                scores[mine] = values[mine] / values[mine].std().clamp(min=1e-12)
            scores = scores - scores.min()
        losses = self._split((scores + 1e-9) * self.costs.double().cpu())
        return {name: Ranking.from_scores(part) for name, part in losses.items()}

    def _select(self, share: float) -> Selection:
        with all_open(self.gates):
            return select(self.chooser, self._rankings(), share)

    def _select_last(self) -> Selection:
        """What stays in the end: channels first, then units within the goals."""
        if self.width is None:
            return self._select(1.0)
        assert self.model is not None  # noqa: S101  # start() came first
        opened = hard_concrete.open_probability(self.parameters.detach())[self.channels :]
        plan = width_plan(self.width, self.stage, opened)
        with all_open(self.gates):
            chooser = narrowed_chooser(self.model, self.stage, len(plan.kept), self.chooser)
            units = select(chooser, self._rankings(), 1.0)
        return same_on_all_processes(with_width(units, plan, self.chooser))

    def decide(self, share: float) -> None:
        """Ask for `share` of the final sparsity; at 1 choose what stays, once and for all."""
        self.share = share
        if share >= 1:
            self._settle(self._select_last())
        elif self.stage.masks != "l0":
            chosen = self._select(1.0 if self.stage.masks == "soft_movement" else share)
            self.selection = chosen
            masks = self._flat(chosen)
            if self.stage.masks == "soft_movement":
                masks = torch.maximum(masks, (self.parameters >= 0).float())  # never past the goal
            self._set(masks)
            total = (self.costs * (1 - masks)).sum()
            self.sparsity = float(total)

    def _flat(self, selection: Selection) -> Tensor:
        """A selection as 0 and 1, `[U + E]`."""
        closed = plan_gates(selection.plan)
        gates = [closed.get(site.name, torch.ones(site.units)) for site in self._gated()]
        return torch.cat(gates).to(self.parameters.device)

    def _gated(self) -> list[Site]:
        """The sites of units, and that of the hidden width."""
        return [*self.sites, *([] if self.width is None else [self.width])]

    @torch.no_grad()
    def _settle(self, selection: Selection) -> None:
        if self.stage.masks == "l0":
            self._fold(self._let_through())
        self.take(selection)

    def _fold(self, values: Tensor) -> None:
        """Write what each gate lets through into the columns that it stands before."""
        assert self.model is not None  # noqa: S101  # start() came first
        base = base_model(self.model)
        units = self._split(values[: self.units])
        for site, gate in zip(self.sites, units.values(), strict=True):
            weight = logical_weight(projection(base, site.gate.module))  # [E, U * D]
            weight.mul_(expand_gate(gate, site.gate.width))
        if self.width is not None:
            fold_width_(self.model, self.width, values[self.units :])

    def take(self, selection: Selection | None) -> None:
        """Hold to a selection: gates are 0 and 1, and no longer learn."""
        self.selection, self.settled = selection, True
        self.gates.evaluation = {}
        if selection is None:
            self.gates.values = {}
            return
        self.gates.values = self._by_site(self._flat(selection))
        self.sparsity = selection.outcomes[0].removed / max(selection.outcomes[0].total, 1)
        if self.width is not None and self.model is not None:
            self.left = counts_left(self.model, self.stage, selection)

    def after_step(self) -> None:
        """Gates hold by themselves: nothing to do after the optimizer."""

    def settle(self) -> None:
        """Nothing more to do: the last decision has done it."""

    def finish(self) -> None:
        """Open the gates and really remove what they had closed."""
        self.gates.remove()
        if self.model is not None and self.selection is not None:
            remove_units(self.model, self.selection.plan)

    def kept(self) -> dict[str, int]:
        """Units whose gate is open now, by kind, for logs."""
        if self.settled or self.stage.masks != "l0":
            return kept_by_kind(self._gated(), self.selection)
        gates = self._by_site(self._let_through())
        result: dict[str, int] = {}
        for site in self._gated():
            opened = int((gates[site.name] > 0).sum())
            result[site.kind] = result.get(site.kind, 0) + opened
        return result

    def state(self) -> State:
        """What must survive a restart."""
        tensors = {
            "parameters": self.parameters,
            "multipliers": self.multipliers,
            "generator": self.generator.get_state(),
        }
        if not self.settled:
            tensors["gates"] = torch.cat([g.detach() for g in self.gates.values.values()])
        for name, value in self.optimizer.state.get(self.parameters, {}).items():
            tensors[f"adam.{name}"] = value
        data = {
            "latency": table_to_dict(self.chooser),
            "selection": selection_to_dict(self.selection),
            "share": self.share,
            "sparsity": self.sparsity,
            "settled": self.settled,
        }
        return data, tensors

    @torch.no_grad()
    def load(self, data: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        """Go on from what `state` gave.

        Raises:
            PlanError: when the plan there does not fit this model.
        """
        assert self.model is not None  # noqa: S101  # start() came first
        device = self.model.device
        table = table_from_dict(data["latency"])
        if table is not None:
            self._aim(make_chooser(self.model, self.sites, self.stage, table))
        self.parameters.requires_grad_(False).copy_(tensors["parameters"])
        self.multipliers.copy_(tensors["multipliers"])
        self.generator.set_state(tensors["generator"])
        moments = {
            name.removeprefix("adam."): value.to(device)
            for name, value in tensors.items()
            if name.startswith("adam.")
        }
        if moments:
            self.optimizer.state[self.parameters] = {**moments, "step": moments["step"].cpu()}
        self.share, self.sparsity = float(data["share"]), float(data["sparsity"])
        selection = selection_from_dict(data["selection"])
        if selection is not None:
            check_plan(selection.plan, self._gated(), self.model.config.model_type)
        if data["settled"]:
            self.take(selection)
        else:
            self.selection = selection
            self._set(tensors["gates"].to(device))
