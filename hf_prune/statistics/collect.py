"""One streamed pass over calibration batches that collects what the criteria need, and no more."""

from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import reduce
from torch import Tensor
from transformers import PreTrainedModel

from hf_prune.errors import ConfigError, DataError, NumericsError
from hf_prune.gates.attach import attach_scoring_gates
from hf_prune.gates.gate import Gates
from hf_prune.sites import EXPERT_KINDS, Site, base_model, get_parameter
from hf_prune.statistics.batches import (
    Batch,
    by_token,
    forward_kwargs,
    labels_of_examples,
    main_input,
    one_by_one,
    sequence_mask,
    summed_loss,
    to_device,
)
from hf_prune.statistics.calls import Calls
from hf_prune.statistics.projection import project_output
from hf_prune.statistics.streams import in_eval

Statistics = dict[str, dict[str, Tensor]]
"""By site, then by name of the statistic."""
LOSS_GATES = frozenset({"gate_grad", "gate_grad_signed", "gate_square"})
"""Read off gates, from the gradient of the loss."""
PROJECTED_GATES = frozenset({"projected_fisher", "projected_gate_fisher"})
"""Read off gates, from the gradient of a random projection of the logits."""
CURVATURES = {
    "loss": ("label_hessian", "label_output_gradient"),
    "projection": ("hessian", "output_gradient"),
    "sample": ("sampled_hessian", "sampled_output_gradient"),
}
"""Read off inputs and the output of a projection, by what is differentiated: the second moments of
the weighted inputs, and those of the output's gradient."""
CURVATURE = frozenset(name for pair in CURVATURES.values() for name in pair)
"""All of them."""
OUTPUTS = CURVATURE | {"weight_grad_square"}
"""All that needs the gradient of a projection's output."""
LOSS = LOSS_GATES | {"weight_grad_square", *CURVATURES["loss"]}
"""All that needs labels."""
PROJECTED = PROJECTED_GATES | set(CURVATURES["projection"])
"""All that is a mean over random projections."""
SAMPLED = frozenset(CURVATURES["sample"])
"""All that is a mean over labels drawn from what the model predicts."""
INPUTS = frozenset({"input_norm", "input_gram"})
"""Read off the inputs of a projection, without any gradient."""
UNSEEN = INPUTS | CURVATURE
"""What there is for linear layers only, and not for fused experts."""
TOKENS = "tokens"
"""Under this name the real tokens that a site has seen are counted."""
SEED_STEP = 1_000_003
"""Between the seeds of the random projections, or of the draws, of one example."""


def sum_over_processes(value: Tensor) -> Tensor:
    """The sum of a tensor over all processes; the tensor itself where there is one."""
    if PartialState().num_processes == 1:
        return value
    result = reduce(value, reduction="sum")
    assert isinstance(result, Tensor)  # noqa: S101  # a tensor in, a tensor out
    return result


class _Sums:
    """Running sums in float64, by site and statistic."""

    def __init__(self) -> None:
        self.values: Statistics = {}
        self.examples = 0

    def add(self, site: str, name: str, value: Tensor) -> None:
        sums = self.values.setdefault(site, {})
        value = value.detach().double().cpu()
        if name in sums:
            sums[name] += value
        else:
            sums[name] = value


SPANS = {"start_positions", "end_positions"}
"""Labels of models that answer questions."""


@dataclass
class _Pass:
    """One pass over calibration data: what is asked for, and what has been summed so far."""

    model: PreTrainedModel
    sites: Sequence[Site]
    names: frozenset[str]
    seed: int
    projections: int
    gates: Gates = field(default_factory=Gates)
    seen: Calls = field(default_factory=Calls)
    sums: _Sums = field(default_factory=_Sums)
    fused: dict[str, Tensor] = field(default_factory=dict)
    frozen: list[Tensor] = field(default_factory=list)

    def __post_init__(self) -> None:
        base = base_model(self.model)
        self.loss = bool(self.names & LOSS)
        wanted = {"projection": PROJECTED, "sample": SAMPLED}
        self.drawn = [kind for kind, names in wanted.items() if self.names & names]
        if self.names & (LOSS_GATES | PROJECTED_GATES):
            self.gates = attach_scoring_gates(self.model, self.sites)
        plain = [site for site in self.sites if site.kind not in EXPERT_KINDS]
        if self.names & (INPUTS | OUTPUTS):
            self.seen.watch(base, plain, outputs=bool(self.names & OUTPUTS))
        if "weight_grad_square" in self.names:
            fused = [site for site in self.sites if site.kind in EXPERT_KINDS]
            self.fused = {site.name: get_parameter(base, site.gate) for site in fused}
            self.frozen = [p for p in self.fused.values() if not p.requires_grad]
        for parameter in self.frozen:
            parameter.requires_grad_(True)

    def close(self) -> None:
        """Take all hooks away."""
        self.gates.remove()
        for handle in self.seen.handles:
            handle.remove()
        for parameter in self.frozen:
            parameter.requires_grad_(False)

    def add(self, batch: Batch) -> None:
        """Run one batch and add what it says."""
        batch = to_device(batch, self.model.device)
        examples = main_input(self.model, batch).shape[0]
        self.sums.examples += examples
        self.seen.clear()
        if self.loss or self.drawn:
            self._add_gradients(batch, examples)
        else:
            with torch.no_grad():
                self.model(**forward_kwargs(self.model, batch, labels=False))
        self._add_inputs(batch)

    def _real_tokens(self, batch: Batch, site: Site, values: Tensor) -> Tensor:
        """The real tokens of what a site sees or gives, `[tokens, N]`, in float32."""
        mask = sequence_mask(self.model, batch, site.layer_module, values)
        return by_token(values, mask).float()

    def _add_inputs(self, batch: Batch) -> None:
        for site in self.sites if self.names & INPUTS else ():
            for inputs in self.seen.inputs[site.name]:
                tokens = self._real_tokens(batch, site, inputs)  # [tokens, U * D]
                self.sums.add(site.name, TOKENS, torch.tensor(float(len(tokens))))
                if "input_norm" in self.names:
                    squares = tokens.square().sum(dim=0, dtype=torch.float64)
                    squares = squares.view(site.units, site.gate.width)  # [U, D]
                    self.sums.add(site.name, "input_norm", squares)
                if "input_gram" in self.names:
                    self.sums.add(site.name, "input_gram", tokens.T @ tokens)

    def _targets(self, batch: Batch, output: Any) -> Iterator[tuple[str, Tensor]]:
        """What is differentiated: the loss, then random projections of the logits, then draws."""
        if self.loss:
            counted = int(labels_of_examples(self.model, batch).sum())
            yield "loss", summed_loss(self.model, output.loss, counted)  # it is a mean: undo it
        for kind in self.drawn:
            for turn in range(self.projections):
                seed, sampled = self.seed + turn * SEED_STEP, kind == "sample"
                found = project_output(self.model, batch, output, seed, sampled=sampled)
                yield kind, found.sum()

    def _add_gradients(self, batch: Batch, examples: int) -> None:
        if self.loss and not ({"labels"} <= set(batch) or set(batch) >= SPANS):
            raise DataError(
                "the criterion needs the gradient of the loss, and the calibration batches have no "
                "'labels'. Add them, or use a criterion without labels such as 'fisher'."
            )
        if self.gates.handles:
            for site in self.sites:
                fused = site.kind in EXPERT_KINDS
                shape = (site.units,) if fused else (examples, 1, site.units)
                gate = torch.ones(shape, device=self.model.device, requires_grad=True)
                self.gates.values[site.name] = gate
        output = self.model(**forward_kwargs(self.model, batch, labels=self.loss))
        leaves = list(self.gates.values.values())
        outputs = [t for site in self.sites for t in self.seen.outputs.get(site.name, ())]
        inner = [*leaves, *outputs, *self.fused.values()]
        per_example = torch.ones(examples, device=self.model.device)
        if self.loss:  # each example has a mean of its own
            per_example = labels_of_examples(self.model, batch).clamp(min=1)  # [B]
        last = self.loss + len(self.drawn) * self.projections - 1
        for turn, (kind, target) in enumerate(self._targets(batch, output)):
            found = torch.autograd.grad(target, inner, retain_graph=turn < last, allow_unused=True)
            gradients = [
                torch.zeros_like(x) if g is None else g for g, x in zip(found, inner, strict=True)
            ]
            scale = 1 / per_example if kind == "loss" else torch.ones_like(per_example)
            self._add_gates(kind, gradients[: len(leaves)], scale)
            self._add_outputs(kind, gradients[len(leaves) :], batch, scale)
            if kind == "loss":
                self._add_fused(gradients[len(leaves) + len(outputs) :], scale)

    def _add_fused(self, gradients: Sequence[Tensor], scale: Tensor) -> None:
        """Squared gradients of the parameters of fused experts, of the one example that was run."""
        axes = {site.name: site.gate.axis for site in self.sites}
        for name, gradient in zip(self.fused, gradients, strict=True):
            by_unit = (gradient.float() * scale).movedim(axes[name], 0).flatten(1)  # [U, N]
            self.sums.add(name, "weight_grad_square", by_unit.square())

    def _add_gates(self, kind: str, gradients: Sequence[Tensor], scale: Tensor) -> None:
        """Statistics of `[B, 1, U]` gradients (of experts `[U]`), one example at a time."""
        for name, gradient in zip(self.gates.values, gradients, strict=True):
            values = gradient.view(len(scale), -1).double() * scale.unsqueeze(1)  # [B, U]
            made = {
                ("loss", "gate_grad"): lambda v: v.abs().sum(dim=0),
                ("loss", "gate_grad_signed"): lambda v: v.sum(dim=0),
                ("loss", "gate_square"): lambda v: v.square().sum(dim=0),
                ("projection", "projected_fisher"): lambda v: v.square().sum(dim=0),
                ("projection", "projected_gate_fisher"): lambda v: v.T @ v,
            }
            for (source, statistic), function in made.items():
                if source == kind and statistic in self.names:
                    self.sums.add(name, statistic, function(values))

    def _add_outputs(
        self, kind: str, gradients: Sequence[Tensor], batch: Batch, scale: Tensor
    ) -> None:
        """Statistics of the gradients of outputs, `[B, T, E]` for each call of each projection."""
        waiting = iter(gradients)
        for site in self.sites:
            outputs = self.seen.outputs.get(site.name, ())
            inputs_seen = self.seen.inputs.get(site.name, ())
            calls = [(x, next(waiting)) for x, _ in zip(inputs_seen, outputs, strict=False)]
            if self.names.intersection(CURVATURES[kind]):
                self._add_curvature(kind, site, calls, batch, scale)
            seen = site.name not in self.fused
            if kind == "loss" and "weight_grad_square" in self.names and seen:
                self._add_weight_gradients(site, calls, scale)

    def _add_curvature(
        self,
        kind: str,
        site: Site,
        calls: Sequence[tuple[Tensor, Tensor]],
        batch: Batch,
        scale: Tensor,
    ) -> None:
        """Both factors of the curvature of a projection; what is not asked for is left out."""
        hessian, output_gradient = CURVATURES[kind]
        for inputs, gradient in calls:
            if kind == "loss":
                gradient = gradient.reshape(len(scale), -1, gradient.shape[-1])  # [B, T, E]
                gradient = gradient * scale.to(gradient).view(-1, 1, 1)
            x, g = (self._real_tokens(batch, site, v) for v in (inputs, gradient))
            if hessian in self.names:
                weight = g.square().sum(dim=1, keepdim=True)  # [tokens, 1]
                self.sums.add(site.name, hessian, (x * weight).T @ x)
            if output_gradient in self.names:
                self.sums.add(site.name, output_gradient, g.T @ g)

    def _add_weight_gradients(
        self, site: Site, calls: Sequence[tuple[Tensor, Tensor]], scale: Tensor
    ) -> None:
        total: Tensor | None = None
        calls = [  # [B, T, N], or tokens of all examples in one row
            (x.reshape(len(scale), -1, x.shape[-1]), g.reshape(len(scale), -1, g.shape[-1]))
            for x, g in calls
        ]
        for row in range(len(scale)):
            products = (g[row].float().T @ x[row].float() for x, g in calls)  # [E, U * D] each
            gradient = torch.stack(list(products)).sum(dim=0) * scale[row]
            square = gradient.square()
            total = square if total is None else total + square
        if total is not None:
            by_unit = total.unflatten(1, (site.units, site.gate.width))  # [E, U, D]
            entries = by_unit.transpose(0, 1).flatten(1)  # [U, N] with N = E * D
            self.sums.add(site.name, "weight_grad_square", entries)


def _mean(name: str, total: Tensor, examples: float, tokens: float, projections: int) -> Tensor:
    """From a sum over everything to what `STATISTICS` promises."""
    if name == "input_norm":
        return (total / tokens).sqrt()
    if name == "input_gram":
        return total / tokens
    if name.endswith("output_gradient"):
        return total / total.diagonal().sum().clamp(min=torch.finfo(total.dtype).tiny)
    return total / (examples * (projections if name in PROJECTED | SAMPLED else 1))


def _check_visible(sites: Sequence[Site], names: Collection[str]) -> None:
    """Refuse what fused experts do not show.

    Raises:
        ConfigError: naming it.
    """
    hidden = sorted(UNSEEN.intersection(names))
    if hidden and any(site.kind in EXPERT_KINDS for site in sites):
        raise ConfigError(
            f"fused experts do not show what {hidden} are read off. Score experts "
            "and their neurons by 'fisher', 'taylor' or 'magnitude', or another criterion of gates "
            "or weights."
        )


def _run(run: _Pass, batches: Iterable[Batch]) -> None:
    """Run all batches in eval mode; those of fused experts one example at a time."""
    fused = any(site.kind in EXPERT_KINDS for site in run.sites)
    try:
        with in_eval(run.model):
            for batch in batches:
                for part in one_by_one(run.model, batch) if fused else [batch]:
                    run.add(part)
    finally:
        run.close()


def _means(run: _Pass) -> Statistics:
    """From the sums of all processes to what `STATISTICS` promises.

    Raises:
        DataError: when no batch was given.
        NumericsError: when a statistic is not finite, naming the site.
    """
    device = run.model.device
    counted = torch.tensor(float(run.sums.examples), dtype=torch.float64, device=device)
    examples = float(sum_over_processes(counted))
    if not examples:
        raise DataError("the calibration set is empty: no batch was given.")
    result: Statistics = {site.name: {} for site in run.sites}
    for site in run.sites:
        sums, tokens = run.sums.values[site.name], 1.0
        if run.names & INPUTS:
            tokens = float(sum_over_processes(sums.pop(TOKENS).to(device)))
        for name in sorted(run.names):
            total = sum_over_processes(sums.pop(name).to(device)).cpu()
            mean = _mean(name, total, examples, tokens, run.projections)
            if not torch.isfinite(mean).all():
                raise NumericsError(
                    f"{site.name}: the statistic {name!r} has values that are not finite. Look for "
                    "overflow (float16?) or damaged weights."
                )
            result[site.name][name] = mean
    return result


def collect(
    model: PreTrainedModel,
    sites: Sequence[Site],
    batches: Iterable[Batch],
    names: Collection[str],
    seed: int = 0,
    projections: int = 1,
) -> Statistics:
    """The named statistics of each site, over all batches of all processes.

    Args:
        model: in any mode; evaluated in eval mode and left as it was. Its gradients are not
            touched.
        sites: from `find_sites`.
        batches: dicts of tensors, read once. Padding, by `attention_mask`, is never counted.
        names: keys of `hf_prune.criteria.STATISTICS`.
        seed: of the random projections.
        projections: how many random projections of the logits of each example, or drawn labels, to
            average over; each costs one backward pass.

    Returns:
        For each site, tensors on the CPU in float64, in the shapes that `STATISTICS` states.

    Raises:
        ConfigError: when a statistic is asked of experts that needs what they see.
        DataError: when labels are needed and missing, or no batch was given.
        NumericsError: when a statistic is not finite, naming the site.
    """
    data = frozenset(names) - {"generator"}
    if not data:
        return {site.name: {} for site in sites}
    _check_visible(sites, data)
    run = _Pass(model, sites, data, seed, projections)
    _run(run, batches)
    return _means(run)
