import math

import pytest
import torch

from circuits import Circuit, Head, LabelledTask, load
from interventions import RenyiEnsemble

from models import VOCABULARY, ragged, tiny

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")


def tokenizer():
    """A word per token: w3 ... w60, saved nowhere."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from transformers import PreTrainedTokenizerFast

    words = {"<pad>": 0, "<s>": 1, "</s>": 2, **{f"w{i}": i for i in range(3, VOCABULARY)}}
    inner = Tokenizer(WordLevel(words, unk_token="<pad>"))
    inner.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<pad>"
    )


def text(ids: list[int]) -> str:
    return " ".join(f"w{i}" for i in ids)


def task(n: int = 12, side: str = "right", contested: bool = True) -> LabelledTask:
    """The last word decides: w10 is good, w20 is bad; a contested text ends in w30 and comes twice, with both labels."""
    rows = []
    for i, ids in enumerate(ragged(n, lengths=(4, 6, 3))):
        words = [v if v not in (10, 20, 30) else 5 for v in ids]
        if i % 3 < 2:
            rows.append({"text": text([*words, (10, 20)[i % 3]]), "label": ("good", "bad")[i % 3]})
        else:
            again = i // 3 % 2 and contested  # the text of three rows before
            same = rows[i - 3]["text"] if again else text([*words, 30])
            rows.append({"text": same, "label": "bad" if again else "good"})
    words = {"good": " w40", "bad": " w41"}
    return LabelledTask.from_rows(rows, template="{text} w50{label}", label_words=words, padding_side=side)


@pytest.fixture(scope="module")
def fitted() -> RenyiEnsemble:
    ensemble = RenyiEnsemble(load(tiny("llama"), tokenizer()), members=4, alpha=0.8, r=4, target_modules="all-linear")
    ensemble.fit(task(36), epochs=12, lr=2e-2, batch_size=12, progress=False)
    return ensemble


def test_predicts_labels_and_flags_contested_inputs(fitted):
    seen = fitted.predict(task(36))
    contested = torch.arange(36) % 3 == 2
    right = (seen.predictions == seen.gold)[~contested].float().mean()
    assert seen.labels == ("good", "bad") and right > 0.9
    torch.testing.assert_close(seen.members.sum(-1), torch.ones(4, 36))
    assert seen.mutual_information[contested].min() > 0.2 > 0.02 > seen.mutual_information[~contested].mean()
    assert (seen.mutual_information <= math.log(4)).all()


def test_texts_are_asked_the_fitted_question(fitted):
    rows = task(36)
    by_task, by_text = fitted.predict(rows), fitted.predict(list(rows.texts))
    torch.testing.assert_close(by_task.members, by_text.members, atol=1e-5, rtol=1e-4)
    assert by_text.gold is None and len(fitted.predict("w7 w10")) == 1


@pytest.mark.parametrize("size", (1, 5, 36))
def test_batches_and_padding_side_change_nothing(fitted, size):
    expected = fitted.predict(task(36), batch_size=36).members
    torch.testing.assert_close(fitted.predict(task(36), batch_size=size).members, expected, atol=1e-5, rtol=1e-4)
    left = fitted.predict(task(36, side="left"), batch_size=size).members
    torch.testing.assert_close(left, expected, atol=1e-5, rtol=1e-4)


def test_new_members_agree_with_the_base_and_know_nothing_of_each_other():
    model = load(tiny("gpt2"), tokenizer())
    for alpha in (0.0, 0.8, 2.0):
        ensemble = RenyiEnsemble(model, 3, alpha=alpha)
        ensemble.task = task()
        seen = ensemble.predict(list(task().texts))
        assert seen.mutual_information.max() < 1e-6 and seen.disagreement.max() == 0
        s = ensemble.log_likelihood(task())
        assert torch.allclose(s, s[:1].expand_as(s), atol=1e-5)
        torch.testing.assert_close(ensemble.responsibilities(task()), torch.full((3, 12), 1 / 3), atol=1e-4, rtol=1e-4)


def test_next_token_without_a_task():
    hf = tiny("qwen2")
    seen = RenyiEnsemble(hf, 2).predict(ragged(3))
    expected = hf(input_ids=torch.tensor([ragged(3)[1]])).logits[0, -1].softmax(-1)
    assert seen.members.shape == (2, 3, VOCABULARY)
    torch.testing.assert_close(seen.mixture[1], expected.detach(), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("family", ("bert", "bert-classifier", "llama-classifier"))
def test_masked_models_and_classifiers(family):
    words = tokenizer()
    words.add_special_tokens({"mask_token": "w60"})
    ensemble = RenyiEnsemble(load(tiny(family), words), 2, r=4, target_modules="all-linear")
    labels = {"good": "good", "bad": "bad", "so": "so"} if "classifier" in family else {"good": " w40", "bad": " w41"}
    base = task(9, contested=False)
    rows = [{"text": t, "label": y} for t, y in zip(base.texts, base.labels, strict=True)]
    asked = LabelledTask.from_rows(rows, template="{text}{label}", label_words=labels)
    before = ensemble.log_likelihood(asked).mean()
    ensemble.fit(asked, epochs=10, lr=1e-2, progress=False)
    assert ensemble.log_likelihood(asked).mean() > before + 0.2
    assert ensemble.predict(asked).members.shape == (2, 9, len(labels))


def test_scores_of_sequences(fitted):
    rows = [{"prompt": "w7 w8", "completion": "w9 w10 w11"}, "w3 w4 w5 w6"]
    seen = fitted.score(rows)
    assert seen.tokens.tolist() == [4, 4]  # the end token is scored too
    torch.testing.assert_close(seen.members, fitted.log_likelihood(rows), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(
        seen.sequence_mixture, seen.members.double().exp().mean(0).log().float(), atol=1e-4, rtol=1e-4
    )
    alone = RenyiEnsemble(tiny("gpt2"), 1, tokenizer=tokenizer()).score(rows)
    torch.testing.assert_close(alone.token_mixture, alone.members[0])


@pytest.mark.parametrize("combine", ("mixture", "sequence", "vote"))
@pytest.mark.parametrize("family", ("gpt2", "llama", "gemma3"))
def test_one_members_generation_is_that_of_the_model(family, combine):
    """Greedy decoding through the folded cache, left padded, equals transformers' generate of the base."""
    hf, words = tiny(family), tokenizer()
    prompts = [text(ids) for ids in ragged(3)]
    seen = RenyiEnsemble(hf, 3, layers=[1, 2], tokenizer=words).generate(prompts, max_new_tokens=6, combine=combine)
    for prompt, tokens in zip(prompts, seen.tokens, strict=True):
        ids = words(prompt, return_tensors="pt").input_ids
        mask = torch.ones_like(ids)
        plain = hf.generate(ids, attention_mask=mask, max_new_tokens=6, do_sample=False, eos_token_id=2, pad_token_id=0)
        assert tokens[tokens >= 0].tolist() == plain[0, ids.shape[1] :].tolist()
    assert seen.mutual_information.max() < 1e-5


def test_generation_scores_are_those_of_scoring(fitted):
    seen = fitted.generate(["w7 w10", "w3"], max_new_tokens=3, combine="sequence")
    for number, prompt in enumerate(([7, 10], [3])):
        tokens = seen.tokens[number][seen.tokens[number] >= 0].tolist()
        expected = fitted.score([{"prompt": prompt, "completion": tokens}]).members[:, 0]
        torch.testing.assert_close(seen.members[:, number], expected, atol=1e-3, rtol=1e-3)
    sampled = [fitted.generate("w7", 4, temperature=3.0, seed=seed).tokens.tolist() for seed in (0, 0, 1, 2)]
    assert sampled[0] == sampled[1] and len({str(tokens) for tokens in sampled}) > 1


def test_survives_a_round_trip(fitted, tmp_path):
    fitted.save(tmp_path)
    again = RenyiEnsemble.load(tmp_path, load(tiny("llama"), tokenizer()))
    rows = task(9)
    torch.testing.assert_close(again.predict(list(rows.texts)).members, fitted.predict(list(rows.texts)).members)
    assert again.alpha == 0.8 and again.settings["epochs"] == 12
    with pytest.raises(ValueError, match="other names or shapes: load the same base model"):
        RenyiEnsemble.load(tmp_path, tiny("gpt2"))
    with pytest.raises(FileNotFoundError, match="ensemble.json"):
        RenyiEnsemble.load(tmp_path / "nowhere", tiny("gpt2"))


def test_circuit_survives_a_round_trip(tmp_path):
    model = load(tiny("llama"))
    RenyiEnsemble(model, 2, circuit=Circuit([Head(1, 2), Head(0, 3)])).save(tmp_path)
    again = RenyiEnsemble.load(tmp_path, model)
    assert again.circuit == Circuit([Head(1, 2), Head(0, 3)]) and again.stack.confined


def test_contested_examples_split_responsibility(fitted):
    entropy = fitted.responsibility_entropy(task(36))
    contested = torch.arange(36) % 3 == 2
    assert entropy[contested].mean() < entropy[~contested].mean()


def test_bad_input_is_told(fitted):
    hf = tiny("llama")
    with pytest.raises(ValueError, match="alpha is -1"):
        RenyiEnsemble(hf, alpha=-1)
    with pytest.raises(TypeError, match="model is a str; expected what circuits.load returns"):
        RenyiEnsemble("gpt2")
    with pytest.raises(ValueError, match="no tokenizer, so text cannot be read"):
        RenyiEnsemble(hf, 2).fit(["w7 w8"], progress=False)
    with pytest.raises(ValueError, match="no examples; expected"):
        RenyiEnsemble(hf, 2).fit([], progress=False)
    with pytest.raises(ValueError, match=r"cannot train on \['question'\]; expected a text"):
        RenyiEnsemble(hf, 2).fit([{"question": "w7"}], progress=False)
    with pytest.raises(ValueError, match="combine='average'; expected mixture or vote"):
        fitted.predict(["w7"], combine="average")
    with pytest.raises(ValueError, match="combine='average'; expected mixture, sequence, vote"):
        fitted.generate("w7", combine="average")
    with pytest.raises(ValueError, match="pair 0 has no completion left"):
        RenyiEnsemble(hf, 2).fit([{"prompt": [3, 4, 5], "chosen": [6], "rejected": [7]}], max_length=2, progress=False)
