import math

import pytest
import torch
from wordlevel import tiny_with_words, word_tokenizer

from circuits import load
from interventions import aisp, inject
from interventions.perturbation import Perturbation
from interventions.prelogits import importance_weights, perturbed_rollout
from interventions.rewards import rowwise
from interventions.rollout import Decoder, rollout

from models import CAUSAL, tiny

PROMPTS = ["w5 w9 w11 w40", "w30 w7", "w8 w8 w21 w33 w50 w12"]
QUICK = dict(n=6, iterations=3, horizon=7, progress=False)


def words_above(_prompt: str, response: str) -> float:
    """The toy reward: the number of words past the middle of the vocabulary."""
    return float(sum(int(word[1:]) > 30 for word in response.split()))


REWARD = rowwise(words_above)


def dense(perturbation: Perturbation) -> torch.Tensor:
    return torch.stack([perturbation.at(t) for t in range(len(perturbation.mean))], 1)


def noise_for(decoder: Decoder, prompts: int, n: int = 6, horizon: int = 5, sigma2: float = 4.0) -> list[Perturbation]:
    generator = torch.Generator().manual_seed(1)
    return [
        Perturbation(torch.randn(horizon, 32, generator=generator), n, sigma2, 0.9, (p, 0), False)
        for p in range(prompts)
    ]


def recomputed(hf, prompt: torch.Tensor, v: torch.Tensor, length: int) -> list[int]:
    """One sample by full forwards over the growing text: no cache, no padding, no sharing."""
    tokens, body = prompt[None], []
    hook = hf.get_output_embeddings().register_forward_pre_hook(
        lambda _m, x: (torch.cat([x[0][:, :-1], x[0][:, -1:] + (v[len(body)] if len(body) < len(v) else 0)], 1),)
    )
    with torch.no_grad():
        while len(body) < length and (not body or body[-1] != 2):
            body.append(int(hf(tokens, use_cache=False).logits[0, -1].argmax()))
            tokens = torch.cat([tokens, torch.tensor([[body[-1]]])], 1)
    hook.remove()
    return body


@pytest.mark.parametrize("family", CAUSAL)
def test_cached_rollout_equals_full_recomputation(family):
    model = tiny_with_words(family)
    decoder = Decoder(model)
    prompts = decoder.encode(PROMPTS)
    noise = noise_for(decoder, 3)
    rows = perturbed_rollout(decoder, decoder.prefill(prompts), noise, [8, 8, 8])
    samples = [dense(p) for p in noise]
    expected = [recomputed(model.hf, prompts[i // 6], samples[i // 6][i % 6], 8) for i in range(18)]
    assert [row.tolist() for row in rows] == expected
    assert len({tuple(row) for row in expected}) > 6  # the noise matters, or nothing was tested


@pytest.mark.parametrize("family", ["gpt2", "gemma2", "llama"])
def test_no_noise_is_greedy_decoding(family):
    model = tiny_with_words(family)
    out = aisp(model, PROMPTS, REWARD, **QUICK, sigma2=0.0)
    for prompt, tokens in zip(PROMPTS, out.tokens, strict=True):
        ids = torch.tensor([word_tokenizer()(prompt)["input_ids"]])
        greedy = model.hf.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=7, pad_token_id=0
        )
        assert tokens.tolist() == greedy[0, ids.shape[1] :].tolist()
    assert float(out.mean.abs().max()) == 0.0


def random_round(n: int = 12, tau: int = 4, d: int = 3):
    g = torch.Generator().manual_seed(0)
    mean = torch.randn(tau, d, generator=g)
    return torch.randn(n, generator=g), mean, mean + torch.randn(n, tau, d, generator=g)


def test_weights_sum_to_one_and_ignore_a_shift_of_the_reward():
    rewards, mean, samples = random_round()
    weights = importance_weights(rewards, mean, samples, 0.5, 0.3, 0.9)
    assert float(weights.sum()) == pytest.approx(1, abs=1e-6)
    assert torch.allclose(weights, importance_weights(rewards + 100, mean, samples, 0.5, 0.3, 0.9), atol=1e-5)


def test_weights_at_alpha_zero_are_the_ratio_of_the_two_gaussians():
    rewards, mean, samples = random_round(tau=1, d=1)
    sigma2, temperature = 0.7, 0.4
    prior, proposal = torch.distributions.Normal(0, sigma2**0.5), torch.distributions.Normal(mean, sigma2**0.5)
    ratio = (prior.log_prob(samples) - proposal.log_prob(samples)).sum((1, 2)).exp() * (rewards / temperature).exp()
    assert torch.allclose(
        importance_weights(rewards, mean, samples, sigma2, temperature, 0), ratio / ratio.sum(), atol=1e-6
    )


def test_weights_at_the_limits_of_the_temperature():
    rewards, mean, samples = random_round()
    cold = importance_weights(rewards, mean, samples, 0.5, 1e-9, 1.0)
    assert torch.equal(cold, torch.nn.functional.one_hot(rewards.argmax(), 12).float())
    hot = importance_weights(rewards, mean, samples, 0.5, 1e9, 1.0)
    assert torch.allclose(hot, torch.full((12,), 1 / 12))


def test_minus_infinity_has_weight_zero_and_all_of_it_says_nothing():
    rewards, mean, samples = random_round()
    rewards[3] = -math.inf
    weights = importance_weights(rewards, mean, samples, 0.5, 0.3, 1.0)
    assert float(weights[3]) == 0 and float(weights.sum()) == pytest.approx(1)
    nothing = importance_weights(torch.full((12,), -math.inf), mean, samples, 0.5, 0.3, 1.0)
    assert torch.allclose(nothing, torch.full((12,), 1 / 12))


@pytest.mark.parametrize("alpha", [0.0, 0.5])
def test_a_linear_reward_moves_the_mean_where_the_algebra_says(alpha):
    """r = <a, V>: the target is a Gaussian with mean alpha U + sigma^2 a / lambda, whatever the proposal."""
    g = torch.Generator().manual_seed(0)
    a, u, sigma2, temperature = torch.tensor([[0.5, -1.0]]), torch.tensor([[0.3, 0.2]]), 0.5, 1.5
    samples = u + sigma2**0.5 * torch.randn(400_000, 1, 2, generator=g)
    weights = importance_weights((samples * a).sum((1, 2)), u, samples, sigma2, temperature, alpha)
    estimate = torch.einsum("n,ntd->td", weights, samples)
    assert torch.allclose(estimate, alpha * u + sigma2 * a / temperature, atol=0.01)


@pytest.mark.parametrize("rao_blackwell", [False, True])
def test_regenerated_noise_gives_the_numbers_of_stored_noise(rao_blackwell):
    rewards, mean, _ = random_round(n=6, tau=5, d=4)
    v = Perturbation(mean, 6, 0.5, 0.7, (3, 1), rao_blackwell)
    stored = dense(v)
    lengths = torch.tensor([5, 2, 3, 1, 4, 3])
    for t in range(3):
        assert torch.equal(v.apply(t, lengths > t), stored[:, t])
    if rao_blackwell:  # two samples are still going when the window is cut short here
        v.apply(3, lengths > 3)
        v.apply(4, lengths > 4)
        used = torch.arange(5) < lengths[:, None]
        squared = mean.square().sum(1)
        expected = (((stored * mean).sum(-1) - 0.85 * squared) * used).sum(1)
        kept = torch.where(used[..., None], stored, 0.7 * mean)
    else:
        expected, kept = (stored * mean).sum((1, 2)), stored
    assert torch.allclose(v.finish(), expected, atol=1e-5)
    weights = rewards[:6].softmax(0)
    assert torch.allclose(v.weighted_mean(weights, lengths), torch.einsum("n,ntd->td", weights, kept), atol=1e-5)


def test_rao_blackwell_is_the_average_over_the_noise_that_did_nothing():
    """Fix what was used, draw the unused tail many times: the importance-sampling estimate goes to the closed form."""
    g = torch.Generator().manual_seed(0)
    mean, sigma2, alpha, draws = torch.tensor([[0.4], [-0.6]]), 0.5, 0.3, 200_000
    rewards, lengths = torch.tensor([0.2, -0.1]), torch.tensor([2, 1])
    v = Perturbation(mean, 2, sigma2, alpha, (0, 0), True)
    used = dense(v)
    samples = used.repeat(draws, 1, 1)
    samples[1::2, 1] = mean[1] + sigma2**0.5 * torch.randn(draws, 1, generator=g)
    samples[0::2, 1] = used[0, 1]
    brute = importance_weights(rewards.repeat(draws), mean, samples, sigma2, 0.8, alpha)
    for t in range(2):
        v.apply(t, lengths > t)
    weights = (rewards / 0.8 - (1 - alpha) / sigma2 * v.finish()).softmax(0)
    assert torch.allclose(v.weighted_mean(weights, lengths), torch.einsum("n,ntd->td", brute, samples), atol=5e-3)


def test_tokens_after_the_horizon_are_greedy():
    model = tiny_with_words("llama")
    out = aisp(model, PROMPTS, REWARD, n=4, iterations=2, horizon=2, max_new_tokens=8, sigma2=30.0, progress=False)
    for prompt, tokens in zip(PROMPTS, out.tokens, strict=True):
        ids = word_tokenizer()(prompt)["input_ids"]
        greedy = recomputed(model.hf, torch.tensor(ids + tokens[:2].tolist()), torch.zeros(0, 32), 6)
        assert tokens[2:].tolist() == greedy
    assert out.mean.shape[1] == 2


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma3"])
def test_a_prompt_does_not_notice_what_else_is_in_the_batch(family):
    model = tiny_with_words(family)
    together = aisp(model, PROMPTS, REWARD, **QUICK, sigma2=8.0)
    chunked = aisp(model, PROMPTS, REWARD, **QUICK, sigma2=8.0, rows=6)
    assert together.responses == chunked.responses
    for i, prompt in enumerate(PROMPTS):
        alone = aisp(model, prompt, REWARD, **QUICK, sigma2=8.0)
        assert alone.responses[0] == together.responses[i]
        assert torch.allclose(alone.mean[0], together.mean[i], atol=1e-5)
    other = aisp(model, PROMPTS, REWARD, **QUICK, sigma2=8.0, seed=1)
    assert not torch.allclose(other.mean, together.mean)


@pytest.mark.parametrize("family", ["gpt2", "mistral"])
def test_sharing_rows_between_equal_prefixes_changes_nothing_but_the_work(family):
    decoder = Decoder(tiny_with_words(family))
    prompts = decoder.encode(PROMPTS)
    rows = []
    embedding = decoder.hf.get_input_embeddings()
    hook = embedding.register_forward_hook(lambda _m, x, _y: rows.append(len(x[0])))
    results, work = [], []
    for share in (True, False):
        rows.clear()
        noise = noise_for(decoder, 3, sigma2=1.0)
        results.append(
            [r.tolist() for r in perturbed_rollout(decoder, decoder.prefill(prompts), noise, [6] * 3, (), share)]
        )
        work.append(sum(rows))
    hook.remove()
    assert results[0] == results[1]
    assert work[0] < work[1]


def test_one_prefill_and_no_transformer_call_for_the_first_token():
    model = load(tiny("llama"), word_tokenizer())
    calls = []
    model.hf.model.register_forward_hook(lambda _m, _x, y: calls.append(tuple(y.last_hidden_state.shape[:2])))
    aisp(model, PROMPTS[0], REWARD, n=4, iterations=3, horizon=1, progress=False)
    assert calls[:1] == [(1, 4)] and len(calls) <= 2  # the prefill; then only the report's teacher-forced pass
    calls.clear()
    aisp(model, PROMPTS, REWARD, n=4, iterations=3, horizon=3, progress=False)
    assert [c for c in calls if c[1] != 1][0] == (3, 6)
    assert sum(c[1] == 1 for c in calls) <= 6  # three rounds of two steps


def test_best_so_far_never_falls_and_every_sample_is_counted():
    model, seen = tiny_with_words("gpt2"), []

    def reward(prompts, responses):
        seen.extend(zip(prompts, responses, strict=True))
        return REWARD(prompts, responses)

    out = aisp(model, PROMPTS, reward, **QUICK, sigma2=8.0)
    assert out.samples.tolist() == [18, 18, 18]
    assert out.scored == len(seen) == len(set(seen))  # duplicates are scored once
    assert bool((out.history["best"].diff(dim=1) >= 0).all())
    assert torch.equal(out.history["best"][:, -1], out.rewards)
    best = [max(words_above(p, r) for p, r in seen if p == prompt) for prompt in PROMPTS]
    assert out.rewards.tolist() == best
    assert [words_above(p, r) for p, r in zip(PROMPTS, out.responses, strict=True)] == best


def test_report_of_a_round():
    rewards_seen = []

    def reward(prompts, responses):
        rewards_seen.append(torch.arange(len(responses)).float())
        return rewards_seen[-1]

    out = aisp(
        tiny_with_words("llama"),
        PROMPTS[0],
        reward,
        n=5,
        iterations=1,
        horizon=4,
        sigma2=40.0,
        temperature=0.9,
        progress=False,
    )
    rewards = rewards_seen[0]
    assert len(rewards) == 5  # all different, so that the weights are known
    weights = (rewards / 0.9).softmax(0)
    assert float(out.history["ess"][0, 0]) == pytest.approx(float(1 / weights.square().sum()), rel=1e-5)
    assert float(out.history["norm"][0, 0]) == pytest.approx(float(out.mean.norm()), rel=1e-5)
    assert float(out.history["kl"][0, 0]) == pytest.approx(float(out.mean.norm()) ** 2 / 80, rel=1e-5)
    assert float(out.history["mean_reward"][0, 0]) == 2.0 and float(out.history["max_reward"][0, 0]) == 4.0
    assert out.perturbation_norm().shape == (1, 4)
    assert out.seconds > 0


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_token_kl_is_that_of_the_two_distributions(family):
    """Prompts and responses of different lengths are read together; each must come out as alone."""
    model = tiny_with_words(family)
    uneven = rowwise(lambda prompt, response: len(response) * (1 if len(prompt) > 9 else -1))
    out = aisp(model, PROMPTS, uneven, **QUICK, sigma2=8.0, stop=["w1"])
    head = model.hf.get_output_embeddings()
    assert len({len(tokens) for tokens in out.tokens}) > 1
    for row, (prompt, tokens) in enumerate(zip(PROMPTS, out.tokens, strict=True)):
        ids = word_tokenizer()(prompt)["input_ids"]
        with torch.no_grad():
            z = model.hf.base_model(torch.tensor([ids + tokens.tolist()])).last_hidden_state[0, len(ids) - 1 : -1]
            base = torch.distributions.Categorical(logits=head(z))
            moved = torch.distributions.Categorical(logits=head(z + out.mean[row, : len(z)]))
        expected = torch.distributions.kl_divergence(moved, base)
        assert torch.allclose(out.token_kl[row, : len(z)], expected, atol=1e-4)
        assert out.token_kl[row, len(z) :].isnan().all()


def test_stop_strings_end_a_response_and_are_not_scored():
    model, seen = tiny_with_words("llama"), []

    def shorter_is_better(prompts, responses):
        seen.extend(responses)
        return torch.tensor([-float(len(r.split())) for r in responses])

    aisp(model, PROMPTS, shorter_is_better, **QUICK, sigma2=8.0)
    word = seen[0].split()[2]
    assert sum(word in text.split() for text in seen) > 1
    seen.clear()
    out = aisp(model, PROMPTS, shorter_is_better, **QUICK, sigma2=8.0, stop=[word, "never"])
    assert not any(word in text for text in seen)
    stopped = [tokens for tokens in out.tokens if len(tokens) < 7 and int(tokens[-1]) != 2]
    assert stopped and all(word_tokenizer().decode(tokens[-1:]) == word for tokens in stopped)


def test_finished_rows_leave_the_batch():
    decoder = Decoder(tiny_with_words("gpt2"))
    start = decoder.prefill(decoder.encode(PROMPTS))
    script = torch.tensor([[5, 2, 9, 9], [6, 7, 2, 9], [8, 8, 8, 8]])
    rows = []
    hook = decoder.hf.get_input_embeddings().register_forward_hook(lambda _m, x, _y: rows.append(len(x[0])))
    out = rollout(decoder, start, 1, lambda _z, _state, sample, step: script[sample, step], [4, 4, 3])
    hook.remove()
    assert [t.tolist() for t in out] == [[5, 2], [6, 7, 2], [8, 8, 8]]
    assert rows == [3, 2]


def test_the_mean_reward_rises_over_the_rounds():
    out = aisp(
        tiny_with_words("llama"),
        PROMPTS,
        REWARD,
        n=16,
        iterations=12,
        horizon=10,
        sigma2=2.0,
        temperature=0.3,
        progress=False,
    )
    rounds = out.history["mean_reward"].mean(0)
    assert float(rounds[-3:].mean()) > float(rounds[:3].mean()) + 1


def test_options_do_what_they_say():
    model = tiny_with_words("llama")
    common = dict(n=8, iterations=4, horizon=6, sigma2=4.0, progress=False)
    smooth = rowwise(lambda prompt, response: words_above(prompt, response) + sum(map(ord, response)) / 997)
    ess = aisp(model, PROMPTS, smooth, **common, target_ess=3.0).history
    assert torch.allclose(ess["ess"], torch.full_like(ess["ess"], 3.0), atol=0.8)
    assert float(ess["temperature"].std()) > 0
    capped = aisp(model, PROMPTS, REWARD, **common, norm_cap=3.0)
    assert float(capped.history["norm"].max()) <= 3.001
    half, full = (aisp(model, PROMPTS, REWARD, **dict(common, iterations=1), step_size=s).mean for s in (0.5, 1.0))
    assert torch.allclose(half, full / 2, atol=1e-6)
    scaled = [
        aisp(model, PROMPTS, lambda p, r, k=k: k * REWARD(p, r), **common, standardise=True).mean for k in (1, 50)
    ]
    assert torch.allclose(*scaled, atol=1e-4)
    tail = aisp(model, PROMPTS, REWARD, **common, rao_blackwell=True)
    assert tail.rewards.isfinite().all()


def test_early_stop_counts_what_was_sampled():
    falling = iter(range(100, 0, -1))

    def reward(prompts, responses):
        return torch.full((len(responses),), float(next(falling)))

    out = aisp(
        tiny_with_words("llama"),
        PROMPTS[0],
        reward,
        n=4,
        iterations=9,
        horizon=6,
        sigma2=40.0,
        patience=2,
        progress=False,
    )
    assert out.samples.tolist() == [12]  # the best round and two worse ones
    assert out.history["ess"].shape == (1, 3)


def test_a_time_limit_stops_after_the_first_round():
    out = aisp(tiny_with_words("llama"), PROMPTS, REWARD, **QUICK, seconds=0.0)
    assert out.samples.tolist() == [6, 6, 6]


def hooks_of(hf) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in hf.modules())


def test_no_hook_survives_an_error_and_the_mode_comes_back():
    model = load(tiny("llama"), word_tokenizer())
    model.hf.train()

    def broken(prompts, responses):
        raise RuntimeError("reward server down")

    with pytest.raises(RuntimeError, match="reward server down"):
        aisp(model, PROMPTS, broken, **QUICK)
    layer = model.hf.model.layers[1].mlp
    forward, layer.forward = layer.forward, lambda *_: 1 / 0
    with pytest.raises(ZeroDivisionError):
        aisp(model, PROMPTS, REWARD, **QUICK)
    layer.forward = forward
    assert hooks_of(model.hf) == 0 and model.hf.training


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_the_hook_of_transformer_lens_gives_the_same_responses(family):
    model = load(tiny(family), word_tokenizer())
    decoder = Decoder(model)
    prompt = decoder.encode(PROMPTS[:1])
    noise = noise_for(decoder, 1)
    expected = perturbed_rollout(decoder, decoder.prefill(prompt), noise, [5])
    v = dense(noise[0])
    for i in range(6):
        step = []

        def move(z, hook, i=i, step=step):
            step.append(1)
            return torch.cat([z[:, :-1], z[:, -1:] + v[i, len(step) - 1]], 1)

        with model.lens.hooks(fwd_hooks=[("unembed.hook_in", move)]):
            out = model.lens.generate(prompt[0][None], max_new_tokens=5, do_sample=False, stop_at_eos=False,
                                      return_type="tokens", verbose=False)  # fmt: skip
        tokens = out[0, prompt[0].shape[0] :].tolist()
        assert tokens[: len(expected[i])] == expected[i].tolist()


@pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing`:FutureWarning"
)  # peft asks transformers by the old name
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_adapters_of_peft_are_decoded_with(family):
    import peft

    hf, target = tiny(family), {"gpt2": "c_attn", "llama": "q_proj"}[family]
    config = peft.LoraConfig(r=4, target_modules=[target], fan_in_fan_out=family == "gpt2", task_type="CAUSAL_LM")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        wrapped = peft.get_peft_model(hf, config)
        for name, parameter in wrapped.named_parameters():
            if "lora_B" in name:
                parameter.data.normal_(std=2.0)
    model = load(wrapped.eval(), word_tokenizer())
    adapted = aisp(model, PROMPTS, REWARD, **QUICK, sigma2=4.0)
    plain = aisp(tiny_with_words(family), PROMPTS, REWARD, **QUICK, sigma2=4.0)
    merged = aisp(load(wrapped.merge_and_unload(), word_tokenizer()), PROMPTS, REWARD, **QUICK, sigma2=4.0)
    assert adapted.responses == merged.responses
    assert adapted.responses != plain.responses


@pytest.mark.parametrize(
    "wrong, message",
    [
        (dict(n=0), "n = 0 must be at least 1"),
        (dict(temperature=0), "temperature = 0 must be positive"),
        (dict(alpha=1.5), r"alpha = 1.5 must be in \[0, 1\]"),
        (dict(sigma2=-1.0), "sigma2 = -1.0 must be at least 0"),
        (dict(target_ess=9), r"target_ess = 9 must be in \[1, n\] = \[1, 6\]"),
        (dict(max_new_tokens=63), "shorten the prompt or max_new_tokens"),
        (dict(max_new_tokens=0), "max_new_tokens = 0 must be at least 1"),
        (dict(seed=[1, 2]), "2 seeds for 3 prompts"),
    ],
)
def test_bad_numbers_are_named(wrong, message):
    with pytest.raises(ValueError, match=message):
        aisp(tiny_with_words("llama"), PROMPTS, REWARD, **{**QUICK, **wrong})


def test_bad_models_prompts_and_rewards_are_named():
    with pytest.raises(ValueError, match="needs a tokenizer"):
        aisp(load(tiny("llama")), PROMPTS, REWARD, **QUICK)
    with pytest.raises(ValueError, match="has no unembedding|needs a causal"):
        aisp(load(tiny("bert-classifier"), word_tokenizer()), PROMPTS, REWARD, **QUICK)
    with pytest.raises(ValueError, match="no prompts"):
        aisp(tiny_with_words("llama"), [], REWARD, **QUICK)
    with pytest.raises(ValueError, match="has no tokens"):
        aisp(tiny_with_words("llama"), ["w4", ""], REWARD, **QUICK)
    with pytest.raises(TypeError, match="reward must be a function|parameter 'reward'"):
        aisp(tiny_with_words("llama"), PROMPTS, 3, **QUICK)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_an_active_injection_edits_every_prompt_once(family):
    """Greedy under injection is what `generate` gives; noisy decoding in a batch is what one prompt alone gives."""
    model = tiny_with_words(family)
    g = torch.Generator().manual_seed(0)
    anatomy = model.anatomy
    embedding = 3 * torch.randn(anatomy.n_layers, anatomy.n_heads, anatomy.d_head, generator=g)
    alpha = torch.rand(anatomy.n_layers, anatomy.n_heads, generator=g)
    plain = aisp(model, PROMPTS, REWARD, **QUICK, sigma2=0.0)
    with inject(model, embedding, alpha):
        quiet = aisp(model, PROMPTS, REWARD, **QUICK, sigma2=0.0)
        for prompt, tokens in zip(PROMPTS, quiet.tokens, strict=True):
            ids = torch.tensor([word_tokenizer()(prompt)["input_ids"]])
            wanted = model.hf.generate(
                ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=7, pad_token_id=0
            )
            assert tokens.tolist() == wanted[0, ids.shape[1] :].tolist()
        noisy = aisp(model, PROMPTS, REWARD, **QUICK, sigma2=4.0)
        alone = aisp(model, PROMPTS[1], REWARD, **QUICK, sigma2=4.0)
    assert quiet.responses != plain.responses
    assert noisy.responses[1] == alone.responses[0]
    assert torch.allclose(noisy.token_kl[1], alone.token_kl[0], atol=1e-4, equal_nan=True)


def test_a_model_tuned_in_its_heads_is_decoded_with_inside_and_outside_the_restriction():
    from circuits import Circuit, Head
    from interventions import HeadMask, restrict

    model = load(tiny("llama"), word_tokenizer())
    before = aisp(model, PROMPTS, REWARD, **QUICK, sigma2=4.0)
    mask = HeadMask.from_circuit(Circuit([Head(0, 1), Head(2, 3)], 3, 4), model)
    with restrict(model.hf, mask) as restricted:
        optimizer = torch.optim.SGD(restricted.parameters(), lr=0.5)
        tokens = torch.tensor([[5, 9, 11, 40, 7, 7, 7, 7]])
        for _ in range(5):
            optimizer.zero_grad()
            model.hf(tokens, labels=tokens).loss.backward()
            optimizer.step()
        inside = aisp(model, PROMPTS, REWARD, **QUICK, sigma2=4.0)
    outside = aisp(model, PROMPTS, REWARD, **QUICK, sigma2=4.0)
    assert inside.responses == outside.responses != before.responses
