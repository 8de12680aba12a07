import pytest
import torch
from fewshot_toys import first_letters, loaded

from circuits.answers import matches, score_answers
from interventions import inject


@pytest.mark.parametrize(
    ("text", "gold", "fold", "exact", "prefix"),
    [
        (" Paris\nQ: x", "Paris", True, True, True),
        (" paris", "Paris", True, False, True),
        (" paris", "Paris", False, False, False),
        ("12", "1", True, False, True),  # SITE's rule counts this; equality does not
        (" a Paris", "Paris", True, False, False),
        ("\n", "Paris", True, False, False),
    ],
)
def test_exact_is_equality_and_prefix_is_the_papers_rule(text, gold, fold, exact, prefix):
    assert matches(text, gold, fold) == (exact, prefix)


@pytest.mark.parametrize("family", ["gpt2", "qwen3", "gemma3", "neox"])
@pytest.mark.parametrize("injected", [False, True])
def test_batched_scores_are_those_of_plain_forwards_and_of_generate(family, injected):
    model, prompts = loaded(family), first_letters().prompts()
    a = model.anatomy
    generator = torch.Generator().manual_seed(1)
    embedding = torch.randn(a.n_layers, a.n_heads, a.d_head, generator=generator)
    alpha = torch.rand(a.n_layers, a.n_heads, generator=generator) * injected
    with inject(model, embedding, alpha):
        scored = score_answers(model, prompts, max_new_tokens=4, batch_size=5)
        for row, prompt in enumerate(prompts[:6]):
            text, answer = (model.tokenizer(part)["input_ids"] for part in (prompt.text, prompt.answer))
            said = model.generate(prompt.text, max_new_tokens=4)
            assert scored.texts[row] == said.split("\n")[0], (scored.texts[row], said)
            out = model.hf(torch.tensor([text]), use_cache=True)
            log_p = [out.logits[0, -1].log_softmax(-1)]
            later = model.hf(torch.tensor([answer[:-1]]), past_key_values=out.past_key_values).logits[0]
            log_p += list(later.log_softmax(-1))
            expected = -sum(p[token] for p, token in zip(log_p, answer, strict=True))
            assert abs(scored.nll[row] - expected) < 2e-3
            assert scored.first[row] == (log_p[0].argmax() == answer[0])
    assert scored.prompt_tokens == pytest.approx(sum(len(model.tokenizer(p.text)["input_ids"]) for p in prompts) / 12)
