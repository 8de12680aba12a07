"""The report's words about one head are true: its numbers are those of the model with the head replaced by hand."""

import re

import pytest
import torch

from circuits import Circuit, Head, ablation, evaluate, load, mean_activations, pocket, rewrite
from circuits.files import read_json
from interventions.cli_head import head_section, save_head

from models import TokenTask, shared_tiny

EVIL = "</script><script>document.title='owned'</script>"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder, model = tmp_path_factory.mktemp("run"), load("pocket")
    task = pocket.sentiment_task("english").balanced(12)
    scores = ablation(model, task, progress=False)
    save_head(model, task, scores, scores.top(3), folder)
    return folder, model, task, scores


def test_what_is_lost_is_what_the_model_loses(run):
    folder, model, task, scores = run
    head, mean = scores.rank()[0], mean_activations(model, task)

    def silence(z, layer):
        z = z.clone()
        z[:, :, head.head] = mean[layer, head.head]
        return z

    before = evaluate(model, task).margin
    with rewrite(model, "z", silence, layers=[head.layer]):
        after = evaluate(model, task).margin
    ((title, items),) = head_section(folder).items()
    assert title == f"One head: {head}"
    assert f"from {before.mean():+.2f} to {after.mean():+.2f} on average" in items[0]
    assert f"({(after.mean() - before.mean()) / before.mean():+.0%})" in items[0]
    assert f"falls in {int((after < before).sum())} of 12" in items[0]
    lost = (before - after)[torch.tensor([label == "bad" for label in task.labels])].mean()
    assert f"bad {lost:+.2f}" in items[0].split("by right answer: ")[1]
    assert f"in {int(((before > 0) & (after <= 0)).sum())} it is no longer above zero" in items[0]


def test_examples_are_ranked_and_name_the_words_the_head_works_at_and_looks_at(run):
    folder, model, task, scores = run
    saved = read_json(folder / "head.json")
    lost = [example["margin"] - example["without"] for example in saved["examples"]]
    assert len(lost) == 12 and lost == sorted(lost, reverse=True)
    assert sorted(lost) == pytest.approx(sorted(saved["effects"]), abs=1e-5)
    first, head = saved["examples"][0], scores.rank()[0]
    tokens = torch.tensor([model.tokenizer(task.prompt(" ".join(first["words"][1:]).split(" |")[0], model)).input_ids])
    hf = load("pocket").hf
    hf.set_attn_implementation("eager")
    pattern = hf(tokens, output_attentions=True).attentions[head.layer][0, head.head]
    assert first["looks"] == pytest.approx(pattern[first["place"]].tolist(), abs=1e-4)
    *_, sentence, _, figure, rows = head_section(folder)[f"One head: {head}"]
    read = sum(example["place"] == example["read"] for example in saved["examples"])
    assert re.search(rf"In {max(read, 12 - read)} of 12 examples", sentence)
    best = first["words"][int(torch.tensor(first["looks"]).argmax())]
    assert rows[0]["looks at"] == f"{best} ({max(first['looks']):.2f})" and len(rows) == 4
    assert rows[0]["works at"] == first["words"][first["place"]]
    assert rows[-1]["margin"] - rows[-1][f"without {head}"] == pytest.approx(min(lost))
    cells = figure.data[0].z
    assert cells[divmod(first["place"], cells.shape[1])] == pytest.approx(max(first["values"], key=abs), abs=1e-4)


def test_words_are_shown_as_text(run, tmp_path):
    import json

    import viz

    saved = read_json(run[0] / "head.json")
    for example in saved["examples"]:
        example["words"][1], example["answer"] = EVIL, EVIL
    (tmp_path / "head.json").write_text(json.dumps(saved))
    page = viz.report(tmp_path / "page.html", head_section(tmp_path)).read_text()
    assert "<script>document" not in page and "&lt;/script&gt;" in page


def test_models_without_patterns_or_words_and_runs_without_a_circuit(tmp_path):
    model, task = shared_tiny("bert-classifier"), TokenTask()
    scores = ablation(model, task, progress=False)
    save_head(model, task, scores, Circuit([], 3, 4), tmp_path)
    assert head_section(tmp_path) == {}
    save_head(model, task, scores, Circuit([Head(1, 1)], 3, 4), tmp_path)
    ((_, items),) = head_section(tmp_path).items()
    assert "looks at" not in items[-1][0] and "attention" not in items[1] and "a1.h1" in items[0]
