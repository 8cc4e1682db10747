"""Sensitivity curves against masking by hand, and rank correlations against scipy."""

import json

import pytest
import torch
from click.testing import CliRunner
from datasets import Dataset
from scipy.stats import spearmanr
from words import word_tokenizer

import hf_prune_cli
from hf_prune.analysis import analyse_sensitivity, rank_correlation
from hf_prune.criteria.ranking import Ranking
from hf_prune.errors import ConfigError, DataError
from hf_prune.gates.plans import close_gates
from hf_prune.plan import Plan, SitePlan
from hf_prune.sites import find_sites
from hf_prune.statistics.logits import said
from hf_prune.statistics.score import score
from hf_prune.statistics.texts import Examples, class_numbers, read_examples


@pytest.mark.parametrize("name", ["bert", "llama"])
def test_curves_are_those_of_masking_each_site(tiny, inputs_for, logits, name):
    model, batch = tiny(name), inputs_for(name)
    found = analyse_sensitivity(model, [batch], ["magnitude", "taylor"], fractions=(0.0, 0.5))
    dense = logits(model, batch)
    rankings = score(model, find_sites(model), "magnitude")
    for site in find_sites(model):
        kept = rankings[site.name].kept(site.units - round(0.5 * site.units))
        plan = Plan(name, {site.name: SitePlan(site.kind, site.units, kept)})
        gates = close_gates(model, plan)
        masked = logits(model, batch)
        with torch.no_grad():
            loss = float(model(**batch).loss)
        gates.remove()
        p, q = dense.softmax(-1), masked.softmax(-1)
        kl = (p * (p.log() - q.log())).sum(-1).mean()
        change = masked - dense
        error = (change - change.mean(-1, keepdim=True)).square().mean()
        curve = found.curves[site.name]
        assert curve["masked"] == [0, round(0.5 * site.units)]
        assert curve["kl"] == pytest.approx([0, float(kl)], rel=1e-3, abs=1e-6)
        assert curve["logit_error"] == pytest.approx([0, float(error)], rel=1e-3, abs=1e-7)
        assert curve["loss"][1] == pytest.approx(loss, rel=1e-5)
        if name == "bert":
            right = (masked.argmax(-1) == batch["labels"]).double().mean()
            assert curve["accuracy"][1] == pytest.approx(float(right))
            assert curve["accuracy"][0] == found.dense["accuracy"]
        else:
            assert "accuracy" not in curve, "a token is not a class"
        assert curve["loss"][0] == pytest.approx(found.dense["loss"])
    with torch.no_grad():
        assert found.dense["loss"] == pytest.approx(float(model(**batch).loss), rel=1e-5)
    assert torch.equal(logits(model, batch), dense)


def test_batches_may_come_once_and_must_come(tiny, inputs_for):
    model, batch = tiny("bert"), inputs_for("bert")
    listed = analyse_sensitivity(model, [batch], ["magnitude"], fractions=(0.5,))
    once = analyse_sensitivity(model, iter([batch]), ["magnitude"], fractions=(0.5,))
    assert once.curves == listed.curves
    with pytest.raises(DataError, match="the calibration set is empty"):
        analyse_sensitivity(model, iter([]), ["magnitude"])
    wrong = {**batch, "input_ids": batch["input_ids"] + 10**6}
    with pytest.raises(DataError):
        analyse_sensitivity(model, [wrong], ["magnitude"])


def halves(batch):
    """Of unlike numbers of counted tokens."""
    return [{k: v[rows] for k, v in batch.items()} for rows in (slice(0, 1), slice(1, None))]


@pytest.mark.parametrize("name", ["bert", "gpt2"])
def test_losses_are_weighted_by_the_labels_that_count(tiny, inputs_for, name):
    model, batch = tiny(name), inputs_for(name)
    if name == "gpt2":
        batch["labels"][1:, 3:] = -100
    whole = analyse_sensitivity(model, [batch], ["magnitude"], fractions=(0.5,))
    parts = analyse_sensitivity(model, halves(batch), ["magnitude"], fractions=(0.5,))
    for site, curve in whole.curves.items():
        for key, values in curve.items():
            assert parts.curves[site][key] == pytest.approx(values, rel=1e-4, abs=1e-8), key


def test_curves_are_of_the_data_of_all_processes(tiny, inputs_for, monkeypatch):
    model, batch = tiny("bert"), inputs_for("bert")
    sums = []

    def other_process(value):
        sums.append(value.clone())
        return value + sums[0] if len(sums) == 2 else value

    whole = analyse_sensitivity(model, [batch], ["magnitude"], fractions=(0.5,))
    monkeypatch.setattr("hf_prune.analysis.sum_over_processes", other_process)
    for half in halves(batch):
        found = analyse_sensitivity(model, [half], ["magnitude"], fractions=(0.5,))
    for site, curve in whole.curves.items():
        for key, values in curve.items():
            assert found.curves[site][key] == pytest.approx(values, rel=1e-4, abs=1e-8), key


def test_scores_and_agreement(tiny, inputs_for):
    model = tiny("bert")
    found = analyse_sensitivity(model, [inputs_for("bert")], ["magnitude", "random"])
    assert found.agreement["magnitude"]["magnitude"] == pytest.approx(1)
    assert found.agreement["magnitude"]["random"] == found.agreement["random"]["magnitude"]
    assert abs(found.agreement["magnitude"]["random"]) < 0.9
    for site in find_sites(model):
        assert len(found.scores["random"][site.name]) == site.units
        assert min(found.scores["magnitude"][site.name]) > 0
    assert set(found.to_dict()) == {
        *("criterion", "fractions", "curves", "scores", "agreement", "dense")
    }


def test_rank_correlation_is_spearmans():
    generator = torch.Generator().manual_seed(0)
    one, two = (torch.randn(30, generator=generator) for _ in range(2))
    expected = spearmanr(one.numpy(), two.numpy()).statistic
    found = rank_correlation(Ranking.from_scores(one), Ranking.from_scores(two))
    assert found == pytest.approx(expected)
    single = Ranking.from_scores(torch.ones(1))
    assert rank_correlation(single, single) == 1


def test_no_criterion(tiny, inputs_for):
    with pytest.raises(ConfigError, match="at least one criterion"):
        analyse_sensitivity(tiny("bert"), [inputs_for("bert")], [])


def test_no_labels_no_loss(tiny, inputs_for):
    batch = inputs_for("bert")
    labels = batch.pop("labels")
    found = analyse_sensitivity(tiny("bert"), [batch], ["magnitude"])
    assert found.dense == {}
    assert all(set(curve) == {"masked", "kl", "logit_error"} for curve in found.curves.values())
    batch["labels"] = torch.full_like(labels, -100)
    found = analyse_sensitivity(tiny("bert"), [batch], ["magnitude"])
    assert found.dense == {}, "nothing is counted"


WORDS = ["good", "bad", "film", "plot"]
ROWS = [
    {"sentence": f"{w} {v} film", "mood": i % 3}
    for i, (w, v) in enumerate([(w, v) for w in WORDS for v in WORDS[:3]])
]


@pytest.fixture
def saved(tiny, tmp_path):
    """A folder with a tiny classifier whose classes have names, and its tokenizer."""
    model = tiny("bert")
    names = ["sad", "glad", "neither"]
    model.config.id2label = dict(enumerate(names))
    model.config.label2id = {name: index for index, name in enumerate(names)}
    model.save_pretrained(tmp_path / "model")
    word_tokenizer(WORDS).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def table(path, rows):
    """The rows as a table of the kind that the name says."""
    data = Dataset.from_list(rows)
    if path.suffix == ".parquet":
        data.to_parquet(path)
    elif path.suffix in (".csv", ".tsv"):
        data.to_csv(path, sep="\t" if path.suffix == ".tsv" else ",")
    else:
        path.write_text("\n".join(json.dumps(row) for row in rows) + "\n")
    return path


def analyze(*arguments):
    return CliRunner().invoke(hf_prune_cli.main, ["analyze", *map(str, arguments)])


COLUMNS = ("--text-column", "sentence", "--label-column", "mood")


@pytest.mark.parametrize("kind", ["csv", "tsv", "json", "jsonl", "parquet"])
def test_a_table_with_labels(saved, tmp_path, logits, tiny, kind):
    """Loss and accuracy are those of the rows, whatever they are written as."""
    file, out = table(tmp_path / f"rows.{kind}", ROWS), tmp_path / "out.json"
    criteria = ("--criteria", "magnitude,kfac_obs_label")
    result = analyze(saved, file, *COLUMNS, *criteria, "--out", out)
    assert result.exit_code == 0, result.output
    assert "Accuracy (dense 0." in result.output
    assert "Squared change of the logits, units masked" in result.output
    found = json.loads(out.read_text())
    tokens = word_tokenizer(WORDS)([r["sentence"] for r in ROWS], padding=True, return_tensors="pt")
    labels = torch.tensor([row["mood"] for row in ROWS])
    said = logits(tiny("bert"), dict(tokens))
    assert found["dense"]["accuracy"] == pytest.approx(
        float((said.argmax(-1) == labels).double().mean())
    )
    loss = torch.nn.functional.cross_entropy(said, labels)
    assert found["dense"]["loss"] == pytest.approx(float(loss), rel=1e-4)
    for curve in found["curves"].values():
        assert len(curve["accuracy"]) == len(curve["loss"]) == len(found["fractions"])


def test_names_of_classes_and_rows_from_all_over(saved, tmp_path):
    """Of a sorted table every class is used; and a name is as good as a number."""
    names = ["sad", "glad", "neither"]
    rows = sorted(ROWS, key=lambda row: row["mood"])
    told = [{**row, "mood": names[row["mood"]]} for row in rows]
    found = []
    for number, kind in ((rows, "numbers"), (told, "names")):
        out = tmp_path / f"{kind}.json"
        options = (*COLUMNS, "--criteria", "magnitude", "--max-samples", "6", "--out", out)
        result = analyze(saved, table(tmp_path / f"{kind}.csv", number), *options)
        assert result.exit_code == 0, result.output
        found.append(json.loads(out.read_text()))
    assert found[0] == found[1]
    texts, labels = read_examples(Examples(tmp_path / "numbers.csv", "sentence", "mood", 6))
    assert labels == [0, 0, 1, 1, 2, 2]
    assert len(set(texts)) == 6


def test_lines_have_no_labels(saved, tmp_path):
    file = tmp_path / "lines.txt"
    file.write_text("good film\n\nbad plot\n")
    result = analyze(saved, file, "--criteria", "magnitude")
    assert result.exit_code == 0, result.output
    assert "Accuracy" not in result.output
    result = analyze(saved, file, "--label-column", "mood")
    assert result.exit_code == 2
    assert "Labels need a table: .csv" in result.output
    bare = table(tmp_path / "rows.csv", ROWS)
    result = analyze(saved, bare, "--text-column", "sentence", "--criteria", "magnitude")
    assert result.exit_code == 0, result.output
    assert "Accuracy" not in result.output


@pytest.mark.parametrize(
    ("rows", "options", "text"),
    [
        (ROWS, ("--text-column", "sentense"), "no column 'sentense'; did you mean 'sentence'"),
        (ROWS, (*COLUMNS[:2], "--label-column", "mod"), "no column 'mod'; did you mean 'mood'"),
        ([{**ROWS[0], "mood": 3}], COLUMNS, r"label 3 is neither a number in [0, 3) nor"),
        ([{**ROWS[0], "mood": "gladd"}], COLUMNS, "label 'gladd' is neither"),
        ([{**ROWS[0], "mood": 0.5}], COLUMNS, "label 0.5 is neither"),
        ([{**ROWS[0], "sentence": " "}], COLUMNS, "row 0 of those that are used has no 'sentence'"),
    ],
)
def test_tables_that_are_refused(saved, tmp_path, rows, options, text):
    result = analyze(saved, table(tmp_path / "rows.jsonl", rows), *options)
    assert result.exit_code == 1
    assert "DataError" in result.output
    assert text in result.output


def test_units_and_fractions_are_chosen(saved, tmp_path):
    file, out = table(tmp_path / "rows.csv", ROWS), tmp_path / "out.json"
    options = ("--text-column", "sentence", "--criteria", "magnitude")
    result = analyze(
        saved, file, *options, "--units", "heads", "--fractions", "0.5,1", "--out", out
    )
    assert result.exit_code == 0, result.output
    found = json.loads(out.read_text())
    assert found["fractions"] == [0.5, 1.0]
    assert found["curves"]
    assert all(name.endswith("attention") for name in found["curves"])
    for chosen, text in (
        (("--fractions", "1.5"), "1.5 is no fraction of units to mask"),
        (("--fractions", "half"), "could not convert"),
        (("--units", "experts"), "has no units of experts"),
        (("--units", "heads,neuron"), "unknown kind of units 'neuron'; did you mean 'neurons'"),
        (("--out", "/nowhere/out.json"), "there is no folder /nowhere"),
    ):
        result = analyze(saved, file, *options, *chosen)
        assert result.exit_code == 2
        assert text in result.output


def test_a_model_that_is_not_there_is_one_line(tmp_path):
    result = analyze(tmp_path / "nothing", table(tmp_path / "rows.csv", ROWS), *COLUMNS)
    assert result.exit_code == 1
    assert "Error: " in result.output
    assert "Traceback" not in result.output


def test_agreement_is_shown(saved, tmp_path):
    file = table(tmp_path / "rows.csv", ROWS)
    result = analyze(saved, file, *COLUMNS, "--criteria", "magnitude,magnitude_l2")
    assert result.exit_code == 0, result.output
    assert "Agreement of criteria" in result.output
    assert "1.00" in result.output


def test_what_is_no_table_and_no_classifier(saved, tmp_path, tiny):
    (tmp_path / "rows.parquet").write_bytes(b"none")
    result = analyze(saved, tmp_path / "rows.parquet")
    assert result.exit_code == 1
    assert "cannot be read as parquet" in result.output
    with pytest.raises(ConfigError, match="GPT2LMHeadModel does not say one class of a text"):
        class_numbers(tiny("gpt2"), [0])
    several = tiny("bert")
    several.config.problem_type = "multi_label_classification"
    with pytest.raises(ConfigError, match="leave the labels out"):
        class_numbers(several, [0])
    one = tiny("bert")
    one.config.num_labels = 1
    assert class_numbers(one, [0.5, 3]).tolist() == [0.5, 3.0]
    assert class_numbers(tiny("bert"), [2, 0]).dtype == torch.int64


@pytest.mark.parametrize("name", ["t5", "bart"])
def test_padding_of_a_decoder_is_that_of_its_labels(tiny, inputs_for, name):
    """Not that of the encoder, although both are of one length here."""
    model, batch = tiny(name), inputs_for(name)
    batch["labels"] = batch["input_ids"].clone()
    batch["labels"][0, 2:] = -100
    batch["attention_mask"] = torch.ones_like(batch["input_ids"])
    batch["attention_mask"][1, 1:] = 0
    with torch.no_grad():
        output = model(**batch)
    real = batch["labels"] != -100
    assert torch.equal(said(model, batch, output).values, output.logits[real])
    del batch["labels"]
    assert len(said(model, batch, output).values) == batch["attention_mask"].sum()
