"""Refining the widths: an evolutionary search on what the pruned and re-fitted network really does.

The errors of sites add up only to first order. When most of a model goes, they do not: then a
network of slightly other widths is built, re-fitted on a few examples, and judged on others. The
best of them are changed further, and crossed with each other.
"""

import copy
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from transformers import PreTrainedModel

from hf_prune.budget.costs import Goal
from hf_prune.budget.prepare import prepare
from hf_prune.budget.selection import selection_of
from hf_prune.criteria.ranking import Ranking
from hf_prune.recipe import Prune
from hf_prune.search.judge import Judge
from hf_prune.sites import Site
from hf_prune.statistics.batches import Batch
from hf_prune.surgery.dense import DenseTargets, dense_targets
from hf_prune.surgery.reconstruct import refit_as_asked
from hf_prune.surgery.remove import remove_units

logger = logging.getLogger(__name__)

LARGEST_STEP = 1 / 6
"""The share of its levels by which a site is narrowed in one step at most, and at least by one: two
heads of twelve, or as many neurons as cost about the same."""
MAX_DRAWS = 50
"""How often a change is drawn that the budget allows, before the search ends."""
GROWTH = 8
"""Trials in which the best widths so far are changed, before others are chosen and crossed."""
SURVIVORS = 6
"""Widths that may be changed and crossed: the best of all that were judged."""

Widths = dict[str, int]
"""By site, how many units stay."""


@dataclass
class LevelSearch:
    """An evolution of widths within all goals, judged by how close the logits stay.

    One child at a time joins those that were judged, and the `SURVIVORS` best of them can be its
    parents: a (mu + 1) strategy with tournaments of two. A child is a parent of which one site is
    narrowed and another widened; or, once there is something to cross, takes each site from one of
    two parents, or halfway between them. None is judged twice.

    Attributes:
        model: to be pruned; not changed.
        sites: of it.
        rankings: in which order the units of each site go.
        stage: floors, `round_to`, ridge.
        goals: never exceeded.
        batches: calibration batches, split into those that are fitted and those that judge.
        seed: of the changes.
        dense: what is aimed at; `model` itself, if not given.
        trials: what was judged, the start first: its `error`, 1 in `accepted` where that was the
            least so far, and 1 in `crossed` where it had two parents.

    Source: evolution by tournaments, Real et al. 2017, arXiv:1703.01041; a search over the levels
        around what dynamic programming gives, Frantar and Alistarh 2022, arXiv:2201.13096. The
        repair of crossed widths is ours.
    """

    model: PreTrainedModel
    sites: Sequence[Site]
    rankings: Mapping[str, Ranking]
    stage: Prune
    goals: Sequence[Goal]
    batches: Sequence[Batch]
    seed: int
    dense: PreTrainedModel | None = None
    trials: list[dict[str, float]] = field(default_factory=list)

    def __post_init__(self) -> None:
        aim = self.dense or self.model
        self.judge = Judge(aim, self.batches)
        self.targets: DenseTargets = dense_targets(aim, self.judge.fitted)
        self.generator = torch.Generator().manual_seed(self.seed)
        ready = prepare(self.sites, self.rankings, self.stage)
        self.rankings, self.levels = ready.rankings, ready.levels

    def error(self, counts: Mapping[str, int]) -> float:
        """Mean squared change of the logits of a network of some widths, re-fitted, on judges."""
        candidate = copy.deepcopy(self.model)
        model_type = self.model.config.model_type
        selection = selection_of(self.sites, self.rankings, counts, (), model_type=model_type)
        remove_units(candidate, selection.plan)
        refit_as_asked(candidate, self.targets, self.stage, selection.plan)
        return self.judge.error(candidate)

    def _draw(self, high: int) -> int:
        return int(torch.randint(high, (1,), generator=self.generator))

    def _fits(self, counts: Mapping[str, int]) -> bool:
        return all(goal.spent(counts) <= goal.budget for goal in self.goals)

    def _widest(self, counts: Mapping[str, int], name: str, most: int) -> int:
        """The widest level of a site that the goals allow beside all others, up to `most`."""
        wider = [level for level in self.levels[name] if counts[name] < level <= most]
        fits = [level for level in wider if self._fits({**counts, name: level})]
        return fits[-1] if fits else counts[name]

    def change(self, counts: Mapping[str, int]) -> Widths | None:
        """Narrow one site, and widen another as far as the goals allow; None if nothing fits."""
        names = [site.name for site in self.sites]
        for _ in range(MAX_DRAWS):
            less, more = names[self._draw(len(names))], names[self._draw(len(names))]
            most = max(1, round(LARGEST_STEP * len(self.levels[less])))
            down = self.levels[less].index(counts[less]) - 1 - self._draw(most)
            if less == more or down < 0:
                continue
            narrowed = {**counts, less: self.levels[less][down]}
            widest = self._widest(narrowed, more, self.levels[more][-1])
            if widest > counts[more]:
                return {**narrowed, more: widest}
        return None

    def _between(self, name: str, one: int, two: int) -> int:
        """The level of one parent, of the other, or the one in the middle."""
        levels = self.levels[name]
        middle = levels[(levels.index(one) + levels.index(two)) // 2]
        return (one, two, middle)[self._draw(3)]

    def cross(self, one: Mapping[str, int], two: Mapping[str, int]) -> Widths | None:
        """Each site as in one of two parents, or halfway between them; then brought to the goals.

        Where it exceeds a goal, sites are narrowed to the narrower parent, in random order; then
        they are widened in the opposite order, as far as goals and the wider parent allow. None if
        the goals do not even allow the narrower parent everywhere.
        """
        child = {name: self._between(name, one[name], two[name]) for name in one}
        differ = [name for name in one if one[name] != two[name]]
        order = torch.randperm(len(differ), generator=self.generator).tolist()
        names = [differ[index] for index in order]
        for name in names:
            if self._fits(child):
                break
            child[name] = min(one[name], two[name])
        if not self._fits(child):
            return None
        for name in reversed(names):
            child[name] = self._widest(child, name, max(one[name], two[name]))
        return child

    def _parent(self, judged: Sequence[tuple[float, Widths]]) -> Widths:
        """The better of two survivors that are drawn."""
        count = min(len(judged), SURVIVORS)
        return judged[min(self._draw(count), self._draw(count))][1]

    def _child(self, judged: Sequence[tuple[float, Widths]]) -> tuple[Widths | None, bool]:
        """Widths that nobody has judged, and whether they are crossed; None if none are found."""
        known = [widths for _, widths in judged]
        for _ in range(MAX_DRAWS):
            crossed = False
            if len(judged) <= GROWTH:
                child = self.change(judged[0][1])
            elif crossed := bool(self._draw(2)):
                child = self.cross(self._parent(judged), self._parent(judged))
            else:
                child = self.change(self._parent(judged))
            if child is not None and child not in known:
                return child, crossed
        return None, False

    def run(self, counts: Mapping[str, int], trials: int) -> Widths:
        """The best widths found from some widths on, in a number of trials.

        Args:
            counts: by site, where the search starts.
            trials: networks that are built and judged, beside the first one.
        """
        judged = [(self.error(counts), dict(counts))]
        self.trials.append({"error": judged[0][0], "accepted": 1.0, "crossed": 0.0})
        for _ in range(trials):
            child, crossed = self._child(judged)
            if child is None:
                break
            error = self.error(child)
            accepted = error < judged[0][0]
            self.trials.append(
                {"error": error, "accepted": float(accepted), "crossed": float(crossed)}
            )
            judged.append((error, child))
            judged.sort(key=lambda pair: pair[0])  # stable: the earlier one first
        logger.info("level search: %.3e -> %.3e", self.trials[0]["error"], judged[0][0])
        return judged[0][1]
