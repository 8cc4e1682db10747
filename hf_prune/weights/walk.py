"""One block after another, matrix after matrix, in the order in which data passes through them.

The dense block says what should come out, the already pruned one what really goes in. A block is
one layer of a known family, or any other module as a whole.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_prune.statistics.batches import (
    Batch,
    decoder_mask,
    forward_kwargs,
    to_device,
    token_mask,
)
from hf_prune.statistics.moments import Moments, same_on_all
from hf_prune.weights.find import Matrix, set_values_
from hf_prune.weights.inputs import (
    Replay,
    Trace,
    main_tensor,
    never_ran,
    paired_rows,
    real_rows,
    rows_of,
    traced,
)
from hf_prune.weights.problem import Fit, Options, Subject, solve

Inputs = Tensor | tuple[Tensor, ...] | Batch
"""One batch of any module: the only argument, the arguments, or the keyword arguments."""


@dataclass(frozen=True)
class Real:
    """Which tokens of one batch are real, `[B, T]`; None, where nothing says so.

    An encoder and a decoder read two sequences; `cross` are the modules of the decoder that read
    that of the encoder. It is None where there is only one sequence.
    """

    tokens: Tensor | None = None
    decoder: Tensor | None = None
    cross: frozenset[str] | None = None

    def of(self, module: str) -> Tensor | None:
        """For what a module sees; of a module outside of both, what the decoder gives."""
        if self.cross is None or module in self.cross:
            return self.tokens
        side = next((part for part in module.split(".") if part in ("encoder", "decoder")), "")
        return self.tokens if side == "encoder" else self.decoder


@dataclass
class Block:
    """Something that both networks can run alone on every batch: one layer, or all of a model.

    `prefix` turns a module's name into its name within the block. `sums` are by such names. The
    dense network is read, and needed, only where it is the target.
    """

    prefix: str
    dense: nn.Module | None
    pruned: nn.Module
    run_dense: Callable[[int], Any]
    run_pruned: Callable[[int], Any]
    real: Sequence[Real]
    sums: Mapping[str, str] = field(default_factory=dict)
    keep_traces: bool = False
    replay: Replay = field(default_factory=Replay)
    done: list[str] = field(default_factory=list)
    """Linear modules that are pruned and will not change any more."""

    def local(self, module: str) -> str:
        """A module's name within the block."""
        return module.removeprefix(self.prefix).removeprefix(".")

    def holders(self, matrix: Matrix) -> list[str]:
        """Names within the block of all modules in it that have a matrix."""
        start = f"{self.prefix}." if self.prefix else ""
        others = [name for name in matrix.others if name.startswith(start)]
        return [self.local(name) for name in (matrix.module, *others)]


def call_model(model: nn.Module, batch: Inputs) -> Any:
    """Run any module on one batch, without labels."""
    if isinstance(model, PreTrainedModel) and isinstance(batch, Mapping):
        # where there is a decoder of its own, its inputs are made from the labels
        labels = model.config.is_encoder_decoder and "decoder_input_ids" not in batch
        return model(**forward_kwargs(model, to_device(batch, model.device), labels=labels))
    if isinstance(batch, Mapping):
        return model(**{name: value for name, value in batch.items() if name != "labels"})
    return model(*batch) if isinstance(batch, tuple) else model(batch)


def _readers_of_encoder(model: PreTrainedModel, batch: Batch) -> frozenset[str]:
    """The modules that are called with what the encoder gave: keys and values of a decoder."""
    given: dict[str, Tensor] = {}
    found: set[str] = set()

    def encoded(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        given["encoder"] = output if isinstance(output, Tensor) else output[0]

    def check(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            values = (*args, *kwargs.values())
            if values and values[0] is given.get("encoder"):
                found.add(name)

        return hook

    handles = [model.get_encoder().register_forward_hook(encoded)]
    handles += [
        module.register_forward_pre_hook(check(name), with_kwargs=True)
        for name, module in model.named_modules()
        if not any(module.children())
    ]
    try:
        call_model(model, batch)
    finally:
        for handle in handles:
            handle.remove()
    return frozenset(found)


def real_tokens(model: nn.Module, batches: Sequence[Inputs]) -> list[Real]:
    """Which tokens of each batch are real.

    Those of a decoder are told as `decoder_mask` says.
    """
    if not isinstance(model, PreTrainedModel):
        return [Real() for _ in batches]
    both, cross, result = model.config.is_encoder_decoder, None, list[Real]()
    for batch in batches:
        if not isinstance(batch, Mapping):
            result.append(Real())
        elif not both:
            # [B, choices, T] -> [B * choices, T]
            result.append(Real(token_mask(model, batch).flatten(0, -2)))
        else:
            cross = _readers_of_encoder(model, batch) if cross is None else cross
            result.append(Real(token_mask(model, batch), decoder_mask(batch), cross))
    return result


def _groups(block: Block, matrices: Sequence[Matrix]) -> tuple[list[list[Matrix]], dict[str, int]]:
    """Matrices in the order in which they are used; those that share one input tensor together.

    Also how often each module is called in one run, by its name in the block.
    """
    names = list(dict.fromkeys(name for matrix in matrices for name in block.holders(matrix)))
    with traced(block.pruned, names) as trace:
        block.run_pruned(0)
    order = list(dict.fromkeys(trace.order))
    unused = [name for name in names if name not in order]
    if unused:
        raise never_ran(unused)
    groups: dict[tuple[int, str, str], list[Matrix]] = {}
    for name in order:
        shared = id(main_tensor(block.pruned.get_submodule(name), trace.calls[name][0]))
        for matrix in (m for m in matrices if block.local(m.module) == name):
            plain = matrix.kind == "linear" and name not in block.sums and not matrix.others
            alone = "" if plain else matrix.name
            groups.setdefault((shared, matrix.kind, alone), []).append(matrix)
    return list(groups.values()), {name: len(calls) for name, calls in trace.calls.items()}


@dataclass
class _Traces:
    """The dense traces of a block, kept for one layer, made again for a whole model."""

    block: Block
    dense: nn.Module
    names: Sequence[str]
    kept: list[Trace] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.block.keep_traces:
            for index in range(len(self.block.real)):
                with traced(self.dense, self.names, self.block.sums) as trace:
                    self.block.run_dense(index)
                self.kept.append(trace)

    def get(self, index: int, names: Sequence[str]) -> Trace:
        """The trace of one batch, in which at least `names` are."""
        if self.kept:
            return self.kept[index]
        with traced(self.dense, names) as trace:
            self.block.run_dense(index)
        return trace


def _pruned_trace(block: Block, index: int, names: Sequence[str], count: int) -> Trace:
    """Run the pruned block as far as the last call of the modules in question."""
    summed = {name: block.sums[name] for name in names if name in block.sums}
    stop = names[-1] if count == len(names) else None
    done = block.done if block.keep_traces else ()
    with (
        block.replay.on(block.pruned, index, done),
        traced(block.pruned, names, summed, stop) as trace,
    ):
        block.run_pruned(index)
    return trace


def _add_sum(
    moments: Moments, dense: Trace, pruned: Trace, name: str, rows: Tensor, mask: Tensor
) -> None:
    """Add tokens whose target is the dense sum of residual and output, less the pruned residual."""
    total = pruned.totals[name]
    residual = total - pruned.outputs[name].view_as(total)
    moments.add(rows, real_rows(dense.totals[name].to(residual.device) - residual, mask))


def _moments(
    block: Block, group: Sequence[Matrix], calls: Mapping[str, int], traces: _Traces | None
) -> list[Moments]:
    """Moments of the inputs that a group shares, for each of its sub-matrices.

    Without dense traces they hold no targets.
    """
    matrix = group[0]
    view, device = matrix.view(matrix.parameter), matrix.parameter.device
    outputs = view.shape[1] if _on_sum(block, matrix) else view.shape[2]
    outputs = outputs if traces is not None else 0
    result = [Moments.zeros(view.shape[2], outputs, device) for _ in range(view.shape[0])]
    for name in block.holders(matrix):
        names = list(dict.fromkeys([name, *(block.local(item.module) for item in group[1:])]))
        _add_moments(block, matrix, names, calls, traces, result)
    return [item.over_processes() for item in result]


def _on_sum(block: Block, matrix: Matrix) -> bool:
    """Whether the target of a matrix is the sum of residual and output."""
    return block.local(matrix.module) in block.sums and not matrix.others


def _add_moments(
    block: Block,
    matrix: Matrix,
    names: Sequence[str],
    calls: Mapping[str, int],
    traces: _Traces | None,
    result: Sequence[Moments],
) -> None:
    """Add what one module that has a matrix sees, the first of `names`, on all batches."""
    name, device = names[0], matrix.parameter.device
    module = block.pruned.get_submodule(name)
    for index, real in enumerate(block.real):
        mask = real.of(name)
        if traces is None:
            # a whole model may call its modules as often as each batch says
            count = sum(calls[n] for n in names) if block.keep_traces else 0
            pruned = _pruned_trace(block, index, names, count)
            for ours in pruned.calls.get(name, ()):
                rows = rows_of(matrix, module, ours, mask)
                for moments, inputs in zip(result, rows, strict=True):
                    moments.add(inputs, inputs[:, :0])
            continue
        dense = traces.get(index, names)
        pruned = _pruned_trace(block, index, names, sum(len(dense.calls[n]) for n in names))
        for theirs, ours in zip(dense.calls[name], pruned.calls[name], strict=True):
            at = traces.dense.get_submodule(name), theirs
            pairs = paired_rows(matrix, at, (module, ours), mask)
            for moments, (x, inputs) in zip(result, pairs, strict=True):
                if _on_sum(block, matrix):
                    assert mask is not None  # noqa: S101  # sums are those of layers
                    _add_sum(moments, dense, pruned, name, inputs, mask)
                else:
                    moments.add(inputs, x.to(device))


def _bias(block: Block, matrix: Matrix, group: int) -> Tensor | None:
    """The bias of the outputs of one group, as a view into the parameter.

    None, too, of a matrix that several modules have: each has a bias of its own.
    """
    if matrix.others:
        return None
    module = block.pruned.get_submodule(block.local(matrix.module))
    key = matrix.name.rpartition(".")[2].replace("weight", "bias")
    key = f"{key}_bias" if matrix.kind == "experts" else key
    bias = getattr(module, key, None)
    if not isinstance(bias, Tensor):
        return None
    return (
        bias.data[group] if matrix.kind == "experts" else bias.data.view(matrix.groups, -1)[group]
    )


def prune_block(
    block: Block,
    matrices: Sequence[Matrix],
    removed: Mapping[str, Sequence[int]],
    options: Options,
) -> Iterator[tuple[Matrix, Tensor, list[Fit]]]:
    """Prune the matrices of one block, group after group, in place.

    Args:
        block: what runs, and what was kept of it.
        matrices: of this block, in any order.
        removed: entries to remove from each group of each matrix, by parameter name.
        options: how.

    Yields:
        Each matrix, its mask in the shape of the parameter, and what each of its groups lost.
    """
    groups, calls = _groups(block, matrices)
    names = list(dict.fromkeys(n for group in groups for m in group for n in block.holders(m)))
    traces = None if block.dense is None else _Traces(block, block.dense, names)
    for group in groups:
        moments = _moments(block, group, calls, traces)
        on_sum = _on_sum(block, group[0])
        for matrix in group:
            mask = torch.ones_like(matrix.parameter, dtype=torch.bool)
            fits = []
            for index, item in enumerate(moments):
                bias = _bias(block, matrix, index)
                weight = matrix.view(matrix.parameter.data)[index]
                subject = Subject(matrix.name, index, weight, bias, on_sum)
                fit = solve(subject, item, removed[matrix.name][index], options)
                kept = same_on_all(fit.mask.to(torch.uint8)).bool()
                matrix.write_(mask, index, kept)
                set_values_(matrix, index, same_on_all(fit.weight) * kept)
                if bias is not None and fit.bias is not None:
                    bias.copy_(same_on_all(fit.bias))
                fits.append(fit)
            yield matrix, mask, fits
        if block.keep_traces:
            # what is one multiplication by a matrix, once in each run, will give the same again
            local = [block.local(m.module) for m in group if m.kind == "linear" and not m.others]
            block.done += [name for name in local if calls[name] == 1]
