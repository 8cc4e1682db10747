"""The rooms stand in the order in which data passes through them, and imports only look up."""

import ast
from pathlib import Path

import pytest

import hf_prune.errors

PACKAGE = Path(hf_prune.errors.__file__).parent
ROWS = (
    ("errors",),
    ("recipe", "plan", "families"),
    ("sites", "criteria"),
    ("gates",),
    ("statistics", "budget"),
    ("weights",),
    ("surgery",),
    ("measure",),
    ("goals",),
    ("targets",),
    ("checkpoint", "training", "infer"),
    ("analysis",),
    ("report", "export", "search"),
    ("oneshot", "ondisk"),
    ("split",),
    ("stages",),
    ("hub", "pipeline"),
    ("cli",),
)
ROW = {room: number for number, rooms in enumerate(ROWS) for room in rooms}
PLAIN = {"errors", "recipe", "plan", "families"}  # must not need torch
MODULES = sorted(p for p in PACKAGE.rglob("*.py") if p != PACKAGE / "__init__.py")


def room_of(path):
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(path):
    """The dotted names of all that a module imports, wherever in it, and how relative they are."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((alias.name, 0) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or ""]
            if node.module == "hf_prune":  # `from hf_prune import plan`
                names = [f"hf_prune.{alias.name}" for alias in node.names]
            yield from ((name, node.level) for name in names)


def wrong(path):
    """What a module imports and must not."""
    room = room_of(path)
    found = []
    for name, level in imports(path):
        top, _, rest = name.partition(".")
        if level:
            found.append(f"relative import of {name!r}")
        if top in ("torch", "transformers", "accelerate") and room in PLAIN:
            found.append(f"{top} in {room}")
        if top == "transformers" and room == "criteria":
            found.append(f"{top} in {room}")
        if top == "hf_prune":
            other = rest.partition(".")[0]
            if other != room and not ROW.get(other, len(ROWS)) < ROW[room]:
                found.append(name)
    return found


def test_there_are_modules():
    assert {room_of(path) for path in MODULES} >= {"errors", "sites", "surgery", "checkpoint"}


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_only_from_above(path):
    assert room_of(path) in ROW, "a new room needs a row"
    assert wrong(path) == []


@pytest.mark.parametrize(
    ("module", "text"),
    [
        ("plan.py", "import torch"),
        ("plan.py", "from hf_prune.sites import Site"),
        ("plan.py", "from hf_prune.recipe import Recipe"),
        ("recipe.py", "def f():\n    from transformers import Trainer"),
        ("sites.py", "from hf_prune import gates"),
        ("gates.py", "from . import sites"),
        ("budget/solvers.py", "import hf_prune.surgery.remove"),
        ("criteria.py", "import transformers"),
        ("sites.py", "from hf_prune.nowhere import x"),
    ],
)
def test_the_check_finds(module, text, tmp_path, monkeypatch):
    monkeypatch.setattr(f"{__name__}.PACKAGE", tmp_path)
    path = tmp_path / module
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)
    assert len(wrong(path)) == 1
