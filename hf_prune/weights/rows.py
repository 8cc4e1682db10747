"""What the matrices of a module are multiplied with, as rows: one row per token, pixel or step.

A linear layer sees its input as it is; a convolution sees patches; a recurrent matrix sees a step
of the sequence, or the state before it; an expert sees the tokens that were routed to it. Torch's
attention sees queries, keys and values, and gives its output projection the heads side by side.
"""

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, pad

from hf_prune.errors import UnsupportedModelError
from hf_prune.statistics.streams import Call
from hf_prune.weights.find import PROJECTIONS, Matrix, is_transposed
from hf_prune.weights.inputs import main_tensor, real_rows
from hf_prune.weights.recurrent import cell_rows, recurrent_rows

ROUTING = ("top_k_index", "router_indices")
"""Names under which packed experts are told which experts each token goes to, `[tokens, k]`."""


def _patches(module: nn.Conv1d | nn.Conv2d | nn.Conv3d, value: Tensor) -> Tensor:
    """The patches that a convolution multiplies, `[G, B * positions, C]`."""
    if value.ndim == len(module.kernel_size) + 1:
        value = value.unsqueeze(0)  # unbatched
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
    value = pad(value, module._reversed_padding_repeated_twice, mode=mode)
    sizes = zip(module.kernel_size, module.stride, module.dilation, strict=True)
    for axis, (size, stride, dilation) in enumerate(sizes):
        value = value.unfold(2 + axis, (size - 1) * dilation + 1, stride)[..., ::dilation]
    dims = len(module.kernel_size)
    value = value.unflatten(1, (module.groups, -1))  # [B, G, I, *positions, *kernel]
    positions = range(3, 3 + dims)
    kernel = range(3 + dims, 3 + 2 * dims)
    value = value.permute(1, 0, *positions, 2, *kernel)  # [G, B, *positions, I, *kernel]
    return value.flatten(2 + dims).flatten(1, 1 + dims)  # [G, B * positions, I * kernel]


def _argument(call: Call, index: int, name: str) -> Any:
    return call.args[index] if len(call.args) > index else call.kwargs.get(name)


def _attended(
    module: nn.MultiheadAttention, call: Call, key: str, mask: Tensor | None
) -> list[Tensor]:
    """What a matrix of torch's attention is multiplied with, `[tokens, C]`: for each of its groups.

    Padding of keys and values is told by the `key_padding_mask` of the call, or else by `mask`; of
    queries by `mask`, or else by that of the keys, where they are as many.
    """
    inputs = [_argument(call, i, name) for i, name in enumerate(("query", "key", "value"))]
    padding = _argument(call, 3, "key_padding_mask")  # [B, T], True or -inf where padded
    keys = None
    if padding is not None:
        keys = ~padding if padding.dtype == torch.bool else padding == 0

    def rows(value: Tensor, real: Tensor | None) -> Tensor:
        if value.ndim == 3 and not module.batch_first:
            value = value.transpose(0, 1)  # [T, B, C] -> [B, T, C]
        return real_rows(value, real)

    queries, sources = (keys if mask is None else mask), (mask if keys is None else keys)

    if key != "out_proj.weight":
        seen = list(zip(inputs, (queries, sources, sources), strict=True))
        taken = seen if key == "in_proj_weight" else [seen[PROJECTIONS.index(key)]]
        return [rows(*pair) for pair in taken]
    width = module.embed_dim
    bare = {"out_proj.weight": torch.eye(width).to(module.out_proj.weight)}
    if module.out_proj.bias is not None:
        bare["out_proj.bias"] = torch.zeros_like(module.out_proj.bias)
    heads = torch.func.functional_call(module, bare, call.args, call.kwargs)[0]
    return [rows(heads, queries)]


def _not_followed(matrix: Matrix, module: nn.Module) -> str | None:
    """Why the inputs of packed experts cannot be told from what their module is called with."""
    takes = inspect.signature(module.forward).parameters
    if "hidden_states" not in takes or not any(name in takes for name in ROUTING):
        return f"its forward takes {', '.join(takes)}, and none of {', '.join(ROUTING)}"
    if not matrix.name.endswith("down_proj"):
        return None
    if not isinstance(getattr(module, "gate_up_proj", None), Tensor):
        return "it has no gate_up_proj, which gives what down_proj reads"
    if not any(callable(getattr(module, name, None)) for name in ("_apply_gate", "act_fn")):
        return "it has neither _apply_gate nor act_fn, one of which gives what down_proj reads"
    return None


def check_followed(model: nn.Module, matrices: Sequence[Matrix]) -> None:
    """Refuse packed experts whose inputs cannot be told, before anything is changed.

    Raises:
        UnsupportedModelError: naming the parameter, and why.
    """
    for matrix in matrices:
        if matrix.kind != "experts":
            continue
        module = model.get_submodule(matrix.module)
        why = _not_followed(matrix, module)
        if why is not None:
            raise UnsupportedModelError(
                f"{matrix.name}: the inputs of the experts of {type(module).__name__} are not "
                f"known: {why}. Leave them out with ignore, or prune without calibration: "
                "criterion: magnitude, reconstruct: false, weights: {dense_target: false}."
            )


def _gated(module: nn.Module, hidden: Tensor, expert: int) -> Tensor:
    """What the `down_proj` of an expert reads, from `[tokens, E]` to `[tokens, F]`."""
    packed, bias = module.gate_up_proj, getattr(module, "gate_up_proj_bias", None)
    assert isinstance(packed, Tensor)  # noqa: S101  # as `check_followed` has seen
    weight = packed[expert].T if is_transposed(module) else packed[expert]
    both = linear(hidden, weight, None if bias is None else bias[expert])  # [tokens, 2 * F]
    gating: Any = getattr(module, "_apply_gate", None)
    if gating is not None:
        gated: Tensor = gating(both)
        return gated
    gate, up = both.chunk(2, dim=-1)
    product: Tensor = module.act_fn(gate) * up  # type: ignore[operator]  # an activation
    return product


def _routed(
    matrix: Matrix, module: nn.Module, call: Call, tokens: Sequence[Tensor]
) -> list[Tensor]:
    """The inputs of each expert's matrix, for the given tokens of each: `[tokens, C]`."""
    bound = inspect.signature(module.forward).bind(*call.args, **call.kwargs).arguments
    hidden = bound["hidden_states"].reshape(-1, bound["hidden_states"].shape[-1])
    if not matrix.name.endswith("down_proj"):
        return [hidden[index] for index in tokens]
    return [_gated(module, hidden[index], expert) for expert, index in enumerate(tokens)]


def _tokens(matrix: Matrix, module: nn.Module, call: Call, mask: Tensor | None) -> list[Tensor]:
    """Which real tokens each expert gets."""
    bound = inspect.signature(module.forward).bind(*call.args, **call.kwargs).arguments
    index = next(bound[name] for name in ROUTING if name in bound)
    index = index.reshape(-1, index.shape[-1])  # [tokens, k]
    real = torch.ones(index.shape[0], dtype=torch.bool, device=index.device)
    if mask is not None and mask.numel() == index.shape[0]:
        real = mask.flatten().to(index.device)
    hit = [(index == expert).any(dim=1) & real for expert in range(matrix.groups)]
    return [item.nonzero().squeeze(1) for item in hit]


@torch.no_grad()
def rows_of(matrix: Matrix, module: nn.Module, call: Call, mask: Tensor | None) -> list[Tensor]:
    """What each group of a matrix was multiplied with in one call, `[rows, C]` each."""
    if matrix.kind == "experts":
        return _routed(matrix, module, call, _tokens(matrix, module, call, mask))
    if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        return list(_patches(module, main_tensor(module, call)))
    if isinstance(module, nn.RNNBase):
        return [recurrent_rows(module, call, matrix.name.rpartition(".")[2])]
    if isinstance(module, nn.RNNCellBase):
        return [cell_rows(module, call, matrix.name.rpartition(".")[2])]
    if isinstance(module, nn.MultiheadAttention):
        key = matrix.name.removeprefix(matrix.module).removeprefix(".")
        return _attended(module, call, key, mask)
    return [real_rows(main_tensor(module, call), mask)]


@torch.no_grad()
def paired_rows(
    matrix: Matrix,
    dense: tuple[nn.Module, Call],
    pruned: tuple[nn.Module, Call],
    mask: Tensor | None,
) -> list[tuple[Tensor, Tensor]]:
    """Rows of the dense and of the pruned stream for each group, `[rows, C]` each, in one order.

    Experts of both streams see the tokens that the pruned network routes to them.
    """
    if matrix.kind == "experts":
        tokens = _tokens(matrix, *pruned, mask)
        ours = _routed(matrix, *pruned, tokens)
        return list(zip(_routed(matrix, *dense, tokens), ours, strict=True))
    return list(zip(rows_of(matrix, *dense, mask), rows_of(matrix, *pruned, mask), strict=True))
