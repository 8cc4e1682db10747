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
from typing import Any, ParamSpec

import click

P = ParamSpec("P")


def _explained(command: Callable[P, None]) -> Callable[P, None]:
    """Turn errors that we raise on purpose, and those of files, into a line and an exit code."""

    @wraps(command)
    def run(*args: P.args, **kwargs: P.kwargs) -> None:
        from hf_prune.errors import CheckpointError, ConfigError, HfPruneError

        try:
            command(*args, **kwargs)
        except HfPruneError as error:
            click.echo(f"{type(error).__name__}: {error}", err=True)
            codes = {ConfigError: 2, CheckpointError: 4}
            sys.exit(codes.get(type(error), 1))
        except OSError as error:  # of transformers, too: no such model, no such file
            click.echo(f"{type(error).__name__}: {error}", err=True)
            sys.exit(1)

    return run


def _names(text: str) -> tuple[str, ...]:
    """What stands between commas."""
    return tuple(name.strip() for name in text.split(",") if name.strip())


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
    from hf_prune.stages import check_stages

    loaded = load_recipe(recipe)
    check_stages(loaded)
    click.echo(loaded.to_yaml(), nl=False)


@main.command()
@click.argument("source")
@click.option("--zeros", is_flag=True, help="Load weights, too, and show how many are zero.")
@_explained
def inspect(source: str, zeros: bool) -> None:
    """Show what was removed from a folder or a repository, without loading weights."""
    from hf_prune.checkpoint.inspect import inspect_model

    found = inspect_model(source, zeros=zeros)
    share = 100 * found.parameters / found.dense_parameters
    click.echo(
        f"{found.architecture}: {found.parameters:,} of {found.dense_parameters:,} parameters "
        f"({share:.1f} %)"
    )
    width = max((len(site.site) for site in found.sites), default=0)
    for site in found.sites:
        click.echo(f"{site.site:<{width}}  {site.kept:>6} of {site.units:>6} {site.kind}")
    if found.nonzero is not None:
        click.echo(f"{found.nonzero:,} parameters are not zero")
    width = max(map(len, found.zeros), default=0)
    for name, part in found.zeros.items():
        click.echo(f"{name:<{width}}  {100 * part:>5.1f} % zero")


@main.command()
@click.argument("folder", type=click.Path(path_type=Path))
@_explained
def verify(folder: Path) -> None:
    """Check a saved model: its manifest, shapes, numbers and ties."""
    from hf_prune.checkpoint.inspect import check_model

    for line in check_model(folder):
        click.echo(line)


@main.command()
@click.argument("source", type=click.Path(path_type=Path))
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--overwrite", is_flag=True, help="Replace an output folder that exists.")
@_explained
def convert(source: Path, out: Path, overwrite: bool) -> None:
    """Write what an older tool has pruned as a model that loads: really smaller.

    SOURCE is a folder of transformers 4 with pruned_heads, of CoFi, of nn_pruning, or with masks of
    torch.nn.utils.prune.
    """
    from hf_prune.checkpoint.convert import convert as convert_folder

    for line in convert_folder(source, out, overwrite=overwrite).found:
        click.echo(line)


@main.command()
@click.argument("source")
@click.argument("texts", type=click.Path(path_type=Path, exists=True, dir_okay=False))
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--at-least", default=1, show_default=True, help="Tokens that occur as often stay.")
@click.option("--at-most", type=int, help="Of these only so many stay, the most frequent.")
@click.option("--overwrite", is_flag=True, help="Replace an output folder that exists.")
@_explained
def vocabulary(
    source: str, texts: Path, out: Path, at_least: int, at_most: int | None, overwrite: bool
) -> None:
    """Remove from a model and its tokenizer the tokens that TEXTS, one a line, do not need."""
    from hf_prune.checkpoint.vocabulary import prune_saved_vocabulary

    _, found = prune_saved_vocabulary(
        source, texts, out, at_least=at_least, at_most=at_most, overwrite=overwrite
    )
    for line in found:
        click.echo(line)


@main.command()
@click.argument("model_name_or_path")
@click.argument("file", type=click.Path(path_type=Path, exists=True, dir_okay=False))
@click.option("--out", type=click.Path(path_type=Path, dir_okay=False), help="JSON file to write.")
@click.option("--criteria", default="kfac_obs,fisher,magnitude", show_default=True)
@click.option(
    "--units", default="heads,neurons", show_default=True, help="Or query_heads, experts."
)
@click.option("--fractions", default="0.25,0.5,0.75,0.9", show_default=True, help="To mask.")
@click.option("--text-column", default="text", show_default=True, help="Column of a table.")
@click.option("--label-column", help="Column of a table, of the class: its number or its name.")
@click.option("--max-samples", default=128, show_default=True, help="Lines or rows, at most.")
@click.option("--max-length", default=128, show_default=True, help="Tokens of a line, at most.")
@_explained
def analyze(
    model_name_or_path: str,
    file: Path,
    out: Path | None,
    fractions: str,
    **options: Any,
) -> None:
    """Show how sensitive every site of a model is.

    FILE has one example a line, or is a table (.csv, .tsv, .json, .jsonl, .parquet). With
    --label-column, of a classifier, loss and accuracy are shown beside the change of the logits.
    """
    from rich.console import Console

    from hf_prune.analysis import analyse_file
    from hf_prune.report.sensitivity import sensitivity_tables
    from hf_prune.statistics.texts import Examples

    criteria, kinds = (_names(options.pop(key)) for key in ("criteria", "units"))
    examples = Examples(file, **options)
    try:
        shares = [float(part) for part in _names(fractions)]
    except ValueError as error:
        raise click.BadParameter(f"--fractions: {error}") from error
    if out is not None and not out.parent.is_dir():
        raise click.BadParameter(f"--out: there is no folder {out.parent}")
    found = analyse_file(model_name_or_path, examples, criteria, kinds=kinds, fractions=shares)
    if out is not None:
        out.write_text(json.dumps(found.to_dict(), indent=1) + "\n", encoding="utf-8")
    for table in sensitivity_tables(found):
        Console().print(table)


@main.command()
@click.argument("model_name_or_path")
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--int8", is_flag=True, help="Also write a graph with int8 weights.")
@click.option("--overwrite", is_flag=True, help="Replace OUT.")
@_explained
def export(model_name_or_path: str, out: Path, int8: bool, overwrite: bool) -> None:
    """Write a model as a graph for ONNX Runtime, and check that it gives the same."""
    from hf_prune.export import export_folder

    off = export_folder(model_name_or_path, out, int8=int8, overwrite=overwrite)
    click.echo(f"{out}: differs by {off:.1e} of the largest output")


@main.command("prune-folder")
@click.argument("source", type=click.Path(path_type=Path, exists=True, file_okay=False))
@click.argument("out", type=click.Path(path_type=Path))
@click.argument("recipe", type=click.Path(path_type=Path, exists=True, dir_okay=False))
@click.argument("text", type=click.Path(path_type=Path, exists=True, dir_okay=False))
@click.option("--max-length", default=512, show_default=True, help="Tokens of a sequence.")
@click.option("--progress", type=click.Path(path_type=Path), help="Folder of finished layers.")
@click.option("--overwrite", is_flag=True, help="Replace OUT.")
@_explained
def prune_folder(
    source: Path,
    out: Path,
    recipe: Path,
    text: Path,
    max_length: int,
    progress: Path | None,
    overwrite: bool,
) -> None:
    """Prune single weights of a model from disk to disk, one layer in memory at a time.

    RECIPE has one stage of single weights. TEXT is cut into sequences that calibrate it. With
    --progress an interrupted run goes on at the layer that it had reached.
    """
    from hf_prune.ondisk import prune_folder_with_text

    figures = prune_folder_with_text(
        source,
        out,
        recipe,
        text,
        max_length=max_length,
        progress=progress,
        overwrite=overwrite,
    )
    click.echo(json.dumps(figures, indent=1))


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
