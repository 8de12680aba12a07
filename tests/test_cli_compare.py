"""`luthier tune --compare` on folders of splits."""

import csv

import pytest
from test_tuning import toy, words_tokenizer

from interventions.cli_compare import run_comparison, splits

from models import tiny

OPTIONS = dict(text="text", label="label", template="{text} {label}", label_words={"good": "good", "bad": "bad"})


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("compare")
    hf, tokenizer = tiny("llama"), words_tokenizer()
    hf.save_pretrained(root / "model")
    tokenizer.save_pretrained(root / "model")
    for name, flip in (("one", False), ("two", True)):
        (root / name).mkdir()
        for i, (split, n) in enumerate((("train", 40), ("valid", 12), ("test", 20))):
            task = toy(n, seed=i, flip=flip)
            with open(root / name / f"{split}.csv", "w", newline="") as file:
                csv.writer(file).writerows([("text", "label"), *zip(task.texts, task.labels, strict=True)])
    return root


def test_writes_a_table_and_resumes(folders):
    out = folders / "out"
    how = dict(arms=("norms", "tfidf"), n=8, seeds=(0,), epochs=1, evals={"again": str(folders / "one" / "test.csv")})
    text = run_comparison(str(folders / "model"), folders / "one", folders / "two", out, OPTIONS, **how)
    assert text.startswith("# two: 8 examples, 1 seeds, source one") and "| tfidf |" in text and "again" in text
    assert (out / "comparison.md").read_text() == text
    page = (out / "comparison.html").read_text()
    assert "Gained on two, kept on one" in page and "plot-0" in page
    stamp = (out / "results.jsonl").read_text()
    assert run_comparison(str(folders / "model"), folders / "one", folders / "two", out, OPTIONS, **how) == text
    assert (out / "results.jsonl").read_text() == stamp


def test_missing_folders_and_splits_are_named(folders, tmp_path):
    with pytest.raises(FileNotFoundError, match="no folder .*nowhere.*expects folders with train, valid and test"):
        splits(tmp_path / "nowhere", None, OPTIONS)
    with pytest.raises(FileNotFoundError, match="no train.csv .* --compare needs all three"):
        splits(tmp_path, None, OPTIONS)


def test_the_verb_checks_its_options(folders):
    from typer.testing import CliRunner

    from interventions.cli import app

    arguments = ["tune", "--compare", "--data", str(folders / "two"), "--out", str(folders / "x")]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code != 0 and "give --model NAME and --source FOLDER" in f"{result.output}{result.exception}"
