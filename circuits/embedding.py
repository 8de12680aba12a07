"""SITE stage 1: a task as one vector per head, read from few-shot prompts (Park et al. 2026, section 3).

1. Draw M prompts of N demonstrations and a query whose answer is left out; each ends at "A:".
2. t[layer, head] = mean over prompts of z at the last token: the head's output before W_O.
   Accumulated in float32 whatever the model's dtype, with the variance over prompts alongside.
3. From the same pass: how often, and how surely, the model answers those prompts right (its N-shot competence).
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from .fewshot import EncodedPrompts, FewShotTask, encode_prompts
from .files import fingerprint, load_tensors, save_tensors
from .hooks import record
from .prefix import forward
from .progress import track


def mean_and_variance(
    batches: Iterable[Float[Tensor, "layer _ head d_head"]],
) -> tuple[Float[Tensor, "layer head d_head"], Float[Tensor, "layer head d_head"]]:
    """Mean and variance over all rows of all batches, in float32, merged batch by batch (Chan et al. 1983)."""
    mean = spread = torch.zeros(())
    seen = 0
    for batch in batches:
        rows = batch.float()
        n, part = rows.shape[1], rows.mean(1)
        shift = part - mean
        mean = mean + shift * (n / (seen + n))
        spread = spread + (rows - part.unsqueeze(1)).square().sum(1) + shift.square() * (seen * n / (seen + n))
        seen += n
    return mean, spread / max(seen - 1, 1)


@dataclass(frozen=True)
class TaskEmbedding:
    """t for every head, with what it was measured on. `save` writes safetensors and JSON."""

    mean: Float[Tensor, "layer head d_head"]
    variance: Float[Tensor, "layer head d_head"] = field(repr=False)
    model: str = ""
    revision: str | None = None
    weights: str = ""
    task: str = ""
    template: str = ""
    data: str = ""
    n_prompts: int = 0
    n_shots: int = 0
    seed: int = 0
    accuracy: float | None = None
    nll: float | None = None

    def __repr__(self) -> str:
        layers, heads, _ = self.mean.shape
        made = f"{self.n_prompts} prompts of {self.n_shots} shots, seed {self.seed}"
        known = "" if self.accuracy is None else f"; accuracy with shots {self.accuracy:.3f}"
        return f"TaskEmbedding({self.task} on {self.model}: {layers} layers x {heads} heads, {made}{known})"

    @property
    def signal(self) -> Float[Tensor, "layer head"]:
        """|t| over its standard error, per head: how well the mean is known."""
        error = (self.variance.sum(-1) / max(self.n_prompts, 1)).sqrt()
        return self.mean.norm(dim=-1) / error.clamp(min=1e-12)

    def save(self, stem: str | Path) -> Path:
        meta = {name: value for name, value in vars(self).items() if name not in ("mean", "variance")}
        return save_tensors(stem, {"mean": self.mean, "variance": self.variance}, {"kind": "task embedding", **meta})

    @classmethod
    def load(cls, stem: str | Path, model: Any = None) -> "TaskEmbedding":
        """With `model`, an embedding measured on another model is refused."""
        tensors, meta = load_tensors(stem)
        if meta.pop("kind", None) != "task embedding":
            raise ValueError(f"{str(stem)!r} does not hold a task embedding; expected a file of TaskEmbedding.save")
        embedding = cls(**tensors, **meta)
        if model is not None:
            check_embedding(model, embedding)
        return embedding


def task_embedding(
    model: Any,
    task: FewShotTask,
    *,
    n_prompts: int = 50,
    n_shots: int = 10,
    seed: int = 0,
    batch_size: int = 16,
    progress: bool = True,
) -> TaskEmbedding:
    """Measure a task's embedding on a causal model. Defaults are the paper's."""
    check_causal(model)
    if n_prompts < 1:
        raise ValueError(f"n_prompts={n_prompts}; an embedding is the mean of at least one prompt")
    prompts = encode_prompts(model, task.prompts(n_shots, n_prompts, seed=seed))
    hits: list[Tensor] = []
    losses: list[Tensor] = []
    mean, variance = mean_and_variance(_last_z(model, prompts, batch_size, hits, losses, progress))
    return TaskEmbedding(
        mean=mean,
        variance=variance,
        model=model.name,
        revision=model.revision,
        weights=weights_of(model),
        task=task.name,
        template=task.template,
        data=task.fingerprint,
        n_prompts=n_prompts,
        n_shots=n_shots,
        seed=seed,
        accuracy=torch.cat(hits).float().mean().item(),
        nll=torch.cat(losses).mean().item(),
    )


@torch.no_grad()
def _last_z(
    model: Any, prompts: EncodedPrompts, batch_size: int, hits: list[Tensor], losses: list[Tensor], progress: bool
) -> Iterable[Tensor]:
    """z at the last token, batch by batch; the logits of the same pass go into `hits` and `losses`."""
    for start in track(range(0, len(prompts), batch_size), "task embedding", enabled=progress):
        rows = slice(start, start + batch_size)
        with record(model, "z") as cache:
            out = forward(model, prompts.tokens[rows], prompts.attention_mask[rows], logits_to_keep=1)
        logits, first = out.logits[:, -1].float(), prompts.first[rows]
        hits.append(logits.argmax(-1) == first)
        losses.append(torch.nn.functional.cross_entropy(logits, first, reduction="none"))
        yield cache.stack()[:, :, -1]


def check_causal(model: Any) -> None:
    if model.kind != "causal":
        raise ValueError(
            f"SITE injects where a causal model ends its prompt; {model.name!r} is a {model.kind} model, "
            "which reads the whole text at once: use a causal language model"
        )


def weights_of(model: Any) -> str:
    """A model's float type and a fingerprint of 4,096 of its token embeddings' values: two models of one name and size differ
    in it, a model with adapters or tuned heads has that of its base."""
    table = model.base.get_input_embeddings().weight.detach().flatten()
    sample = table[:: max(1, len(table) // 4096)][:4096].float()
    return f"{table.dtype}:{fingerprint(sample.cpu().numpy().tobytes().hex())}"


def check_embedding(model: Any, embedding: "TaskEmbedding | Tensor") -> Float[Tensor, "layer head d_head"]:
    """t on the model's device in float32, after checking that it can belong to this model."""
    mean = embedding if isinstance(embedding, Tensor) else embedding.mean
    anatomy = model.anatomy
    expected = (anatomy.n_layers, anatomy.n_heads, anatomy.d_head)
    if tuple(mean.shape) != expected:
        raise ValueError(
            f"the task embedding has shape {list(mean.shape)} (layer, head, d_head) and model {model.name!r} needs "
            f"{list(expected)}; it was measured on another model: run task_embedding on this one"
        )
    measured_on = "" if isinstance(embedding, Tensor) else embedding.model
    if measured_on and model.name and measured_on != model.name:
        raise ValueError(
            f"the task embedding was measured on {measured_on!r} and this model is {model.name!r}; "
            "run task_embedding on this one"
        )
    weights = "" if isinstance(embedding, Tensor) else embedding.weights
    same_type = weights.split(":")[0] == str(model.dtype)
    if weights and same_type and weights != weights_of(model):
        raise ValueError(
            f"the task embedding was measured on a model named {model.name!r} with other weights; run task_embedding on this one"
        )
    return mean.detach().float().to(model.device)
