"""`luthier align` and its figure: true runs on the pocket model, bad input in one line."""

import json

import pytest
import torch

from circuits import load
from interventions import aisp, rowwise
from viz import decoding

from command import luthier

PROMPTS = ["the food was", "tonight , the train was"]
RULE = "def words(prompt, response):\n    return len(set(response.split()))\n\ndef length(p, r):\n    return -len(r)\n"


@pytest.fixture(scope="module")
def result():
    reward = rowwise(lambda _p, r: float(len(set(r.split()))))
    return aisp(load("pocket"), PROMPTS, reward, n=6, iterations=4, horizon=8, progress=False)


def test_align_writes_responses_rounds_and_a_page(tmp_path, monkeypatch, capsys, result):
    (tmp_path / "rule.py").write_text(RULE)
    arguments = ["align", "--prompt", PROMPTS[0], "--prompt", PROMPTS[1], "--reward", f"python={tmp_path / 'rule.py'}:words",
                 "--n", 6, "--iterations", 4, "--horizon", 8, "--out", tmp_path / "run"]  # fmt: skip
    code, out, err = luthier(monkeypatch, capsys, *arguments, "--json")
    assert code == 0, err
    printed = json.loads(out)
    assert [row["response"] for row in printed["responses"]] == result.responses  # the same run as in Python
    assert printed["samples"] == 48
    assert json.loads((tmp_path / "run" / "responses.json").read_text()) == printed["responses"]
    from circuits.files import load_tensors

    tensors, meta = load_tensors(tmp_path / "run" / "rounds")
    assert torch.equal(tensors["best"][:, -1], torch.tensor([row["reward"] for row in printed["responses"]]))
    assert meta["prompts"] == PROMPTS
    page = (tmp_path / "run" / "report.html").read_text()
    assert "effective sample size" in page and "luthier align --prompt" in page and "transformer-lens" in page


def test_align_compares_with_the_baselines(tmp_path, monkeypatch, capsys):
    (tmp_path / "rule.py").write_text(RULE)
    (tmp_path / "prompts.csv").write_text("start\nthe food was\nthe film\n")
    arguments = ["align", "--data", tmp_path / "prompts.csv", "--text", "start", "--reward", f"python={tmp_path / 'rule.py'}:words",
                 "--heldout", "likelihood=pocket", "--compare", "--n", 4, "--iterations", 2, "--horizon", 6,
                 "--out", tmp_path / "run"]  # fmt: skip
    code, out, err = luthier(monkeypatch, capsys, *arguments)
    assert code == 0, err
    assert "best-of-n, equal samples" in out and "AISP" in out and "held-out reward, AISP minus best-of-n" in out
    rows = json.loads((tmp_path / "run" / "comparison.json").read_text())["rows"]
    assert {row["method"] for row in rows} >= {
        "AISP",
        "greedy",
        "best-of-n, equal seconds",
        "ARGS-style, equal samples",
    }


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--prompt", "the", "--reward", "beauty=yes"], "--reward 'beauty=yes'; expected classifier=MODEL"),
        (["--prompt", "the", "--reward", "beauty"], "--reward 'beauty'; expected classifier=MODEL"),
        (["--prompt", "the", "--reward", "python=no.py:f"], "no file 'no.py'; expected python=FILE.py:FUNCTION"),
        (["--prompt", "the", "--reward", "python={rule}:beauty"], "has no function 'beauty'"),
        (["--reward", "likelihood=pocket"], "give prompts with --prompt TEXT"),
        (["--data", "{data}", "--reward", "likelihood=pocket"], "has no column 'prompt'; it has start"),
        (["--prompt", "the", "--reward", "likelihood=pocket", "--alpha", "2"], "alpha = 2.0 must be in [0, 1]"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(arguments, message, tmp_path, monkeypatch, capsys):
    (tmp_path / "rule.py").write_text(RULE)
    (tmp_path / "data.csv").write_text("start\nthe food was\n")
    filled = [a.format(rule=tmp_path / "rule.py", data=tmp_path / "data.csv") for a in arguments]
    code, _, err = luthier(monkeypatch, capsys, "align", *filled, "--out", tmp_path / "run")
    last = err.strip().splitlines()[-1]  # transformers' loading bar may come before it
    assert code == 2 and last.startswith("luthier: ") and message in last and "Traceback" not in err
    assert not (tmp_path / "run").exists()


def test_figure_shows_the_numbers_of_the_result(result):
    figure = decoding(result)
    lines = {trace.name: trace for trace in figure.data if trace.fill is None}
    assert set(lines) == {"best so far", "round's maximum", "round's mean", "ESS", "|u|"}
    assert list(lines["best so far"].y) == pytest.approx(result.history["best"].mean(0).tolist())
    assert list(lines["ESS"].y) == pytest.approx(result.history["ess"].mean(0).tolist())
    assert list(lines["|u|"].y) == pytest.approx(result.perturbation_norm().mean(0).tolist())
    assert list(lines["ESS"].x) == [1, 2, 3, 4]


def test_figure_of_something_else_is_refused():
    with pytest.raises(ValueError, match="has no rounds to show; expected the result of aisp"):
        decoding({"not": "a result"})
