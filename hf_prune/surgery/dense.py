"""What the dense network computes on calibration batches: what every re-fit aims at."""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_prune.sites import Site, base_model, find_sites
from hf_prune.statistics.batches import (
    Batch,
    example_seed,
    examples_of,
    main_input,
    token_mask,
)
from hf_prune.statistics.streams import Seen, Stream, by_layer, in_eval, start_streams, watched

HELD_OUT_EVERY = 5
"""About one example in so many is held out of the fits and judges them."""
MAX_STORED_BYTES = 1 << 30
"""Dense sums are kept in memory up to here; beyond, the dense layers are run again where needed."""

Sums = dict[str, list[Tensor]]
"""By output projection, the dense sums of residual and output on one batch, `[B, T, E]` a run."""


def watch_all(base: nn.Module, sites: Sequence[Site], stack: ExitStack) -> dict[str, Seen]:
    """What each output projection sees, as long as the stack is open."""
    return {site.gate.module: stack.enter_context(watched(base, site)) for site in sites}


def totals_of(seen: dict[str, Seen]) -> Sums:
    """The sums that were seen; projections that did not run are left out."""
    return {name: item.totals for name, item in seen.items() if item.totals}


@dataclass
class DenseTargets:
    """What the dense network computes on calibration batches, for any number of re-fits to it.

    Attributes:
        dense: the network, in eval mode.
        sites: of it.
        batches: on which it was run.
        streams: how its layers are called, and what enters the first, batch by batch.
        stored: its sums at all sites, batch by batch; None where they need too much memory.
        held_out: which examples judge the fits, `[B]` for each batch.
    """

    dense: PreTrainedModel
    sites: Sequence[Site]
    batches: Sequence[Batch]
    streams: list[Stream]
    stored: list[Sums] | None
    held_out: list[Tensor]


def held_out_examples(model: PreTrainedModel, batch: Batch, seed: int = 0) -> Tensor:
    """Which examples of a batch judge the fits, `[B]`: about one in five.

    Drawn from the content of each, so that it depends neither on its batch nor on its process.
    Another `seed` draws others.
    """
    rows = zip(main_input(model, batch), token_mask(model, batch), strict=True)
    seeds = [example_seed(row, real, seed) for row, real in rows]
    return torch.tensor([seed % HELD_OUT_EVERY == 0 for seed in seeds])


def set_apart(
    model: PreTrainedModel, batches: Sequence[Batch], seed: int
) -> tuple[list[Batch], list[Batch]]:
    """Batches without the examples that `held_out_examples` draws, and batches of these alone."""
    fitted, judges = list[Batch](), list[Batch]()
    for batch in batches:
        chosen = held_out_examples(model, batch, seed)
        for part, rows in ((judges, chosen), (fitted, ~chosen)):
            if bool(rows.any()):
                part.append(examples_of(batch, rows))
    return fitted, judges


@torch.no_grad()
def dense_targets(dense: PreTrainedModel, batches: Sequence[Batch]) -> DenseTargets:
    """Run the dense network once over the batches, and keep what re-fits need of it.

    Args:
        dense: evaluated in eval mode and left as it was.
        batches: calibration batches. Labels are not used.
    """
    sites, base = find_sites(dense), base_model(dense)
    with in_eval(dense):
        stored: list[Sums] | None = []
        streams: list[Stream] = []
        for batch in batches:
            with ExitStack() as stack:
                seen = watch_all(base, sites if stored is not None else (), stack)
                streams += start_streams(dense, dense, [batch], list(by_layer(sites)))
            if stored is None:
                continue
            stored.append(totals_of(seen))
            kept = (t for sums in stored for each in sums.values() for t in each)
            held = sum(t.numel() * t.element_size() for t in kept)
            if held > MAX_STORED_BYTES:
                stored = None
    held_out = [held_out_examples(dense, batch) for batch in batches]
    return DenseTargets(dense, sites, batches, streams, stored, held_out)
