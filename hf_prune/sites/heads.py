"""The heads of an attention: each with its keys and values, or single query heads."""

from collections.abc import Iterator, Sequence

from torch import nn

from hf_prune.families.spec import Attention
from hf_prune.sites.modules import (
    get_module,
    has_module,
    logical_weight,
    out_features,
    projection,
)
from hf_prune.sites.place import Place, join
from hf_prune.sites.site import QUERY_HEADS, Attribute, Site, Slice


def uneven_groups(root: nn.Module, core: str) -> list[int] | None:
    """The key/value head that each query head reads, where groups differ; None where they do not.

    Args:
        root: the base model.
        core: path of the attention.
    """
    return getattr(get_module(root, core), "reads", None)


def _packed_slices(
    root: nn.Module, block: str, spec: Attention, head_dim: int, queries: int
) -> list[Slice]:
    """Slices of a projection that packs queries, keys and values."""
    name = join(block, spec.qkv)
    keys = (out_features(projection(root, name)) - queries) // 2
    if spec.interleaved:
        return [Slice(name, 0, 3 * head_dim)]
    group = queries // max(keys, 1)  # query heads per key/value head
    return [
        Slice(name, 0, group * head_dim),
        Slice(name, 0, head_dim, queries),
        Slice(name, 0, head_dim, queries + keys),
    ]


def _attention_slices(
    root: nn.Module, block: str, spec: Attention, head_dim: int, queries: int
) -> list[Slice]:
    """The slices of all projections into a block, `queries` its width; the first is of queries."""
    if spec.qkv:
        return _packed_slices(root, block, spec, head_dim, queries)
    if spec.kv:
        pair = join(block, spec.kv)
        keys = out_features(projection(root, pair)) // 2
        others = [Slice(pair, 0, head_dim), Slice(pair, 0, head_dim, keys)]
    else:
        keys = out_features(projection(root, join(block, spec.k)))
        others = [Slice(join(block, name), 0, head_dim) for name in (spec.k, spec.v)]
    group = queries // max(keys, 1)
    more = [name for name in (join(block, m) for m in spec.more) if has_module(root, name)]
    return [
        Slice(join(block, spec.q), 0, group * head_dim),
        *others,
        *(Slice(name, 0, group * head_dim) for name in more),
    ]


def _head_site(root: nn.Module, place: Place, spec: Attention) -> Site | None:
    block = join(place.name, spec.path)
    core = join(block, spec.core)
    head_dim = spec.head_dim
    if isinstance(head_dim, str):
        head_dim = int(getattr(get_module(root, core), head_dim))
    out = join(block, spec.out)
    queries = int(logical_weight(projection(root, out)).shape[1])
    if not queries:  # no head is left
        return None
    slices = _attention_slices(root, block, spec, head_dim, queries)
    width = head_dim if spec.interleaved else slices[0].width  # of the query heads of a unit
    group = width // head_dim
    attributes = [Attribute(core, name, group) for name in spec.counts]
    attributes += [Attribute(core, name, width) for name in spec.widths]
    attributes += [Attribute(core, name, 1) for name in spec.kv_counts]
    attributes += [Attribute(core, f"config.{name}", group) for name in spec.config_counts]
    return place.site(
        root,
        spec,
        [*slices, Slice(out, 1, width)],
        name=block,
        kind="heads",
        units=queries // width,
        attributes=tuple(attributes),
        attention_width=place.runs * width,
        core=core,
        shared_bias=spec.shared_bias,
        sizes=tuple(zip(spec.sizes, (group, 1), strict=False)),
        empty=spec.empty,
        cross=spec is place.stack.cross,
    )


def _query_site(root: nn.Module, place: Place, spec: Attention) -> Site | None:
    """The single query heads of an attention in which several share keys and values."""
    block = join(place.name, spec.path)
    core, out = join(block, spec.core), join(block, spec.out)
    if spec.interleaved or not isinstance(spec.head_dim, str):
        return None
    head_dim = int(getattr(get_module(root, core), spec.head_dim))
    queries = int(logical_weight(projection(root, out)).shape[1]) // head_dim
    if not queries:
        return None
    first = join(block, spec.qkv or spec.q)
    read: tuple[Slice, ...]
    if spec.qkv:
        keys = (out_features(projection(root, first)) // head_dim - queries) // 2
        read = (
            Slice(first, 0, head_dim, queries * head_dim),
            Slice(first, 0, head_dim, (queries + keys) * head_dim),
        )
    elif spec.k:
        keys = out_features(projection(root, join(block, spec.k))) // head_dim
        read = tuple(Slice(join(block, name), 0, head_dim) for name in (spec.k, spec.v))
    else:
        return None
    uneven = uneven_groups(root, core)
    if uneven is None and queries <= keys:
        return None
    reads = uneven or [unit // (queries // keys) for unit in range(queries)]
    counts = [*spec.counts, *(f"config.{name}" for name in spec.config_counts)]
    return place.site(
        root,
        spec,
        [Slice(first, 0, head_dim), Slice(out, 1, head_dim)],
        name=join(block, "queries"),
        kind=QUERY_HEADS,
        units=queries,
        attributes=(
            *(Attribute(core, name, 1) for name in counts),
            *(Attribute(core, name, head_dim) for name in spec.widths),
        ),
        attention_width=place.runs * head_dim,
        core=core,
        empty=spec.empty,
        cross=spec is place.stack.cross,
        reads=tuple(reads),
        read=read,
    )


def head_sites(
    root: nn.Module, place: Place, spec: Attention, kinds: Sequence[str]
) -> Iterator[Site | None]:
    """The heads of an attention; also single query heads, where they are asked for or all there is.

    Args:
        root: the base model.
        place: the layer.
        spec: the attention.
        kinds: that are asked for.
    """
    uneven = uneven_groups(root, join(place.name, spec.path, spec.core)) is not None
    if not uneven:
        yield _head_site(root, place, spec)
    if uneven or QUERY_HEADS in kinds:
        yield _query_site(root, place, spec)
