"""In which order the matrices of a model are reached, and which of its layers can be run alone."""

from collections.abc import Mapping, Sequence

from torch import nn
from transformers import PreTrainedModel

from hf_prune.errors import UnsupportedModelError
from hf_prune.sites import Site, base_model, find_sites
from hf_prune.statistics.streams import by_layer, by_stack, in_order
from hf_prune.weights.chains import chained_layers
from hf_prune.weights.find import Matrix
from hf_prune.weights.inputs import check_ran
from hf_prune.weights.walk import Inputs, call_model


def known_layers(model: nn.Module, batches: Sequence[Inputs]) -> dict[str, list[Site]]:
    """The sites of each layer, where one layer can be run after the other; else nothing.

    A layer that runs several times, or not at all, cannot. Of families that are not known layers
    have no sites, and run alone where one pass shows that they can.
    """
    if not isinstance(model, PreTrainedModel):
        return {}
    try:
        layers = by_layer(find_sites(model))
    except UnsupportedModelError:
        return {name: [] for name in chained_layers(model, batches[0])}
    with in_order(base_model(model), list(layers)) as order:
        call_model(model, batches[0])
    return layers if sorted(order) == sorted(layers) else {}


def merged(order: Sequence[str], more: Sequence[str]) -> list[str]:
    """Names as they first come in either of two orders; new ones stand behind their neighbours."""
    result, place = list(order), 0
    for name in dict.fromkeys(more):
        if name not in result:
            result.insert(place, name)
        place = result.index(name) + 1
    return result


def parts_of(
    model: nn.Module,
    matrices: Sequence[Matrix],
    layers: Mapping[str, list[Site]],
    batches: Sequence[Inputs],
) -> list[tuple[list[Matrix], dict[str, list[Site]]]]:
    """Stacks of layers as they run, each with the matrices outside of layers that run before it.

    Raises:
        UnsupportedModelError: when calibration never runs one of the matrices.
    """
    holders = {m.name: (m.module, *m.others) for m in matrices}
    roots: dict[str, str] = {}
    if isinstance(model, PreTrainedModel):
        base = base_model(model)
        names = {id(module): name for name, module in model.named_modules()}
        roots = {layer: names[id(base.get_submodule(layer))] for layer in layers}
    order = _first_runs(model, list(holders.values()), list(roots.values()), batches)
    place = {name: index for index, name in enumerate(order)}
    starts = tuple(f"{root}." for root in roots.values())
    outside = [matrix for matrix in matrices if not matrix.name.startswith(starts)]
    parts = []
    for stack in sorted(by_stack(layers).values(), key=lambda names: place[roots[names[0]]]):
        first = place[roots[stack[0]]]
        before = [m for m in outside if place.get(m.module, len(order)) < first]
        parts.append((before, {layer: layers[layer] for layer in stack}))
        outside = [matrix for matrix in outside if matrix not in before]
    return [*parts, (outside, {})]


def _first_runs(
    model: nn.Module,
    holders: Sequence[Sequence[str]],
    layers: Sequence[str],
    batches: Sequence[Inputs],
) -> list[str]:
    """Modules in the order in which they first run, over as many batches as it takes to see all.

    Raises:
        UnsupportedModelError: on every process, when no batch of one of them runs any of the
            modules that hold one matrix.
    """
    watched = list(dict.fromkeys([*(name for names in holders for name in names), *layers]))
    found: list[str] = []
    unused = [names[0] for names in holders]
    for batch in batches:
        with in_order(model, watched) as order:
            call_model(model, batch)
        found = merged(found, order)
        unused = [names[0] for names in holders if not set(names) & set(found)]
        if not unused:
            break
    check_ran(unused)
    return found
