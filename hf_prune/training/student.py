"""Students of another depth and width, made from a teacher: its best layers, heads and columns.

Pruning keeps the hidden width, since every layer shares it. A student may be narrower than that: a
model of its own, with a plain config, whose weights are parts of the teacher's.
"""

import copy
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from hf_prune.criteria.ranking import Ranking
from hf_prune.errors import ConfigError, DataError
from hf_prune.recipe import Student
from hf_prune.sites import (
    Site,
    base_model,
    find_sites,
    hidden_width,
    layer_modules,
    logical_weight,
    projection,
)
from hf_prune.statistics.batches import Batch, forward_kwargs, to_device, token_mask
from hf_prune.statistics.collect import collect, sum_over_processes
from hf_prune.statistics.score import score
from hf_prune.statistics.streams import in_eval
from hf_prune.surgery.shapes import forget_shapes_, set_key_
from hf_prune.training.mapping import uniform_pairs
from hf_prune.training.taps import attach_taps

CRITERION = "activation_norm"
"""By which heads and neurons of the teacher are chosen."""


@dataclass(frozen=True)
class Choice:
    """What a student takes from its teacher.

    Attributes:
        layers: of the teacher, in order; one for each layer of the student.
        hidden: sorted columns of the hidden width.
        units: by site of the teacher, the sorted units that are taken.
    """

    layers: tuple[int, ...]
    hidden: tuple[int, ...]
    units: Mapping[str, tuple[int, ...]]


def _sizes(model: PreTrainedModel) -> dict[str, int]:
    """Depth and widths of a model whose layers are all alike."""
    sites = find_sites(model)
    kinds: dict[str, set[int]] = {}
    for site in sites:
        kinds.setdefault(site.kind, set()).add(site.units)
    if any(len(units) != 1 for units in kinds.values()) or set(kinds) != {"heads", "neurons"}:
        raise ConfigError("a student is made from a teacher whose layers all have the same widths.")
    sizes = {kind: units.pop() for kind, units in kinds.items()}
    return {"layers": len(layer_modules(model)), "hidden": hidden_width(model, sites), **sizes}


def _head_site(model: PreTrainedModel) -> Site:
    """The heads of one layer; they are alike in all of them."""
    return next(site for site in find_sites(model) if site.kind == "heads")


def _grouped(config: PreTrainedConfig) -> bool:
    """Whether several query heads share keys and values."""
    shared = getattr(config, "num_key_value_heads", None)
    return shared is not None and shared != config.num_attention_heads


def _check_heads(
    teacher: PreTrainedModel, config: PreTrainedConfig, wanted: Mapping[str, int]
) -> None:
    """Refuse heads that a model of this config would not have as the teacher has them.

    Raises:
        ConfigError: naming the widths.
    """
    with torch.device("meta"):
        built = _head_site(type(teacher)(config))
    ours, theirs = built.gate.width, _head_site(teacher).gate.width
    if (built.units, ours) != (wanted["heads"], theirs):
        raise ConfigError(
            f"hidden / heads is {ours} in the student and {theirs} in the teacher: heads can be "
            f"taken over only if they are as wide. With hidden={wanted['hidden']} write "
            f"heads={wanted['hidden'] // theirs}."
        )


def student_config(
    teacher: PreTrainedModel, stage: Student
) -> tuple[PreTrainedConfig, dict[str, int]]:
    """The config of a student, and its sizes: of a pruned teacher those that it has by now.

    Raises:
        ConfigError: when a size is larger than the teacher's, or heads would have another width.
    """
    sizes = _sizes(teacher)
    wanted = {name: getattr(stage, name) or size for name, size in sizes.items()}
    for name, size in wanted.items():
        if stage.init == "teacher" and size > sizes[name]:
            raise ConfigError(f"{name}={size} is more than the teacher's {sizes[name]}.")
    config = copy.deepcopy(teacher.config)
    forget_shapes_(config)
    if not _grouped(config):
        config.num_attention_heads = wanted["heads"]
    elif any(wanted[name] != sizes[name] for name in ("hidden", "heads")):
        raise ConfigError("under grouped queries a student keeps the hidden width and the heads.")
    else:
        for key, per_unit in _head_site(teacher).sizes:
            set_key_(config, key, per_unit * sizes["heads"])
    config.num_hidden_layers = wanted["layers"]  # families with other names map them
    config.hidden_size = wanted["hidden"]
    keys = ("intermediate_size", "hidden_dim", "n_inner")
    width = next((key for key in keys if hasattr(config, key)), None)
    if width is None:
        raise ConfigError(f"{config.model_type} does not say how wide its feed-forward blocks are.")
    setattr(config, width, wanted["neurons"])
    if getattr(config, "head_dim", None) is None and wanted["hidden"] % wanted["heads"]:
        raise ConfigError(
            f"hidden={wanted['hidden']} is not a multiple of heads={wanted['heads']}."
        )
    if stage.init == "teacher":
        _check_heads(teacher, config, wanted)
    return config, wanted


@torch.no_grad()
def _hidden_scores(model: PreTrainedModel, batches: Iterable[Batch]) -> tuple[Tensor, list[float]]:
    """Scores of columns `[E]` and of layers, from one pass over the batches of all processes.

    A column counts by how much of it the layers read: its root mean square before each projection,
    times the norm of the projection's column, each projection as a share of its whole (after Sun et
    al. 2023, arXiv:2306.11695). A layer counts by how much it turns the hidden state: 1 minus the
    cosine of what enters and what leaves (Men et al. 2024, arXiv:2403.03853).
    """
    base = base_model(model)
    taps = attach_taps(model, hidden=True, attention=False)
    squares: dict[str, Tensor] = {}
    turns = torch.zeros(taps.layers, dtype=torch.float64)
    state: dict[str, Tensor] = {}
    handles = []
    readers = {item.module for s in find_sites(model) for item in s.slices if item.axis == 0}
    for name in sorted(readers):

        def note(module: nn.Module, args: tuple[Tensor, ...], name: str = name) -> None:
            total = args[0][state["mask"]].float().square().sum(dim=0).double().cpu()  # [E]
            squares[name] = squares[name] + total if name in squares else total

        handles.append(projection(base, name).register_forward_pre_hook(note))
    try:
        with in_eval(model):
            for batch in batches:
                batch = to_device(batch, model.device)
                mask = state["mask"] = token_mask(model, batch)
                model(**forward_kwargs(model, batch, labels=False))
                for index in range(taps.layers):
                    before, after = (taps.hidden[i][mask].float() for i in (index, index + 1))
                    cosine = torch.cosine_similarity(before, after, dim=-1)
                    turns[index] += (1 - cosine).double().sum().cpu()
    finally:
        taps.remove()
        for handle in handles:
            handle.remove()
    scores = torch.zeros(hidden_width(model, find_sites(model)), dtype=torch.float64)
    for name in sorted(squares):
        total = sum_over_processes(squares[name].to(model.device)).cpu()
        reads = total * logical_weight(projection(base, name)).double().cpu().square().sum(dim=0)
        scores += reads / reads.sum()
    return scores, sum_over_processes(turns.to(model.device)).tolist()


def _best(scores: Tensor, count: int) -> tuple[int, ...]:
    return Ranking.from_scores(scores).kept(count)


def choose(teacher: PreTrainedModel, stage: Student, batches: Sequence[Batch]) -> Choice:
    """What a student takes from its teacher, by scores on some batches.

    Raises:
        ConfigError: for sizes that cannot be taken.
        DataError: when there is no batch.
    """
    _, wanted = student_config(teacher, stage)
    if not batches:
        raise DataError("a student that starts from its teacher needs batches to choose by.")
    columns, turns = _hidden_scores(teacher, batches)
    depth = len(turns)
    if stage.pick_layers == "score":
        layers = _best(torch.tensor(turns, dtype=torch.float64), wanted["layers"])
    else:
        layers = tuple(j for _, j in uniform_pairs(wanted["layers"], depth))
    sites = [site for site in find_sites(teacher) if site.layer in layers]
    statistics = collect(teacher, sites, batches, ["input_norm"])
    rankings = score(teacher, sites, CRITERION, statistics)
    units = {site.name: rankings[site.name].kept(wanted[site.kind]) for site in sites}
    return Choice(layers, _best(columns, wanted["hidden"]), units)


def _initialise_(model: PreTrainedModel, init: str, seed: int) -> None:
    """Draw all matrices anew: normal with the config's deviation, or Xavier's uniform."""
    generator = torch.Generator().manual_seed(seed)
    deviation = float(getattr(model.config, "initializer_range", 0.02))
    norms = {id(p) for m in model.modules() if "Norm" in type(m).__name__ for p in m.parameters()}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.zero_()
            elif id(parameter) in norms:
                parameter.fill_(1.0)
            elif init == "xavier" and parameter.ndim == 2:
                nn.init.xavier_uniform_(parameter, generator=generator)
            else:
                parameter.normal_(0.0, deviation, generator=generator)


def _positions(item_width: int, offset: int, units: Sequence[int]) -> list[int]:
    return [offset + u * item_width + step for u in units for step in range(item_width)]


def _axis_indices(teacher: PreTrainedModel, choice: Choice) -> dict[tuple[str, int], list[int]]:
    """By module of the base model and logical axis, the rows or columns that its units own."""
    found: dict[tuple[str, int], list[int]] = {}
    for site in find_sites(teacher):
        if site.name in choice.units:
            for item in site.slices:
                rows = _positions(item.width, item.offset, choice.units[site.name])
                found.setdefault((item.module, item.axis), []).extend(rows)
    return {key: sorted(rows) for key, rows in found.items()}


def _layer_names(model: PreTrainedModel) -> list[str]:
    names = {id(module): name for name, module in model.named_modules()}
    return [names[id(layer)] for layer in layer_modules(model)]


def _part(
    weight: Tensor, shape: Sequence[int], given: Mapping[int, list[int]], hidden: Sequence[int]
) -> Tensor:
    """The part of a tensor of the teacher that has the student's shape."""
    for axis, size in enumerate(shape):
        index = given.get(axis)
        if index is None and weight.shape[axis] == size:
            continue
        index = list(hidden) if index is None else index
        if len(index) != size or max(index) >= weight.shape[axis]:
            raise ConfigError(f"a tensor {list(weight.shape)} has no part of shape {list(shape)}.")
        weight = weight.index_select(axis, torch.tensor(index, device=weight.device))
    return weight


@torch.no_grad()
def _take_over_(student: PreTrainedModel, teacher: PreTrainedModel, choice: Choice) -> None:
    """Write the chosen parts of the teacher into the student."""
    base = base_model(teacher)
    prefix = next(name for name, module in teacher.named_modules() if module is base)
    owned = _axis_indices(teacher, choice)
    modules = dict(teacher.named_modules())
    theirs = dict(teacher.named_parameters())
    ours, layers = _layer_names(student), _layer_names(teacher)
    for name, parameter in student.named_parameters():
        source = name
        for index, layer in enumerate(ours):
            if name.startswith(f"{layer}."):
                source = f"{layers[choice.layers[index]]}{name.removeprefix(layer)}"
        module_name, _, kind = source.rpartition(".")
        inner = module_name.removeprefix(f"{prefix}.") if prefix else module_name
        packed = isinstance(modules[module_name], Conv1D)
        given = {}
        for axis in (0, 1):
            rows = owned.get((inner, axis))
            if rows is not None and kind == "weight":
                given[1 - axis if packed else axis] = rows
            elif rows is not None and axis == 0:
                given[0] = rows
        parameter.copy_(_part(theirs[source], parameter.shape, given, choice.hidden))


def make_student(
    teacher: PreTrainedModel, stage: Student, batches: Sequence[Batch] = (), seed: int = 0
) -> PreTrainedModel:
    """A smaller model of the teacher's class, which starts from parts of it or at random.

    It has a plain config and loads anywhere. With the widths of the teacher and fewer layers it is
    the teacher without the others.

    Args:
        teacher: of a family whose layers are all alike. It is not changed.
        stage: sizes, and from what to start.
        batches: by which parts are chosen; only for `init: teacher`.
        seed: of a random start.

    Raises:
        ConfigError: for sizes that cannot be.
        DataError: when batches are needed and missing.
    """
    config, _ = student_config(teacher, stage)
    student: PreTrainedModel = type(teacher)(config)
    if stage.init == "teacher":
        _take_over_(student, teacher, choose(teacher, stage, batches))
    else:
        _initialise_(student, stage.init, seed)
    student.tie_weights()
    nn.Module.to(student, teacher.device, teacher.dtype)
    student.train(teacher.training)
    return student
