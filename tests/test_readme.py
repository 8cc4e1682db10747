"""The README's code runs, its recipes parse, and the two READMEs show the same figures."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from hf_prune import load_recipe
from hf_prune.stages import check_stages

ROOT = Path(__file__).parent.parent
BLOCKS = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)


@pytest.mark.slow
def test_code_blocks_run(tmp_path):
    """One process for all blocks: imports are what costs."""
    assert len(BLOCKS) >= 2
    code = "\n".join(BLOCKS) + (
        "\nassert sum(p.numel() for p in trainer.model.parameters()) < "
        "sum(p.numel() for p in dense.parameters())"
        "\nassert all(bool((a == b).all()) for a, b in "
        "zip(model.parameters(), result.model.parameters(), strict=True))"
    )
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr[-2000:]


@pytest.mark.parametrize("path", sorted((ROOT / "recipes").rglob("*.yaml")), ids=lambda p: p.name)
def test_recipes_parse_and_name_known_things(path):
    recipe = load_recipe(path)
    if recipe.prune_stages:
        check_stages(recipe)
    else:
        assert any(stage.stage == "student" for stage in recipe.stages)


def test_readmes_show_the_same_results():
    tables = [
        (ROOT / name).read_text().split("<!-- results: begin -->")[1].split("<!-- results: end")[0]
        for name in ("README.md", "README.zh-CN.md")
    ]
    assert tables[0] == tables[1]
    assert "recovered" in tables[0]
