"""LoRA on the query and value projections, rank 8: the weight-training baseline (Hu et al. 2022), by PEFT.

1. Adapters on q and v of every layer (the fused projection where a family has one).
2. Loss: cross-entropy of all answer tokens after the zero-shot prompt. AdamW, checkpoint by held-out loss.
3. While applied, the adapters sit in the model's modules; afterwards they are unloaded and the model is as before.
"""

import contextlib
import time
from collections.abc import Iterator
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import cross_entropy

from circuits.fewshot import EncodedPrompts, FewShotTask, encode_prompts
from circuits.prefix import forward
from circuits.progress import track

from .adapter import Adapter


def answer_loss(
    logits: Float[Tensor, "row position vocab"],
    tokens: Int[Tensor, "row position"],
    answer: Int[Tensor, "row position"],
) -> Float[Tensor, ""]:
    """Mean over rows of -log p(answer): `answer` marks the positions whose token is to be predicted."""
    losses = cross_entropy(logits[:, :-1].float().transpose(1, 2), tokens[:, 1:], reduction="none")
    return (losses * answer[:, 1:]).sum(1).mean()


@contextlib.contextmanager
def lora(model: Any, rank: int, state: dict[str, Tensor] | None = None, seed: int = 0) -> Iterator[Any]:
    """The model with adapters in place. Parameters, flags and modules are as before when the block ends."""
    import peft

    layout = model.anatomy.layout
    targets = sorted({layout.q.split(".")[-1], layout.v.split(".")[-1]})
    flags = [(parameter, parameter.requires_grad) for parameter in model.base.parameters()]
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        config = peft.LoraConfig(
            r=rank, lora_alpha=2 * rank, target_modules=targets, fan_in_fan_out=layout.transposed, task_type="CAUSAL_LM"
        )
        adapted = peft.get_peft_model(model.base, config)
    try:
        if state is not None:
            peft.set_peft_model_state_dict(adapted, state)
        yield adapted
    finally:
        adapted.unload()
        if hasattr(model.base, "peft_config"):
            del model.base.peft_config
        for parameter, flag in flags:
            parameter.requires_grad_(flag)


def fit_lora(
    model: Any,
    train: FewShotTask,
    validation: FewShotTask,
    *,
    rank: int = 8,
    steps: int = 200,
    batch_size: int = 8,
    lr: float | int = 3e-3,
    seed: int = 0,
    progress: bool = True,
) -> Adapter:
    import peft

    started = time.perf_counter()
    rows, held = (_with_answers(model, encode_prompts(model, task.prompts())) for task in (train, validation))
    generator = torch.Generator().manual_seed(seed)
    best, kept, size = float("inf"), None, 0
    with lora(model, rank, seed=seed) as adapted:
        parameters = [parameter for parameter in adapted.parameters() if parameter.requires_grad]
        size = sum(parameter.numel() for parameter in parameters)
        optimizer = torch.optim.AdamW(parameters, lr=lr)
        for step in track(range(steps), "LoRA", enabled=progress):
            batch = torch.randint(len(rows[0]), (batch_size,), generator=generator).to(model.device)
            optimizer.zero_grad()
            _loss(model, rows, batch).backward()
            optimizer.step()
            if (step + 1) % 25 == 0 or step + 1 == steps:
                with torch.no_grad():
                    loss = _loss(model, held, torch.arange(len(held[0]), device=model.device)).item()
                if loss < best:
                    best = loss
                    kept = {name: value.clone() for name, value in peft.get_peft_model_state_dict(adapted).items()}
    return Adapter(
        "LoRA",
        lambda: lora(model, rank, kept),
        trainable=size,
        seconds=time.perf_counter() - started,
        details=f"r={rank}",
    )


def _with_answers(model: Any, prompts: EncodedPrompts) -> tuple[Tensor, Tensor, Tensor]:
    """Prompts with their answers: tokens, attention mask, and which tokens are answer."""
    answers, mask = model.pad(prompts.answers, side="right")
    answers, mask = answers.to(model.device), mask.to(model.device)
    tokens = torch.cat((prompts.tokens, answers), 1)
    return tokens, torch.cat((prompts.attention_mask, mask), 1), torch.cat((torch.zeros_like(prompts.tokens), mask), 1)


def _loss(model: Any, data: tuple[Tensor, Tensor, Tensor], rows: Tensor) -> Float[Tensor, ""]:
    tokens, mask, answer = (part[rows] for part in data)
    return answer_loss(forward(model, tokens, mask).logits, tokens, answer)
