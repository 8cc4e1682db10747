"""One run of a script: data, models, the stages of a recipe, and the figures so far."""

import copy
import logging
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from itertools import chain
from pathlib import Path
from typing import Any

import evaluate as hf_evaluate
import torch
from accelerate import PartialState
from arguments import FLOOR, Arguments, columns_of, cut, hold_out, load_data
from datasets import Dataset, DatasetDict
from general import general_collator, general_rows, read_general
from packaged import strip_quantizer
from tasks import TASKS
from timing import time_stages
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import (
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from hf_prune import (
    DistillCallback,
    KeepZeros,
    PruneCallback,
    Recipe,
    Result,
    last_checkpoint,
    make_student,
    prepare_trainer,
)
from hf_prune.errors import DataError
from hf_prune.pipeline import prune_further
from hf_prune.plan import Plan
from hf_prune.recipe import Distill, Prune, Student, Train, Vocabulary
from hf_prune.report.result import measure_stage, new_report
from hf_prune.surgery.layers import moved_parameters, shorten_layers_
from hf_prune.surgery.vocabulary import count_tokens
from hf_prune.surgery.vocabulary_stage import (
    narrow_masks,
    prune_vocabulary_stage,
    read_texts,
)
from hf_prune.training.distill import distill_fields
from hf_prune.training.lora import add_lora, merge_lora
from hf_prune.training.structure import needs_calibration

logger = logging.getLogger(__name__)

Batch = dict[str, torch.Tensor]
NOT_FOR_THE_TRAINER = {"stage", "lora_rank"}
"""Fields of a train stage that are not arguments of a Trainer."""


class Job:
    """One run: its data, its models, and the figures so far.

    Args:
        arguments: what to prune, on what.
        recipe: the stages.
        source: Hub name or folder of the model.
        packaged: data that is used if the arguments name none.
        texts: without labels, that are used if the arguments name none.
    """

    def __init__(
        self,
        arguments: Arguments,
        recipe: Recipe,
        source: str,
        packaged: DatasetDict | None = None,
        texts: Sequence[str] = (),
    ) -> None:
        self.arguments, self.recipe = arguments, recipe
        self.texts = read_general(arguments.general_file) if arguments.general_file else texts
        if arguments.task not in TASKS:
            raise DataError(f"no task {arguments.task!r}; there are {', '.join(sorted(TASKS))}.")
        self.task = TASKS[arguments.task]
        self.columns = columns_of(arguments, self.task)
        data = load_data(arguments, self.task, recipe.seed, packaged)
        self.names = self.task.classes(data, self.columns)
        self.blocks = self.task.name == "text-generation"  # lines of text are cut into blocks first
        self.raw = data if self.blocks else hold_out(cut(data, arguments, recipe.seed), recipe)
        gguf = {} if arguments.gguf_file is None else {"gguf_file": arguments.gguf_file}
        self.tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(source, **gguf)
        self.model = self.load(source, **gguf)
        self.encode_all()
        self.model.to(PartialState().device)
        self.dense: PreTrainedModel | None = None
        self.pruned: PreTrainedModel | None = None
        self.plan = Plan(self.model.config.model_type)
        self.masks: dict[str, torch.Tensor] = {}
        self.layers: dict[str, str] = {}  # by path of a layer now, that in the dense model
        self.report = new_report(recipe, self.model)
        if FLOOR in self.data:
            self.report["floor"] = {
                "examples": len(self.data[FLOOR]),
                "rows": "of the training data, drawn by the seed; no stage trains on them",
            }
        self.student_rows: Dataset | None = None  # what a student learns from, if not the same
        self.trained_after_pruning = False

    def load(self, source: str, **options: Any) -> PreTrainedModel:
        """A model of the task, with the classes of the data."""
        if self.names:
            names = dict(enumerate(self.names))
            back = {name: index for index, name in names.items()}
            options |= {"num_labels": len(names), "id2label": names, "label2id": back}
        elif self.task.name == "question-answering":
            options["num_labels"] = 2  # start and end
        if "gguf_file" in options:
            options["dtype"] = torch.float32
        model: PreTrainedModel = self.task.auto_class.from_pretrained(source, **options)
        return strip_quantizer(model) if "gguf_file" in options else model

    def encode_all(self) -> None:
        """Spell all data with the tokenizer as it is."""
        encoded = self.encode(self.raw)
        if self.blocks:
            encoded = hold_out(cut(encoded, self.arguments, self.recipe.seed), self.recipe)
        self.data = encoded
        self.collator = self.task.collator(self.tokenizer)

    def encode(self, data: DatasetDict) -> DatasetDict:
        """Token ids and labels of rows; padding is left to the collator."""
        return self.task.encode(data, self.tokenizer, self.columns, self.arguments.max_length)

    def batches(
        self, rows: Dataset, size: int, title: str, *, by_length: bool = False
    ) -> Iterator[Batch]:
        """This process's share of some rows, padded in batches; if asked, by their length."""
        state = PartialState()
        mine = rows.shard(state.num_processes, state.process_index)
        if by_length:
            lengths = [len(ids) for ids in mine["input_ids"]]
            mine = mine.select(sorted(range(len(mine)), key=lengths.__getitem__, reverse=True))
        loader = DataLoader(mine, batch_size=size, collate_fn=self.collator)
        for batch in tqdm(loader, desc=title, disable=not state.is_main_process):
            yield dict(batch)

    def measure(self, name: str, model: PreTrainedModel) -> None:
        """Evaluate a model and write its figures under `stages`."""
        size = self.arguments.eval_batch_size
        title = f"Measuring {name}"
        scores = self.task.measure(
            model, self.batches(self.data["test"], size, title, by_length=True)
        )
        examples = scores.pop("examples")
        self.report["stages"][name] = measure_stage(model, self.arguments.max_length) | scores
        if self.arguments.metric:
            self.report["stages"][name][self.arguments.metric] = self._other_metric(model)
        self.report["evaluation"] = {"examples": int(examples), "split": ""}

    @torch.inference_mode()
    def _other_metric(self, model: PreTrainedModel) -> dict[str, float]:
        if self.task.name != "text-classification":
            raise DataError("--metric is for text-classification.")
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
        if stage.teacher is not None:
            return self.load(stage.teacher)
        if self.dense is None:
            raise DataError("a distill stage before the first prune stage must name a teacher.")
        return self.dense

    def _rows(self, stage: Train) -> tuple[Dataset, Any]:
        """What a stage learns from, and its collator."""
        if isinstance(stage, Distill) and stage.data == "texts":
            rows = general_rows(self.texts, self.tokenizer, self.arguments.max_length)
            return rows, general_collator(self.tokenizer)
        taught = isinstance(stage, Distill) and self.student_rows is not None
        return (self.student_rows if taught else self.data["train"]), self.collator

    def _options(self, stage: Train, folder: str) -> TrainingArguments:
        a = self.arguments
        saving: dict[str, Any] = {"save_strategy": "no"}
        if a.save_steps:
            saving = {"save_strategy": "steps", "save_steps": a.save_steps, "save_total_limit": 2}
        return TrainingArguments(
            output_dir=folder,
            report_to=a.report_to,
            seed=self.recipe.seed,
            train_sampling_strategy="group_by_length",
            logging_steps=50,
            use_cpu=PartialState().device.type == "cpu",
            **saving,
            **stage.model_dump(include=set(Train.model_fields) - NOT_FOR_THE_TRAINER),
        )

    def _folder(self, scratch: ExitStack, index: int) -> str:
        """Where a stage keeps its checkpoints: beside the output, or nowhere for long."""
        if self.arguments.save_steps or self.arguments.resume:
            return f"{self.arguments.output_dir}.checkpoints/stage-{index}"
        return scratch.enter_context(tempfile.TemporaryDirectory())

    def train(self, stage: Train, prunes: Sequence[Prune], index: int) -> None:
        """Train the current model, with a teacher, a schedule or masks where the recipe says so."""
        callbacks: list[TrainerCallback] = []
        gradual = None
        if isinstance(stage, Distill):
            callbacks.append(DistillCallback(self.teacher(stage), **distill_fields(stage)))
        if prunes:
            known = self._examples(prunes[0]) if needs_calibration(prunes[0]) else None
            whole = Recipe(
                seed=self.recipe.seed, portable=self.recipe.portable, stages=(*prunes, stage)
            )
            gradual = PruneCallback(whole, calibration=known)
            callbacks.append(gradual)
        if self.masks and not stage.lora_rank:
            callbacks.append(KeepZeros(self.masks))
        adapted = (
            add_lora(self.model, stage.lora_rank, self.recipe.seed) if stage.lora_rank else None
        )
        rows, collator = self._rows(stage)
        with ExitStack() as scratch:
            folder = self._folder(scratch, index)
            trainer = Trainer(
                model=self.model if adapted is None else adapted,
                args=self._options(stage, folder),
                train_dataset=rows,
                data_collator=collator,
                processing_class=self.tokenizer,
                callbacks=callbacks,
            )
            newest = None
            if self.arguments.resume:
                kept = (PruneCallback, DistillCallback)
                newest = last_checkpoint(
                    folder, plain=not any(isinstance(c, kept) for c in callbacks)
                )
            prepare_trainer(trainer).train(resume_from_checkpoint=newest)
        if adapted is not None:
            self.model = merge_lora(adapted, self.masks)
        self.trained_after_pruning = self.pruned is not None or gradual is not None
        if gradual is not None and gradual.plan is not None:
            self._note_gradual(gradual)

    def _note_gradual(self, gradual: PruneCallback) -> None:
        assert gradual.plan is not None  # noqa: S101  # training has ended
        self.plan = self.plan.then(gradual.plan.moved(self.layers))
        self.masks |= gradual.masks
        self.report["pruning"] += gradual.entries

    def calibration(self, samples: int) -> Iterator[Batch]:
        """Batches of a random part of the training data."""
        rows = self.data["train"].shuffle(seed=self.recipe.seed)
        return self.batches(rows.select(range(min(samples, len(rows)))), 32, "Calibrating")

    def _examples(self, stage: Prune) -> Iterator[Batch]:
        """What a stage is calibrated on; the report says how many examples."""
        samples = max(stage.calibration_samples, stage.reconstruction_samples or 0)
        self.report["calibration_samples"] = min(samples, len(self.data["train"]))
        return self.calibration(samples)

    def prune(self, stage: Prune) -> None:
        """Prune the current model in one shot."""
        one = self.recipe.model_copy(update={"stages": (stage,)})
        metric = self.score_for_floor if stage.floor is not None else None
        batches = self._examples(stage)
        known = self.arguments.experience if stage.floor is not None else None
        assert self.dense is not None  # noqa: S101  # noted before the first prune stage
        result = prune_further(
            self.model, self.dense, one, batches, metric=metric, experience=known
        )
        self.model = result.model
        self.plan = self.plan.then(result.plan.moved(self.layers))
        self._note_layers(result.layers)
        self.masks |= result.masks
        self.report["pruning"] += result.report["pruning"]

    def _note_layers(self, layers: dict[str, str]) -> None:
        """Layers may have left their list: what is left has other names."""
        if layers:
            self.masks = moved_parameters(self.model, self.masks, layers)
            self.layers = {now: self.layers.get(old, old) for now, old in layers.items()}

    def score(self, model: PreTrainedModel) -> float:
        """One number on the test split, higher = better: F1, accuracy, or the negative loss.

        To be looked at, not to decide by: `score_for_floor` is for that.
        """
        return self._score(model, "test")

    def score_for_floor(self, model: PreTrainedModel) -> float:
        """The same on training data that was held out: neither measured, trained nor calibrated."""
        return self._score(model, FLOOR)

    def _score(self, model: PreTrainedModel, part: str) -> float:
        size = self.arguments.eval_batch_size
        batches = self.batches(self.data[part], size, "Measuring", by_length=True)
        figures = self.task.measure(model, batches)
        return figures.get("f1", figures.get("accuracy", -figures.get("loss", 0.0)))

    def make_student(self, stage: Student) -> None:
        """Make a student of the current model, which becomes its teacher."""
        self._note_dense(copied=False)
        assert self.dense is not None  # noqa: S101  # just noted
        batches = list(self.calibration(512)) if stage.init == "teacher" else []
        self.model = make_student(self.dense, stage, batches, self.recipe.seed)
        self.plan = Plan(self.model.config.model_type)
        self._note_pruned()

    def narrow_vocabulary(self, stage: Vocabulary) -> None:
        """Remove the tokens that are not needed; the data is spelt with those that are left."""
        if stage.texts is not None:
            counts = count_tokens(self.tokenizer, read_texts(Path(stage.texts)))
        else:
            counts = Counter(chain.from_iterable(self.data["train"]["input_ids"]))
        left, entry = prune_vocabulary_stage(self.model, self.tokenizer, stage, counts)
        self.tokenizer = left.tokenizer
        self.masks = narrow_masks(self.model, self.masks, left.kept)
        self.report["pruning"].append(entry)
        self.encode_all()

    def _note_dense(self, *, copied: bool) -> None:
        if self.dense is None:
            self.dense = copy.deepcopy(self.model) if copied else self.model
            self.measure("dense", self.dense)

    def _note_pruned(self) -> None:
        self.pruned = copy.deepcopy(self.model)
        self.measure("pruned", self.pruned)

    def run(self) -> Result:
        """All stages of the recipe, then latency."""
        scheduled: list[Prune] = []
        for index, stage in enumerate(self.recipe.stages):
            logger.info("Stage %d of %d: %s", index + 1, len(self.recipe.stages), stage)
            if isinstance(stage, Student):
                self.make_student(stage)
            elif isinstance(stage, Vocabulary):
                self._note_dense(copied=True)
                self.narrow_vocabulary(stage)
            elif isinstance(stage, Prune):
                self._note_dense(copied=stage.schedule is not None)
                if stage.schedule is not None:
                    scheduled.append(stage)
                else:
                    self.prune(stage)
            else:
                if self.model is not self.dense and self.plan.sites and self.pruned is None:
                    self._note_pruned()
                self.train(stage, scheduled, index)
                scheduled = []
        self._note_layers(shorten_layers_(self.model))  # a gradual stage may have emptied some
        if self.trained_after_pruning:
            self.measure("recovered", self.model)
        else:
            self._note_pruned()
        self.time()
        return Result(
            self.model,
            self.plan,
            self.report,
            self.recipe,
            self.masks,
            tokenizer=self.tokenizer,
            layers=self.layers,
        )

    def time(self) -> None:
        """Latency of all stages, in turn."""
        assert self.dense is not None  # noqa: S101  # the recipe prunes something
        models = {"dense": self.dense, "pruned": self.pruned, "recovered": self.model}
        present = {n: m for n, m in models.items() if m is not None and n in self.report["stages"]}
        self.report["latency"] = time_stages(present, self.arguments, self.report["stages"])
