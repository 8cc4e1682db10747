"""One table: every family by every way in which a pruned model must be what was asked for.

`pytest tests/contract/test_table.py -m slow --write-table` writes it into `docs/families.md`.
"""

import copy
import re
import tempfile
from pathlib import Path

import pytest
import torch
from tinies import (
    DECODERS,
    EAGER_ONLY,
    SEQ2SEQ,
    TINY,
    auto_class,
    inputs_for,
    prediction,
    without_labels,
)
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING

from hf_prune.checkpoint.hook import register
from hf_prune.checkpoint.save import save_model
from hf_prune.errors import UnsupportedModelError
from hf_prune.families import FAMILIES
from hf_prune.gates.plans import masked
from hf_prune.plan import Plan, SitePlan
from hf_prune.sites import ALL_KINDS, HIDDEN, QUERY_HEADS, find_sites
from hf_prune.surgery.layers import shorten_layers_
from hf_prune.surgery.plain import make_plain_
from hf_prune.surgery.remove import remove_units

PAGE = Path(__file__).parents[2] / "docs" / "families.md"
STATIC = {"cache_implementation": "static", "disable_compile": True}
CACHES = {
    "no cache": {"use_cache": False},
    "dynamic": {},
    "static": STATIC,
    "chunked": {**STATIC, "prefill_chunk_size": 4},
    "beam": {"num_beams": 3},
}
HEAD = (
    "family",
    "masked = removed",
    "saved = loaded",
    *(f"generate, {cache}" for cache in CACHES),
    "gradient checkpointing",
    "portable: neurons",
    "portable: all",
    "standalone",
    "hidden width",
    "single query heads",
    "layer leaves its list",
)
TEXT = """# Families

Measured by `pytest tests/contract/test_table.py -m slow --write-table`, on a model of two or three
layers with another random width in every site. Each cell is the largest absolute difference of the
logits (of hidden states where there is no head; at each step of `generate`; of gradients, relative
to the largest, under gradient checkpointing), in float32. Portable and standalone models are loaded
with no loader of hf_prune registered.

"""
WHY = {
    "a": "it does not generate",
    "b": "a decoder that begins with one token has nothing to prefill",
    "c": "transformers has no gradient checkpointing for it",
    "d": "its config cannot say how many heads a layer has, or how wide one is",
    "e": "parts of the model have other widths, or convolutions mix its channels",
    "f": "every query head has keys and values of its own",
    "g": "layers do more than add (a norm after the sum), share weights, or keep their experts",
    "h": "all layers share one position bias, of which each keeps the heads that it has kept",
}


def largest(ours, theirs):
    return (ours.float() - theirs.float()).abs().max().item()


def gradients(model, batch):
    model = model.train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        for name in ("dropout_prob", "attention_dropout", "dropout", "layerdrop"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)
    output = model(**(batch if "labels" in batch else without_labels(model, batch)))
    loss = output.loss if "labels" in batch else None
    if loss is None:
        key = "logits_per_image" if "logits_per_image" in output else "last_hidden_state"
        loss = output[key].square().mean()
    loss.backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def checkpointing(model, batch):
    if not model.supports_gradient_checkpointing:
        return "c"
    plain, saved = copy.deepcopy(model), copy.deepcopy(model)
    new = getattr(saved, "activation_checkpointing_enable", None)  # the name since 5.2x
    (new or saved.gradient_checkpointing_enable)()
    ours, theirs = gradients(plain, batch), gradients(saved, batch)
    return largest(ours, theirs) / ours.abs().max().item()


def generation(name, dense, pruned, plan, cache):
    if name not in (*DECODERS, *SEQ2SEQ):
        return "a"
    if name in SEQ2SEQ and cache == "chunked":
        return "b"
    prompt = {key: value for key, value in inputs_for(name).items() if key != "labels"}
    if name in DECODERS:
        prompt = {key: value.flip(1) for key, value in prompt.items()}
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, **CACHES[cache]}
    options |= {"output_logits": True, "return_dict_in_generate": True}
    ours = pruned.generate(**prompt, **options)
    with masked(dense, plan):
        theirs = dense.generate(**prompt, **options)
    assert torch.equal(ours.sequences, theirs.sequences)
    return max(largest(a, b) for a, b in zip(ours.logits, theirs.logits, strict=True))


def even_plan(model, kinds):
    sites = {}
    for site in find_sites(model, kinds):
        kept = 8 if site.multiple > 1 else max(site.units // 2, site.floor)
        sites[site.name] = SitePlan(site.kind, site.units, tuple(range(kept)))
    return Plan(model.config.model_type, sites)


class NoHook:
    """A block in which transformers does not know our loader."""

    def __enter__(self):
        for mapping in (AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING):
            mapping.pop("hf_prune", None)

    def __exit__(self, *_):
        self.__enter__()
        register()


def reloaded(name, folder, **more):
    options = {"attn_implementation": "eager"} if name in EAGER_ONLY else {}
    return auto_class(name).from_pretrained(folder, **options, **more).eval()


def portable(name, model, batch, kinds):
    remove_units(model, even_plan(model, kinds))
    expected = prediction(model, batch)
    try:
        make_plain_(model)
    except UnsupportedModelError:
        return "h" if name == "t5" else "d"
    with tempfile.TemporaryDirectory() as folder, NoHook():
        model.save_pretrained(folder)
        return largest(prediction(reloaded(name, folder), batch), expected)


def measure(name, tiny, uneven_plan):
    dense, pruned, batch = tiny(name), tiny(name), inputs_for(name)
    plan = uneven_plan(dense)
    with masked(dense, plan):
        zeroed = prediction(dense, batch)
    remove_units(pruned, plan)
    removed = prediction(pruned, batch)
    with tempfile.TemporaryDirectory() as folder:
        save_model(pruned, Path(folder) / "out", standalone=True)
        loaded = reloaded(name, Path(folder) / "out")
        cells = [largest(removed, zeroed), largest(prediction(loaded, batch), removed)]
        with NoHook():
            alone = reloaded(name, Path(folder) / "out", trust_remote_code=True)
            standalone = largest(prediction(alone, batch), removed)
    cells += [generation(name, dense, loaded, plan, cache) for cache in CACHES]
    cells.append(checkpointing(loaded, batch))
    cells.append(portable(name, tiny(name), batch, ("neurons", "expert_neurons")))
    cells.append(portable(name, tiny(name), batch, ALL_KINDS))
    more = [other_units(tiny(name), batch, kind) for kind in (HIDDEN, QUERY_HEADS)]
    return [*cells, standalone, *more, shorter(tiny(name), batch)]


def other_units(model, batch, kind):
    """Masked, removed, saved and loaded by units that are not those of every plan."""
    try:
        sites = find_sites(model, [kind])
    except UnsupportedModelError:
        return "e"
    if not sites:
        return "f"
    kept = {}
    for site in sites:
        count = max(site.units * 3 // 4 // site.multiple, 1) * site.multiple
        kept[site.name] = SitePlan(kind, site.units, tuple(range(site.units - count, site.units)))
    plan = Plan(model.config.model_type, kept)
    with masked(model, plan):
        zeroed = prediction(model, batch)
    remove_units(model, plan)
    if zeroed.shape != prediction(model, batch).shape:  # the channels themselves
        zeroed = zeroed[..., list(kept[kind].kept)]
    return saved(model, batch, zeroed)


def saved(model, batch, expected):
    """The larger difference of the model, and of what is loaded from its folder."""
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        loaded = reloaded(model.config.model_type, folder)
        found = [prediction(each, batch) for each in (model, loaded)]
    return max(largest(each, expected) for each in found)


def shorter(model, batch):
    sites = {
        site.name: SitePlan(
            site.kind, site.units, () if site.layer == 1 else tuple(range(site.units))
        )
        for site in find_sites(model)
    }
    remove_units(model, Plan(model.config.model_type, sites))
    expected = prediction(model, batch)
    return saved(model, batch, expected) if shorten_layers_(model) else "g"


@pytest.mark.slow
def test_every_cell(tiny, uneven_plan, request):
    rows = {name: measure(name, tiny, uneven_plan) for name in sorted(FAMILIES)}
    wrong = [
        (name, title, cell)
        for name, cells in rows.items()
        for title, cell in zip(HEAD[1:], cells, strict=True)
        if not (cell in WHY if isinstance(cell, str) else cell <= 1e-5)
    ]
    assert wrong == []
    if request.config.getoption("--write-table"):
        lines = [HEAD, ["---"] * len(HEAD)]
        for name, cells in rows.items():
            shown = [c if isinstance(c, str) else f"{c:.0e}" if c else "0" for c in cells]
            lines.append([f"`{name}`", *(f"n/a ({c})" if c in WHY else c for c in shown)])
        table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
        notes = "\n".join(f"- n/a ({key}): not applicable, {why}." for key, why in WHY.items())
        PAGE.write_text(f"{TEXT}{table}\n\n{notes}\n", encoding="utf-8")


def test_the_page_has_every_family():
    text = PAGE.read_text(encoding="utf-8")
    rows = re.findall(r"^\| `([^`]+)` \|(.*)\|$", text, re.MULTILINE)
    assert [name for name, _ in rows] == sorted(FAMILIES) == sorted(TINY)
    for name, row in rows:
        cells = [cell.strip() for cell in row.split("|")]
        assert len(cells) == len(HEAD) - 1, name
        for cell in cells:
            assert re.fullmatch(r"n/a \([a-h]\)", cell) or float(cell) <= 1e-5, (name, cell)
