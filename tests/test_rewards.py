import math

import pytest
import torch
from wordlevel import tiny_with_words, word_tokenizer

from circuits import load
from interventions.rewards import Scorer, classifier_reward, likelihood_reward, rowwise

from models import tiny

PROMPTS, RESPONSES = ["w5 w9", "w5", "w7 w8 w9"], [" w10 w11 w12", " w13", " w20 w21"]


def test_scores_that_are_no_numbers_are_excluded_and_counted():
    scorer = Scorer(rowwise(lambda _p, r: {"a": math.nan, "b": math.inf, "c": 1.0, "d": -math.inf}[r]))
    with pytest.warns(UserWarning, match="NaN or \\+inf"):
        values = scorer(["x"] * 4, ["a", "b", "c", "d"])
    assert values.tolist() == [-math.inf, -math.inf, 1.0, -math.inf]
    assert scorer.invalid == 2 and scorer.scored == 4
    assert scorer(["x", "x"], ["c", "a"]).tolist() == [1.0, -math.inf] and scorer.scored == 4


def test_a_reward_of_the_wrong_shape_is_named():
    with pytest.raises(ValueError, match=r"returned shape \(3, 1\), expected \(3,\)"):
        Scorer(lambda p, r: torch.zeros(len(r), 1))(["x"] * 3, ["a", "b", "c"])


@pytest.mark.parametrize("family", ["llama-classifier", "bert-classifier"])
def test_classifier_reward_is_the_classifier_one_text_at_a_time(family):
    model = load(tiny(family), word_tokenizer())
    for output, finish in (("logit", lambda x: x), ("probability", lambda x: x.softmax(-1)),
                           ("log_probability", lambda x: x.log_softmax(-1))):  # fmt: skip
        got = classifier_reward(model, label="LABEL_2", output=output)(PROMPTS, RESPONSES)
        ids = [torch.tensor([word_tokenizer()(p + r)["input_ids"]]) for p, r in zip(PROMPTS, RESPONSES, strict=True)]
        with torch.no_grad():
            expected = torch.stack([finish(model.hf(i).logits)[0, 2] for i in ids])
        assert torch.allclose(got, expected, atol=1e-5)
    assert got.std() > 0


def test_classifier_labels_that_do_not_exist_are_named():
    with pytest.raises(
        ValueError, match="label 'good' is not one of this classifier's labels: LABEL_0, LABEL_1, LABEL_2"
    ):
        classifier_reward(load(tiny("llama-classifier"), word_tokenizer()), label="good")
    with pytest.raises(ValueError, match="several labels, LABEL_0, LABEL_1, LABEL_2; choose one with label="):
        classifier_reward(load(tiny("llama-classifier"), word_tokenizer()))
    with pytest.raises(ValueError, match="LlamaForCausalLM is no sequence classifier; for a language model use"):
        classifier_reward(load(tiny("llama"), word_tokenizer()), label=0)
    with pytest.raises(ValueError, match="give its tokenizer"):
        classifier_reward(load(tiny("llama-classifier")), label=0)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_likelihood_reward_is_the_mean_log_probability_of_the_response(family):
    model = tiny_with_words(family)
    got = likelihood_reward(model, batch_size=2)(PROMPTS, RESPONSES)
    for p, r, value in zip(PROMPTS, RESPONSES, got.tolist(), strict=True):
        ids, start = torch.tensor([word_tokenizer()(p + r)["input_ids"]]), len(word_tokenizer()(p)["input_ids"])
        with torch.no_grad():
            log_p = model.hf(ids).logits[0].log_softmax(-1)
        expected = [float(log_p[t - 1, ids[0, t]]) for t in range(start, ids.shape[1])]
        assert value == pytest.approx(sum(expected) / len(expected), abs=1e-5)
    assert likelihood_reward(model)(["w5"], [""]).tolist() == [-math.inf]
