"""Sensitivity: what each site's loss does as more and more of it goes, and do criteria agree?

Each site is masked alone, in the order of a criterion, with everything else as it is.
"""

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import transformers
from accelerate import PartialState
from torch import Tensor
from tqdm.auto import tqdm
from transformers import AutoConfig, AutoTokenizer, PreTrainedModel

from hf_prune.criteria import get_criterion, needs
from hf_prune.criteria.ranking import Ranking
from hf_prune.errors import ConfigError, DataError
from hf_prune.gates.attach import attach_gates
from hf_prune.recipe import did_you_mean
from hf_prune.sites import ALL_KINDS, HIDDEN, QUERY_HEADS, Site, find_sites
from hf_prune.statistics.batches import (
    Batch,
    check_batch,
    forward_kwargs,
    labels_of_examples,
    summed_loss,
    to_device,
)
from hf_prune.statistics.collect import collect, sum_over_processes
from hf_prune.statistics.logits import Said, divergence, said
from hf_prune.statistics.score import score
from hf_prune.statistics.streams import in_eval
from hf_prune.statistics.texts import Examples, class_numbers, read_examples

UNITS = (*ALL_KINDS, QUERY_HEADS, HIDDEN)
"""Kinds of units that can be named."""
FRACTIONS = (0.25, 0.5, 0.75, 0.9)
"""Shares of a site's units that are masked."""
BATCH = 16
"""Examples of a file that run at once."""


@dataclass(frozen=True)
class Sensitivity:
    """What a sensitivity analysis found; plain data, for plots.

    Attributes:
        criterion: in whose order units were masked.
        fractions: shares of the units of one site that were asked for.
        curves: by site, at each fraction: `masked` (the units that were masked, the nearest whole
            number of them), `kl` (mean KL divergence from the dense model, in nats per example or
            token, of answers in a text per start and end: see `divergence_over` for others),
            `logit_error` (mean squared change of the logits, less their mean over the classes, or
            tokens, that a softmax runs over) and, where batches have labels, `loss`, the mean over
            all labels that count: examples, or tokens. All are over the batches of all processes.
        scores: by criterion and site, what each unit's removal adds in the criterion's order, by
            unit.
        agreement: by two criteria, the mean over sites of the rank correlation of their orders.
        dense: what `loss` and `accuracy` are where nothing is masked.
    """

    criterion: str
    fractions: tuple[float, ...]
    curves: dict[str, dict[str, list[float]]]
    scores: dict[str, dict[str, list[float]]]
    agreement: dict[str, dict[str, float]]
    dense: dict[str, float]

    def to_dict(self) -> dict[str, object]:
        """As JSON."""
        return {
            "criterion": self.criterion,
            "fractions": list(self.fractions),
            "curves": self.curves,
            "scores": self.scores,
            "agreement": self.agreement,
            "dense": self.dense,
        }


def _positions(ranking: Ranking) -> Tensor:
    """When each unit goes, `[U]`."""
    positions = torch.empty(ranking.units, dtype=torch.float64)
    positions[ranking.order] = torch.arange(ranking.units, dtype=torch.float64)
    return positions


def rank_correlation(one: Ranking, two: Ranking) -> float:
    """Spearman's rank correlation of two orders of the same units; 1 for a single unit."""
    if one.units < 2:
        return 1.0
    return float(torch.corrcoef(torch.stack([_positions(one), _positions(two)]))[0, 1])


def _by_unit(ranking: Ranking) -> list[float]:
    values = torch.empty(ranking.units, dtype=torch.float64)
    values[ranking.order] = ranking.errors.diff()
    return [float(value) for value in values]


def _compare(dense: Said, masked: Said) -> Tensor:
    """Sums over examples or tokens of divergence and squared logit error, and their number."""
    kl = divergence(dense, masked)
    change = replace(masked, values=masked.values - dense.values).centred().values
    if dense.real is None:
        error = change.square().mean(dim=-1)
    else:
        error = change.square().sum(dim=-1) / dense.real.sum(dim=-1)
    count = kl.new_tensor(len(kl), dtype=torch.float64)
    return torch.stack([kl.double().sum(), error.double().sum(), count])


def _told(model: PreTrainedModel, batch: Batch, output: Any) -> Tensor:
    """What labels say of an output, `[4]`: a loss and its labels, right answers and all of them.

    The loss is times the labels that it is a mean over. Only classifiers have right answers.
    """
    labels = batch["labels"]
    count = labels_of_examples(model, batch).sum().double()
    total = torch.zeros_like(count)
    if count:
        total = summed_loss(model, output.loss.double(), int(count))
    right = judged = torch.zeros_like(count)
    if _classifies(model, labels, output):
        counted = labels != -100
        judged = counted.sum().double()
        right = ((output.logits.argmax(dim=-1) == labels) & counted).sum().double()
    return torch.stack([total, count, right, judged])


def _classifies(model: PreTrainedModel, labels: Tensor, output: Any) -> bool:
    """Whether each label is one of several classes, and not a token, a number or a span."""
    logits = getattr(output, "logits", None)
    if logits is None or model.get_output_embeddings() is not None or labels.is_floating_point():
        return False
    return bool(logits.shape[:-1] == labels.shape and logits.shape[-1] > 1)


def _means(sums: Tensor) -> dict[str, list[float]]:
    """Loss and accuracy by fraction, where there are any, of the sums of `_told`, `[n, 4]`."""
    found = {}
    for name, at in (("loss", 0), ("accuracy", 2)):
        if bool((sums[:, at + 1] > 0).all()):
            found[name] = (sums[:, at] / sums[:, at + 1]).tolist()
    return found


@torch.no_grad()
def _curves(
    model: PreTrainedModel,
    sites: Sequence[Site],
    rankings: dict[str, Ranking],
    batches: Sequence[Batch],
    fractions: Sequence[float],
) -> tuple[dict[str, dict[str, list[float]]], dict[str, float]]:
    """The curves of each site, and what labels say of the dense model."""
    labelled = all("labels" in batch for batch in batches)
    shape = len(sites), len(fractions), 7
    sums = torch.zeros(shape, dtype=torch.float64, device=model.device)
    whole = torch.zeros(1, 4, dtype=torch.float64, device=model.device)
    gates = attach_gates(model, sites)
    title, quiet = "Masking each site", not PartialState().is_main_process
    try:
        for batch in tqdm(batches, desc=title, disable=quiet):
            batch = to_device(batch, model.device)
            kwargs = forward_kwargs(model, batch, labels=labelled)
            given = model(**kwargs)
            dense = said(model, batch, given)
            if labelled:
                whole[0] += _told(model, batch, given)
            for row, site in zip(sums, sites, strict=True):
                for index, fraction in enumerate(fractions):
                    gate = torch.ones(site.units, device=model.device)
                    gate[rankings[site.name].order[: round(fraction * site.units)]] = 0.0
                    gates.values = {site.name: gate}
                    output = model(**kwargs)
                    row[index, :3] += _compare(dense, said(model, batch, output))
                    if labelled:
                        row[index, 3:] += _told(model, batch, output)
                gates.values = {}
    finally:
        gates.remove()
    every = sum_over_processes(torch.cat([sums.flatten(), whole.flatten()])).cpu()
    curves = {}
    for site, total in zip(sites, every[:-4].view(shape), strict=True):
        kl, logit_error = ((total[:, at] / total[:, 2]).tolist() for at in (0, 1))
        units = [float(round(fraction * site.units)) for fraction in fractions]
        curve = {"masked": units, "kl": kl, "logit_error": logit_error}
        curves[site.name] = {**curve, **_means(total[:, 3:])}
    told = _means(every[-4:].view(1, 4))
    return curves, {name: values[0] for name, values in told.items()}


def analyse_sensitivity(
    model: PreTrainedModel,
    batches: Iterable[Batch],
    criteria: Sequence[str] = ("kfac_obs", "fisher", "magnitude"),
    *,
    fractions: Sequence[float] = FRACTIONS,
    kinds: Sequence[str] = ("heads", "neurons"),
    seed: int = 0,
) -> Sensitivity:
    """Mask each site alone, more and more of it, and compare what criteria say.

    Args:
        model: of a known family; not changed.
        batches: dicts of tensors. Criteria that need labels need them here too. Under several
            processes, each passes its own share.
        criteria: keys of `hf_prune.criteria.CRITERIA`; units are masked in the order of the first.
        fractions: shares of a site's units to mask.
        kinds: of sites.
        seed: of everything random.

    Raises:
        ConfigError: when no criterion is given, or an unknown one; when the model has no unit of
            these kinds, or a fraction is outside [0, 1].
        DataError: when batches are missing or out of range, or labels that a criterion needs.
    """
    if not criteria:
        raise ConfigError("name at least one criterion.")
    for fraction in fractions:
        if not 0 <= fraction <= 1:
            raise ConfigError(f"{fraction:g} is no fraction of units to mask: it is in [0, 1].")
    batches = list(batches)  # they pass once for statistics, and once for the curves
    if not batches:
        raise DataError("the calibration set is empty. Pass batches (dicts of tensors).")
    for index, batch in enumerate(batches):
        check_batch(model, batch, index)
    wanted = {name for criterion in criteria for name in needs(get_criterion(criterion))}
    for kind in kinds:
        if kind not in UNITS:
            raise ConfigError(f"unknown kind of units {kind!r}{did_you_mean(kind, UNITS)}")
    sites = find_sites(model, kinds)
    if not sites:
        raise ConfigError(
            f"{type(model).__name__} has no units of {', '.join(kinds) or 'no kind'}."
        )
    statistics = collect(model, sites, batches, wanted, seed)
    rankings = {name: score(model, sites, name, statistics, seed) for name in criteria}
    agreement = {
        one: {
            two: sum(rank_correlation(rankings[one][s.name], rankings[two][s.name]) for s in sites)
            / len(sites)
            for two in criteria
        }
        for one in criteria
    }
    with in_eval(model):
        curves, dense = _curves(model, sites, rankings[criteria[0]], batches, fractions)
    scores = {
        name: {site: _by_unit(ranking) for site, ranking in each.items()}
        for name, each in rankings.items()
    }
    return Sensitivity(criteria[0], tuple(fractions), curves, scores, agreement, dense)


def analyse_file(
    model: "str | os.PathLike[str]",
    examples: Examples,
    criteria: Sequence[str],
    *,
    kinds: Sequence[str] = ("heads", "neurons"),
    fractions: Sequence[float] = FRACTIONS,
) -> Sensitivity:
    """The sensitivity of a saved model on a text file with one example a line, or on a table.

    Args:
        model: folder or Hub name, with a tokenizer; loaded as the class that it was saved from.
        examples: texts, for classifiers with labels: numbers of classes, or their names in the
            config; for models of one number, that number.
        criteria: as in `analyse_sensitivity`. Language models have their tokens for labels.
        kinds: as in `analyse_sensitivity`.
        fractions: as in `analyse_sensitivity`.

    Raises:
        ConfigError: when labels are named that file or model do not have; or transformers does not
            have the class that the model was saved from.
        DataError: when there is no text, or a label that the model does not know.
    """
    texts, values = read_examples(examples)
    names = AutoConfig.from_pretrained(model).architectures or ["none"]
    loader = getattr(transformers, names[0], None)
    if loader is None:
        raise ConfigError(f"{model} was saved from {names[0]}, which transformers does not have.")
    loaded: PreTrainedModel = loader.from_pretrained(model)
    labels = None if values is None else class_numbers(loaded, values)
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    options = {"truncation": True, "max_length": examples.max_length, "padding": True}
    batches = []
    for start in range(0, len(texts), BATCH):
        part = slice(start, start + BATCH)
        batch = dict(tokenizer(texts[part], return_tensors="pt", **options))
        if labels is not None:
            batch["labels"] = labels[part]
        elif loaded.get_output_embeddings() is not None:
            batch["labels"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        batches.append(batch)
    loaded.to(PartialState().device)
    return analyse_sensitivity(loaded, batches, criteria, kinds=kinds, fractions=fractions)
