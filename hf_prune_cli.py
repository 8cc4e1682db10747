"""The command line: argument parsing and printing, nothing else.

It lies beside the package because importing `hf_prune` registers the loader with transformers,
which imports
torch: `hf-prune --help` must not wait for that.
"""

import json
import sys
from collections.abc import Callable
from functools import wraps
from importlib.metadata import version as package_version
from pathlib import Path
from typing import ParamSpec

import click

P = ParamSpec("P")


def _explained(command: Callable[P, None]) -> Callable[P, None]:
    """Turn errors that we raise on purpose into one line and an exit code."""

    @wraps(command)
    def run(*args: P.args, **kwargs: P.kwargs) -> None:
        from hf_prune.errors import CheckpointError, ConfigError, HfPruneError

        try:
            command(*args, **kwargs)
        except HfPruneError as error:
            click.echo(f"{type(error).__name__}: {error}", err=True)
            codes = {ConfigError: 2, CheckpointError: 4}
            sys.exit(codes.get(type(error), 1))

    return run


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
def main() -> None:
    """Make Hugging Face transformers really smaller and really faster.

    For example:

      hf-prune validate recipes/bert/speedup-2x.yaml

      hf-prune inspect runs/prune_bert/model

      hf-prune push runs/prune_bert me/minilm-2x
    """


@main.command()
@click.argument("recipe", type=click.Path(path_type=Path))
@_explained
def validate(recipe: Path) -> None:
    """Check a recipe, and print it with all defaults."""
    from hf_prune import load_recipe
    from hf_prune.pipeline import check_stages

    loaded = load_recipe(recipe)
    check_stages(loaded)
    click.echo(loaded.to_yaml(), nl=False)


@main.command()
@click.argument("folder", type=click.Path(path_type=Path))
@_explained
def inspect(folder: Path) -> None:
    """Show the widths of a pruned model, without loading its weights."""
    from hf_prune.errors import CheckpointError
    from hf_prune.surgery.rebuild import QUANT_METHOD, check_shapes

    path = folder / "config.json"
    try:
        shapes = json.loads(path.read_text(encoding="utf-8")).get("quantization_config") or {}
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    if shapes.get("quant_method") != QUANT_METHOD:
        click.echo(f"{folder}: no unit was removed.")
        return
    check_shapes(shapes)
    for name, size in shapes["modules"].items():
        click.echo(f"{name}\t[{size['out']}, {size['in']}]")


@main.command()
@click.argument("folder", type=click.Path(path_type=Path))
@_explained
def verify(folder: Path) -> None:
    """Compare a saved model with its manifest: sizes and SHA-256."""
    from hf_prune import verify as verify_folder

    click.echo(f"{len(verify_folder(folder))} files are as they were saved.")


@main.command()
@click.argument("model_name_or_path")
@click.argument("text", type=click.Path(path_type=Path, exists=True, dir_okay=False))
@click.option("--out", type=click.Path(path_type=Path, dir_okay=False), help="JSON file to write.")
@click.option("--criteria", default="kfac_obs,fisher,magnitude", show_default=True)
@click.option("--max-samples", default=128, show_default=True, help="Lines of the text, at most.")
@click.option("--max-length", default=128, show_default=True, help="Tokens of a line, at most.")
@_explained
def analyze(
    model_name_or_path: str,
    text: Path,
    out: Path | None,
    criteria: str,
    max_samples: int,
    max_length: int,
) -> None:
    """Show how sensitive every site of a model is. TEXT has one example a line."""
    from rich.console import Console

    from hf_prune.analysis import analyse_file
    from hf_prune.report.sensitivity import sensitivity_table

    names = tuple(name.strip() for name in criteria.split(",") if name.strip())
    found = analyse_file(
        model_name_or_path, text, names, max_samples=max_samples, max_length=max_length
    )
    if out is not None:
        out.write_text(json.dumps(found.to_dict(), indent=1) + "\n", encoding="utf-8")
    Console().print(sensitivity_table(found))


@main.command()
@click.argument("folder", type=click.Path(path_type=Path))
@click.argument("repo_id")
@click.option("--private", is_flag=True, help="Make a new repository private.")
@_explained
def push(folder: Path, repo_id: str, private: bool) -> None:
    """Push the output folder of a run to the Hub, in one commit. Can be run again."""
    from hf_prune import push_to_hub

    click.echo(push_to_hub(folder, repo_id, private=private or None))


@main.command()
def version() -> None:
    """Print the version."""
    click.echo(package_version("hf_prune"))


if __name__ == "__main__":
    main()
