import math

import pytest
import torch
from wordlevel import tiny_with_words, word_tokenizer

from interventions import aisp, best_of_n, compare_decoding
from interventions.decoding_baselines import greedy, reward_guided, sampled
from interventions.decoding_comparison import interval
from interventions.rewards import rowwise

PROMPTS = ["w5 w9 w11 w40", "w30 w7", "w8 w8 w21 w33 w50 w12"]
REWARD = rowwise(lambda _p, r: float(sum(int(word[1:]) > 30 for word in r.split())))


def continuation(model, prompt: str, words: str) -> torch.Tensor:
    """Logits before each word of a continuation, and after it."""
    ids, start = (
        torch.tensor([word_tokenizer()(f"{prompt} {words}")["input_ids"]]),
        len(word_tokenizer()(prompt)["input_ids"]),
    )
    with torch.no_grad():
        return model.hf(ids).logits[0, start - 1 :]


def test_sampled_tokens_follow_the_distribution_and_the_nucleus():
    logits = torch.randn(1, 7, generator=torch.Generator().manual_seed(0))
    grid = (torch.arange(100_000) + 0.5) / 100_000
    counts = sampled(logits.expand(100_000, 7), grid, temperature=0.7).bincount(minlength=7) / 100_000
    assert torch.allclose(counts, (logits[0] / 0.7).softmax(-1), atol=1e-4)
    p, order = logits[0].softmax(-1).sort(descending=True)
    kept = int((p.cumsum(0) < 0.6).sum()) + 1
    expected = torch.zeros(7).index_put((order[:kept],), p[:kept] / p[:kept].sum())
    counts = sampled(logits.expand(100_000, 7), grid, top_p=0.6).bincount(minlength=7) / 100_000
    assert torch.allclose(counts, expected, atol=1e-4) and kept < 7


@pytest.mark.parametrize("family", ["gpt2", "gemma2"])
def test_greedy_is_greedy(family):
    model = tiny_with_words(family)
    out = greedy(model, PROMPTS, REWARD, max_new_tokens=6)
    for prompt, tokens in zip(PROMPTS, out.tokens, strict=True):
        logits = continuation(model, prompt, word_tokenizer().decode(tokens))
        assert tokens.tolist() == logits.argmax(-1)[: len(tokens)].tolist()
    assert out.samples.tolist() == [1, 1, 1]


def test_best_of_n_keeps_the_best_and_does_not_depend_on_the_batch():
    model, seen = tiny_with_words("llama"), []

    def reward(prompts, responses):
        seen.extend(zip(prompts, responses, strict=True))
        return REWARD(prompts, responses)

    out = best_of_n(model, PROMPTS, reward, n=70, max_new_tokens=6, progress=False)
    assert out.samples.tolist() == [70, 70, 70] and out.scored == len(seen)
    for prompt, value in zip(PROMPTS, out.rewards.tolist(), strict=True):
        assert value == max(float(REWARD([p], [r])) for p, r in seen if p == prompt)
    chunked = best_of_n(model, PROMPTS, REWARD, n=70, max_new_tokens=6, rows=32, progress=False)
    alone = best_of_n(model, PROMPTS[1], REWARD, n=70, max_new_tokens=6, progress=False)
    assert chunked.responses == out.responses and alone.responses[0] == out.responses[1]
    more = best_of_n(model, PROMPTS, REWARD, n=256, max_new_tokens=6, progress=False)
    assert bool((more.rewards >= out.rewards).all())


def test_reward_guided_search_maximises_likelihood_plus_reward_at_each_token():
    model, weight = tiny_with_words("llama"), 2.0
    out = reward_guided(model, PROMPTS, REWARD, k=5, weight=weight, max_new_tokens=4)
    for prompt, tokens in zip(PROMPTS, out.tokens, strict=True):
        for step in range(len(tokens)):
            before = word_tokenizer().decode(tokens[:step])
            log_p = continuation(model, prompt, before)[-1].log_softmax(-1)
            top, candidates = log_p.topk(5)
            text = [
                word_tokenizer().decode(torch.tensor([*tokens[:step], c]), skip_special_tokens=True) for c in candidates
            ]
            assert int(tokens[step]) == int(candidates[(top + weight * REWARD([prompt] * 5, text)).argmax()])
    assert out.samples.tolist() == [5 * len(t) for t in out.tokens]
    plain = reward_guided(model, PROMPTS, REWARD, k=5, weight=0.0, max_new_tokens=4)
    assert plain.responses == greedy(model, PROMPTS, REWARD, max_new_tokens=4).responses


def test_budgets_in_seconds_end_and_keep_a_response():
    model = tiny_with_words("gpt2")
    for out in (
        best_of_n(model, PROMPTS, REWARD, max_new_tokens=5, seconds=0.3, progress=False),
        reward_guided(model, PROMPTS, REWARD, k=3, max_new_tokens=5, seconds=0.3),
    ):
        assert out.seconds < 20 and out.rewards.isfinite().all() and all(len(t) for t in out.tokens)
        assert int(out.samples.min()) > 1


def test_aisp_beats_best_of_n_on_a_countable_reward():
    """Matched samples, 3 seeds; random models have no peaked distribution to fight, so the search must win."""
    model, gaps = tiny_with_words("llama"), []
    for seed in range(3):
        ours = aisp(model, PROMPTS, REWARD, n=16, iterations=12, horizon=12, sigma2=2.0, seed=seed, progress=False)
        theirs = best_of_n(model, PROMPTS, REWARD, n=192, max_new_tokens=12, seed=seed, progress=False)
        assert ours.samples.tolist() == theirs.samples.tolist()
        gaps.append(float((ours.rewards - theirs.rewards).mean()))
    assert min(gaps) > 0


def test_comparison_table_pairs_prompts_and_says_who_wins():
    heldout = rowwise(lambda _p, r: float(len(set(r.split()))))
    out = compare_decoding(tiny_with_words("llama"), PROMPTS, REWARD, heldout=heldout, seeds=(0, 1), n=8, iterations=3, horizon=6,
                           sigma2=2.0, progress=False)  # fmt: skip
    assert list(out.runs) == ["AISP", "greedy", "best-of-n, equal samples", "ARGS-style, equal samples", "best-of-n, equal seconds",
                              "ARGS-style, equal seconds"]  # fmt: skip
    assert all(len(parts) == 2 for parts in out.runs.values())
    budget = {label: int(parts[0].samples.max()) for label, parts in out.runs.items()}
    assert budget["AISP"] == budget["best-of-n, equal samples"] == 24 and budget["ARGS-style, equal samples"] <= 24
    gap = (out.rewards("AISP") - out.rewards("greedy")).mean(0)
    middle, low, high = out.difference("AISP", "greedy")
    assert middle == pytest.approx(float(gap.mean())) and low <= middle <= high
    assert torch.equal(out.heldout["greedy"][0], heldout(PROMPTS, out.runs["greedy"][0].responses))
    assert len(out.table().splitlines()) == 8
    assert ("AISP beats greedy" in out.statement()) == (low > 0)
    with pytest.raises(ValueError, match="no method 'beam' in this comparison; it has AISP"):
        out.difference("beam")


def test_interval_of_a_constant_is_that_constant():
    assert interval(torch.full((9,), 2.5)) == (2.5, 2.5, 2.5)
    middle, low, high = interval(torch.arange(100).float())
    assert middle == 49.5 and 42 < low < 46 and 53 < high < 57 and math.isfinite(low)


def test_one_prompt_has_no_interval_and_the_statement_says_so():
    out = compare_decoding(tiny_with_words("llama"), PROMPTS[:1], REWARD, n=4, iterations=2, horizon=4, equal_seconds=False,
                           progress=False)  # fmt: skip
    assert "one prompt has no interval" in out.statement() and "beats" not in out.statement()
    assert "loses" not in out.statement() and "[" not in out.table() and "nan" not in out.table()


def test_bad_baseline_numbers_are_named():
    with pytest.raises(ValueError, match="expected n >= 1, temperature > 0"):
        best_of_n(tiny_with_words("llama"), PROMPTS, REWARD, n=0)
    with pytest.raises(ValueError, match="expected k >= 1"):
        reward_guided(tiny_with_words("llama"), PROMPTS, REWARD, k=0)
