"""The command line as people call it: true runs on the pocket model, bad input in one line, a quick `--help`."""

import csv
import json
import subprocess
import sys

import pytest

from interventions import cli

from command import luthier

WORDS = "good= good,bad= bad,fair= fair"
TEMPLATE = "{text} | sentiment:{label}"


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """Pocket sentences as CSV files, as a user has them."""
    from circuits.pocket import world

    folder = tmp_path_factory.mktemp("data")
    for language, split, n in (("english", "train", 120), ("english", "test", 45), ("nuri", "train", 45)):
        with (folder / f"{language}-{split}.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, ["sentence", "feeling"])
            writer.writeheader()
            for row in world.sentiment(language, n, 0, split):
                writer.writerow({"sentence": row["text"], "feeling": row["label"]})
    return folder


def options(rows, file="english-train.csv"):
    return ["--model", "pocket", "--data", rows / file, "--text", "sentence", "--label", "feeling",
            "--template", TEMPLATE, "--label-words", WORDS]  # fmt: skip


def test_discover_then_tune_then_report(rows, tmp_path, monkeypatch, capsys):
    found = tmp_path / "found"
    few = ["--method", "ablation", "--heads", 4, "--examples", 12, "--controls", 2]
    code, out, err = luthier(monkeypatch, capsys, "discover", *options(rows), *few, "--out", found, "--json")
    assert code == 0, err
    result = json.loads(out)
    assert len(result["circuit"]) == 4 and result["accuracy"] > 0.6
    assert result["faithfulness"][-1]["faithfulness"] == pytest.approx(1, abs=1e-5)
    files = {path.name for path in found.iterdir()}
    assert {
        "scores.safetensors",
        "scores.json",
        "circuit.json",
        "faithfulness.json",
        "run.json",
        "report.html",
    } <= files

    point, page = result["circuit_faithfulness"], (found / "report.html").read_text()
    assert (
        f"In short: 4 of 32 heads keep {point['faithfulness']:.2f} ({point['low']:.2f} to {point['high']:.2f})" in page
    )
    assert f"as many random heads of the same layers keep {point['random']:.2f}." in page
    assert f"One head: {result['heads'][0]['head']}" in page

    tuned = tmp_path / "tuned"
    evals = ["--eval", f"english={rows / 'english-test.csv'}"]
    tuning = ["--epochs", 1, "--lr", 1e-3, "--n", 20, "--arms", "circuit,random"]
    code, out, err = luthier(
        monkeypatch, capsys, "tune", "--from", found, "--data", rows / "nuri-train.csv", *evals, *tuning, "--out", tuned,
    )  # fmt: skip
    assert code == 0, err
    assert "english" in out and "random" in out
    from transformers import AutoModelForCausalLM

    from circuits import load
    from interventions import HeadMask

    mask = HeadMask.load(tuned / "mask", load("pocket"))
    assert [str(head) for head in mask.circuit] == result["circuit"]
    before, after = (
        load("pocket").hf.state_dict(),
        AutoModelForCausalLM.from_pretrained(tuned / "checkpoint").state_dict(),
    )
    moves, moved = mask.tensors(), 0
    for name, value in before.items():
        changed = value != after[name].to(value)
        assert not changed[~moves[name]].any() if name in moves else not changed.any()
        moved += int(changed.sum())
    assert moved > 0

    code, out, _ = luthier(
        monkeypatch, capsys, "report", tuned, "--out", tmp_path / "page.html", "--title", "<i>mine</i>"
    )
    page = (tmp_path / "page.html").read_text()
    assert code == 0 and "page.html" in out
    assert "&lt;i&gt;mine&lt;/i&gt;" in page and "luthier tune --from" in page and "values that may move" in page


def test_paired_rows_are_recognised(tmp_path, monkeypatch, capsys):
    from circuits.pocket import world

    pairs = tmp_path / "names.json"
    pairs.write_text(json.dumps(world.name_copying(40, 0)))
    code, out, err = luthier(
        monkeypatch, capsys, "discover", "--model", "pocket", "--data", pairs, "--method", "gradient", "--heads", 3,
        "--ablate", "resample", "--controls", 1, "--out", tmp_path / "out", "--json",
    )  # fmt: skip
    assert code == 0, err
    assert json.loads(out)["chance"] == 0.5


def bad(rows):
    good = options(rows)
    out = ["--out", rows / "never"]
    return {
        "no such file": (["discover", "--model", "pocket", "--data", rows / "no.csv", *out], "no.csv"),
        "wrong column": (
            ["discover", "--model", "pocket", "--data", rows / "english-train.csv", *out],
            "no column 'text'",
        ),
        "unknown model": (["discover", *good, "--model", "./nowhere", *out], "no model directory './nowhere'"),
        "unknown method": (
            ["discover", *good, "--method", "magic", *out],
            "--method 'magic'; expected one of relevance",
        ),
        "label words": (["discover", *good, "--label-words", "good,bad", *out], "expected name=value"),
        "two tokens": (
            ["discover", *good, "--label-words", "good= goodness me,bad= bad,fair= fair", *out],
            "not one token",
        ),
        "no start": (["tune", "--data", rows / "nuri-train.csv", *out], "nothing to start from"),
        "no run": (["tune", "--from", rows, "--data", rows / "nuri-train.csv", *out], "no run.json in"),
        "no folder": (["report", rows / "nothing"], "no folder"),
        "empty folder": (["report", rows], "holds no scores"),
        "missing option": (["discover", "--model", "pocket"], "Missing option"),
    }


@pytest.mark.parametrize("case", list(bad(__import__("pathlib").Path("."))))
def test_bad_input_is_one_line_and_exit_two(case, rows, monkeypatch, capsys):
    arguments, text = bad(rows)[case]
    code, out, err = luthier(monkeypatch, capsys, *arguments)
    assert code == 2
    assert text in err and "Traceback" not in err
    if case != "missing option":  # typer draws a box around that one
        assert err.startswith("luthier: ") and len(err.strip().splitlines()) == 1
    assert not (rows / "never").exists()


def test_empty_data(tmp_path, monkeypatch, capsys):
    (tmp_path / "empty.csv").write_text("text,label\n")
    code, _, err = luthier(
        monkeypatch,
        capsys,
        "discover",
        "--model",
        "pocket",
        "--data",
        tmp_path / "empty.csv",
        "--out",
        tmp_path / "out",
    )
    assert code == 2 and "expected a header and at least one row" in err
    assert not (tmp_path / "out").exists()


def test_help_is_quick_and_imports_no_torch():
    """Wall time depends on the machine; what is imported does not, and torch alone would take seconds."""
    code = "import sys, interventions.cli as c; c.app(['--help'], standalone_mode=False); print(sorted(sys.modules))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    for heavy in ("torch", "transformers", "transformer_lens", "datasets", "plotly", "numpy"):
        assert f"'{heavy}'" not in run.stdout
    assert "discover" in run.stdout


@pytest.mark.parametrize("verb", [command.callback.__name__ for command in cli.app.registered_commands])
def test_every_verb_shows_an_example(verb, monkeypatch, capsys):
    code, out, _ = luthier(monkeypatch, capsys, verb, "--help")
    assert code == 0 and "Example" in out and f"luthier {verb}" in out
