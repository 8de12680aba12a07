"""Tasks: text to tokens, read-outs and label columns; batched equals one by one; every bad input has one clear line."""

import json
from dataclasses import replace

import pytest
import torch

from circuits import Circuit, LabelledTask, PairedTask, evaluate, load
from circuits.text import read_rows

from models import CAUSAL, FAMILIES, tiny

WORDS = "good bad fine the a film was song bird cat sings runs well badly Mary Tom Ann gave ball to and it is so very".split()
TEXTS = ["the film was well", "a song", "the bird sings so very badly and it runs", "it is a cat"]
LABELS = ["good", "bad", "bad", "fine"]


def word_tokenizer(mask=False):
    """A real fast tokenizer over whole words; ` Mary` is one token, `unseen` is unknown, `goodbad` is two pieces."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = ["[PAD]", "[BOS]", "[EOS]", "[UNK]", "[MASK]"]
    vocabulary = {word: i for i, word in enumerate(special + WORDS + ["##" + w for w in WORDS] + ["|", ":", "?"])}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        bos_token="[BOS]",
        eos_token="[EOS]",
        unk_token="[UNK]",
        mask_token="[MASK]",
    )


def model_of(family):
    hf = tiny(family)
    if hf.config.get_text_config().vocab_size < 61:
        raise AssertionError
    return load(hf, word_tokenizer())


def task(**options):
    rows = [{"text": text, "label": label} for text, label in zip(TEXTS, LABELS, strict=True)]
    return LabelledTask.from_rows(rows, **{"template": "{text} |{label}", "name": "films", **options})


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", FAMILIES)
def test_batched_equals_one_by_one(family, side):
    model, t = model_of(family), task(padding_side=side)
    together, encoded = evaluate(model, t), t.encode(model)
    for i in range(len(t)):
        alone = evaluate(model, t.select([i]))
        torch.testing.assert_close(together.margin[i : i + 1], alone.margin, atol=1e-4, rtol=1e-4)
        assert together.predictions[i] == alone.predictions[0]
    assert evaluate(model, t, batch_size=3).margin.allclose(together.margin, atol=1e-4)
    assert encoded.attention_mask.sum(-1).tolist() == [len(row) for row in t._token_rows(model)[0]]


def test_the_margin_is_the_right_answer_minus_the_mean_of_the_others():
    model, t = model_of("llama"), task()
    encoded = t.encode(model)
    ids = model.tokenizer.convert_tokens_to_ids(["bad", "fine", "good"])
    assert encoded.columns.tolist() == ids and encoded.gold.tolist() == [2, 0, 0, 1]
    with torch.no_grad():
        logits = model(torch.tensor([model.tokenizer("a song |").input_ids]))[0, -1, ids]
    expected = logits[0] - (logits[1] + logits[2]) / 2
    assert evaluate(model, t).margin[1].item() == pytest.approx(expected.item(), abs=1e-4)
    assert evaluate(model, t).predictions[1] == logits.argmax()


def test_a_masked_model_reads_at_the_mask():
    model, t = (
        model_of("bert"),
        task(template="it was{label} : {text}", label_words={"good": " good", "bad": " bad", "fine": " fine"}),
    )
    encoded = t.encode(model)
    mask_id = model.tokenizer.mask_token_id
    assert (
        encoded.tokens[torch.arange(4), encoded.readout] == mask_id
    ).all() and encoded.readout.unique().tolist() == [2]


def test_a_classifier_reads_its_own_classes():
    model, t = model_of("bert-classifier"), task()
    model.hf.config.label2id = {"good": 2, "fine": 0, "bad": 1}
    assert t.encode(model).columns.tolist() == [1, 0, 2]  # bad, fine, good
    model.hf.config.label2id = {"yes": 0, "no": 1, "maybe": 2}
    with pytest.raises(
        ValueError, match=r"the classifier has no class 'bad', 'fine', 'good'; its classes are yes, no, maybe"
    ):
        t.encode(model)


def test_label_words_of_several_tokens_are_named_with_their_pieces():
    t = task(label_words={"good": " goodbad", "bad": " bad", "fine": " unseen"})
    message = r"not one token: ' goodbad' \('good' \+ '##bad'\), ' unseen' \(not in the vocabulary\); choose words"
    with pytest.raises(ValueError, match=message):
        t.encode(model_of("llama"))
    with pytest.raises(ValueError, match="' good' and ' good' are the same token"):
        task(label_words={"good": " good", "bad": " good", "fine": " fine"}).encode(model_of("llama"))


def test_long_text_is_cut_only_on_request_and_the_template_survives():
    model = model_of("llama")
    with pytest.raises(
        ValueError,
        match=r"1 of 4 prompts are longer than 8 tokens \(the longest has 10\); shorten them or set truncate",
    ):
        task(max_length=8).encode(model)
    with pytest.warns(UserWarning, match="1 of 4 texts were cut to fit 8 tokens"):
        encoded = task(max_length=8, truncate=True).encode(model)
    assert encoded.truncated == 1 and encoded.tokens.shape[1] == 8
    assert model.tokenizer.decode(encoded.tokens[2]) == "the bird sings so very badly and |"
    with pytest.raises(ValueError, match="the template alone is longer than 1 tokens"):
        task(template="{text} | it was so{label}", max_length=1, truncate=True).encode(model)


def test_selection_is_seeded_disjoint_and_balanced():
    rows = [{"text": f"the film {i}", "label": "good" if i % 3 else "bad"} for i in range(30)]
    t = LabelledTask.from_rows(rows)
    a, b = t.split(20, seed=31)
    assert len(a) == 20 and len(b) == 10 and not set(a.texts) & set(b.texts)
    assert t.split(20, seed=31)[0] == a != t.split(20, seed=32)[0]
    balanced = t.balanced(12, seed=1)
    assert balanced.labels.count("good") == balanced.labels.count("bad") == 6
    assert t.balanced(12, seed=1) == balanced != t.balanced(12, seed=2)
    assert t[:3].texts == t.texts[:3] and t[:3].fingerprint != t.fingerprint == LabelledTask.from_rows(rows).fingerprint
    with pytest.raises(ValueError, match="15 examples of 'bad' are needed for a balanced 30, but there are 10"):
        t.balanced(30)
    with pytest.raises(ValueError, match="cannot split 30 examples into 30 and the rest"):
        t.split(30)


def test_correct_keeps_what_the_model_gets_right():
    model, t = model_of("llama"), task()
    said = [list(t.label_words)[i] for i in evaluate(model, t).predictions]
    other = ["bad" if label != "bad" else "good" for label in said]
    half = replace(t, labels=(said[0], other[1], said[2], other[3]))
    assert half.correct(model) == half.select([0, 2])
    wrong = half.select([1, 3])
    with pytest.raises(ValueError, match="gets no example of films right; tune it for competence first"):
        wrong.correct(model)


def test_macro_f1_by_hand():
    model, t = model_of("llama"), task()
    result = evaluate(model, t)
    f1 = []
    for label in range(3):
        hit = ((result.predictions == label) & (result.gold == label)).sum().item()
        total = (result.predictions == label).sum().item() + (result.gold == label).sum().item()
        f1 += [2 * hit / total] if total else []
    assert result.macro_f1 == pytest.approx(sum(f1) / len(f1))
    assert result.accuracy == (result.predictions == result.gold).float().mean().item()


PAIRS = [
    dict(
        prompt="Mary and Tom Tom gave the ball to",
        answer=" Mary",
        distractor=" Tom",
        corrupted="Mary and Tom Ann gave the ball to",
    ),
    dict(
        prompt="so Ann and Mary Ann gave it to",
        answer=" Mary",
        distractor=" Ann",
        corrupted="so Ann and Mary Tom gave it to",
    ),
]


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", CAUSAL)
def test_pairs_score_answer_against_distractor(family, side):
    model = model_of(family)
    t = PairedTask.from_rows(PAIRS, model, padding_side=side)
    encoded, result = t.encode(model), evaluate(model, t)
    for i, row in enumerate(PAIRS):
        ids = [model.tokenizer.convert_tokens_to_ids(row[k].strip()) for k in ("answer", "distractor")]
        with torch.no_grad():
            logits = model(torch.tensor([model.tokenizer(row["prompt"]).input_ids]))[0, -1, ids]
        assert result.margin[i].item() == pytest.approx((logits[0] - logits[1]).item(), abs=1e-4)
        assert (result.predictions[i] == result.gold[i]).item() == (logits[0] > logits[1]).item()
    assert encoded.corrupted is not None and encoded.corrupted.tokens.shape == encoded.tokens.shape
    assert encoded.candidates.sum(-1).tolist() == [2, 2]
    assert torch.equal(encoded.select([1]).corrupted.tokens, encoded.corrupted.tokens[1:])


def test_pairs_refuse_what_makes_no_sense():
    with pytest.raises(ValueError, match="paired tasks ask for the next token"):
        PairedTask.from_rows(PAIRS, model_of("bert"))
    with pytest.raises(ValueError, match="row 1 has the same answer and distractor"):
        PairedTask.from_rows([{**PAIRS[0], "distractor": " Mary"}], model_of("llama"))
    with pytest.raises(ValueError, match="row 1 has no column 'distractor'; it has: prompt, answer"):
        PairedTask.from_rows([{"prompt": "x", "answer": " Mary"}])
    with pytest.raises(
        ValueError, match=r"rows \[2\] have no 'corrupted' prompt and others do; give all rows one, or none"
    ):
        PairedTask.from_rows([PAIRS[0], {**PAIRS[1], "corrupted": None}])
    with pytest.raises(ValueError, match="has no tokenizer, so text cannot be read"):
        PairedTask.from_rows(PAIRS, load(tiny("llama")))


def test_files_of_every_kind_give_the_same_task(tmp_path):
    from datasets import Dataset

    rows = [{"text": text, "label": label} for text, label in zip(TEXTS, LABELS, strict=True)]
    (tmp_path / "a.csv").write_text("text,label\n" + "\n".join(f'"{r["text"]}",{r["label"]}' for r in rows))
    (tmp_path / "a.tsv").write_text("text\tlabel\n" + "\n".join(f"{r['text']}\t{r['label']}" for r in rows))
    (tmp_path / "a.json").write_text(json.dumps(rows))
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    made = [LabelledTask.from_csv(tmp_path / f"a.{kind}", name="x") for kind in ("csv", "tsv", "json", "jsonl")]
    made.append(LabelledTask.from_dataset(Dataset.from_list(rows), name="x"))
    assert all(m == made[0] for m in made) and made[0].texts == tuple(TEXTS)


def test_dataset_class_labels_become_their_names():
    from datasets import ClassLabel, Dataset, Features, Value

    features = Features({"text": Value("string"), "label": ClassLabel(names=["bad", "good"])})
    t = LabelledTask.from_dataset(Dataset.from_dict({"text": ["a", "b"], "label": [1, 0]}, features))
    assert t.labels == ("good", "bad")


def test_bad_files_and_columns_say_what_to_do(tmp_path):
    with pytest.raises(
        FileNotFoundError, match=r"no file 'absent.csv'; expected a CSV, JSON or JSONL file of examples"
    ):
        LabelledTask.from_csv("absent.csv")
    (tmp_path / "e.csv").write_text("text,label\n")
    with pytest.raises(ValueError, match="holds no examples; expected a header and at least one row"):
        LabelledTask.from_csv(tmp_path / "e.csv")
    (tmp_path / "c.csv").write_text("text,label\nhello,good\nbye,good\n")
    with pytest.raises(
        ValueError, match="row 1 has no column 'review'; it has: text, label. Name the column with text= or label="
    ):
        LabelledTask.from_csv(tmp_path / "c.csv", text="review")
    with pytest.raises(ValueError, match=r"only one label \('good'\); a task needs at least two to tell apart"):
        LabelledTask.from_csv(tmp_path / "c.csv")
    (tmp_path / "j.jsonl").write_text("{oops\n")
    with pytest.raises(ValueError, match="has a line that is not JSON"):
        read_rows(tmp_path / "j.jsonl")
    with pytest.raises(ValueError, match=r"template 'x' has no \{text\}"):
        task(template="x")
    with pytest.raises(ValueError, match=r"labels 'fine' have no label word; label_words names good, bad"):
        task(label_words={"good": " good", "bad": " bad"})


def test_braces_in_text_are_text():
    model = model_of("llama")
    t = LabelledTask.from_rows(
        [{"text": "a {label} song", "label": "good"}, {"text": "b", "label": "bad"}], template="{text} |{label}"
    )
    assert t.prompt(t.texts[0], model) == "a {label} song |"


def test_real_text_on_a_real_model(shared):
    model = load(shared / "models/nusantara-4m")
    words = {"positive": " baik", "negative": " buruk", "neutral": " biasa"}
    options = dict(template="{text} | sentimen:{label}", label_words=words)
    t = LabelledTask.from_csv(shared / "data/nusax/indonesian/valid.csv", **options)
    assert len(t) == 100 and t.name == "indonesian/valid" and t.labels.count("neutral") == 24
    assert evaluate(model, t, batch_size=32).margin.allclose(evaluate(model, t, batch_size=7).margin, atol=1e-4)
    with pytest.raises(ValueError, match=r"' negative' \('Ġneg' \+ 'ati' \+ 've'\)"):
        LabelledTask.from_csv(shared / "data/nusax/indonesian/valid.csv", template="{text} | sentimen:{label}").encode(
            model
        )


def test_a_circuit_of_another_model_is_refused():
    with pytest.raises(ValueError, match="the model has layers 0-2 and heads 0-3; use a circuit found on this model"):
        Circuit(["a5.h1"]).check(3, 4)


def test_trimmed_drops_padding_on_either_side_and_moves_the_readout():
    from circuits.encoding import Encoded

    mask = torch.tensor([[0, 0, 1, 1, 0], [0, 1, 1, 0, 0]])
    rest = (torch.tensor([3, 2]), torch.tensor([0]), torch.ones(2, 1), torch.zeros(2).long(), torch.zeros(2).long())
    short = Encoded(torch.arange(10).view(2, 5), mask, *rest).trimmed()
    assert short.tokens.tolist() == [[1, 2, 3], [6, 7, 8]] and short.readout.tolist() == [2, 1]
    assert short.attention_mask.tolist() == [[0, 1, 1], [1, 1, 0]]
