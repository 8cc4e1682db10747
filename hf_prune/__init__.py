"""Make Hugging Face transformers really smaller and really faster.

Importing this package registers the loader of pruned models with transformers, and nothing else.
"""

from hf_prune.analysis import analyse_sensitivity
from hf_prune.checkpoint.bitmask import register_bitmask
from hf_prune.checkpoint.hook import HfPruneConfig, register
from hf_prune.checkpoint.manifest import verify
from hf_prune.checkpoint.save import save_model
from hf_prune.errors import HfPruneError
from hf_prune.families import register_family
from hf_prune.gates.plans import close_gates
from hf_prune.hub import push_to_hub
from hf_prune.infer import infer_family, load_family
from hf_prune.pipeline import compress, compress_family
from hf_prune.plan import Plan
from hf_prune.recipe import Recipe, load_recipe
from hf_prune.report.result import Result, save_result
from hf_prune.sites import find_sites
from hf_prune.surgery.channels import keep_channels_, remove_dead_channels_
from hf_prune.surgery.layers import shorten_layers_
from hf_prune.surgery.reconstruct import reconstruct
from hf_prune.surgery.remove import remove_units
from hf_prune.surgery.vocabulary import prune_vocabulary
from hf_prune.training.callback import PruneCallback
from hf_prune.training.distill import DistillCallback
from hf_prune.training.state import last_checkpoint
from hf_prune.training.student import make_student
from hf_prune.training.teacher import cache_logits
from hf_prune.training.trainer import prepare_trainer
from hf_prune.training.zeros import KeepZeros
from hf_prune.weights.stage import sparsify_

__all__ = [
    "DistillCallback",
    "HfPruneConfig",
    "HfPruneError",
    "KeepZeros",
    "Plan",
    "PruneCallback",
    "Recipe",
    "Result",
    "analyse_sensitivity",
    "cache_logits",
    "close_gates",
    "compress",
    "compress_family",
    "find_sites",
    "infer_family",
    "keep_channels_",
    "last_checkpoint",
    "load_family",
    "load_recipe",
    "make_student",
    "prepare_trainer",
    "prune_vocabulary",
    "push_to_hub",
    "reconstruct",
    "register_family",
    "remove_dead_channels_",
    "remove_units",
    "save_model",
    "save_result",
    "shorten_layers_",
    "sparsify_",
    "verify",
]

register()
register_bitmask()
