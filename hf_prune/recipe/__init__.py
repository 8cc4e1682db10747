"""What should happen: a `Recipe` of ordered stages, written as YAML.

A recipe holds plain values only. It is strict (an unknown key is an error with a suggestion),
frozen, and survives a round trip through YAML. This room does not import torch.
"""

from hf_prune.recipe.load import MAX_RECIPE_BYTES, Recipe, Stage, explain, load_recipe
from hf_prune.recipe.names import Names, did_you_mean
from hf_prune.recipe.prune import RIDGE, UNITS, Prune
from hf_prune.recipe.schedule import Schedule
from hf_prune.recipe.target import Floor, Target, count_to_remove, share_of
from hf_prune.recipe.template import (
    AlternateLayers,
    Ends,
    EveryHead,
    Rule,
    Rules,
    Template,
    UniformWidth,
)
from hf_prune.recipe.text import MAX_RECIPE_DEPTH, parse_yaml
from hf_prune.recipe.train import Distill, Student, Train
from hf_prune.recipe.vocabulary import Vocabulary
from hf_prune.recipe.weights import Weights

__all__ = [
    "MAX_RECIPE_BYTES",
    "MAX_RECIPE_DEPTH",
    "RIDGE",
    "UNITS",
    "AlternateLayers",
    "Distill",
    "Ends",
    "EveryHead",
    "Floor",
    "Names",
    "Prune",
    "Recipe",
    "Rule",
    "Rules",
    "Schedule",
    "Stage",
    "Student",
    "Target",
    "Template",
    "Train",
    "UniformWidth",
    "Vocabulary",
    "Weights",
    "count_to_remove",
    "did_you_mean",
    "explain",
    "load_recipe",
    "parse_yaml",
    "share_of",
]
