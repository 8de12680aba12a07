import pytest
import torch
from torch import nn

from interventions.examples import IGNORED, Examples
from interventions.likelihood import token_values
from interventions.lora import StackedLoRA
from interventions.unembedding import HiddenLogLikelihood, hidden_log_likelihood, plain_head

from models import CAUSAL, VOCABULARY, ragged, tiny


def padded(side: str) -> Examples:
    """Rows of unequal length; every second token of each is a target."""
    rows = ragged(3)
    width = max(map(len, rows))
    tokens, mask, targets = torch.zeros(3, width).long(), torch.zeros(3, width).long(), torch.full((3, width), IGNORED)
    for number, row in enumerate(rows):
        span = slice(0, len(row)) if side == "right" else slice(width - len(row), width)
        tokens[number, span], mask[number, span] = torch.tensor(row), 1
        targets[number, span] = torch.tensor(
            [row[i + 1] if i % 2 and i + 1 < len(row) else IGNORED for i in range(len(row))]
        )
    return Examples(tokens, mask, targets)


@pytest.mark.parametrize("rows", (1, 3, 100))
@pytest.mark.parametrize("bias", (False, True))
def test_value_and_gradient_are_those_of_log_softmax(bias, rows):
    generator = torch.Generator().manual_seed(0)
    hidden, weight, shift = (
        torch.randn(*size, generator=generator, dtype=torch.float64) for size in ((7, 5), (11, 5), (11,))
    )
    targets = torch.randint(11, (7,), generator=generator)
    upstream = torch.randn(7, generator=generator, dtype=torch.float64)
    ours, theirs = hidden.clone().requires_grad_(), hidden.clone().requires_grad_()
    s = HiddenLogLikelihood.apply(ours, weight, shift if bias else None, targets, rows)
    wanted = torch.log_softmax(theirs @ weight.T + (shift if bias else 0), -1)[torch.arange(7), targets]
    torch.testing.assert_close(s, wanted)
    (s * upstream).sum().backward()
    (wanted * upstream).sum().backward()
    torch.testing.assert_close(ours.grad, theirs.grad)


def test_large_logits_and_half_precision():
    head = nn.Linear(4, 9, bias=False).requires_grad_(False)
    hidden, targets = 1e4 * torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(1)), torch.tensor([0, 8, 4])
    wanted = torch.log_softmax(head(hidden), -1)[:, torch.arange(3), targets]
    torch.testing.assert_close(hidden_log_likelihood(hidden, head, targets), wanted)
    half = hidden_log_likelihood(1e-4 * hidden.bfloat16(), head.bfloat16(), targets)
    assert half.dtype == torch.float32 and half.isfinite().all()


@pytest.mark.parametrize("side", ("left", "right"))
@pytest.mark.parametrize("family", CAUSAL)
def test_token_values_are_those_of_the_models_logits(family, side):
    hf, batch = tiny(family).requires_grad_(False), padded(side)
    logits = hf(**batch.inputs(hf)).logits[batch.where]
    wanted = torch.log_softmax(logits, -1).gather(1, batch.targets[batch.where][:, None])[:, 0]
    for _ in range(2):  # a model that caps its logits is found out at the first call
        torch.testing.assert_close(token_values(hf, batch)[0], wanted, atol=1e-4, rtol=1e-4)
    assert (plain_head(hf) is None) == (family == "gemma2")


def test_no_logits_are_kept_for_backward():
    hf, batch, kept = tiny("llama").requires_grad_(False), padded("right"), []
    hf.model.embed_tokens.requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.shape) or t, lambda t: t):
        token_values(hf, batch).sum().backward()
    assert kept and (len(batch.owners()), VOCABULARY) not in kept


@pytest.mark.parametrize("in_place", (False, True))
def test_a_scale_after_the_output_layer_is_respected(in_place):
    class Scaled(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def get_output_embeddings(self):
            return self.inner.get_output_embeddings()

        def forward(self, input_ids, attention_mask, position_ids=None):
            out = self.inner(input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids)
            out.logits = out.logits.mul_(0.5) if in_place else out.logits * 0.5
            return out

    hf, batch = tiny("llama").requires_grad_(False), padded("right")
    logits = hf(**batch.inputs(hf)).logits[batch.where] * 0.5
    wanted = torch.log_softmax(logits, -1).gather(1, batch.targets[batch.where][:, None])[:, 0]
    torch.testing.assert_close(token_values(Scaled(hf), batch)[0], wanted, atol=1e-5, rtol=1e-4)


def test_an_output_layer_that_others_touched_is_run():
    hf = tiny("llama").requires_grad_(False)
    handle = hf.lm_head.register_forward_pre_hook(lambda module, args: None)
    assert plain_head(hf) is None
    handle.remove()
    assert plain_head(hf) is hf.lm_head
    hf.lm_head.forward = lambda hidden: 2 * torch.nn.functional.linear(hidden, hf.lm_head.weight)
    assert plain_head(hf) is None


def test_an_adapted_or_training_output_layer_is_run():
    hf = tiny("llama")
    assert plain_head(hf) is None  # its weights learn
    hf.requires_grad_(False)
    assert plain_head(hf) is hf.lm_head
    stack = StackedLoRA(hf, 2, r=2, target_modules=["lm_head"])
    with stack.attached(hf):
        assert plain_head(hf) is None
