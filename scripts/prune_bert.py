"""Fine-tune, prune, recover, measure and save a text classifier, as a recipe says.

    accelerate launch scripts/prune_bert.py                                 # packaged model and
    data, offline accelerate launch scripts/prune_bert.py --model_name_or_path me/bert-sst2
    --dataset_name stanfordnlp/sst2 \
        --text_column sentence --eval_split validation --recipe recipes/bert/speedup-2x.yaml

In the output folder: model/ (loads with plain from_pretrained after `import hf_prune`), plan.json,
recipe.yaml, report.json, README.md (the model card) and units.svg.
"""

import copy
import logging
import os
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import evaluate as hf_evaluate
import torch
from accelerate import PartialState
from datasets import ClassLabel, Dataset, DatasetDict, load_dataset
from packaged import DATASET_NAME, MODEL_NAME, packaged_model, rotten_tomatoes
from rich.console import Console
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    HfArgumentParser,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)

from hf_prune import (
    DistillCallback,
    HfPruneError,
    KeepZeros,
    PruneCallback,
    Recipe,
    Result,
    compress,
    load_recipe,
    push_to_hub,
    save_result,
)
from hf_prune.checkpoint.folder import check_output
from hf_prune.errors import DataError
from hf_prune.measure.latency import compare_latency
from hf_prune.measure.metrics import evaluate
from hf_prune.plan import Plan
from hf_prune.recipe import Distill, Prune, Student, Train
from hf_prune.report.result import measure_stage, new_report
from hf_prune.report.table import report_table
from hf_prune.training.distill import distill_fields

logger = logging.getLogger("prune_bert")
RECIPE = Path(__file__).parent.parent / "recipes" / "bert" / "speedup-2x.yaml"


@dataclass
class Arguments:
    """What to prune, on what, and where to put it."""

    recipe: str = field(default=str(RECIPE), metadata={"help": "YAML file with the stages."})
    model_name_or_path: str | None = field(
        default=None, metadata={"help": "Hub name or folder; default: the packaged MiniLM-L6."}
    )
    dataset_name: str | None = field(
        default=None, metadata={"help": "Hub name or folder; default: packaged Rotten Tomatoes."}
    )
    dataset_config_name: str | None = field(default=None, metadata={"help": "Its configuration."})
    text_column: str = field(default="text", metadata={"help": "Column with the text."})
    label_column: str = field(default="label", metadata={"help": "Column with the class."})
    train_split: str = field(default="train", metadata={"help": "Split to learn from."})
    eval_split: str = field(default="test", metadata={"help": "Split to measure on."})
    max_train_samples: int | None = field(
        default=6000, metadata={"help": "Random part of the training split; 0 = all of it."}
    )
    max_eval_samples: int | None = field(default=0, metadata={"help": "The same for measuring."})
    max_length: int = field(default=128, metadata={"help": "Tokens of a text at most."})
    metric: str | None = field(
        default=None, metadata={"help": "A further metric of the `evaluate` library, by name."}
    )
    output_dir: str = field(default="runs/prune_bert", metadata={"help": "Where results go."})
    overwrite: bool = field(default=False, metadata={"help": "Replace an existing output folder."})
    eval_batch_size: int = field(default=64, metadata={"help": "Examples at once, measuring."})
    latency_batch_size: int = field(default=32, metadata={"help": "Sequences at once, timing."})
    latency_tokens: int = field(default=64, metadata={"help": "Tokens of each, timing."})
    latency_rounds: int = field(default=15, metadata={"help": "Rounds over all models."})
    push_to_hub: str | None = field(
        default=None, metadata={"help": "Repository (user/name) to push the complete result to."}
    )
    private: bool = field(default=False, metadata={"help": "Make a new repository private."})


def load_data(arguments: Arguments, seed: int) -> DatasetDict:
    """Train and test data with the columns `text` and `label`."""
    if arguments.dataset_name is None:
        data = rotten_tomatoes(seed)
    else:
        data = load_dataset(arguments.dataset_name, arguments.dataset_config_name)
    parts = {}
    for part, split, most in (
        ("train", arguments.train_split, arguments.max_train_samples),
        ("test", arguments.eval_split, arguments.max_eval_samples),
    ):
        if split not in data:
            raise DataError(f"the dataset has no split {split!r}; it has {', '.join(data)}.")
        rows = data[split]
        for column in (arguments.text_column, arguments.label_column):
            if column not in rows.column_names:
                raise DataError(f"no column {column!r}; there are {', '.join(rows.column_names)}.")
        rows = rows.select_columns([arguments.text_column, arguments.label_column])
        rows = rows.rename_columns(
            {
                a: b
                for a, b in ((arguments.text_column, "text"), (arguments.label_column, "label"))
                if a != b
            }
        )
        parts[part] = (
            rows.shuffle(seed=seed).select(range(most)) if most and most < len(rows) else rows
        )
    return DatasetDict(parts)


def class_names(data: DatasetDict) -> list[str]:
    """The names of the classes; labels out of range are refused here, by row."""
    feature = data["train"].features["label"]
    if isinstance(feature, ClassLabel):
        names = list(feature.names)
    else:
        names = [str(value) for value in sorted(set(data["train"]["label"]))]
    for part, rows in data.items():
        for index, label in enumerate(rows["label"]):
            if not isinstance(label, int) or not 0 <= label < len(names):
                raise DataError(
                    f"split {part}, row {index}: label {label!r} is not an integer in "
                    f"[0, {len(names)})."
                )
    return names


def tokenize(data: DatasetDict, tokenizer: PreTrainedTokenizerBase, max_length: int) -> DatasetDict:
    """Token ids; padding is left to the collator."""

    def encode(rows: dict[str, list[Any]]) -> dict[str, Any]:
        return {
            **tokenizer(rows["text"], truncation=True, max_length=max_length),
            "labels": rows["label"],
        }

    return data.map(encode, batched=True, remove_columns=["text", "label"], desc="Tokenizing")


class Job:
    """One run of the script: its data, its models, and the figures so far."""

    def __init__(self, arguments: Arguments, recipe: Recipe) -> None:
        self.arguments, self.recipe = arguments, recipe
        source = arguments.model_name_or_path or packaged_model()
        data = load_data(arguments, recipe.seed)
        names = class_names(data)
        self.tokenizer = AutoTokenizer.from_pretrained(source)
        self.model: PreTrainedModel = AutoModelForSequenceClassification.from_pretrained(
            source,
            num_labels=len(names),
            id2label=dict(enumerate(names)),
            label2id={name: index for index, name in enumerate(names)},
        )
        self.data = tokenize(data, self.tokenizer, arguments.max_length)
        self.collator = DataCollatorWithPadding(self.tokenizer)
        self.model.to(PartialState().device)
        self.dense: PreTrainedModel | None = None
        self.pruned: PreTrainedModel | None = None
        self.plan = Plan(self.model.config.model_type)
        self.masks: dict[str, torch.Tensor] = {}
        self.report = new_report(recipe, self.model)
        self.trained_after_pruning = False

    def batches(self, rows: Dataset, size: int, title: str) -> Iterator[dict[str, torch.Tensor]]:
        """This process's share of some rows, as padded batches."""
        state = PartialState()
        mine = rows.shard(state.num_processes, state.process_index)
        loader = DataLoader(mine, batch_size=size, collate_fn=self.collator)
        for batch in tqdm(loader, desc=title, disable=not state.is_main_process):
            yield dict(batch)

    def measure(self, name: str, model: PreTrainedModel) -> None:
        """Evaluate a model and write its figures under `stages`."""
        length = self.arguments.max_length
        rows = self.data["test"]
        scores = evaluate(
            model, self.batches(rows, self.arguments.eval_batch_size, f"Measuring {name}")
        )
        figures = measure_stage(model, length)
        figures |= {"accuracy": scores["accuracy"], "loss": scores["loss"]}
        if self.arguments.metric:
            figures[self.arguments.metric] = self._other_metric(model)
        self.report["stages"][name] = figures
        split = "movies that training never saw" if self.arguments.dataset_name is None else ""
        self.report["evaluation"] = {"examples": scores["examples"], "split": split}

    @torch.inference_mode()
    def _other_metric(self, model: PreTrainedModel) -> dict[str, float]:
        metric = hf_evaluate.load(self.arguments.metric)
        loader = DataLoader(
            self.data["test"], batch_size=self.arguments.eval_batch_size, collate_fn=self.collator
        )
        model.eval()
        for batch in loader:
            batch = {key: value.to(model.device) for key, value in batch.items()}
            predictions = model(**batch).logits.argmax(dim=-1)
            metric.add_batch(predictions=predictions.tolist(), references=batch["labels"].tolist())
        return {key: float(value) for key, value in metric.compute().items()}

    def teacher(self, stage: Distill) -> PreTrainedModel | str:
        """Who teaches in a stage: the dense model, another checkpoint, or a file of logits."""
        if stage.teacher_logits is not None:
            return stage.teacher_logits
        if stage.teacher is None:
            if self.dense is None:
                raise DataError("a distill stage before the first prune stage must name a teacher.")
            return self.dense
        names = dict(self.model.config.id2label or {})
        found: PreTrainedModel = AutoModelForSequenceClassification.from_pretrained(
            stage.teacher,
            num_labels=len(names),
            id2label=names,
            label2id=self.model.config.label2id,
        )
        return found

    def train(self, stage: Train, prune: Prune | None, title: str) -> None:
        """Train the current model, with a teacher, a schedule or masks where the recipe says so."""
        callbacks: list[TrainerCallback] = []
        gradual = None
        if isinstance(stage, Distill):
            callbacks.append(DistillCallback(self.teacher(stage), **distill_fields(stage)))
        if prune is not None:
            gradual = PruneCallback(Recipe(seed=self.recipe.seed, stages=(prune, stage)))
            callbacks.append(gradual)
        if self.masks:
            callbacks.append(KeepZeros(self.masks))
        with tempfile.TemporaryDirectory() as scratch:
            options = TrainingArguments(
                output_dir=scratch,
                save_strategy="no",
                report_to="none",
                seed=self.recipe.seed,
                train_sampling_strategy="group_by_length",
                logging_steps=50,
                use_cpu=PartialState().device.type == "cpu",
                **stage.model_dump(include=set(Train.model_fields) - {"stage"}),
            )
            logger.info("%s: %s", title, stage.model_dump())
            Trainer(
                model=self.model,
                args=options,
                train_dataset=self.data["train"],
                data_collator=self.collator,
                processing_class=self.tokenizer,
                callbacks=callbacks,
            ).train()
        self.trained_after_pruning = self.pruned is not None or gradual is not None
        if gradual is not None and gradual.plan is not None:
            self.plan = self.plan.then(gradual.plan)
            self.masks |= gradual.masks
            entry = gradual.selection.to_dict() if gradual.selection else {}
            self.report["pruning"].append({"kind": "structure", **entry, "gradual": True})

    def prune(self, stage: Prune) -> None:
        """Prune the current model in one shot."""
        rows = self.data["train"].shuffle(seed=self.recipe.seed)
        rows = rows.select(range(min(stage.calibration_samples, len(rows))))
        one = Recipe(seed=self.recipe.seed, stages=(stage,))
        result = compress(self.model, one, self.batches(rows, 32, "Calibrating"))
        self.model = result.model
        self.plan = self.plan.then(result.plan)
        self.masks |= result.masks
        self.report["pruning"] += result.report["pruning"]
        self.report["calibration_samples"] = len(rows)

    def run(self) -> Result:
        """All stages of the recipe, then latency."""
        scheduled: Prune | None = None
        for index, stage in enumerate(self.recipe.stages):
            title = f"Stage {index + 1} of {len(self.recipe.stages)}: {stage.stage}"
            if isinstance(stage, Prune) and self.dense is None:
                self.dense = self.model if stage.schedule is None else copy.deepcopy(self.model)
                self.measure("dense", self.dense)
            if isinstance(stage, Prune) and stage.schedule is not None:
                scheduled = stage
            elif isinstance(stage, Student):
                raise DataError("a student stage is for scripts/distill_tinybert.py.")
            elif isinstance(stage, Prune):
                logger.info("%s: %s", title, stage.model_dump(exclude_none=True))
                self.prune(stage)
            else:
                if self.model is not self.dense and self.plan.sites and self.pruned is None:
                    self._note_pruned()
                self.train(stage, scheduled, title)
                scheduled = None
        if self.trained_after_pruning:
            self.measure("recovered", self.model)
        else:
            self._note_pruned()
        self.time()
        return Result(
            self.model, self.plan, self.report, self.recipe, self.masks, tokenizer=self.tokenizer
        )

    def _note_pruned(self) -> None:
        self.pruned = copy.deepcopy(self.model)
        self.measure("pruned", self.pruned)

    def time(self) -> None:
        """Latency of all stages, in turn, on one process."""
        assert self.dense is not None  # noqa: S101  # the recipe prunes something
        models = {"dense": self.dense, "pruned": self.pruned, "recovered": self.model}
        present = {n: m for n, m in models.items() if m is not None and n in self.report["stages"]}
        a = self.arguments
        latency: dict[str, Any] = {
            "batch_size": a.latency_batch_size,
            "sequence_length": a.latency_tokens,
            "rounds": a.latency_rounds,
        }
        for size, key in ((a.latency_batch_size, "latency_ms"), (1, "latency_ms_batch_1")):
            rounds = a.latency_rounds * (1 if size > 1 else 4)
            times = compare_latency(
                present, batch_size=size, sequence_length=a.latency_tokens, rounds=rounds
            )
            for name, item in times.items():
                self.report["stages"][name][key] = item.median_ms
                latency.setdefault(name, {})[f"batch_{size}"] = item.to_dict()
        self.report["latency"] = latency


def describe(job: Job) -> None:
    """What the card says besides figures."""
    a, report = job.arguments, job.report
    packaged = a.model_name_or_path is None
    local = a.model_name_or_path is not None and Path(a.model_name_or_path).exists()
    report["sequence_length"] = a.max_length
    report["auto_class"] = "AutoModelForSequenceClassification"
    report["task"] = "text-classification"
    report["base_model"] = MODEL_NAME if packaged else None if local else a.model_name_or_path
    report["dataset"] = DATASET_NAME if a.dataset_name is None else Path(a.dataset_name).name
    report["license"] = "apache-2.0" if packaged else None
    report["language"] = "en" if packaged else None
    report["name"] = (a.push_to_hub or "").split("/")[-1] or None
    report["command"] = "accelerate launch scripts/prune_bert.py"


def main() -> None:
    """Parse, run, show, save, push."""
    parser = HfArgumentParser([Arguments])  # type: ignore[list-item]  # a dataclass, by its hints
    (arguments,) = parser.parse_args_into_dataclasses()
    state = PartialState(cpu=os.environ.get("ACCELERATE_USE_CPU", "").lower() == "true")
    level = logging.INFO if state.is_main_process else logging.WARNING
    logging.basicConfig(format="%(levelname)s %(name)s: %(message)s", level=level)
    logging.getLogger("httpx").setLevel(logging.WARNING)
    out = Path(arguments.output_dir)
    try:
        check_output(out, overwrite=arguments.overwrite)
        recipe = load_recipe(arguments.recipe)
        if not recipe.prune_stages:
            raise DataError("the recipe has no prune stage: there is nothing to do.")
        set_seed(recipe.seed)
        job = Job(arguments, recipe)
        result = job.run()
        describe(job)
        if not state.is_main_process:
            return
        save_result(result, out, overwrite=arguments.overwrite)
        Console().print(report_table(result.report))
        print(f"Everything is in {out}: load {out / 'model'} after `import hf_prune`.")
        if arguments.push_to_hub:
            private = arguments.private or None
            print("Pushed:", push_to_hub(out, arguments.push_to_hub, private=private))
    except HfPruneError as error:
        raise SystemExit(f"{type(error).__name__}: {error}") from error


if __name__ == "__main__":
    main()
