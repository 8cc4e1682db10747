"""Every recipe is parsed, and followed for two steps on the tiny model of its family."""

import csv
import json
import random
import sys
from pathlib import Path

import pytest
import torch
from transformers import BertForSequenceClassification
from words import word_tokenizer

import hf_prune.errors
from hf_prune import load_recipe, save_result, targets
from hf_prune.measure import latency_table
from hf_prune.measure.latency import Latency
from hf_prune.recipe import Distill, Prune, Recipe, Student, Train, Vocabulary
from hf_prune.report.card import render_card

ROOT = Path(hf_prune.errors.__file__).parent.parent
RECIPES = sorted((ROOT / "recipes").rglob("*.yaml"))
sys.path.insert(0, str(ROOT / "scripts"))

import arguments as scripts_arguments  # noqa: E402  # a script, found by the line above
import general  # noqa: E402  # another
import job as scripts_job  # noqa: E402  # another
import tasks  # noqa: E402

WORDS = ["good", "great", "fine", "bad", "awful", "poor", "film", "movie", "the", "is", "a", "plot"]
SMALL = {"layers": 1, "hidden": 16, "heads": 2, "neurons": 24}


@pytest.fixture(scope="session")
def tokenizer():
    return word_tokenizer(WORDS)


def texts(count, seed):
    generator = random.Random(seed)
    return [" ".join(generator.choices(WORDS, k=generator.randint(3, 9))) for _ in range(count)]


@pytest.fixture
def folder(tiny, tokenizer, tmp_path):
    """`folder(family)`: a saved tiny model of it, with a tokenizer."""

    def make(family):
        path = tmp_path / family
        tiny(family).save_pretrained(path)
        tokenizer.save_pretrained(path)
        return str(path)

    return make


@pytest.fixture
def files(tmp_path):
    """By task, arguments that name a training and a test file."""
    rows = texts(48, seed=0)
    with (tmp_path / "rows.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["text", "label"])
        writer.writerows([text, index % 3] for index, text in enumerate(rows))
    (tmp_path / "rows.txt").write_text("\n".join(rows * 4) + "\n")
    tags = ["B-FILM", "I-FILM", "O"]
    lines = ["\n".join(f"{w}\t{tags[i % 3]}" for i, w in enumerate(t.split())) for t in rows]
    (tmp_path / "rows.conll").write_text("\n\n".join(lines) + "\n")
    questions = [
        {
            "question": "the film is",
            "context": text,
            "answers": {"text": [text.split()[1]], "answer_start": [len(text.split()[0]) + 1]},
        }
        for text in rows
    ]
    (tmp_path / "rows.json").write_text("\n".join(json.dumps(row) for row in questions))
    names = {
        "text-classification": "rows.csv",
        "text-generation": "rows.txt",
        "token-classification": "rows.conll",
        "question-answering": "rows.json",
    }
    (tmp_path / "general.txt").write_text("\n\n".join(texts(9, seed=1)) + "\n")
    common = {"general_file": str(tmp_path / "general.txt")}
    return {
        task: common
        | {"task": task, **dict.fromkeys(("train_file", "eval_file"), str(tmp_path / n))}
        for task, n in names.items()
    }


def shortened(recipe):
    """The same stages: two steps each, few examples, sizes that the tiny model has."""
    stages = []
    for stage in recipe.stages:
        if isinstance(stage, Train):
            few = {"max_steps": 2, "per_device_train_batch_size": 4, "warmup_steps": 0}
            stages.append(stage.model_copy(update=few))
        elif isinstance(stage, Student):
            stages.append(stage.model_copy(update=SMALL))
        elif isinstance(stage, Prune):
            few = {"calibration_samples": 16, "reconstruction_samples": None, "sequence_length": 16}
            schedule = stage.schedule
            if schedule is not None:
                few["schedule"] = schedule.model_copy(update={"every": 1, "end": 1.0})
            stages.append(stage.model_copy(update=few))
    return recipe.model_copy(update={"stages": tuple(stages)})


def run(recipe, source, arguments):
    found = scripts_arguments.Arguments(
        max_length=16,
        max_eval_samples=8,
        latency_rounds=1,
        latency_tokens=8,
        latency_batch_size=2,
        **arguments,
    )
    return scripts_job.Job(found, recipe, source).run()


@pytest.fixture
def clock(monkeypatch):
    """A machine on which time is parameters: real times of tiny models are noise."""

    def compare(models, **options):
        times = {n: 1e-3 * sum(p.numel() for p in m.parameters()) for n, m in models.items()}
        first = next(iter(times.values()))
        return {name: Latency(value, value, value, value / first) for name, value in times.items()}

    monkeypatch.setattr(latency_table, "compare_latency", compare)
    monkeypatch.setattr(targets, "compare_latency", compare)


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: str(p.relative_to(ROOT / "recipes")))
# PEFT reads what transformers has deprecated.
@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
def test_recipe_runs(path, folder, files, tmp_path, clock, monkeypatch):
    monkeypatch.setenv("HF_PRUNE_CACHE", str(tmp_path / "cache"))
    recipe = load_recipe(path)
    assert load_recipe(recipe.model_dump()) == recipe
    family = path.parent.name
    task = "text-classification" if family == "bert" else "text-generation"
    result = run(shortened(recipe), folder(family), files[task])
    stages = result.report["stages"]
    last = "recovered" if "recovered" in stages else "pruned"
    assert stages[last]["nonzero_parameters"] < stages["dense"]["nonzero_parameters"]
    assert result.report["pruning"] or any(isinstance(s, Student) for s in recipe.stages)
    save_result(result, tmp_path / "out")
    assert (tmp_path / "out" / "model" / "model.safetensors").exists()


PRUNE = Prune(sparsity=0.5, criterion="fisher", solver="global", calibration_samples=16)


@pytest.mark.parametrize(
    ("task", "figure"),
    [
        ("token-classification", "f1"),
        ("question-answering", "exact_match"),
        ("text-classification", "accuracy"),
    ],
)
def test_tasks_of_prune_bert(folder, files, task, figure):
    steps = {"max_steps": 2, "per_device_train_batch_size": 4}
    stages = (Train(**steps), PRUNE, Distill(**steps, hidden=1.0))
    recipe = load_recipe({"stages": [stage.model_dump(mode="json") for stage in stages]})
    report = run(recipe, folder("bert"), files[task]).report
    for name in ("dense", "pruned", "recovered"):
        assert 0 <= report["stages"][name][figure] <= 1
    removed = report["pruning"][0]
    assert removed["removed"] >= removed["asked_to_remove"] > 0


@pytest.mark.parametrize("task", ["text-classification", "text-generation"])
def test_a_floor_is_judged_by_rows_that_nothing_else_sees(folder, files, task, monkeypatch):
    steps = {"max_steps": 2, "per_device_train_batch_size": 4}
    stage = PRUNE.model_copy(update={"calibration_samples": 1000})
    with_floor = {**stage.model_dump(mode="json"), "floor": {"drop": 0.5}}
    recipe = load_recipe({"stages": [with_floor, Distill(**steps).model_dump(mode="json")]})
    source = folder("bert" if task == "text-classification" else "gpt2")
    found = scripts_arguments.Arguments(
        max_length=16, latency_rounds=1, latency_tokens=8, latency_batch_size=2, **files[task]
    )
    job = scripts_job.Job(found, recipe, source)
    whole = scripts_job.Job(found, load_recipe({"stages": [steps_only(steps)]}), source)
    ids = {name: sorted(map(tuple, part["input_ids"])) for name, part in job.data.items()}
    assert sorted(ids["train"] + ids["floor"]) == sorted(
        map(tuple, whole.data["train"]["input_ids"])
    )
    assert len(ids["floor"]) == len(whole.data["train"]) // 5
    assert "floor" not in whole.data
    titles = []
    plain = scripts_job.Job.batches

    def batches(self, rows, size, title, **how):
        titles.append((title, rows is self.data["floor"], rows is self.data["test"]))
        return plain(self, rows, size, title, **how)

    monkeypatch.setattr(scripts_job.Job, "batches", batches)
    result = job.run()
    assert ("Measuring", True, False) in titles
    assert ("Measuring", False, True) not in titles, "the search does not see the test split"
    assert result.report["floor"]["examples"] == len(ids["floor"])
    assert result.report["calibration_samples"] == len(ids["train"])


def steps_only(steps):
    return Train(**steps).model_dump(mode="json")


def test_a_floor_needs_rows(folder, files, tmp_path):
    few = tmp_path / "few.csv"
    few.write_text("text,label\ngood film,0\nbad film,1\nfine plot,2\n")
    recipe = load_recipe({"stages": [{**PRUNE.model_dump(mode="json"), "floor": {"drop": 0.5}}]})
    names = {**files["text-classification"], "train_file": str(few)}
    with pytest.raises(hf_prune.errors.DataError, match="3 training rows: a floor is judged"):
        run(recipe, folder("bert"), names)


def test_a_portable_recipe_in_scripts(folder, files, tmp_path):
    steps = {"max_steps": 2, "per_device_train_batch_size": 4}
    stage = PRUNE.model_copy(update={"units": ("neurons",), "even": True, "solver": "knapsack"})
    stages = [stage.model_dump(mode="json"), Distill(**steps).model_dump(mode="json")]
    recipe = load_recipe({"portable": True, "stages": stages})
    result = run(recipe, folder("bert"), files["text-classification"])
    assert result.plan.sites
    assert "import hf_prune" not in render_card(result.report)
    save_result(result, tmp_path / "out")
    model = tmp_path / "out" / "model"
    assert "hf_prune" not in (model / "config.json").read_text()
    loaded = BertForSequenceClassification.from_pretrained(model)
    for name, value in result.model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name


@pytest.mark.parametrize("task", ["text-classification", "token-classification"])
@pytest.mark.parametrize("trained", [False, True])
def test_the_vocabulary_goes_at_the_end(folder, files, task, trained):
    """All words are in the training data: figures stay, and there are fewer parameters."""
    steps = {"max_steps": 2, "per_device_train_batch_size": 4}
    stages = [PRUNE, Distill(**steps)] if trained else [PRUNE]
    plain, narrow = (
        run(Recipe(stages=(*stages, *more)), folder("bert"), files[task])
        for more in ((), (Vocabulary(),))
    )
    last = "recovered" if trained else "pruned"
    before, after = (r.report["stages"][last] for r in (plain, narrow))
    gone = narrow.report["pruning"][-1]["removed"]
    assert gone == 99 - len(narrow.tokenizer) > 0
    assert before["parameters"] - after["parameters"] == 32 * gone
    figures = {"accuracy", "f1", "exact_match", "loss"} & before.keys()
    assert figures
    assert {n: after[n] for n in figures} == pytest.approx(
        {n: before[n] for n in figures}, abs=1e-5
    )


def test_texts_of_one_s_own_say_which_tokens_stay(folder, files, tmp_path):
    (tmp_path / "texts.txt").write_text("good film\nfilm\n")
    stage = Vocabulary(texts=str(tmp_path / "texts.txt"), at_least=2)
    result = run(Recipe(stages=(PRUNE, stage)), folder("llama"), files["text-generation"])
    left = {word for word in result.tokenizer.get_vocab() if word in WORDS}
    assert left == {"film", "a"}  # single letters always stay
    assert result.model.config.vocab_size == len(result.tokenizer)
    assert result.report["stages"]["pruned"]["perplexity"] > 0


def test_perplexity_is_that_of_all_predicted_tokens(tiny, inputs_for):
    model, batch = tiny("gpt2"), inputs_for("gpt2")
    with torch.no_grad():
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    losses = torch.nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten(), reduction="none"
    )
    counted = (batch["labels"][:, 1:] != -100).flatten()
    expected = float(losses[counted].mean().exp())
    halves = [{k: v[i : i + 2] for k, v in batch.items()} for i in (0, 2)]
    found = tasks.TASKS["text-generation"].measure(model, halves)
    assert found["perplexity"] == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize(
    ("tags", "expected"),
    [
        ("O B-x I-x O", {(1, 3, "x")}),
        ("B-x B-x I-y", {(0, 1, "x"), (1, 2, "x"), (2, 3, "y")}),
        ("I-x I-x", {(0, 2, "x")}),
        ("O O", set()),
    ],
)
def test_entities(tags, expected):
    assert tasks.entities(tags.split()) == expected


def test_a_conll_file_that_is_none(tmp_path):
    (tmp_path / "x.conll").write_text("a\tO\nb\n")
    with pytest.raises(hf_prune.errors.DataError, match="line 2: expected a word, a tab and a tag"):
        tasks.read_conll(tmp_path / "x.conll")


def test_a_killed_script_goes_on(folder, files, tmp_path, monkeypatch):
    """The second run takes up every stage where its newest checkpoint is, and ends alike."""
    recipe = shortened(load_recipe(ROOT / "recipes" / "bert" / "movement-50.yaml"))
    steps = {"max_steps": 6, "per_device_train_batch_size": 4}
    stages = (recipe.stages[0], recipe.stages[1].model_copy(update=steps))
    recipe = recipe.model_copy(update={"stages": stages})
    source, data = folder("bert"), files["text-classification"]
    whole = run(recipe, source, data)
    options = {**data, "output_dir": str(tmp_path / "out"), "save_steps": 2}
    original = scripts_job.PruneCallback.on_step_begin

    def die(self, args, state, control, **kwargs):
        if state.global_step == 5:
            raise RuntimeError("killed")
        original(self, args, state, control, **kwargs)

    monkeypatch.setattr(scripts_job.PruneCallback, "on_step_begin", die)
    with pytest.raises(RuntimeError, match="killed"):
        run(recipe, source, options)
    monkeypatch.undo()
    resumed = run(recipe, source, {**options, "resume": True})
    assert resumed.plan.fingerprint() == whole.plan.fingerprint()
    for name, value in whole.model.state_dict().items():
        assert torch.equal(resumed.model.state_dict()[name], value), name


def test_measuring_pads_little_and_counts_every_row(folder, files):
    """Rows of like length run together, and each of them once."""
    recipe = load_recipe({"stages": [PRUNE.model_dump(mode="json")]})
    found = scripts_arguments.Arguments(max_length=16, **files["text-classification"])
    job = scripts_job.Job(found, recipe, folder("bert"))
    rows = job.data["test"]
    padded, counts = [], []
    for by_length in (False, True):
        batches = list(job.batches(rows, 8, "Measuring", by_length=by_length))
        seen = [ids for b in batches for ids in b["input_ids"].tolist()]
        found = sorted(tuple(i for i in ids if i) for ids in seen)
        assert found == sorted(tuple(ids) for ids in rows["input_ids"])
        padded.append(sum(int((b["attention_mask"] == 0).sum()) for b in batches))
        counts.append(job.task.measure(job.model, iter(batches)))
    assert padded[1] < padded[0]
    assert counts[1]["accuracy"] == counts[0]["accuracy"]
    assert counts[1]["examples"] == counts[0]["examples"] == len(rows)


def test_texts_without_labels_are_cut_and_taught(folder, files, tokenizer):
    words = " ".join(WORDS)  # 12 words, of which 6 fit between two special tokens
    rows = general.general_rows([words, "good film"], tokenizer, 8)
    assert [len(ids) for ids in rows["input_ids"]] == [8, 8, 4]
    inside = [ids[1:-1] for ids in rows["input_ids"][:2]]
    assert tokenizer.decode(inside[0] + inside[1]) == words
    with pytest.raises(hf_prune.errors.DataError, match="name a file with --general_file"):
        general.general_rows([], tokenizer, 8)
    few = {"max_steps": 3, "per_device_train_batch_size": 3, "learning_rate": 1e-2}
    stages = (Student(**SMALL), Distill(data="texts", alpha=1.0, logits=0.0, hidden=1.0, **few))
    source, seen = folder("bert"), []
    arguments = scripts_arguments.Arguments(max_length=16, **files["text-classification"])
    job = scripts_job.Job(arguments, Recipe(stages=stages), source)
    job.make_student(stages[0])
    job.model.register_forward_pre_hook(lambda m, a, k: seen.append(k), with_kwargs=True)
    before = job.model.get_input_embeddings().weight.clone()
    job.train(stages[1], (), 1)
    assert len(seen) == 3
    assert not any("labels" in inputs for inputs in seen)
    lines = {tuple(row) for row in general.general_rows(job.texts, tokenizer, 16)["input_ids"]}
    fed = {tuple(ids[ids != 0].tolist()) for inputs in seen for ids in inputs["input_ids"]}
    assert fed <= {tuple(i for i in line if i) for line in lines}
    assert not torch.equal(job.model.get_input_embeddings().weight, before)


def test_texts_are_padded_where_a_tokenizer_has_no_token_for_it():
    """As those of most causal language models."""
    tokenizer = word_tokenizer(WORDS)
    tokenizer.pad_token, tokenizer.eos_token = None, tokenizer.sep_token
    rows = general.general_rows(["good film", "a good film is fine"], tokenizer, 16)
    batch = general.general_collator(tokenizer)([rows[0], rows[1]])
    short = batch["attention_mask"][0] == 0
    assert short.any()
    assert (batch["input_ids"][0][short] == tokenizer.eos_token_id).all()
    assert tokenizer.pad_token is None, "it is saved as it was"


def test_texts_have_no_labels_to_learn_from():
    with pytest.raises(ValueError, match="set alpha to 1"):
        Distill(data="texts", alpha=0.9)
    with pytest.raises(ValueError, match="set alpha to 1"):
        Distill(data="texts", alpha=1.0, ends={"alpha": 0.5})
