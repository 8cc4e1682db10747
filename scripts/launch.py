"""What all scripts do around a job: parse, check, run, show, save, push."""

import logging
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from accelerate import PartialState
from arguments import Arguments
from datasets import DatasetDict
from job import Job
from rich.console import Console
from transformers import HfArgumentParser, set_seed

from hf_prune import HfPruneError, Recipe, load_recipe, push_to_hub, save_result
from hf_prune.checkpoint.folder import check_output
from hf_prune.errors import DataError
from hf_prune.recipe import Distill
from hf_prune.report.result import check_storage
from hf_prune.report.table import report_table

RECIPES = Path(__file__).parent.parent / "recipes"


@dataclass(frozen=True)
class Packaged:
    """What a script uses when nothing is named, and what the card says of it.

    Attributes:
        model: from nothing to a folder.
        data: from task and seed to a dataset; None where there is none.
        texts: from a seed to texts without labels.
        names: of the `model` and the `data`, their `split`, and the `license`, for the card.
    """

    model: Callable[[], str]
    data: Callable[[str, int], DatasetDict | None]
    names: dict[str, str]
    texts: Callable[[int], Sequence[str]] = lambda seed: ()


Kind = type[Arguments]
Prepare = Callable[[Job], None]


def _nothing(job: Job) -> None:
    """Nothing to prepare."""


def _uses_texts(recipe: Recipe) -> bool:
    return any(isinstance(s, Distill) and s.data == "texts" for s in recipe.stages)


def _run(
    arguments: Arguments, script: str, packaged: Packaged, recipe: Recipe, prepare: Prepare
) -> None:
    state = PartialState()
    source = arguments.model_name_or_path or packaged.model()
    data = packaged.data(arguments.task, recipe.seed)
    set_seed(recipe.seed)
    texts = () if arguments.general_file or not _uses_texts(recipe) else packaged.texts(recipe.seed)
    job = Job(arguments, recipe, source, data, texts)
    prepare(job)
    result = job.run()
    _describe(job, script, packaged.names)
    if not state.is_main_process:
        return
    out = Path(arguments.output_dir)
    save_result(result, out, overwrite=arguments.overwrite, storage=arguments.storage)
    Console().print(report_table(result.report))
    print(f"Everything is in {out}: load {out / 'model'} after `import hf_prune`.")
    if arguments.push_to_hub:
        private = arguments.private or None
        print("Pushed:", push_to_hub(out, arguments.push_to_hub, private=private))


def _describe(job: Job, script: str, packaged: Mapping[str, str]) -> None:
    """What the card says besides figures.

    Args:
        job: that has run.
        script: its file name.
        packaged: names of the packaged `model` and `data`, and the `license`.
    """
    a, report = job.arguments, job.report
    own = a.model_name_or_path is None
    local = a.model_name_or_path is not None and Path(a.model_name_or_path).exists()
    files = a.train_file is not None
    if a.dataset_name is None and not files:
        report["evaluation"]["split"] = packaged["split"]
    report["sequence_length"] = a.max_length
    report["auto_class"] = job.task.auto_class.__name__
    report["task"] = job.task.name
    report["base_model"] = packaged["model"] if own else None if local else a.model_name_or_path
    report["dataset"] = (
        Path(str(a.train_file)).name
        if files
        else Path(a.dataset_name).name
        if a.dataset_name is not None
        else packaged["data"]
    )
    report["license"] = packaged["license"] if own else None
    report["language"] = "en" if own else None
    report["name"] = (a.push_to_hub or "").split("/")[-1] or None
    report["command"] = f"accelerate launch scripts/{script}"


def launch(script: str, kind: Kind, packaged: Packaged, prepare: Prepare = _nothing) -> None:
    """Parse the command line and run.

    Args:
        script: its file name.
        kind: dataclass of its arguments.
        packaged: what it uses when nothing is named.
        prepare: what is done with the job before it runs.
    """
    parser = HfArgumentParser([kind])  # type: ignore[list-item]  # a dataclass, by its hints
    (arguments,) = parser.parse_args_into_dataclasses()
    state = PartialState(cpu=os.environ.get("ACCELERATE_USE_CPU", "").lower() == "true")
    level = logging.INFO if state.is_main_process else logging.WARNING
    logging.basicConfig(format="%(levelname)s %(name)s: %(message)s", level=level)
    logging.getLogger("httpx").setLevel(logging.WARNING)
    try:
        check_output(Path(arguments.output_dir), overwrite=arguments.overwrite)
        recipe = load_recipe(arguments.recipe)
        check_storage(recipe, arguments.storage)
        if all(stage.stage not in ("prune", "student", "vocabulary") for stage in recipe.stages):
            raise DataError("the recipe makes nothing smaller: there is nothing to do.")
        _run(arguments, script, packaged, recipe, prepare)
    except HfPruneError as error:
        raise SystemExit(f"{type(error).__name__}: {error}") from error
    except KeyboardInterrupt as error:
        raise SystemExit(130) from error
