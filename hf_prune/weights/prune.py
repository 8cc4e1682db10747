"""Single weights of a whole model: layer by layer where layers are known, else from its input.

Where layers form a chain one runs at a time, and only its dense copy is kept: the model has
the layers that are pruned already and those that are still dense. Any other module is copied, and
run from its input as far as the matrices in question. Where what the dense network computes is not
the target, nothing is copied, and no dense layer runs.
"""

import copy
import dataclasses
import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_prune.errors import ConfigError, DataError
from hf_prune.sites import Site, base_model
from hf_prune.statistics.streams import (
    Stream,
    in_eval,
    run_layer,
)
from hf_prune.weights.block import prune_block
from hf_prune.weights.find import Matrix, set_values_
from hf_prune.weights.inputs import modules_that_run
from hf_prune.weights.masks import Masks
from hf_prune.weights.norms import prune_by_norms
from hf_prune.weights.parts import known_layers, parts_of
from hf_prune.weights.patterns import keep
from hf_prune.weights.problem import Options
from hf_prune.weights.progress import Progress
from hf_prune.weights.starts import all_starts, start_again_, tokens_of_both
from hf_prune.weights.walk import Block, Inputs, Real, call_model, real_tokens

logger = logging.getLogger(__name__)

Removed = Mapping[str, Sequence[int]]
"""Entries to remove from each group of each matrix, by parameter name."""


@dataclass
class Pruned:
    """What a walk did: masks by parameter name, and the relative error of each matrix's outputs."""

    masks: Masks = field(default_factory=dict)
    errors: dict[str, float] = field(default_factory=dict)
    resumed: list[str] = field(default_factory=list)
    """Layers that an earlier run had finished."""


@dataclass
class Job:
    """One walk: what it is told, and what it has done so far."""

    removed: Removed
    options: Options
    progress: Progress | None = None
    result: Pruned = field(default_factory=Pruned)


def _prune_without_data(matrices: Sequence[Matrix], job: Job) -> None:
    """Masks from the weights alone (or from scores collected before); values stay as they are."""
    options = job.options
    for matrix in matrices:
        mask = torch.ones_like(matrix.parameter, dtype=torch.bool)
        for group, weight in enumerate(matrix.view(matrix.parameter.data)):
            scores = options.scores_of(matrix.name, group, weight)
            count, allowed = job.removed[matrix.name][group], options.allowed_of(matrix, group)
            rows, columns = weight.shape
            pattern = options.pattern.at(count, (rows, columns))
            kept = keep(scores, count, pattern, allowed)
            matrix.write_(mask, group, kept)
            set_values_(matrix, group, torch.where(kept, weight, 0))
        job.result.masks[matrix.name] = mask


@dataclass
class _Layer:
    """One layer of a chain, in both networks, and the streams that pass through it.

    Without a dense copy only the stream of the pruned network moves on. `both` says of each batch
    which tokens of an encoder and a decoder are real, where there are both.
    """

    name: str
    call: str
    dense: nn.Module | None
    pruned: nn.Module
    streams: list[Stream]
    outputs: list[Tensor]
    both: Sequence[Real] = ()

    def real(self) -> list[Real]:
        """Which tokens of each batch are real, by names in the layer."""
        start = f"{self.name}."
        found = [Real(stream.mask) for stream in self.streams]
        for index, item in enumerate(self.both):
            cross = {name for name in item.cross or () if name.startswith(start)}
            if cross:
                local = frozenset(name.removeprefix(start) for name in cross)
                found[index] = Real(item.tokens, self.streams[index].mask, local)
        return found

    def run_dense(self, index: int) -> Tensor:
        stream = self.streams[index]
        assert self.dense is not None  # noqa: S101  # it runs only where it is the target
        self.outputs[index] = run_layer(self.dense, "", stream.dense, stream.calls[self.call])
        return self.outputs[index]

    def run_pruned(self, index: int) -> Tensor:
        stream = self.streams[index]
        calls = stream.calls if stream.pruned_calls is None else stream.pruned_calls
        return run_layer(self.pruned, "", stream.pruned, calls[self.call])

    def block(self, sites: Sequence[Site]) -> Block:
        def local(module: str) -> str:
            return module.removeprefix(self.call).removeprefix(".")

        return Block(
            self.name,
            self.dense,
            self.pruned,
            self.run_dense,
            self.run_pruned,
            self.real(),
            {local(site.gate.module): local(site.sum_module) for site in sites},
            keep_traces=True,
        )

    def advance(self, block: Block | None) -> None:
        """Move both streams behind the layer; a block that was pruned knows most outputs."""
        for index, stream in enumerate(self.streams):
            if block is None:
                output = self.run_pruned(index)
                if self.dense is not None:
                    self.run_dense(index)
            else:
                with block.replay.on(self.pruned, index, block.done):
                    output = self.run_pruned(index)
            stream.dense, stream.pruned = self.outputs[index], output


def _touched(model: nn.Module, matrices: Sequence[Matrix], masks: Masks) -> dict[str, Tensor]:
    """What a layer's file must hold: its pruned matrices, all its vectors, and the masks."""
    prefixes = {name for matrix in matrices for name in (matrix.module, matrix.owner)}
    found = {n: p.data for n, p in model.named_parameters() if n.rpartition(".")[0] in prefixes}
    return found | {f"mask:{m.name}": masks[m.name] for m in matrices}


def _restore(model: nn.Module, tensors: Mapping[str, Tensor]) -> Masks:
    parameters = dict(model.named_parameters())
    masks: Masks = {}
    for name, value in tensors.items():
        if name.startswith("mask:"):
            masks[name.removeprefix("mask:")] = value
        else:
            parameters[name].data.copy_(value)
    return masks


def _keep(
    model: nn.Module, layer: str, matrices: Sequence[Matrix], errors: dict[str, float], job: Job
) -> None:
    """Note what a layer lost, and keep what it became, where a folder for that was named."""
    job.result.errors |= errors
    if job.progress is not None and matrices:
        job.progress.save(layer, _touched(model, matrices, job.result.masks), errors)


def _prune_light(layer: _Layer, matrices: Sequence[Matrix], job: Job) -> dict[str, float]:
    """Prune one layer by the norms of its inputs; only the pruned stream moves on."""
    found = prune_by_norms(
        layer.pruned,
        {m.module: m.module.removeprefix(f"{layer.name}.") for m in matrices},
        matrices,
        job.removed,
        job.options,
        run=layer.run_pruned,
        real=layer.real(),
    )
    errors: dict[str, float] = {}
    for matrix, mask, error in found:
        job.result.masks[matrix.name], errors[matrix.name] = mask, error
    for index, stream in enumerate(layer.streams):
        stream.pruned = layer.run_pruned(index)
    return errors


def _prune_layer(
    model: PreTrainedModel,
    layer: _Layer,
    sites: Sequence[Site],
    matrices: Sequence[Matrix],
    job: Job,
) -> None:
    """Prune one layer, or take what an earlier run made of it; then move the streams on."""
    block: Block | None = None
    found = job.progress.load(layer.name) if job.progress is not None and matrices else None
    if found is not None:
        job.result.masks |= _restore(model, found[0])
        job.result.errors |= found[1]
        job.result.resumed.append(layer.name)
    elif job.options.norms_only and all(m.kind == "linear" for m in matrices):
        _keep(model, layer.name, matrices, _prune_light(layer, matrices, job), job)
        return
    elif matrices:
        block = layer.block(sites if job.options.dense_target else ())
        errors = {}
        for matrix, mask, fits in prune_block(block, matrices, job.removed, job.options):
            job.result.masks[matrix.name] = mask
            errors[matrix.name] = sum(fit.error for fit in fits) / len(fits)
        _keep(model, layer.name, matrices, errors, job)
    layer.advance(block)
    logger.info("%s: %d matrices pruned", layer.name, len(matrices))


Around = Callable[[str], AbstractContextManager[None]]
"""What happens around each layer, by its name in the model: its weights come, and go again."""


def prune_layers(
    model: PreTrainedModel,
    layers: Mapping[str, list[Site]],
    matrices: Sequence[Matrix],
    streams: list[Stream],
    job: Job,
    around: Around | None = None,
    both: Sequence[Real] = (),
) -> None:
    """Prune all matrices that lie in the layers of one stack, one layer after the other.

    Args:
        model: in eval mode; its layers are changed in place.
        layers: the sites of each layer, by its name in the base model, as they run.
        matrices: of any part of the model.
        streams: what enters the first layer; moved behind the last one.
        job: what to do, and where results go.
        around: entered for each layer.
        both: of each batch, where a model has encoder and decoder.
    """
    base = base_model(model)
    names = {id(module): name for name, module in model.named_modules()}
    for call, sites in layers.items():
        pruned = base.get_submodule(call)
        name = names[id(pruned)]
        here = [m for m in matrices if m.name.startswith(f"{name}.")]
        with around(name) if around is not None else nullcontext():
            outputs = [stream.dense for stream in streams]
            dense = copy.deepcopy(pruned) if job.options.dense_target else None
            layer = _Layer(name, call, dense, pruned, streams, outputs, both)
            _prune_layer(model, layer, sites, here, job)


def _prune_whole(
    model: nn.Module,
    dense: nn.Module,
    matrices: Sequence[Matrix],
    batches: Sequence[Inputs],
    job: Job,
) -> None:
    """Any matrices, each reached from the input of the whole model."""
    block = Block(
        "",
        dense if job.options.dense_target else None,
        model,
        lambda index: call_model(dense, batches[index]),
        lambda index: call_model(model, batches[index]),
        real_tokens(dense, batches),
    )
    for matrix, kept, fits in prune_block(block, matrices, job.removed, job.options):
        job.result.masks[matrix.name] = kept
        job.result.errors[matrix.name] = sum(fit.error for fit in fits) / len(fits)


def _with_earlier(matrix: Matrix, removed: Sequence[int], options: Options) -> list[int]:
    """Entries to remove from each group: no fewer than earlier stages have removed."""
    masks = (options.allowed_of(matrix, group) for group in range(len(removed)))
    zeros = [0 if mask is None else int((~mask).sum()) for mask in masks]
    return [max(pair) for pair in zip(removed, zeros, strict=True)]


@torch.no_grad()
def prune_weights_(
    model: nn.Module,
    matrices: Sequence[Matrix],
    removed: Removed,
    options: Options,
    batches: Sequence[Inputs] = (),
    *,
    progress: Progress | None = None,
    earlier: Mapping[str, Tensor] | None = None,
) -> Pruned:
    """Prune single weights of any module, in place.

    Args:
        model: any `nn.Module`, left in the mode it was in.
        matrices: from `find_matrices`.
        removed: entries to remove, from `hf_prune.weights.budgets`.
        options: criterion, pattern, target and re-fit.
        batches: calibration inputs: dicts of tensors for transformers, else tensors or tuples.
            Padding is not counted where an attention mask says so.
        progress: where finished layers are kept, of models in which layers form a chain.
        earlier: masks of earlier stages. Their zeros stay zeros, and count as removed.

    Returns:
        Masks, and the relative error of the outputs of each matrix.

    Raises:
        ConfigError: when progress is to be kept where no layers run.
        DataError: when inputs are needed and there are none.
        NumericsError: when inputs are not finite.
        UnsupportedModelError: when calibration never runs one of the matrices.
    """
    plain = [m for m in matrices if m.kind == "embedding" or not options.needs_inputs]
    rest = [m for m in matrices if m not in plain]
    if earlier:
        options = dataclasses.replace(options, earlier=earlier)
        if options.pattern.kind != "n:m":  # there a count says which n
            removed = {m.name: _with_earlier(m, removed[m.name], options) for m in matrices}
    job = Job(removed, options, progress)
    if not rest:
        if progress is not None:
            raise ConfigError(
                f"progress: {options.criterion!r} without a re-fit and a dense target runs no "
                "layer, so that nothing could be kept. Leave it out."
            )
        _prune_without_data(plain, job)
        return job.result
    if not batches:
        raise DataError(
            f"criterion {options.criterion!r} with its re-fit needs calibration batches. Pass "
            "some, or choose a magnitude with reconstruct: false and dense_target: false."
        )
    with in_eval(model), modules_that_run():
        _prune_with_data(model, plain, rest, batches, job)
    job.result.masks = {m.name: job.result.masks[m.name] for m in matrices}
    return job.result


def _prune_with_data(
    model: nn.Module,
    plain: Sequence[Matrix],
    matrices: Sequence[Matrix],
    batches: Sequence[Inputs],
    job: Job,
) -> None:
    """What needs no inputs, then layers, and matrices before, between and behind them, in order."""
    layers = known_layers(model, batches)
    if job.progress is not None and not layers:
        raise ConfigError(
            f"progress: {type(model).__name__} has no layers that run one after another, so that "
            "nothing could be kept. Leave it out."
        )
    parts = parts_of(model, matrices, layers, batches)
    copied = job.options.dense_target and any(outside for outside, _ in parts)
    dense = copy.deepcopy(model) if copied else model
    stacks = [list(stack) for _, stack in parts if stack]
    starts = all_starts(model, batches, stacks)
    both = tokens_of_both(model, batches)
    _prune_without_data(plain, job)
    changed = bool(plain)
    for outside, stack in parts:
        if outside:
            _prune_whole(model, dense, outside, batches, job)
        if stack:
            assert isinstance(model, PreTrainedModel)  # noqa: S101  # of which a chain is known
            streams = starts.pop(next(iter(stack)))
            if changed or outside:
                start_again_(model, streams, batches, list(stack))
            prune_layers(model, stack, matrices, streams, job, both=both)
        changed = True
