"""`finetune`: learns, reports what it forgot, moves only what it may."""

import pytest
import torch

from circuits import Circuit, LabelledTask, evaluate, load
from interventions.masks import HeadMask
from interventions.tuning import by_length, finetune, readout_loss, step

from models import tiny

WORDS = [f"w{i}" for i in range(40)]


def words_tokenizer():
    """One token per word, made on the spot: no file, no network."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from transformers import PreTrainedTokenizerFast

    words = ["[PAD]", "[UNK]", "[MASK]", "[CLS]", "good", "bad", *WORDS]
    raw = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    raw.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="[PAD]", unk_token="[UNK]", mask_token="[MASK]")


def toy(n=24, seed=0, flip=False, name="toy", longest=5, **options):
    """The first word decides: even is good. `flip` turns the rule around, so that learning one forgets the other."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for length in torch.randint(2, longest + 1, (n,), generator=generator).tolist():
        words = torch.randint(0, 40, (length,), generator=generator).tolist()
        good = (words[0] % 2 == 0) != flip
        rows.append({"text": " ".join(WORDS[w] for w in words), "label": "good" if good else "bad"})
    return LabelledTask.from_rows(
        rows, template="{text} {label}", label_words={"good": "good", "bad": "bad"}, name=name, **options
    )


def toy_model(family="llama", seed=0):
    return load(tiny(family, seed), words_tokenizer())


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert", "bert-classifier", "llama-classifier"])
def test_full_tuning_learns_on_every_kind_of_model(family):
    model = toy_model(family)
    if family.endswith("classifier"):  # the tiny classifiers have three classes
        model.hf.config.label2id = {"good": 0, "bad": 1, "other": 2}
    task = toy()
    result = finetune(model, task, epochs=12, lr=3e-3, eval_tasks={"train": task}, progress=False)
    assert result.history[-1]["loss"] < 0.5 * result.history[0]["loss"]
    assert result.after["train"]["accuracy"] > 0.9
    assert result.after["train"]["accuracy"] == evaluate(model, task).accuracy
    assert result.trained == result.total and result.proof == ""


def test_masked_tuning_moves_only_the_mask_and_reports_forgetting():
    model = toy_model("qwen2")
    finetune(model, toy(), epochs=12, lr=3e-3, progress=False)
    before = {name: p.detach().clone() for name, p in model.hf.named_parameters()}
    mask = HeadMask.from_circuit(Circuit(["a0.h0", "a1.h1", "a2.h3"]), model)
    kept = toy()
    result = finetune(
        model, toy(flip=True, name="flipped"), mask, epochs=10, lr=1e-2, weight_decay=0.1, progress=False,
        eval_tasks={"flipped": toy(flip=True), "kept": kept},
    )  # fmt: skip
    masks = mask.tensors()
    for name, parameter in model.hf.named_parameters():
        outside = ~masks.get(name, torch.zeros(parameter.shape, dtype=torch.bool))
        assert torch.equal(parameter[outside], before[name][outside])
    assert result.trained == mask.n_parameters and 0.9 * result.trained < result.moved <= result.trained
    assert result.total == sum(p.numel() for p in model.hf.parameters())
    assert result.proof == f"0 of {result.total - result.trained:,} frozen values changed"
    assert result.retention("kept") == pytest.approx(evaluate(model, kept).accuracy - result.before["kept"]["accuracy"])
    assert result.retention("kept") < -0.1 and result.retention("flipped") > 0.1
    text = repr(result)
    assert "flipped" in text and "kept" in text and result.proof in text
    with pytest.raises(ValueError, match="no task 'else' was evaluated; evaluated: flipped, kept"):
        result.retention("else")


@pytest.mark.parametrize("side", ["left", "right"])
def test_loss_is_the_cross_entropy_one_text_at_a_time(side):
    model = toy_model()
    encoded = toy(6, padding_side=side).encode(model)
    rows = torch.tensor([4, 1, 5])
    for loss in ("labels", "vocabulary"):
        one_by_one = []
        for row in rows.tolist():
            real = encoded.tokens[row][encoded.attention_mask[row].bool()]
            logits = model.hf(real[None]).logits[0, -1]
            gold = encoded.columns[encoded.gold[row]]
            others = logits[encoded.columns] if loss == "labels" else logits
            one_by_one.append(others.logsumexp(0) - logits[gold])
        torch.testing.assert_close(readout_loss(model, encoded, rows, loss), torch.stack(one_by_one).mean())


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_batch_in_parts_of_similar_length_has_the_gradient_of_the_whole(side):
    model = toy_model()
    encoded = toy(16, longest=20, padding_side=side).encode(model)
    rows, lengths = torch.arange(15), encoded.attention_mask.sum(1)
    parts = by_length(rows, lengths)
    assert len(parts) > 1 and sorted(torch.cat(parts).tolist()) == rows.tolist()
    padded = sum(len(part) * int(lengths[part].max()) for part in parts)
    assert int(lengths[rows].sum()) <= padded < 0.9 * len(rows) * int(lengths[rows].max())
    readout_loss(model, encoded, rows).backward()
    whole = {name: p.grad.clone() for name, p in model.hf.named_parameters() if p.grad is not None}
    start = {name: p.detach().clone() for name, p in model.hf.named_parameters()}
    parameters = list(model.hf.parameters())
    optimizer = torch.optim.SGD(parameters, lr=1.0)
    before = readout_loss(model, encoded, rows).item()
    value = step(model, encoded, rows, "labels", optimizer, parameters, [], anchor=0.0, clip=1e9)
    assert value == pytest.approx(before)
    for name, gradient in whole.items():
        torch.testing.assert_close(
            start[name] - dict(model.hf.named_parameters())[name], gradient, atol=1e-6, rtol=1e-4
        )


def test_texts_of_one_length_stay_one_batch():
    rows = torch.tensor([3, 0, 2, 1])
    assert [part.tolist() for part in by_length(rows, torch.full((4,), 9))] == [[3, 0, 2, 1]]
    assert [part.tolist() for part in by_length(rows, torch.tensor([2, 9, 2, 9]))] == [[0, 2], [3, 1]]
    assert [part.tolist() for part in by_length(rows[:1], torch.tensor([2, 9, 2, 9]))] == [[3]]


def test_seeds_repeat_and_the_global_generator_is_left_alone():
    results, state = [], torch.random.get_rng_state()
    for seed in (3, 3, 4):
        model = toy_model()
        finetune(model, toy(), epochs=2, lr=1e-3, seed=seed, progress=False)
        results.append(model.hf.lm_head.weight.detach().clone())
    assert torch.equal(results[0], results[1]) and not torch.equal(results[0], results[2])
    assert torch.equal(torch.random.get_rng_state(), state)


def test_validation_keeps_the_best_epoch_and_may_keep_the_start():
    model = toy_model()
    finetune(model, toy(), epochs=12, lr=3e-3, progress=False)
    start = model.hf.lm_head.weight.detach().clone()
    result = finetune(model, toy(flip=True), epochs=3, lr=3e-3, validation=toy(), progress=False)
    assert result.options["kept_epoch"] == 0 and torch.equal(model.hf.lm_head.weight, start)
    assert result.moved == 0 and result.distance == 0
    result = finetune(model, toy(flip=True), epochs=8, lr=3e-3, validation=toy(flip=True), progress=False)
    kept = result.options["kept_epoch"]
    best = max(row["validation_accuracy"] for row in result.history)
    assert kept > 0 and result.history[kept]["validation_accuracy"] == best
    assert evaluate(model, toy(flip=True)).accuracy == best


@pytest.mark.parametrize("masked", [False, True])
def test_anchor_keeps_weights_nearer_to_the_start(masked):
    distances = []
    for anchor in (0.0, 10.0):
        model = toy_model()
        mask = HeadMask.from_circuit(Circuit(["a1.h1"]), model) if masked else None
        distances.append(finetune(model, toy(), mask, epochs=5, lr=1e-3, anchor=anchor, progress=False).distance)
    assert 0 < distances[1] < 0.7 * distances[0]


def test_adapters_of_a_peft_model_are_what_learns():
    from peft import LoraConfig, get_peft_model

    hf = get_peft_model(tiny("llama"), LoraConfig(r=2, target_modules=["q_proj", "o_proj"]))
    model = load(hf, words_tokenizer())
    before = {name: p.detach().clone() for name, p in hf.named_parameters()}
    result = finetune(model, toy(), epochs=2, lr=1e-2, progress=False)
    changed = {name for name, p in hf.named_parameters() if not torch.equal(p, before[name])}
    assert changed and all("lora_" in name for name in changed)
    assert result.trained == sum(p.numel() for n, p in hf.named_parameters() if "lora_" in n)


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(lr=0.0), "lr=0.0: expected"),
        (dict(batch_size=0), "batch_size=0"),
        (dict(epochs=-1), "epochs=-1"),
        (dict(loss="words"), "loss='words' is not known; choose 'labels' or 'vocabulary'"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        finetune(toy_model(), toy(4), progress=False, **options)


def test_a_loss_that_is_not_finite_stops_and_leaves_a_plain_model():
    model = toy_model()
    mask = HeadMask.from_circuit(Circuit(["a0.h0"]), model)
    model.hf.lm_head.weight.data[:] = float("nan")
    with pytest.raises(ValueError, match="loss became nan; use a smaller learning rate"):
        finetune(model, toy(4), mask, progress=False)
    assert not [name for name, _ in model.hf.named_parameters() if name.endswith("_slice")]
    with pytest.raises(TypeError, match="mask is a Circuit; expected a HeadMask"):
        finetune(model, toy(4), Circuit(["a0.h0"]), progress=False)
