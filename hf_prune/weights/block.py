"""One block after another, matrix after matrix, in the order in which data passes through them.

The dense block says what should come out, the already pruned one what really goes in. A block is
one layer, or any other module as a whole.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from hf_prune.errors import UnsupportedModelError
from hf_prune.statistics.collect import sum_over_processes
from hf_prune.statistics.moments import Moments, same_on_all
from hf_prune.weights.find import PROJECTIONS, Matrix, set_values_
from hf_prune.weights.inputs import Trace, main_tensor, never_ran, real_rows, traced
from hf_prune.weights.parts import merged
from hf_prune.weights.problem import Fit, Options, Subject, solve
from hf_prune.weights.rows import paired_rows, rows_of
from hf_prune.weights.walk import Block


def _groups(block: Block, matrices: Sequence[Matrix]) -> tuple[list[list[Matrix]], dict[str, int]]:
    """Matrices in the order in which they are used; those that share one input tensor together.

    Also how often each module is called in the first run that calls it, by its name in the block.
    Not every batch may run all of them: as many are run as it takes to see all.
    """
    names = list(dict.fromkeys(name for matrix in matrices for name in block.holders(matrix)))
    order, calls = list[str](), dict[str, int]()
    shared: dict[str, tuple[int, int]] = {}
    for index in range(len(block.real)):
        if len(order) == len(names):
            break
        with traced(block.pruned, names) as trace:
            block.run_pruned(index)
        order = merged(order, trace.order)
        for name, found in trace.calls.items():
            value = main_tensor(block.pruned.get_submodule(name), found[0])
            shared.setdefault(name, (index, id(value)))
            calls.setdefault(name, len(found))
    groups: dict[tuple[tuple[int, int], str, str], list[Matrix]] = {}
    first = {m.name: next((n for n in block.holders(m) if n in calls), None) for m in matrices}
    unused = [m.module for m in matrices if first[m.name] is None]
    if unused:
        raise never_ran(unused)
    for name in order:
        for matrix in (m for m in matrices if first[m.name] == name):
            plain = matrix.kind == "linear" and name not in block.sums and not matrix.others
            alone = "" if plain else matrix.name
            groups.setdefault((shared[name], matrix.kind, alone), []).append(matrix)
    return list(groups.values()), calls


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


def _pruned_trace(block: Block, index: int, name: str, *, once: bool) -> Trace:
    """Run the pruned block; as far as the call of the module in question, if there is one only."""
    summed = {name: block.sums[name]} if name in block.sums else {}
    stop = name if once else None
    done = block.done if block.keep_traces else ()
    with (
        block.replay.on(block.pruned, index, done),
        traced(block.pruned, [name], summed, stop) as trace,
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
    total: list[Moments] = []
    for name in block.holders(matrix):
        parts = [Moments.zeros(view.shape[2], outputs, device) for _ in range(view.shape[0])]
        if traces is None:
            _add_own(block, matrix, name, calls, parts)
        else:
            _add_both(block, matrix, name, traces, parts)
        total = [a.plus(b) for a, b in zip(total, parts, strict=True)] if total else parts
    return [item.over_processes() for item in total]


def _on_sum(block: Block, matrix: Matrix) -> bool:
    """Whether the target of a matrix is the sum of residual and output."""
    return block.local(matrix.module) in block.sums and not matrix.others


def _add_own(
    block: Block, matrix: Matrix, name: str, calls: Mapping[str, int], result: Sequence[Moments]
) -> None:
    """Add what one module of the pruned network sees on all batches, without targets."""
    module = block.pruned.get_submodule(name)
    # a whole model may call its modules as often as each batch says
    once = block.keep_traces and calls.get(name) == 1
    for index, real in enumerate(block.real):
        pruned = _pruned_trace(block, index, name, once=once)
        for ours in pruned.calls.get(name, ()):
            rows = rows_of(matrix, module, ours, real.of(name))
            for moments, inputs in zip(result, rows, strict=True):
                moments.add(inputs, inputs[:, :0])


def _add_both(
    block: Block, matrix: Matrix, name: str, traces: _Traces, result: Sequence[Moments]
) -> None:
    """Add what one module sees in both networks on all batches.

    A batch on which the networks call it with other rows says that they route their tokens. Then
    the target is everywhere what the dense module makes of the pruned network's own inputs.
    """
    alike, on_sum = True, _on_sum(block, matrix)
    for index, real in enumerate(block.real):
        mask = real.of(name)
        dense = traces.get(index, [name])
        pruned = _pruned_trace(block, index, name, once=len(dense.calls.get(name, ())) == 1)
        pairs = _all_pairs(matrix, (traces.dense, dense), (block.pruned, pruned), name, mask)
        if pairs is None:
            alike, pairs = False, _own_pairs(block, matrix, name, pruned, mask)
        for moments, (x, inputs) in ((m, p) for c in pairs for m, p in zip(result, c, strict=True)):
            if on_sum:
                assert mask is not None  # noqa: S101  # sums are those of layers
                _add_sum(moments, dense, pruned, name, inputs, mask)
            else:
                moments.add(inputs, x.to(inputs.device))
    routed = torch.tensor(float(not alike), device=matrix.parameter.device)
    if bool(sum_over_processes(routed)):
        for moments in result:
            moments.tx, moments.t = moments.xx.clone(), moments.x.clone()


def _own_pairs(
    block: Block, matrix: Matrix, name: str, pruned: Trace, mask: Tensor | None
) -> list[list[tuple[Tensor, Tensor]]]:
    """Rows of the pruned network in both places, for each call of a module and each group.

    Raises:
        UnsupportedModelError: where the target is a sum, of which other tokens say nothing.
    """
    if _on_sum(block, matrix):
        raise UnsupportedModelError(
            f"{matrix.name} sees other tokens in the pruned network than in the dense one, so that "
            "what it lost is not known: use dense_target: false."
        )
    module = block.pruned.get_submodule(name)
    found = (rows_of(matrix, module, call, mask) for call in pruned.calls.get(name, ()))
    return [[(rows, rows) for rows in parts] for parts in found]


def _all_pairs(
    matrix: Matrix,
    dense: tuple[nn.Module, Trace],
    pruned: tuple[nn.Module, Trace],
    name: str,
    mask: Tensor | None,
) -> list[list[tuple[Tensor, Tensor]]] | None:
    """Rows of both streams for each call of a module and each group.

    None, where the networks call the module with different numbers of rows, or times.
    """
    theirs, ours = (trace.calls.get(name, []) for _, trace in (dense, pruned))
    if len(theirs) != len(ours):
        return None
    modules = [root.get_submodule(name) for root, _ in (dense, pruned)]
    result = [
        paired_rows(matrix, (modules[0], one), (modules[1], two), mask)
        for one, two in zip(theirs, ours, strict=True)
    ]
    same = all(x.shape == inputs.shape for call in result for x, inputs in call)
    return result if same else None


def _bias(block: Block, matrix: Matrix, group: int) -> Tensor | None:
    """The bias of the outputs of one group, as a view into the parameter.

    None, too, of a matrix that several modules have: each has a bias of its own.
    """
    if matrix.others:
        return None
    module = block.pruned.get_submodule(block.local(matrix.owner))
    key = matrix.name.rpartition(".")[2]
    if key in PROJECTIONS:  # their biases are parts of one
        whole = module.in_proj_bias
        return whole.data.chunk(3)[PROJECTIONS.index(key)] if isinstance(whole, Tensor) else None
    key = key.replace("weight", "bias")
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
                allowed = options.allowed_of(matrix, index)
                subject = Subject(matrix.name, index, weight, bias, on_sum, allowed)
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
            block.done += [name for name in local if calls.get(name) == 1]
