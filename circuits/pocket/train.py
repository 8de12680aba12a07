"""Make the pocket model: `python -m circuits.pocket.train [folder]` (minutes on 2 CPU cores, seeded).

1. Build a word-level tokenizer over the world's vocabulary.
2. Pack marked documents (`corpus.py`) into rows; attention and positions stay inside a document.
3. Minimise the token loss, where what can be known from the text counts 1 and the rest 0.1: Muon on the matrices,
   AdamW on embeddings and norms, linear warm-up and decay.
4. Save `config.json`, `model.safetensors` (float16) and the tokenizer.
"""

import re
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from circuits.progress import track

from . import corpus

SEED, STEPS, ROWS, LENGTH, PEAK_LR = 0, 1600, 24, 192, 6e-3
REST = 0.1  # weight in the loss of tokens that cannot be known
SHAPE = dict(
    hidden_size=96, intermediate_size=256, num_hidden_layers=4, num_attention_heads=8, num_key_value_heads=4,
    head_dim=16, max_position_embeddings=512, tie_word_embeddings=False, initializer_range=0.05,
)  # fmt: skip
SPECIAL = ("<pad>", "<s>", "</s>", "<unk>")


def build_tokenizer():
    """A word with its leading space is one token, so ` good` or ` Mary` is one; the text comes back exactly."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    marks = [mark for sign in ":,.|?" for mark in (sign, "▁" + sign)]
    vocabulary = [*SPECIAL, "\n", "\n\n", "▁", "Q", "A", "▁Q", "▁A", *marks]
    vocabulary += ["▁" + word for word in corpus.vocabulary()]
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(vocabulary)}, unk_token="<unk>"))
    pieces = Regex(r"\n+|▁?[A-Za-z]+|▁?[^A-Za-z▁\s]|▁")
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Metaspace("▁", "first"), pre_tokenizers.Split(pieces, "isolated")]
    )
    core.decoder = decoders.Metaspace("▁", "first")
    core.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", SPECIAL.index("<s>"))]
    )
    names = dict(zip(("pad_token", "bos_token", "eos_token", "unk_token"), SPECIAL, strict=True))
    return PreTrainedTokenizerFast(
        tokenizer_object=core, padding_side="left", model_max_length=SHAPE["max_position_embeddings"], **names
    )


def marked(document: str, tokenizer) -> tuple[list[int], list[float]]:
    """Token ids and loss weights of a document; `{` and `}` enclose what counts fully."""
    text, spans = "", []
    for i, part in enumerate(re.split(r"[{}]", document)):
        if i % 2:
            spans.append((len(text), len(text) + len(part)))
        text += part
    encoded = tokenizer(text, return_offsets_mapping=True)
    inside = [any(start <= a and b <= end and a < b for start, end in spans) for a, b in encoded["offset_mapping"]]
    return encoded["input_ids"], [1.0 if known else REST for known in inside]


class Batch:
    """Rows of packed documents, with the document each token belongs to (0: padding)."""

    def __init__(self, rows: list[list[tuple[list[int], list[float]]]], pad: int):
        self.tokens: Int[Tensor, "row pos"] = torch.full((len(rows), LENGTH), pad)
        self.weights: Float[Tensor, "row pos"] = torch.zeros(len(rows), LENGTH)
        self.document: Int[Tensor, "row pos"] = torch.zeros(len(rows), LENGTH, dtype=torch.long)
        self.positions: Int[Tensor, "row pos"] = torch.zeros(len(rows), LENGTH, dtype=torch.long)
        for r, row in enumerate(rows):
            at = 0
            for d, (ids, weights) in enumerate(row, start=1):
                here = slice(at, at + len(ids))
                self.tokens[r, here] = torch.tensor(ids)
                self.weights[r, here] = torch.tensor([0.0, *weights[1:]])  # a document's first token follows nothing
                self.document[r, here], self.positions[r, here] = d, torch.arange(len(ids))
                at += len(ids)

    def mask(self) -> Bool[Tensor, "row 1 pos pos"]:
        same = self.document[:, :, None] == self.document[:, None, :]
        return (same & torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril())[:, None]


def batches(tokenizer, seed: int, steps: int) -> Iterator[Batch]:
    """`steps` batches; the corpus moves through its curriculum in 20 stages."""
    for stage in range(20):
        source = corpus.documents(seed, stage / 20, (stage + 1) / 20)
        waiting: list[tuple[list[int], list[float]]] = []
        for _ in range(steps * stage // 20, steps * (stage + 1) // 20):
            rows = []
            for _ in range(ROWS):
                row, used = [], 0
                while True:
                    document = waiting.pop() if waiting else marked(next(source), tokenizer)
                    if used + len(document[0]) > LENGTH:
                        waiting.append(document)
                        break
                    row.append(document)
                    used += len(document[0])
                rows.append(row)
            yield Batch(rows, tokenizer.pad_token_id)


def loss_of(model, batch: Batch) -> Float[Tensor, ""]:
    mask = torch.zeros(batch.mask().shape).masked_fill(~batch.mask(), torch.finfo(torch.float32).min)
    logits = model(batch.tokens, attention_mask=mask, position_ids=batch.positions, use_cache=False).logits
    weights = batch.weights[:, 1:].flatten()
    kept = weights > 0
    losses = torch.nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1)[kept], batch.tokens[:, 1:].flatten()[kept], reduction="none"
    )
    return (losses * weights[kept]).sum() / weights[kept].sum()


def optimizers(model, steps: int) -> list[tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]]:
    """Muon for the matrices inside the blocks, AdamW for the rest, both warmed up and then decayed to zero."""
    inner = [p for name, p in model.named_parameters() if p.ndim == 2 and "layers" in name]
    rest = [p for name, p in model.named_parameters() if not (p.ndim == 2 and "layers" in name)]
    muon = torch.optim.Muon(inner, lr=PEAK_LR, weight_decay=0.0, adjust_lr_fn="match_rms_adamw")
    adam = torch.optim.AdamW(rest, lr=PEAK_LR, betas=(0.9, 0.98), weight_decay=0.0)

    def rate(step: int) -> float:
        return min((step + 1) / 50, 1.0) * max(1 - step / steps, 0.0)

    return [(o, torch.optim.lr_scheduler.LambdaLR(o, rate)) for o in (muon, adam)]


def new_model(tokenizer, seed: int):
    from transformers import LlamaConfig, LlamaForCausalLM

    ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("pad", "bos", "eos")}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **SHAPE, **ids))


def train(folder: Path, seed: int = SEED, steps: int = STEPS, progress: bool = True) -> Path:
    """Train from scratch and save into `folder`."""
    tokenizer = build_tokenizer()
    model = new_model(tokenizer, seed).train()
    schedule = optimizers(model, steps)
    for step, batch in enumerate(track(batches(tokenizer, seed, steps), "training", total=steps, enabled=progress)):
        loss = loss_of(model, batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, scheduler in schedule:
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
        if step % 50 == 0 or step == steps - 1:
            print(f"step {step:5d}  loss {loss.item():.3f}", file=sys.stderr, flush=True)
    model.eval().half().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


if __name__ == "__main__":
    print(train(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent / "model"))
