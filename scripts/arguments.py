"""What a script is told, and the data that it reads."""

from dataclasses import dataclass, field

from datasets import DatasetDict, load_dataset
from tasks import TASKS, Columns, Task, file_data

from hf_prune.checkpoint.save import Storage
from hf_prune.errors import DataError
from hf_prune.recipe import Recipe

FLOOR = "floor"
"""Name of the part of the data by which a floor is judged."""
HELD_OUT = 5, 1000
"""One of so many training rows is held out for it, and at most so many."""


@dataclass
class Arguments:
    """What to prune, on what, and where to put it."""

    recipe: str = field(default="", metadata={"help": "YAML file with the stages."})
    task: str = field(default="text-classification", metadata={"help": ", ".join(sorted(TASKS))})
    model_name_or_path: str | None = field(
        default=None, metadata={"help": "Hub name or folder; default: the packaged model."}
    )
    gguf_file: str | None = field(default=None, metadata={"help": "GGUF file in that folder."})
    dataset_name: str | None = field(
        default=None, metadata={"help": "Hub name or folder; default: the packaged data."}
    )
    dataset_config_name: str | None = field(default=None, metadata={"help": "Its configuration."})
    train_file: str | None = field(
        default=None, metadata={"help": "Instead: a file of text, CoNLL, CSV or JSON."}
    )
    eval_file: str | None = field(default=None, metadata={"help": "The same, to measure on."})
    general_file: str | None = field(
        default=None, metadata={"help": "Texts without labels, a line each, for `data: texts`."}
    )
    text_column: str | None = field(default=None, metadata={"help": "Column with the text."})
    label_column: str | None = field(default=None, metadata={"help": "Column with the answer."})
    train_split: str = field(default="train", metadata={"help": "Split to learn from."})
    eval_split: str = field(default="test", metadata={"help": "Split to measure on."})
    max_train_samples: int | None = field(
        default=6000, metadata={"help": "Random part of the training split; 0 = all of it."}
    )
    max_eval_samples: int | None = field(default=0, metadata={"help": "The same for measuring."})
    max_length: int = field(default=128, metadata={"help": "Tokens of a text at most."})
    metric: str | None = field(
        default=None, metadata={"help": "A further metric of the `evaluate` library, for texts."}
    )
    output_dir: str = field(default="runs/prune", metadata={"help": "Where results go."})
    overwrite: bool = field(default=False, metadata={"help": "Replace an existing output folder."})
    storage: Storage = field(
        default="dense", metadata={"help": "bitmask: zeros of single weights as one bit each."}
    )
    save_steps: int = field(
        default=0, metadata={"help": "Steps between checkpoints, beside the output; 0 = none."}
    )
    resume: bool = field(
        default=False, metadata={"help": "Go on from the newest complete checkpoints."}
    )
    report_to: str = field(default="none", metadata={"help": "Tracker of the Trainer."})
    experience: str | None = field(
        default=None, metadata={"help": "Local file of past searches above a floor, to start from."}
    )
    eval_batch_size: int = field(default=64, metadata={"help": "Examples at once, measuring."})
    latency_batch_size: int = field(default=32, metadata={"help": "Sequences at once, timing."})
    latency_tokens: int = field(default=64, metadata={"help": "Tokens of each, timing."})
    latency_rounds: int = field(default=15, metadata={"help": "Rounds over all models."})
    push_to_hub: str | None = field(
        default=None, metadata={"help": "Repository (user/name) to push the complete result to."}
    )
    private: bool = field(default=False, metadata={"help": "Make a new repository private."})


def columns_of(arguments: Arguments, task: Task) -> Columns:
    """The columns to read: those named, or those of the task."""
    return Columns(
        arguments.text_column or task.columns.text, arguments.label_column or task.columns.label
    )


def read_data(arguments: Arguments, packaged: DatasetDict | None) -> DatasetDict:
    """The dataset that the arguments name, or the packaged one.

    Raises:
        DataError: when nothing is named and nothing is packaged for the task.
    """
    if arguments.train_file or arguments.eval_file:
        files = {"train": arguments.train_file, "test": arguments.eval_file}
        if not all(files.values()):
            raise DataError("name both files: --train_file and --eval_file.")
        return file_data(arguments.task, {k: str(v) for k, v in files.items()})
    if arguments.dataset_name is not None:
        return load_dataset(arguments.dataset_name, arguments.dataset_config_name)
    if packaged is None:
        raise DataError(
            f"no data is packaged for {arguments.task}: name it with --train_file and --eval_file, "
            "or --dataset_name."
        )
    return packaged


def load_data(
    arguments: Arguments, task: Task, seed: int, packaged: DatasetDict | None
) -> DatasetDict:
    """Train and test data, cut to size.

    Raises:
        DataError: naming a split or column that is not there.
    """
    data = read_data(arguments, packaged)
    columns = columns_of(arguments, task)
    local = arguments.train_file is not None
    splits = ("train", "test") if local else (arguments.train_split, arguments.eval_split)
    parts = {}
    for part, split in zip(("train", "test"), splits, strict=True):
        if split not in data:
            raise DataError(f"the dataset has no split {split!r}; it has {', '.join(data)}.")
        rows = data[split]
        for column in (columns.text, columns.label):
            if column not in rows.column_names:
                raise DataError(f"no column {column!r}; there are {', '.join(rows.column_names)}.")
        parts[part] = rows
    return DatasetDict(parts)


def cut(data: DatasetDict, arguments: Arguments, seed: int) -> DatasetDict:
    """A random part of each split, as large as the arguments say."""
    most = {"train": arguments.max_train_samples, "test": arguments.max_eval_samples}
    parts = {}
    for part, rows in data.items():
        size = most[part] or len(rows)
        parts[part] = rows.shuffle(seed=seed).select(range(size)) if size < len(rows) else rows
    return DatasetDict(parts)


def hold_out(data: DatasetDict, recipe: Recipe) -> DatasetDict:
    """Take a part of the training data away for the metric of a floor, where a stage has one.

    Raises:
        DataError: when there is too little of it.
    """
    if all(stage.floor is None for stage in recipe.prune_stages):
        return data
    share, most = HELD_OUT
    rows = data["train"].shuffle(seed=recipe.seed)
    count = min(len(rows) // share, most)
    if not count:
        raise DataError(
            f"{len(rows)} training rows: a floor is judged by one of {share} of them. Give more."
        )
    parts = {"train": rows.select(range(count, len(rows))), FLOOR: rows.select(range(count))}
    return DatasetDict({**data, **parts})
