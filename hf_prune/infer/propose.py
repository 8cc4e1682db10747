"""Families that nobody wrote: proposed from a trace, and then proved.

A proposal is only ever returned when closing gates and really removing units give the same on the
user's own model, with other widths in every layer.
"""

import copy
import itertools
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from hf_prune.errors import HfPruneError, UnsupportedModelError
from hf_prune.families import FAMILIES
from hf_prune.families.spec import Attention, Family, Ffn, Stack
from hf_prune.gates.plans import masked
from hf_prune.plan import Plan, SitePlan
from hf_prune.sites import base_model, find_sites, logical_weight
from hf_prune.statistics.example import example_batch
from hf_prune.surgery.remove import remove_units

TOLERANCE = 1e-5
"""Largest difference of what masked and shrunken model give, relative to the largest value."""
_COUNT, _KV, _WIDTH = "heads", "key/value heads", "all heads"


@dataclass
class _Trace:
    """What the modules of one layer were called with, in the order of the calls."""

    layer: nn.Module
    inputs: dict[str, Tensor] = field(default_factory=dict)
    outputs: dict[str, Tensor] = field(default_factory=dict)
    entered: Tensor | None = None
    left: Tensor | None = None


def _tensor(value: Any) -> Tensor | None:
    first = value[0] if isinstance(value, tuple) and value else value
    return first.detach() if isinstance(first, Tensor) else None


@torch.no_grad()
def _trace(model: PreTrainedModel, layer: nn.Module, batch: Mapping[str, Tensor]) -> _Trace:
    trace, handles = _Trace(layer), []

    def watch(name: str) -> Any:
        def keep(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            given = _tensor(args) if args else _tensor(kwargs.get("hidden_states"))
            made = _tensor(output)
            if given is None or made is None:
                return
            if name:
                trace.inputs.setdefault(name, given)
                trace.outputs.setdefault(name, made)
            elif trace.entered is None:
                trace.entered, trace.left = given, made

        return keep

    for name, module in layer.named_modules():
        handles.append(module.register_forward_hook(watch(name), with_kwargs=True))
    try:
        model(**batch)
    finally:
        for handle in handles:
            handle.remove()
    return trace


def _layer_lists(base: nn.Module) -> list[str]:
    """The paths of lists of equal layers that hold linear layers, the longest first."""
    found = []
    for name, module in base.named_modules():
        if isinstance(module, nn.ModuleList) and len(module):
            same = len({type(child) for child in module}) == 1
            linear = any(isinstance(m, (nn.Linear, Conv1D)) for m in module[0].modules())
            has_lists = any(isinstance(m, nn.ModuleList) for m in module[0].modules())
            if same and linear and not has_lists:
                found.append((len(module), name))
    return [name for _, name in sorted(found, key=lambda item: -item[0])]


def _same(a: Tensor, b: Tensor) -> bool:
    if a.numel() != b.numel():
        return False
    scale = float(b.abs().max()) + 1e-6
    return bool((a.reshape(-1) - b.reshape(-1)).abs().max() <= 1e-5 * scale)


def _sum_of(trace: _Trace, out: str) -> str | None:
    """The module whose input is the sum of residual and output; "" = the layer; None = neither."""
    made = trace.outputs[out]
    assert trace.entered is not None and trace.left is not None  # noqa: S101, PT018  # the layer ran
    seen = list(trace.inputs)
    later = [
        name for name in seen[seen.index(out) + 1 :] if trace.inputs[name].numel() == made.numel()
    ]
    residuals = [trace.entered]
    for name in seen:
        given, after = trace.inputs[name], trace.outputs[name]
        residuals += [given] if given.numel() == made.numel() else []
        if after.numel() == made.numel():  # what a block beside this one has added
            residuals.append(trace.entered + after.reshape(trace.entered.shape))
    for name in later:
        given = trace.inputs[name].reshape(made.shape)
        if any(_same(given - made, residual) for residual in residuals):
            return name
    rest = trace.left.reshape(made.shape) - made if trace.left.numel() == made.numel() else made
    return "" if any(_same(rest, residual) for residual in residuals) else None


@dataclass(frozen=True)
class _Block:
    """Linear layers that read the same, and the one that what they give flows into."""

    into: tuple[str, ...]
    out: str


def _blocks(trace: _Trace, width: int) -> list[_Block]:
    """All pairs of layers into and out of a block, by widths and by what was called with what."""
    linear = {
        name: module
        for name, module in trace.layer.named_modules()
        if type(module) in (nn.Linear, Conv1D) and name in trace.inputs
    }
    groups: dict[tuple[int, str], list[str]] = {}
    for name in linear:
        if logical_weight(linear[name]).shape[1] == width:
            key = trace.inputs[name].data_ptr(), _parent((name,))
            groups.setdefault(key, []).append(name)
    order = list(trace.inputs)
    blocks, taken = [], set()
    for name in sorted(linear, key=order.index):  # the way out comes after the way in
        out, inner = logical_weight(linear[name]).shape
        if out != width or any(name in group for group in groups.values() if len(group) > 1):
            continue
        for key, group in groups.items():
            sizes = {logical_weight(linear[g]).shape[0] for g in group if g != name}
            before = all(order.index(g) < order.index(name) for g in group)
            if key not in taken and before and name not in group and max(sizes) >= inner:
                blocks.append(_Block(tuple(group), name))
                taken.add(key)
                break
    return blocks


def _integers(module: nn.Module, value: int) -> tuple[str, ...]:
    return tuple(
        name
        for name, found in vars(module).items()
        if type(found) is int
        and found == value
        and not name.startswith("_")
        and "group" not in name
    )


def _parent(names: Sequence[str]) -> str:
    """The path of the innermost module that holds all of them."""
    parts = [name.split(".")[:-1] for name in names]
    same = itertools.takewhile(lambda level: len(set(level)) == 1, zip(*parts, strict=False))
    return ".".join(level[0] for level in same)


def _attentions(trace: _Trace, block: _Block, heads: int, total: str) -> Iterator[Attention]:
    """Every way in which a block could be attention, the likeliest first."""
    layer = trace.layer
    sizes = {name: int(logical_weight(layer.get_submodule(name)).shape[0]) for name in block.into}
    inner = int(logical_weight(layer.get_submodule(block.out)).shape[1])
    if inner % heads:
        return
    shared, core = _parent((*block.into, block.out)), _parent(block.into)
    names = {n: n.removeprefix(shared).strip(".") for n in (*block.into, block.out)}
    ways: list[dict[str, Any]] = []
    if len(block.into) == 3 and max(sizes.values()) == inner:
        q, k, v = sorted(block.into, key=lambda name: -sizes[name])
        ways.append({"q": names[q], "k": names[k], "v": names[v]})
        keys = sizes[k]
    elif len(block.into) == 1 and sizes[block.into[0]] > inner:
        keys = (sizes[block.into[0]] - inner) // 2
        ways += [{"qkv": names[block.into[0]], "interleaved": i} for i in (False, True)]
    else:
        return
    head_dim, module = inner // heads, layer.get_submodule(core)
    dims = [n for n in _integers(module, head_dim) if "head" in n or "dim" in n]
    kv = keys // head_dim
    attributes = {
        _COUNT: tuple(n for n in _integers(module, heads) if "head" in n),
        _KV: tuple(n for n in _integers(module, kv) if "head" in n and kv != heads),
        _WIDTH: tuple(n for n in _integers(module, inner) if n not in dims),
    }
    for way, wide in itertools.product(ways, (False, True)):
        if wide and not attributes[_WIDTH]:
            continue
        yield Attention(
            path=shared,
            core=core.removeprefix(shared).strip("."),
            out=names[block.out],
            sum=total,
            head_dim=dims[0] if dims else head_dim,
            counts=attributes[_COUNT],
            widths=attributes[_WIDTH] if wide else (),
            kv_counts=attributes[_KV],
            **way,
        )


def _ffn(trace: _Trace, block: _Block, total: str) -> Ffn | None:
    """A block as a feed-forward one, if its widths are those of one."""
    layer = trace.layer
    inner = int(logical_weight(layer.get_submodule(block.out)).shape[1])
    sizes = {int(logical_weight(layer.get_submodule(name)).shape[0]) for name in block.into}
    if len(sizes) != 1 or len(block.into) > 2 or next(iter(sizes)) not in (inner, 2 * inner):
        return None
    path = block.out.rpartition(".")[0]
    counts = _integers(layer.get_submodule(path), inner) if path else ()
    packed = next(iter(sizes)) // inner
    return Ffn(block.into, block.out, total, path=path, counts=counts, packed=packed)


def _proposals(
    model: PreTrainedModel, batch: Mapping[str, Tensor]
) -> Iterator[tuple[Attention, Ffn, str]]:
    """What the trace allows, the likeliest first."""
    base = base_model(model)
    heads = getattr(model.config.get_text_config(), "num_attention_heads", None)
    if type(heads) is not int:
        raise UnsupportedModelError("the config does not say num_attention_heads.")
    for layers in _layer_lists(base):
        trace = _trace(model, base.get_submodule(f"{layers}.0"), batch)
        if trace.entered is None:
            continue
        blocks = _blocks(trace, trace.entered.shape[-1])
        sums = {block.out: _sum_of(trace, block.out) for block in blocks}
        for one, other in itertools.permutations(blocks, 2):
            one_sum, other_sum = sums[one.out], sums[other.out]
            if one_sum is None or other_sum is None:
                continue
            ffn = _ffn(trace, other, other_sum)
            for attention in _attentions(trace, one, heads, one_sum) if ffn else ():
                assert ffn is not None  # noqa: S101  # checked in the line above
                yield attention, ffn, layers


def _predict(model: PreTrainedModel, batch: Mapping[str, Tensor]) -> Tensor:
    output = model(**batch)
    logits = output.get("logits")
    found: Tensor = output[0] if logits is None else logits
    return found.float()


def _uneven(model: PreTrainedModel, seed: int) -> Plan:
    generator = random.Random(seed)
    sites = {}
    for site in find_sites(model):
        count = generator.randint(1, max(1, site.units - 1))
        kept = sorted(generator.sample(range(site.units), count))
        sites[site.name] = SitePlan(site.kind, site.units, tuple(kept))
    return Plan(model.config.model_type, sites)


@torch.no_grad()
def prove_family(
    model: PreTrainedModel, family: Family, batch: Mapping[str, Tensor] | None = None
) -> float:
    """Compare closed gates with real removal, twice, with other random widths in every layer.

    Args:
        model: of that family, in float32 or better. It is not changed.
        family: a description that need not be registered.
        batch: what to run it on; token ids or whatever the model takes, if not given.

    Returns:
        The largest difference, relative to the largest value that the model gives.

    Raises:
        UnsupportedModelError: when it is larger than `TOLERANCE`, when nothing can be removed, when
            removing changes nothing, or when the shrunken model does not run.
    """
    model = copy.deepcopy(model).eval()
    batch = example_batch(model, 2, 12) if batch is None else batch
    known = FAMILIES.get(family.model_type)
    FAMILIES[family.model_type] = family
    try:
        worst = 0.0
        for seed in (0, 1):
            dense, pruned = _predict(model, batch), copy.deepcopy(model)
            plan = _uneven(pruned, seed)
            with masked(model, plan):
                expected = _predict(model, batch)
            remove_units(pruned, plan)
            found, scale = _predict(pruned, batch), float(expected.abs().max())
            worst = max(worst, float((found - expected).abs().max()) / scale)
            if not plan.sites or float((expected - dense).abs().max()) < 1e-3 * scale:
                raise UnsupportedModelError("closing gates changes nothing.")
    except HfPruneError:
        raise
    except Exception as error:  # whatever a wrong description leads to inside of a model
        raise UnsupportedModelError(f"the shrunken model does not run: {error}") from error
    finally:
        del FAMILIES[family.model_type]
        if known is not None:
            FAMILIES[family.model_type] = known
    if not worst <= TOLERANCE:
        raise UnsupportedModelError(
            f"masked and shrunken model differ by {worst:.1e} of the largest value."
        )
    return worst


def infer_family(model: PreTrainedModel, batch: Mapping[str, Tensor] | None = None) -> Family:
    """A description of a model that nobody has described, proved on this model.

    One forward pass is traced: which linear layers read the same tensor, which one their output
    flows into, and where it is added to the residual. Every description that fits the trace is
    tried, until one passes `prove_family`. Pass the result to `register_family`.

    Args:
        model: an encoder or a decoder. It is not changed.
        batch: what to run it on; token ids or whatever the model takes, if not given.

    Raises:
        UnsupportedModelError: when no description passes, with what was tried.
    """
    if model.config.is_encoder_decoder:
        raise UnsupportedModelError("encoder-decoders cannot be inferred: describe the family.")
    traced = copy.deepcopy(model).eval()
    batch = example_batch(traced, 2, 12) if batch is None else batch
    reasons: list[str] = []
    for attention, ffn, layers in _proposals(traced, batch):
        family = Family(model.config.model_type, (Stack(layers, attention, ffn),))
        try:
            prove_family(traced, family, batch)
        except UnsupportedModelError as error:
            reasons.append(str(error))
        else:
            return family
    tried = "; ".join(dict.fromkeys(reasons)) or "no layers with attention and feed-forward blocks"
    raise UnsupportedModelError(
        f"no description of {model.config.model_type!r} could be proved ({tried}). Describe the "
        "family by hand: CONTRIBUTING.md shows how."
    )
