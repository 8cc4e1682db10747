"""Which matrices of a module can lose single weights, and how each is seen as rows of inputs.

Works on any `nn.Module`: linear layers, `Conv1D`, convolutions, recurrent matrices, torch's own
attention, packed experts, and embeddings where they are asked for. A matrix that several modules
share is found once.
"""

import fnmatch
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from hf_prune.errors import ConfigError, UnsupportedModelError
from hf_prune.recipe import Names, did_you_mean

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
RECURRENT = (nn.LSTM, nn.GRU, nn.RNN)
CELLS = (nn.LSTMCell, nn.GRUCell, nn.RNNCell)
EMBEDDINGS = (nn.Embedding, nn.EmbeddingBag)
PROJECTIONS = ("q_proj_weight", "k_proj_weight", "v_proj_weight")
"""Names of the matrices of torch's attention where queries, keys and values differ in width."""
EXPERTS = ("gate_up_proj", "gate_proj", "up_proj", "down_proj")
"""Names under which transformers packs the matrices of all experts of a layer, `[X, R, C]`."""


@dataclass(frozen=True, eq=False)
class Matrix:
    """One prunable parameter.

    `groups` is how many independent matrices it holds: experts, the groups of a convolution, or
    queries, keys and values. `module` computes with it. `others` are further modules that have the
    same parameter.
    """

    name: str
    module: str
    kind: str
    parameter: Tensor
    groups: int = 1
    transposed: bool = False
    others: tuple[str, ...] = ()

    @property
    def owner(self) -> str:
        """The module that holds the parameter; others than `module` only of torch's attention."""
        return self.name.rpartition(".")[0]

    @property
    def numel(self) -> int:
        """Entries of all groups."""
        return self.parameter.numel()

    def view(self, values: Tensor) -> Tensor:
        """A tensor of the parameter's shape as `[groups, R, C]`: rows are outputs. For reading.

        It is a copy where strides have no such view, as those of `channels_last`.
        """
        if self.kind == "experts":
            return values.transpose(1, 2) if self.transposed else values  # [X, R, C]
        if self.transposed:
            return values.T.unsqueeze(0)  # [C, R] -> [1, R, C]
        matrices: Tensor = values.flatten(1).unflatten(0, (self.groups, -1))  # [G, R, C]
        return matrices

    def write_(self, values: Tensor, group: int, new: Tensor) -> None:
        """Write `[R, C]` into one group of a tensor of the parameter's shape, of any strides."""
        if self.kind == "experts" or self.transposed:
            self.view(values)[group].copy_(new)  # transposing is never a copy
        else:
            part = values.unflatten(0, (self.groups, -1))[group]  # [R, ...]
            part.copy_(new.reshape(part.shape))


def is_transposed(module: nn.Module) -> bool:
    """Whether packed experts hold `[X, C, R]`: what the module says, else what its shapes say."""
    told = getattr(module, "is_transposed", None)
    if told is not None:
        return bool(told)
    both, down = (getattr(module, name, None) for name in ("gate_up_proj", "down_proj"))
    if not isinstance(both, Tensor) or not isinstance(down, Tensor):
        return False
    return both.shape[-1] == 2 * down.shape[1]  # [X, E, 2 * F] and [X, F, E], as in Llama 4


def _experts(prefix: str, module: nn.Module) -> Iterator[Matrix]:
    transposed = is_transposed(module)
    for key in EXPERTS:
        parameter = getattr(module, key, None)
        if isinstance(parameter, nn.Parameter) and parameter.ndim == 3:
            name = f"{prefix}.{key}" if prefix else key
            yield Matrix(name, prefix, "experts", parameter, parameter.shape[0], transposed)


def _attention(prefix: str, module: nn.MultiheadAttention) -> Iterator[Matrix]:
    """The matrices with which torch's attention computes by itself: its submodule never runs."""
    names = ("in_proj_weight", *PROJECTIONS, "out_proj.weight")
    parameters = dict(module.named_parameters())
    for key in (name for name in names if name in parameters):
        groups = 3 if key == "in_proj_weight" else 1
        name = f"{prefix}.{key}" if prefix else key
        yield Matrix(name, prefix, "attention", parameters[key], groups)


def _of(prefix: str, module: nn.Module, *, embeddings: bool) -> Iterator[Matrix]:
    name = f"{prefix}.weight" if prefix else "weight"
    plain = "weight" in module._parameters  # not one that is computed, as under weight norm
    if isinstance(module, nn.MultiheadAttention):
        yield from _attention(prefix, module)
    elif isinstance(module, nn.Linear) and plain:
        yield Matrix(name, prefix, "linear", module.weight)
    elif isinstance(module, Conv1D):
        yield Matrix(name, prefix, "linear", module.weight, transposed=True)
    elif isinstance(module, CONVOLUTIONS) and plain:
        yield Matrix(name, prefix, "convolution", module.weight, module.groups)
    elif isinstance(module, (*RECURRENT, *CELLS)):
        for key, parameter in module.named_parameters(recurse=False):
            if key.startswith("weight"):  # of inputs, of states, and of what becomes a state
                yield Matrix(f"{prefix}.{key}" if prefix else key, prefix, "recurrent", parameter)
    elif isinstance(module, EMBEDDINGS) and embeddings:
        yield Matrix(name, prefix, "embedding", module.weight)
    else:
        yield from _experts(prefix, module)


_Named = list[tuple[Matrix, nn.Module]]
"""One matrix under each name that it has, with the modules that have it."""


def _names(found: _Named) -> set[str]:
    """What a pattern can call a matrix: its parameter, its module, and the class of its module."""
    return {
        name
        for matrix, module in found
        for name in (matrix.name, matrix.owner, matrix.module, type(module).__name__)
    }


def _matches(found: _Named, patterns: Sequence[str]) -> bool:
    names = _names(found)
    return any(fnmatch.fnmatchcase(name, pattern) for name in names for pattern in patterns)


def _by_parameter(model: nn.Module, *, embeddings: bool) -> dict[int, _Named]:
    embedded: set[int] = set()
    if not embeddings:
        embedded = {id(m.weight) for m in model.modules() if isinstance(m, EMBEDDINGS)}
    inside = {m.out_proj for m in model.modules() if isinstance(m, nn.MultiheadAttention)}
    found: dict[int, _Named] = {}
    for prefix, module in model.named_modules():
        if module in inside:  # which never runs: its attention computes with its matrix
            continue
        for matrix in _of(prefix, module, embeddings=embeddings):
            if id(matrix.parameter) not in embedded:
                found.setdefault(id(matrix.parameter), []).append((matrix, module))
    return found


def _all_names(model: nn.Module, prunable: Mapping[int, _Named]) -> Names:
    """Every name in a model: of what is prunable, of what holds some of it, and of the rest."""
    holding: set[str] = set()
    others = {name for name, _ in model.named_parameters()}
    for name, module in model.named_modules():
        holds = any(id(parameter) in prunable for parameter in module.parameters())
        (holding if holds else others).update((name, type(module).__name__))
    known = [found[0][0].name for found in prunable.values()]
    also = {name for found in prunable.values() for name in _names(found)}
    return Names(known, also, holding - also, others - holding - also)


def find_matrices(
    model: nn.Module,
    *,
    targets: Sequence[str] = (),
    ignore: Sequence[str] = (),
    embeddings: bool = False,
) -> list[Matrix]:
    """The prunable matrices of any module, in its order, each shared one once.

    Weights that are computed from others (weight norm and other parametrizations) are left alone.

    Args:
        model: any `nn.Module`.
        targets: shell patterns; a matrix is taken if one fits the name of its parameter, the name
            of its module, or the class of its module (`Linear`). All are, if none is given. Any
            name of a shared one will do.
        ignore: the same, for what is left alone.
        embeddings: take embeddings too. Otherwise what an embedding shares is left alone.

    Raises:
        ConfigError: when a target fits no matrix, or what is to be ignored nothing at all.
        UnsupportedModelError: for a model with adapters of PEFT.
    """
    for name, module in model.named_modules():
        if type(module).__module__.partition(".")[0] == "peft":
            raise UnsupportedModelError(
                f"{name or 'the model'} is a {type(module).__name__}: merge adapters before you "
                "prune, and train new ones afterwards."
            )
    prunable = _by_parameter(model, embeddings=embeddings)
    for target in targets:
        if not any(_matches(found, [target]) for found in prunable.values()):
            names = [found[0][0].name for found in prunable.values()]
            every = () if embeddings else _by_parameter(model, embeddings=True).values()
            if any(_matches(found, [target]) for found in every):
                raise ConfigError(
                    f"targets: {target!r} is an embedding, or shares the matrix of one: to prune "
                    "it write weights: {embeddings: true}."
                )
            raise ConfigError(f"targets: nothing is called {target!r}{did_you_mean(target, names)}")
    if ignore:
        _all_names(model, prunable).check_ignored(ignore)
    return [
        replace(found[0][0], others=tuple(matrix.module for matrix, _ in found[1:]))
        for found in prunable.values()
        if (not targets or _matches(found, targets)) and not _matches(found, ignore)
    ]


def find_weights(model: nn.Module, ignore: Sequence[str] = ()) -> dict[str, Tensor]:
    """The prunable weights of any module by parameter name, in its order, each shared one once.

    Args:
        model: any `nn.Module`.
        ignore: shell patterns of parameters, modules or classes to leave out, such as
            `classifier.*`.

    Raises:
        ConfigError: when one of them fits nothing at all.
    """
    return {matrix.name: matrix.parameter for matrix in find_matrices(model, ignore=ignore)}


def set_values_(matrix: Matrix, group: int, values: Tensor) -> None:
    """Write the `[R, C]` values of one group into the parameter, in its dtype and layout."""
    with torch.no_grad():
        matrix.write_(matrix.parameter.data, group, values)
