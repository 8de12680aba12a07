import json
from functools import partial

import pytest

import command


@pytest.fixture
def luthier(monkeypatch, capsys):
    """Exit code, stdout, stderr of `luthier embed ...`."""
    return partial(command.luthier, monkeypatch, capsys, "embed")


def test_fit_then_apply_answers_zero_shot_queries(luthier, tmp_path):
    few = ["--n-prompts", 10, "--steps", 60, "--n-shots", 5]
    code, out, err = luthier("fit", "--data", "pocket:uppercase", *few, "--out", tmp_path / "up", "--json")
    assert code == 0, err
    fitted = json.loads(out)
    assert fitted["validation_nll"] < 0.5 * fitted["start_nll"] and len(fitted["heads"]) == 10
    files = {path.name for path in (tmp_path / "up").iterdir()}
    assert files == {f"{stem}.{end}" for stem in ("embedding", "selection") for end in ("json", "safetensors")} | {
        "run.json"
    }

    from circuits import pocket

    words = [source for source, _ in pocket.fewshot_task("uppercase").pairs[:2]]
    scored = ["--query", words[0], "--query", words[1], "--data", "pocket:uppercase", "--max-new-tokens", 3]
    code, out, err = luthier("apply", "--from", tmp_path / "up", *scored, "--json")
    assert code == 0, err
    applied = json.loads(out)
    assert [row["answer"] for row in applied["answers"]] == [word.upper() for word in words]
    clean, injected = applied["scores"]
    assert (clean["model"], injected["model"]) == ("zero-shot", "injected")
    assert injected["exact"] > 0.9 > 0.3 > clean["exact"] and injected["nll"] < clean["nll"]


def test_compare_reads_files_and_prints_one_row_per_method(luthier, tmp_path):
    from circuits import pocket

    rows = [{"input": a, "output": b} for a, b in pocket.fewshot_task("plural").pairs]
    (tmp_path / "plural.json").write_text(json.dumps(rows))
    few = ["--n-shots", 5, "--max-new-tokens", 3, "--methods", "zero-shot,icl", "--out", tmp_path / "rows.json"]
    code, out, err = luthier("compare", "--data", tmp_path / "plural.json", *few)
    assert code == 0, err
    assert [line.split("|")[1].strip() for line in out.splitlines()] == ["method", "---", "zero-shot", "icl"]
    saved = json.loads((tmp_path / "rows.json").read_text())
    assert saved[1]["first"][0] > saved[0]["first"][0] and saved[1]["prompt_tokens"] > saved[0]["prompt_tokens"]


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["fit", "--data", "nothing.json", "--out", "x"], "no file 'nothing.json'"),
        (["fit", "--data", "pocket:nothing", "--out", "x"], "unknown mapping 'nothing'"),
        (["apply", "--from", "nowhere"], "give --query INPUT or --data FILE"),
        (["apply", "--from", "nowhere", "--query", "a"], "expected the --out folder of `luthier embed fit`"),
        (["compare", "--data", "pocket:plural", "--methods", "magic"], "unknown method 'magic'"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(luthier, arguments, text):
    code, _, err = luthier(*arguments)
    assert code == 2 and text in err and err.count("\n") == 1


def test_help_shows_a_worked_example(luthier):
    for verb in ("fit", "apply", "compare"):
        code, out, _ = luthier(verb, "--help")
        assert code == 0 and f"luthier embed {verb} --" in " ".join(out.split())
