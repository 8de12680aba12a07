"""`luthier ensemble` as people call it, on the pocket model."""

import csv
import json

import pytest

from interventions import cli

from command import luthier

WORDS = "good= good,bad= bad,fair= fair"
TEMPLATE = "{text} | sentiment:{label}"


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    from circuits.pocket import world

    path = tmp_path_factory.mktemp("data") / "train.csv"
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, ["text", "label"])
        writer.writeheader()
        writer.writerows(
            {"text": row["text"], "label": row["label"]} for row in world.sentiment("english", 30, 0, "train")
        )
    return path


@pytest.fixture(scope="module")
def fitted(rows, tmp_path_factory):
    """A run of `fit`, as a folder."""
    from typer.testing import CliRunner

    out = tmp_path_factory.mktemp("runs") / "ensemble"
    asked = [
        "--template",
        TEMPLATE,
        "--label-words",
        WORDS,
        "--members",
        "3",
        "--lr",
        "1e-3",
        "--epochs",
        "2",
        "--json",
    ]
    done = CliRunner().invoke(
        cli.app, ["ensemble", "fit", "--model", "pocket", "--data", str(rows), *asked, "--out", str(out)]
    )
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["rows"][0]["steps"] == 8
    return out


def test_fit_writes_peft_adapters(fitted):
    from peft import PeftConfig

    assert {path.name for path in fitted.iterdir()} == {"member_0", "member_1", "member_2", "ensemble.json", "run.json"}
    assert PeftConfig.from_pretrained(str(fitted / "member_2")).r == 8


def test_predict_answers_the_less_contested(fitted, rows, tmp_path, monkeypatch, capsys):
    where = tmp_path / "answers.csv"
    asked = ["--from", fitted, "--data", rows, "--coverage", 0.5, "--out", where, "--json"]
    code, out, err = luthier(monkeypatch, capsys, "ensemble", "predict", *asked)
    assert code == 0, err
    answers = json.loads(out)["rows"]
    told = [row for row in answers if row["answer"]]
    assert len(answers) == 30 and len(told) == 15
    assert max(row["mutual_information"] for row in told) <= min(
        row["mutual_information"] for row in answers if not row["answer"]
    )
    with where.open(newline="") as file:
        assert [row["answer"] or None for row in csv.DictReader(file)] == [row["answer"] for row in answers]


def test_report_is_one_page(fitted, rows, tmp_path, monkeypatch, capsys):
    page = tmp_path / "report.html"
    code, out, err = luthier(monkeypatch, capsys, "ensemble", "report", "--from", fitted, "--data", rows, "--out", page)
    assert code == 0, err
    assert "aurc" in out and "Who answers for which label" in page.read_text()
    assert "; fitted)" in page.read_text() and "luthier ensemble report --from" in page.read_text()


def test_bad_input_is_one_line(fitted, rows, tmp_path, monkeypatch, capsys):
    for arguments, expected in (
        (["predict", "--from", tmp_path, "--data", rows], "run.json"),
        (["predict", "--from", fitted, "--data", rows, "--text", "words"], "has no column 'words'; it has text, label"),
        (
            ["predict", "--from", fitted, "--data", rows, "--combine", "mean"],
            "combine='mean'; expected mixture or vote",
        ),
        (["fit", "--model", "pocket", "--data", rows, "--out", tmp_path, "--alpha", -1], "alpha is -1.0; expected 0"),
    ):
        code, out, err = luthier(monkeypatch, capsys, "ensemble", *arguments)
        assert code == 2 and expected in err and len(err.strip().splitlines()) == 1 and not out
