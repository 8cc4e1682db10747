"""A module beside the weights, by which a pruned model loads without hf_prune.

It is the code that rebuilds a model, the hook, and one subclass for each class that transformers
may ask for. Whoever loads it passes `trust_remote_code=True`.
"""

import importlib.resources
import json
import re
from pathlib import Path

import transformers
from transformers import PreTrainedModel

from hf_prune.errors import CheckpointError
from hf_prune.sites import base_model

MODULE = "modeling_hf_prune"
"""Name of the module in a saved model."""
_SOURCES = (
    ("surgery", "remade.py"),
    ("surgery", "description.py"),
    ("surgery", "rebuild.py"),
    ("checkpoint", "hook.py"),
)
_HEAD = '''"""Builds a model with narrowed modules, as its config describes it. Written by hf_prune.

Pass trust_remote_code=True to load it, or import hf_prune, which does the same and needs no code
from here.
"""
'''
_ERROR = '''

class CheckpointError(ValueError):
    """A saved model is damaged, hostile, or does not describe itself."""
'''
_CLASS = '''

class {name}(transformers.{name}):
    """As in transformers."""

    @classmethod
    def is_custom_code(cls) -> bool:
        """No: weights are renamed on disk as those of the class in transformers are."""
        return False
'''
_DOCSTRING = re.compile(r'\A"""[\s\S]*?"""\n')
_OURS = re.compile(r"^from hf_prune\.[^\n]*import (?:\([^)]*\)|[^\n]*)\n", re.MULTILINE)


def _source() -> str:
    """What rebuilds a model and hooks into transformers, as one module without imports of ours."""
    root = importlib.resources.files("hf_prune")
    parts = [root.joinpath(*path).read_text(encoding="utf-8") for path in _SOURCES]
    return "\n\n".join(_OURS.sub("", _DOCSTRING.sub("", part)).strip() for part in parts)


def _auto_classes(cls: type[PreTrainedModel], config: type) -> list[str]:
    """The auto classes that load a class, by name."""
    found = []
    for name in (name for name in dir(transformers) if name.startswith("AutoModel")):
        mapping = getattr(getattr(transformers, name), "_model_mapping", None)
        if mapping is not None and config in mapping:
            classes = mapping[config]
            if cls in (classes if isinstance(classes, tuple) else (classes,)):
                found.append(name)
    return found


def is_standalone(model: PreTrainedModel) -> bool:
    """Whether a model was loaded from a folder with such a module."""
    named = getattr(model.config, "auto_map", None) or {}
    return any(f"{MODULE}." in str(value) for value in named.values())


def write_standalone(model: PreTrainedModel, folder: Path) -> None:
    """Add the module to a saved model, and name it in the config.

    Raises:
        CheckpointError: when the class of the model is not one of transformers.
    """
    classes = [type(model), type(base_model(model))]
    if type(model.config) in transformers.AutoModel._model_mapping:
        plain = transformers.AutoModel._model_mapping[type(model.config)]
        classes += [plain] if isinstance(plain, type) else []
    auto_map: dict[str, str] = {}
    text = _HEAD + _source().replace("\nclass ConfigView", _ERROR + "\n\nclass ConfigView", 1)
    text = text.replace("import contextlib\n", "import contextlib\n\nimport transformers\n", 1)
    for name, cls in {cls.__name__: cls for cls in classes}.items():
        if getattr(transformers, name, None) is not cls:
            raise CheckpointError(
                f"{name} is not a class of transformers: standalone is for those. Save it without, "
                "and load it with import hf_prune."
            )
        text += _CLASS.format(name=name)
        for auto in _auto_classes(cls, type(model.config)):
            auto_map.setdefault(auto, f"{MODULE}.{name}")
    (folder / f"{MODULE}.py").write_text(text + "\n\nregister()\n", encoding="utf-8")
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config["auto_map"] = auto_map
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
