"""Refining the widths: an evolutionary search on what the pruned and re-fitted network really does.

The errors of sites add up only to first order. When most of a model goes, they do not: then a
network of slightly other widths is built, re-fitted on a few examples, and judged on others.
"""

import copy
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import PreTrainedModel

from hf_prune.budget.costs import Goal
from hf_prune.budget.prepare import prepare
from hf_prune.budget.selection import selection_of
from hf_prune.criteria.ranking import Ranking
from hf_prune.errors import DataError
from hf_prune.recipe import Prune
from hf_prune.sites import Site
from hf_prune.statistics.batches import Batch, examples_of, forward_kwargs, to_device, token_mask
from hf_prune.statistics.collect import sum_over_processes
from hf_prune.statistics.projection import logits_of
from hf_prune.surgery.dense import DenseTargets, dense_targets, held_out_examples
from hf_prune.surgery.reconstruct import refit_as_asked
from hf_prune.surgery.remove import remove_units

logger = logging.getLogger(__name__)

JUDGES = 1
"""Seed of the examples that judge networks; the others are fitted, with judges of their own."""
MAX_STEPS = 4
"""Levels by which a site is narrowed in one step at most."""
MAX_DRAWS = 50
"""How often a change is drawn that the budget allows, before the search ends."""


@torch.no_grad()
def logits_on(model: PreTrainedModel, batches: Sequence[Batch]) -> list[Tensor]:
    """The logits of examples or of real tokens, batch by batch, less their mean over classes."""
    model.eval()
    found = []
    for batch in batches:
        batch = to_device(batch, model.device)
        values = logits_of(model(**forward_kwargs(model, batch, labels=False))).float()
        mask = token_mask(model, batch)
        if values.ndim == 3 and values.shape[:2] == mask.shape:
            values = values[mask]  # [B, T, C] -> [real tokens, C]
        found.append(values - values.mean(dim=-1, keepdim=True))
    return found


@dataclass
class LevelSearch:
    """Widths that change a little at a time, within all goals, as long as the logits get closer.

    Attributes:
        model: to be pruned; not changed.
        sites: of it.
        rankings: in which order the units of each site go.
        stage: floors, `round_to`, ridge.
        goals: never exceeded.
        batches: calibration batches, split into those that are fitted and those that judge.
        seed: of the changes.
    """

    model: PreTrainedModel
    sites: Sequence[Site]
    rankings: Mapping[str, Ranking]
    stage: Prune
    goals: Sequence[Goal]
    batches: Sequence[Batch]
    seed: int
    trials: list[dict[str, float]] = field(default_factory=list)

    def __post_init__(self) -> None:
        judges, fitted = self._split()
        self.judges: Sequence[Batch] = judges
        self.targets: DenseTargets = dense_targets(self.model, fitted)
        self.dense = logits_on(self.model, self.judges)
        self.generator = torch.Generator().manual_seed(self.seed)
        ready = prepare(self.sites, self.rankings, self.stage)
        self.rankings, self.levels = ready.rankings, ready.levels

    def _split(self) -> tuple[list[Batch], list[Batch]]:
        """Examples that judge, and those that are fitted; the same ones however they are batched.

        Raises:
            DataError: on every process, when no example of any of them is one or the other.
        """
        judges, fitted = list[Batch](), list[Batch]()
        for batch in self.batches:
            chosen = held_out_examples(self.model, batch, JUDGES)
            for part, rows in ((judges, chosen), (fitted, ~chosen)):
                if bool(rows.any()):
                    part.append(examples_of(batch, rows))
        device = self.model.device
        found = torch.tensor([float(len(judges)), float(len(fitted))], device=device)
        if not bool((sum_over_processes(found) > 0).all()):
            raise DataError("too few calibration examples to search with: pass some dozens.")
        return judges, fitted

    def error(self, counts: Mapping[str, int]) -> float:
        """Mean squared change of the logits of a network of some widths, re-fitted, on judges."""
        candidate = copy.deepcopy(self.model)
        model_type = self.model.config.model_type
        selection = selection_of(self.sites, self.rankings, counts, (), model_type=model_type)
        remove_units(candidate, selection.plan)
        refit_as_asked(candidate, self.targets, self.stage, selection.plan)
        pairs = zip(logits_on(candidate, self.judges), self.dense, strict=True)
        sums = torch.zeros(2, dtype=torch.float64)
        for ours, theirs in pairs:
            sums += torch.tensor([float((ours - theirs).square().sum()), ours.numel()])
        total, number = sum_over_processes(sums.to(self.model.device)).tolist()
        return float(total / number)

    def _draw(self, high: int) -> int:
        return int(torch.randint(high, (1,), generator=self.generator))

    def _fits(self, counts: Mapping[str, int]) -> bool:
        return all(goal.spent(counts) <= goal.budget for goal in self.goals)

    def change(self, counts: Mapping[str, int]) -> dict[str, int] | None:
        """Narrow one site, and widen another as far as the goals allow; None if nothing fits."""
        names = [site.name for site in self.sites]
        for _ in range(MAX_DRAWS):
            less, more = names[self._draw(len(names))], names[self._draw(len(names))]
            at = self.levels[less].index(counts[less])
            down = at - 1 - self._draw(MAX_STEPS)
            if less == more or down < 0:
                continue
            narrowed = {**counts, less: self.levels[less][down]}
            wider = [level for level in self.levels[more] if level > counts[more]]
            fits = [level for level in wider if self._fits({**narrowed, more: level})]
            if fits:
                return {**narrowed, more: fits[-1]}
        return None

    def run(self, counts: Mapping[str, int], trials: int) -> dict[str, int]:
        """The best widths found from some widths on, in a number of trials.

        Args:
            counts: by site, where the search starts.
            trials: networks that are built and judged.
        """
        best, least = dict(counts), self.error(counts)
        self.trials.append({"error": least, "accepted": 1.0})
        for _ in range(trials):
            candidate = self.change(best)
            if candidate is None:
                break
            error = self.error(candidate)
            self.trials.append({"error": error, "accepted": float(error < least)})
            if error < least:
                best, least = candidate, error
        logger.info("level search: %.3e -> %.3e", self.trials[0]["error"], least)
        return best
