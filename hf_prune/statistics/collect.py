"""One streamed pass over calibration batches that collects what the criteria need, and no more."""

from collections.abc import Collection, Iterable, Sequence

import torch
from accelerate import PartialState
from accelerate.utils import reduce
from torch import Tensor
from transformers import PreTrainedModel

from hf_prune.errors import DataError, NumericsError
from hf_prune.gates import Gates, attach_gates
from hf_prune.sites import Site, base_model, projection
from hf_prune.statistics.batches import (
    Batch,
    by_token,
    check_one_sequence,
    counted_positions,
    example_seed,
    forward_kwargs,
    main_input,
    to_device,
    token_mask,
)

Statistics = dict[str, dict[str, Tensor]]
"""By site, then by name of the statistic."""


def sum_over_processes(value: Tensor) -> Tensor:
    """The sum of a tensor over all processes; the tensor itself where there is one."""
    if PartialState().num_processes == 1:
        return value
    result = reduce(value, reduction="sum")
    assert isinstance(result, Tensor)  # noqa: S101  # a tensor in, a tensor out
    return result


def project_logits(logits: Tensor, inputs: Tensor, mask: Tensor, seed: int) -> Tensor:
    """A random projection of the logits of each example, `[B]`, with signs drawn from its content.

    Args:
        logits: `[B, C]`, or `[B, T, C]`, of which only real tokens count.
        inputs: `[B, T]` token ids, from which the signs are seeded.
        mask: `[B, T]`, True for real tokens.
        seed: of the whole run.

    Returns:
        `[B]`: the sum of `v * z`, `v` in {-1, +1} with its mean over classes taken off, since
        adding a constant to all logits changes no probability.
    """
    result = []
    for row in range(logits.shape[0]):
        generator = torch.Generator().manual_seed(example_seed(inputs[row], mask[row], seed))
        values = logits[row].float()
        if values.ndim == 2:
            values = values[mask[row]]  # [T, C] -> [real tokens, C]
        signs = torch.randint(0, 2, values.shape, generator=generator, dtype=torch.int8)
        signs = signs.to(values) * 2 - 1
        if values.shape[-1] > 1:
            signs = signs - signs.mean(dim=-1, keepdim=True)
        result.append((values * signs).sum())
    return torch.stack(result)


class _Sums:
    """Running sums in float64, by site and statistic."""

    def __init__(self) -> None:
        self.values: Statistics = {}
        self.counts = torch.zeros(2, dtype=torch.float64)  # examples, tokens

    def add(self, site: str, name: str, value: Tensor) -> None:
        sums = self.values.setdefault(site, {})
        value = value.detach().double().cpu()
        sums[name] = sums[name] + value if name in sums else value


def _input_norm_hooks(
    base: PreTrainedModel, sites: Sequence[Site], sums: _Sums, state: dict[str, Tensor]
) -> Gates:
    gates = Gates()
    for site in sites:

        def add(module: torch.nn.Module, args: tuple[Tensor, ...], site: Site = site) -> None:
            inputs = by_token(args[0].detach(), state["mask"])  # [real tokens, U * D]
            squares = inputs.float().square().sum(dim=0, dtype=torch.float64)
            sums.add(site.name, "input_norm", squares.view(site.units, site.gate.width))  # [U, D]

        hook = projection(base, site.gate.module).register_forward_pre_hook(add)
        gates.handles.append(hook)
    return gates


def _add_gradients(
    model: PreTrainedModel,
    batch: Batch,
    gates: Gates,
    names: Collection[str],
    sums: _Sums,
    seed: int,
) -> None:
    inputs, mask = main_input(model, batch), token_mask(model, batch)
    examples = inputs.shape[0]
    wants_loss = "gate_grad" in names
    if wants_loss and "labels" not in batch:
        raise DataError(
            "the criterion needs the gradient of the loss, and the calibration batches have no "
            "'labels'. Add them, or use a criterion without labels such as 'fisher'."
        )
    output = model(**forward_kwargs(model, batch, labels=wants_loss))
    leaves = list(gates.values.values())
    targets = {}
    per_example = torch.ones(1, 1, 1, device=model.device)
    if wants_loss:
        counted = counted_positions(model, batch["labels"]).view(examples, -1).sum(dim=1)  # [B]
        targets["gate_grad"] = output.loss * counted.sum()  # the loss is a mean: undo it
        per_example = counted.clamp(min=1).view(-1, 1, 1)  # each example has a mean of its own
    if "projected_fisher" in names:
        targets["projected_fisher"] = project_logits(output.logits, inputs, mask, seed).sum()
    for index, (name, target) in enumerate(targets.items()):
        keep = index + 1 < len(targets)
        gradients = torch.autograd.grad(target, leaves, retain_graph=keep, allow_unused=True)
        for site, gradient in zip(gates.values, gradients, strict=True):
            leaf = gates.values[site]
            value = torch.zeros_like(leaf) if gradient is None else gradient
            per_unit = (value / per_example).abs() if name == "gate_grad" else value.square()
            sums.add(site, name, per_unit.double().sum(dim=(0, 1)))  # [B, 1, U] -> [U]


def _pass(
    model: PreTrainedModel,
    sites: Sequence[Site],
    batches: Iterable[Batch],
    names: Collection[str],
    seed: int,
) -> _Sums:
    sums = _Sums()
    base = base_model(model)
    backward = {"gate_grad", "projected_fisher"} & set(names)
    state: dict[str, Tensor] = {}
    gates = attach_gates(model, sites) if backward else Gates()
    norms = _input_norm_hooks(base, sites, sums, state) if "input_norm" in names else Gates()
    try:
        for batch in batches:
            batch = to_device(batch, model.device)
            state["mask"] = token_mask(model, batch)
            examples = main_input(model, batch).shape[0]
            sums.counts += torch.tensor([examples, int(state["mask"].sum())])
            if backward:
                for site in sites:
                    shape = (examples, 1, site.units)
                    gates.values[site.name] = torch.ones(
                        shape, device=model.device, requires_grad=True
                    )
                _add_gradients(model, batch, gates, names, sums, seed)
            else:
                with torch.no_grad():
                    model(**forward_kwargs(model, batch, labels=False))
    finally:
        gates.remove()
        norms.remove()
    return sums


def collect(
    model: PreTrainedModel,
    sites: Sequence[Site],
    batches: Iterable[Batch],
    names: Collection[str],
    seed: int = 0,
) -> Statistics:
    """The named statistics of each site, over all batches of all processes.

    Args:
        model: in any mode; evaluated in eval mode and left as it was. Its gradients are not
            touched.
        sites: from `find_sites`.
        batches: dicts of tensors, read once. Padding, by `attention_mask`, is never counted.
        names: keys of `hf_prune.criteria.STATISTICS`.
        seed: of the random projections.

    Returns:
        For each site, tensors on the CPU in float64, in the shapes that `STATISTICS` states.

    Raises:
        DataError: when labels are needed and missing, or no batch was given.
        NumericsError: when a statistic is not finite, naming the site.
        UnsupportedModelError: when a statistic is not defined for such a model.
    """
    data = set(names) - {"generator"}
    if not data:
        return {site.name: {} for site in sites}
    if data - {"gate_grad"}:
        check_one_sequence(model, sites, f"the statistic {min(data - {'gate_grad'})!r}")
    training = model.training
    model.eval()
    try:
        sums = _pass(model, sites, batches, data, seed)
    finally:
        model.train(training)
    examples, tokens = sum_over_processes(sums.counts.to(model.device)).tolist()
    if not examples:
        raise DataError("the calibration set is empty: no batch was given.")
    result: Statistics = {site.name: {} for site in sites}
    for site in sites:
        for name in sorted(data):
            value = sums.values[site.name][name].to(model.device)
            total = sum_over_processes(value).cpu()
            mean = (total / tokens).sqrt() if name == "input_norm" else total / examples
            if not torch.isfinite(mean).all():
                raise NumericsError(
                    f"{site.name}: the statistic {name!r} has values that are not finite. Look for "
                    "overflow (float16?) or damaged weights."
                )
            result[site.name][name] = mean
    return result
