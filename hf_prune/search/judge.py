"""What decides between networks: how far their logits move, on examples that judge alone."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import zip_longest

import torch
from transformers import PreTrainedModel

from hf_prune.errors import DataError
from hf_prune.statistics.batches import Batch, forward_kwargs, to_device
from hf_prune.statistics.collect import sum_over_processes
from hf_prune.statistics.logits import Said, said
from hf_prune.statistics.streams import in_eval
from hf_prune.surgery.dense import MAX_STORED_BYTES, set_apart

JUDGES = 1
"""Seed of the examples that judge networks; the others are fitted, with judges of their own."""


@torch.no_grad()
def centred_logits(model: PreTrainedModel, batch: Batch) -> Said:
    """The logits of examples or of real tokens, less what a softmax cannot tell, in float32."""
    batch = to_device(batch, model.device)
    with in_eval(model):
        found = said(model, batch, model(**forward_kwargs(model, batch, labels=False)))
    return found.centred()


@dataclass
class Judge:
    """Calibration examples that judge networks, about one in five, and the others.

    The same ones judge however they are batched, and on whatever process they are. Logits of the
    dense network are kept as far as they fit into `MAX_STORED_BYTES`, and else computed again.

    Attributes:
        dense: what networks are compared with; not changed.
        batches: calibration batches of this process.
        fitted: those without the examples that judge.

    Raises:
        DataError: on every process, when no example of any of them is one or the other.
    """

    dense: PreTrainedModel
    batches: Sequence[Batch]
    fitted: list[Batch] = field(init=False)

    def __post_init__(self) -> None:
        self.fitted, self.examples = set_apart(self.dense, self.batches, JUDGES)
        counts = [float(len(self.examples)), float(len(self.fitted))]
        found = torch.tensor(counts, device=self.dense.device)
        if not bool((sum_over_processes(found) > 0).all()):
            raise DataError("too few calibration examples to search with: pass some dozens.")
        self.logits: list[Said] = []
        held = 0
        for batch in self.examples:
            stored = centred_logits(self.dense, batch)
            held += stored.values.numel() * stored.values.element_size()
            if held > MAX_STORED_BYTES:
                break
            self.logits.append(stored)

    def error(self, candidate: PreTrainedModel) -> float:
        """Mean squared change of the logits on the examples that judge, of all processes."""
        sums = torch.zeros(2, dtype=torch.float64)
        for batch, stored in zip_longest(self.examples, self.logits):
            theirs = centred_logits(self.dense, batch) if stored is None else stored
            ours = centred_logits(candidate, batch)
            change = ours.values - theirs.values
            sums += torch.tensor([float(change.square().sum()), ours.entries])
        total, number = sum_over_processes(sums.to(self.dense.device)).tolist()
        return float(total / number)
