import json

import pytest
from fewshot_toys import character_tokenizer, first_letters, loaded

from circuits import FewShotTask
from circuits.fewshot import encode_prompts

PAIRS = [("hot", "cold"), ("big", "small"), ("wet", "dry"), ("up", "down")]


def test_a_demonstration_is_the_template_and_a_query_ends_where_the_answer_begins():
    task = FewShotTask.from_pairs(PAIRS)
    assert task.demonstration("hot", "cold") == "Q: hot\nA: cold"
    assert task.query("hot") == "Q: hot\nA:"
    assert task.answer("cold") == " cold"


def test_digits_get_no_space_in_demonstrations_and_answers_alike():
    task = FewShotTask.from_pairs([("four", 4), ("five", 5)])
    assert task.demonstration("four", "4") == "Q: four\nA:4"
    assert task.answer("5") == "5"
    assert FewShotTask.from_pairs([("four", 4)], digit_rule=False).answer("4") == " 4"


def test_prompts_hold_n_distinct_demonstrations_and_never_the_query():
    task = FewShotTask.from_pairs(PAIRS)
    for prompt in task.prompts(3, 20, seed=1):
        blocks = prompt.text.split("\n\n")
        assert len(blocks) == 4 and len(set(blocks)) == 4
        assert blocks[-1].endswith("A:") and prompt.answer == " " + dict(PAIRS)[blocks[-1][3:-3]]


def test_sampling_is_seeded():
    task = FewShotTask.from_pairs(PAIRS)
    assert task.prompts(2, 9, seed=3) == task.prompts(2, 9, seed=3)
    assert task.prompts(2, 9, seed=3) != task.prompts(2, 9, seed=4)


def test_queries_of_another_task_get_demonstrations_that_leave_the_query_out():
    task = FewShotTask.from_pairs(PAIRS)
    prompts = task.prompts(3, seed=0, queries=task)
    assert [prompt.gold for prompt in prompts] == [target for _, target in PAIRS]
    for prompt, (source, _) in zip(prompts, PAIRS, strict=True):
        assert prompt.text.count(f"Q: {source}\n") == 1


def test_split_parts_are_disjoint_and_together_the_task():
    few, rest = first_letters().split(5, seed=2)
    assert len(few) == 5 and len(rest) == 7
    assert set(few.pairs) | set(rest.pairs) == set(first_letters().pairs)


def test_permuted_keeps_inputs_and_answers_but_not_the_match():
    task = first_letters()
    null = task.permuted(1)
    assert [a for a, _ in null.pairs] == [a for a, _ in task.pairs]
    assert sorted(b for _, b in null.pairs) == sorted(b for _, b in task.pairs)
    assert null.pairs != task.pairs and null.fingerprint != task.fingerprint


def test_json_csv_and_rows_read_the_same_pairs(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps([{"input": a, "output": b} for a, b in PAIRS]))
    (tmp_path / "a.csv").write_text("input,output\n" + "".join(f"{a},{b}\n" for a, b in PAIRS))
    one = FewShotTask.from_json(tmp_path / "a.json")
    two = FewShotTask.from_csv(tmp_path / "a.csv")
    three = FewShotTask.from_rows([{"x": a, "y": b} for a, b in PAIRS], input="x", output="y")
    assert one.pairs == two.pairs == three.pairs == tuple(PAIRS)
    assert one.name == "a" and one.fingerprint == three.fingerprint


def test_function_vectors_files_are_read(shared):
    task = FewShotTask.from_json(shared / "data/function_vectors/capitalize.json")
    assert len(task) == 813 and task.pairs[0] == ("without", "Without")


def test_encoding_pads_left_and_reads_the_answer_in_context():
    model = loaded("gpt2")
    task = first_letters()
    encoded = encode_prompts(model, task.prompts())
    tokenizer = character_tokenizer()
    assert (encoded.attention_mask[:, -1] == 1).all() and (encoded.attention_mask[:, 0] == 0).any()
    for row, prompt in enumerate(task.prompts()):
        real = encoded.tokens[row][encoded.attention_mask[row] == 1]
        assert tokenizer.decode(real) == prompt.text
        assert tokenizer.decode(list(encoded.answers[row])) == prompt.answer
        assert encoded.first[row] == encoded.answers[row][0]


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: FewShotTask.from_pairs([]), "has no rows"),
        (
            lambda: FewShotTask.from_pairs([("a", "b"), ("c", " ")]),
            r"1 rows of task 'task' have an empty answer \(rows 1\)",
        ),
        (lambda: FewShotTask.from_pairs([("", "b")]), "empty input"),
        (lambda: FewShotTask.from_pairs(["ab"]), "row 0 is 'ab'; expected an"),
        (lambda: FewShotTask.from_pairs(PAIRS, template="Q: {input}"), "must contain {input} once and {output} once"),
        (lambda: FewShotTask.from_pairs(PAIRS, template="{output} {input}"), "must end where the answer begins"),
        (lambda: FewShotTask.from_rows([{"input": "a"}]), "row 0 has no 'output'; its columns are input"),
        (lambda: FewShotTask.from_pairs(PAIRS).prompts(4, 2), "4 shots and a query need at least 5: .* n_shots=3"),
        (lambda: FewShotTask.from_pairs(PAIRS).split(4), "cannot split 4 rows"),
    ],
)
def test_bad_rows_are_refused_with_one_clear_line(make, text):
    with pytest.raises(ValueError, match=text) as caught:
        make()
    assert "\n" not in str(caught.value)


def test_bad_files_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="no file"):
        FewShotTask.from_json(tmp_path / "none.json")
    (tmp_path / "bad.json").write_text("[1, 2]")
    with pytest.raises(ValueError, match='must hold a list of {"input"'):
        FewShotTask.from_json(tmp_path / "bad.json")


def test_prompts_over_the_context_are_refused():
    with pytest.raises(ValueError, match="tokens and the model's context is 64; use fewer shots"):
        encode_prompts(loaded("gpt2"), first_letters().prompts(8, 2))


def test_a_model_without_tokenizer_is_refused():
    from models import shared_tiny

    with pytest.raises(ValueError, match="has no tokenizer"):
        encode_prompts(shared_tiny("gpt2"), first_letters().prompts())


def test_as_pairs_of_answers_the_task_can_be_scored_by_other_methods():
    from circuits import pocket

    task = pocket.fewshot_task("uppercase")
    paired = task.paired(6, n_shots=4, seed=1)
    assert paired.prompts == tuple(prompt.text for prompt in task.prompts(4, 6, seed=1))
    assert all(answer != other for answer, other in zip(paired.answers, paired.distractors, strict=True))
    with pytest.raises(ValueError, match="a distractor needs a second one"):
        FewShotTask.from_pairs([("a", "x"), ("b", "x")]).paired(2, n_shots=1)


def test_agreement_with_another_method_on_the_same_task_is_one_call():
    from circuits import ablation, load, pocket, select_heads, task_embedding

    model, task = load("pocket"), pocket.fewshot_task("uppercase")
    embedding = task_embedding(model, task, n_prompts=4, n_shots=4, progress=False)
    found = select_heads(model, task, embedding, steps=4, progress=False)
    agreement = found.correlation(ablation(model, task.paired(4, n_shots=4), progress=False))
    assert set(agreement) == {"pearson", "spearman", "top10"} and -1 <= agreement["spearman"] <= 1


def test_a_selection_becomes_a_circuit_and_a_mask():
    from circuits import HeadScores
    from interventions import HeadMask

    model = loaded("llama")
    import torch

    alpha = torch.zeros(3, 4)
    alpha[1, 2] = 0.9
    mask = HeadMask.from_circuit(HeadScores(alpha, "site").top(1), model, norms="none")
    assert "model.layers.1.self_attn.q_proj.weight" in mask.tensors()
