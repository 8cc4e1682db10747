"""Tiny models, batches and plans for every family, without network."""

import os

os.environ["HF_HUB_DISABLE_XET"] = "1"  # read once, when huggingface_hub is first imported
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")

import copy
import random
from collections.abc import Callable

import pytest
import torch
from tinies import EAGER_ONLY, TINY, auto_class, prediction
from tinies import inputs_for as make_inputs
from torch import Tensor
from transformers import PreTrainedModel

from hf_prune.checkpoint.hook import register
from hf_prune.plan import Plan, SitePlan
from hf_prune.sites import ALL_KINDS, find_sites

torch.set_num_threads(1)
register()


def pytest_addoption(parser: pytest.Parser) -> None:
    """An option of `tests/contract/test_table.py`."""
    parser.addoption("--write-table", action="store_true", help="write docs/families.md")


def _randomise(model: PreTrainedModel, seed: int) -> None:
    """Make every parameter matter: large matrices, biases and norms that are not 0 and 1."""
    generator = torch.Generator().manual_seed(seed)
    gemma = model.config.model_type.startswith("gemma")  # whose norms add 1 to their weights
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim > 1:
                parameter.copy_((0.1 if gemma else 0.15) * noise)
            elif name.endswith("bias"):
                parameter.copy_(0.3 * noise)
            else:
                parameter.copy_((0 if gemma else 1) + 0.3 * noise)


_CACHE: dict[tuple[str, str], PreTrainedModel] = {}


def _tiny(name: str, attention: str = "sdpa") -> PreTrainedModel:
    attention = "eager" if name in EAGER_ONLY else attention
    key = (name, attention)
    if key not in _CACHE:
        config = TINY[name]()
        model = auto_class(name).from_config(config, attn_implementation=attention)
        _randomise(model, seed=7)
        _CACHE[key] = model.eval()
    return copy.deepcopy(_CACHE[key])


def _uneven_plan(model: PreTrainedModel, seed: int = 0) -> Plan:
    """Another random width in every site, and at least one unit gone from the first two."""
    generator = random.Random(seed)
    sites = {}
    for index, site in enumerate(find_sites(model, ALL_KINDS)):
        most = site.units - 1 if index < 2 and site.units > 1 else site.units
        floor, step = max(site.floor, 1), site.multiple
        count = generator.randint(-(-floor // step), max(most // step, floor // step)) * step
        kept = generator.sample(range(site.units), count)
        sites[site.name] = SitePlan(site.kind, site.units, tuple(sorted(kept)))
    return Plan(model.config.model_type, sites)


@pytest.fixture(scope="session")
def tiny() -> Callable[..., PreTrainedModel]:
    """`tiny(name, attention="sdpa")`: a fresh copy of the tiny model of a family, in eval mode."""
    return _tiny


@pytest.fixture(scope="session")
def tiny_families() -> set[str]:
    """The families that have a tiny model."""
    return set(TINY)


@pytest.fixture(scope="session")
def inputs_for() -> Callable[..., dict[str, Tensor]]:
    """`inputs_for(name, seed=0, lengths=...)`: a right-padded batch with labels."""
    return make_inputs


@pytest.fixture(scope="session")
def logits() -> Callable[..., Tensor]:
    """`logits(model, batch)`: the logits of real tokens (or of the examples of a classifier)."""
    return prediction


@pytest.fixture(scope="session")
def uneven_plan() -> Callable[..., Plan]:
    """`uneven_plan(model, seed=0)`: a plan with another random width in every site."""
    return _uneven_plan
