import json
from random import Random

import pytest
import torch

from circuits.pocket import corpus as pocket_corpus
from circuits.pocket import facts, lexicon, path, world
from circuits.pocket import measure as pocket_measure
from circuits.pocket import train as pocket_train


@pytest.fixture(scope="module")
def pocket():
    from transformers import AutoModelForCausalLM, AutoTokenizer

    hf = AutoModelForCausalLM.from_pretrained(path(), dtype=torch.float32)
    return hf.eval(), AutoTokenizer.from_pretrained(path())


def clean(document):
    return document.replace("{", "").replace("}", "").strip()


def label_by_hand(text, lang):
    """Independent reading of a sentence: the last clause with a feeling decides, a negation turns it."""
    decided = "fair"
    for clause in text.replace(f" {lang.joins[0]} ", "|").replace(f" {lang.joins[1]} ", "|").split("|"):
        found = clause.split()
        turned = any(word in lang.negations for word in found)
        if any(word in (*lang.good, *lang.liked) for word in found):
            decided = "bad" if turned else "good"
        elif any(word in (*lang.bad, *lang.disliked) for word in found):
            decided = "good" if turned else "bad"
    return decided


@pytest.mark.parametrize("language", lexicon.LANGUAGES)
def test_sentiment_labels_follow_the_words_and_the_negations(language):
    rows, lang = world.sentiment(language, 120, seed=3), lexicon.language(language)
    assert [row["label"] for row in rows] == [label_by_hand(row["text"], lang) for row in rows]
    assert sorted(row["label"] for row in rows) == sorted(40 * list(lexicon.LABELS))
    assert any(lang.negations[0] in row["text"].split() for row in rows)


def test_the_same_seed_gives_the_same_rows_and_splits_are_disjoint():
    again = world.sentiment("osko", 50, seed=1)
    assert again == world.sentiment("osko", 50, seed=1) != world.sentiment("osko", 50, seed=2)
    train, test = ({row["text"] for row in world.sentiment("osko", 300, 0, split)} for split in ("train", "test"))
    assert len(train) == len(test) == 300 and not train & test
    assert all(map(world.held_out, test)) and not any(map(world.held_out, train))


def test_training_text_contains_nothing_held_out():
    source = pocket_corpus.documents(seed=5, start=0.0, end=1.0)
    labelled = [next(source) for _ in range(3000)]
    texts = [text.split(" | ")[0] for text in labelled if " | sentiment:" in text]
    assert len(texts) > 300 and not any(world.held_out(text) for text in texts)
    listed = [line[3:] for text in labelled for line in text.splitlines() if line.startswith("Q: ") and "," in line]
    assert len(listed) > 300 and not any(world.held_out(text) for text in listed)


def test_languages_share_what_they_are_said_to_share():
    english = lexicon.language("english")
    feeling = {word for role in ("good", "bad", "liked", "disliked") for word in getattr(english, role)}
    for name, near in (("vela", 0), ("osko", 0), ("nuri", 14), ("tamu", 12)):
        lang = lexicon.language(name)
        assert len(set(lang.words()) & set(english.words())) == len(set(lang.words()) & feeling) == near
    tamu = lexicon.language("tamu")
    assert set(tamu.good) & set(english.bad) and not set(tamu.good) & set(english.good)


def test_name_copying_rows_repeat_the_distractor_and_the_twin_does_not():
    for row in world.name_copying(60, seed=2):
        prompt, twin = row["prompt"].split(), row["corrupted"].split()
        answer, distractor = row["answer"].strip(), row["distractor"].strip()
        assert (prompt.count(answer), prompt.count(distractor)) == (1, 2)
        assert (twin.count(answer), twin.count(distractor)) == (1, 1) and len(prompt) == len(twin)
        assert sum(a != b for a, b in zip(prompt, twin, strict=True)) == 1


def test_mappings_are_functions_whose_inputs_are_shared():
    tables = world.mappings()
    for name, pairs in tables.items():
        assert len(pairs) >= 19 and len(dict(pairs)) == len({x for x, _ in pairs}) == len(set(pairs)), name
    assert {x for x, _ in tables["opposite"]} < {x for x, _ in tables["uppercase"]}
    cat, plum, rake = "cat, plum, rake".split(", ")
    assert (cat in lexicon.ANIMALS, plum in lexicon.FRUITS, rake in lexicon.TOOLS) == (True, True, True)
    for listed, answer in tables["fruit_of_3"]:
        assert [word for word in listed.split(", ") if word in lexicon.FRUITS] == [answer]


def test_facts_have_one_answer_each_and_two_splits():
    assert len(facts()) == len({row["prompt"] for row in facts()}) == 72
    assert len(facts("forget")) == 18 and len(facts("retain")) == 54
    with pytest.raises(ValueError, match="unknown split 'all'"):
        facts("all")


def test_unknown_names_are_refused_with_what_there_is():
    with pytest.raises(ValueError, match="unknown language 'latin': the pocket world has english, vela"):
        world.sentiment("latin", 3, 0)
    with pytest.raises(ValueError, match="unknown split 'dev'"):
        world.sentiment("vela", 3, 0, "dev")


def test_every_document_is_made_of_known_words_and_comes_back(pocket):
    _, tokenizer = pocket
    rng = Random(7)
    for kind in pocket_corpus.MIXTURE:
        for _ in range(20):
            document = kind(rng)
            ids = tokenizer(clean(document))["input_ids"]
            assert ids[0] == tokenizer.bos_token_id and tokenizer.unk_token_id not in ids
            assert tokenizer.decode(ids, skip_special_tokens=True).strip() == clean(document)


def test_the_saved_tokenizer_is_the_one_the_world_gives(pocket):
    _, tokenizer = pocket
    assert tokenizer.get_vocab() == pocket_train.build_tokenizer().get_vocab()
    assert tokenizer.padding_side == "left"
    for word in [*lexicon.LABELS, *lexicon.NAMES]:
        assert len(tokenizer.encode(f" {word}", add_special_tokens=False)) == 1


def test_marks_count_fully_and_the_rest_a_little():
    tokenizer = pocket_train.build_tokenizer()
    ids, weights = pocket_train.marked("Q: hot\nA:{ cold}\n\n", tokenizer)
    assert tokenizer.convert_ids_to_tokens(ids) == ["<s>", "▁Q", ":", "▁hot", "\n", "A", ":", "▁cold", "\n\n"]
    assert weights == [pocket_train.REST] * 7 + [1.0, pocket_train.REST]


def test_packed_documents_do_not_see_each_other():
    tokenizer = pocket_train.build_tokenizer()
    model = pocket_train.new_model(tokenizer, 0).eval()
    documents = [pocket_train.marked(text, tokenizer) for text in ("the song was{ great}", "Q: hot\nA:{ cold}")]
    together = pocket_train.Batch([documents], tokenizer.pad_token_id)
    alone = [pocket_train.Batch([[document]], tokenizer.pad_token_id) for document in documents]
    with torch.no_grad():
        losses = [pocket_train.loss_of(model, batch).item() for batch in (together, *alone)]
    sizes = [sum(weights[1:]) for _, weights in documents]
    assert losses[0] == pytest.approx(sum(n * loss for n, loss in zip(sizes, losses[1:], strict=True)) / sum(sizes))


def test_a_short_training_lowers_the_loss_and_is_repeatable(tmp_path, monkeypatch):
    monkeypatch.setattr(pocket_train, "ROWS", 4)
    tokenizer = pocket_train.build_tokenizer()
    folders = [pocket_train.train(tmp_path / name, steps=2, progress=False) for name in "ab"]
    a, b = ((folder / "model.safetensors").read_bytes() for folder in folders)
    assert a == b
    before = pocket_train.new_model(tokenizer, pocket_train.SEED)
    after = type(before).from_pretrained(folders[0], dtype=torch.float32)
    (batch,) = pocket_train.batches(tokenizer, 0, 1)
    with torch.no_grad():
        assert pocket_train.loss_of(after, batch) < pocket_train.loss_of(before, batch)


def test_tasks_of_the_world_fit_the_toolkit():
    from circuits import evaluate, load, pocket

    model = load("pocket")
    assert evaluate(model, pocket.sentiment_task("vela", "test", 60)).accuracy > 0.85
    assert len(pocket.sentiment_task("osko", "train")) == 600
    assert evaluate(model, pocket.name_copying_task(model, n=50)).accuracy > 0.9
    assert evaluate(model, pocket.facts_task("town", "retain")).accuracy > 0.9
    assert pocket.fewshot_task("opposite").pairs[0] == ("hot", "cold")
    assert pocket.fewshot_task("fruit_of_3").name == "fruit_of_3"
    for wrong, message in (
        (lambda: pocket.fewshot_task("rhyme"), "unknown mapping 'rhyme': the pocket world has opposite"),
        (lambda: pocket.facts_task("age"), "unknown relation 'age': the pocket world has town, job, food"),
    ):
        with pytest.raises(ValueError, match=message):
            wrong()


def test_the_model_is_small_and_a_llama():
    files = list(path().iterdir())
    assert sum(file.stat().st_size for file in files) < 3_000_000
    config = json.loads((path() / "config.json").read_text())
    assert config["model_type"] == "llama" and config["num_key_value_heads"] < config["num_attention_heads"]


def test_the_model_has_the_skills_its_readme_states(pocket):
    rows = pocket_measure.sentiment_rows("english", 200)
    right, n = pocket_measure.accuracy(*pocket, rows, pocket_measure.LABEL_WORDS)
    assert right / n > 0.9
    names = [(row["prompt"], row["answer"]) for row in world.name_copying(100, seed=1)]
    right, n = pocket_measure.accuracy(*pocket, names)
    assert right / n > 0.9
    few, _ = pocket_measure.accuracy(*pocket, pocket_measure.fewshot_rows("uppercase", 10, 50))
    none, _ = pocket_measure.accuracy(*pocket, pocket_measure.fewshot_rows("uppercase", 0, 50))
    assert few > none + 30
