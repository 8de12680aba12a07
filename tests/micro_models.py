"""Two hand-built attention models whose working heads are known because they were put there.

The stream has blocks of one-hot coordinates: the token, the position, what an early head fetched (`memo`), and the answer (`out`).
Every model has 3 layers of 4 heads, no MLP; the heads that are not wired hold small random weights.

  induction   a0.h1 writes the previous token into `memo`; a1.h2 looks where `memo` is the present token and copies what stands
              there. a0.h1 acts through a1.h2's *keys* only.
  pointer     a0.h3 copies the first token into `memo` of the last position; a1.h0 looks at the position which that token names and
              copies what stands there. a0.h3 acts through a1.h0's *query* only.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from circuits import Circuit, Head
from circuits.encoding import Encoded
from circuits.tasks import Task

TOKENS, LENGTH, D_HEAD = 8, 8, 8
BLOCK = {"token": 0, "position": 8, "memo": 16, "out": 24}
KNOWN = {"induction": Circuit([Head(0, 1), Head(1, 2)], 3, 4), "pointer": Circuit([Head(0, 3), Head(1, 0)], 3, 4)}


def micro(name: str) -> Any:
    """The Hugging Face model."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=TOKENS, n_embd=32, n_layer=3, n_head=4, n_positions=LENGTH, n_inner=4, tie_word_embeddings=False,
        bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        hf = GPT2LMHeadModel(config).eval()
    for parameter in hf.transformer.h.parameters():
        parameter.data *= 4.0 if parameter.ndim > 1 else 1.0  # the heads that do nothing still do something
    for block in hf.transformer.h:
        block.mlp.c_proj.weight.data.zero_()
    one = torch.eye(8)
    hf.transformer.wte.weight.data = _into("token", one)
    hf.transformer.wpe.weight.data = _into("position", one)
    hf.lm_head.weight.data = _into("out", one) * 2.0
    previous = torch.eye(8).roll(-1, 1)  # position p asks for position p - 1
    if name == "induction":
        _wire(hf, 0, 1, q=("position", previous), k=("position", one), v="token", o="memo")
        _wire(hf, 1, 2, q=("token", one), k=("memo", one), v="token", o="out")
    else:
        _wire(hf, 0, 3, q=("position", one[[0] * 8]), k=("position", one), v="token", o="memo")
        _wire(hf, 1, 0, q=("memo", one), k=("position", one), v="token", o="out")
    return hf


def _into(block: str, matrix: Tensor) -> Tensor:
    """The matrix's columns as coordinates of a block of the stream."""
    out = torch.zeros(len(matrix), 32)
    out[:, BLOCK[block] : BLOCK[block] + 8] = matrix
    return out


def _wire(hf: Any, layer: int, head: int, q: tuple[str, Tensor], k: tuple[str, Tensor], v: str, o: str) -> None:
    """q and k: (block that is read, its map to the head); v copies a block, o writes it to another."""
    attention, mine = hf.transformer.h[layer].attn, slice(head * D_HEAD, (head + 1) * D_HEAD)
    for part, (block, matrix) in enumerate((q, k, (v, torch.eye(8)))):
        gain = 0.8 if part < 2 else 0.5  # attention of about 0.9 where it is meant to be
        columns = slice(part * 32 + mine.start, part * 32 + mine.stop)
        attention.c_attn.weight.data[:, columns] = gain * _into(block, matrix.T).T
        attention.c_attn.bias.data[columns] = 0
    attention.c_proj.weight.data[mine] = _into(o, torch.eye(8))


class MicroTask(Task):
    """Rows for a micro-model, with twins in which the answer is another one."""

    fingerprint = "seeded"

    def __init__(self, name: str, n: int, rows: Sequence[int] | None = None):
        self.name, self.rows = name, list(range(n)) if rows is None else list(rows)

    def __len__(self) -> int:
        return len(self.rows)

    def select(self, indices):
        return MicroTask(self.name, 0, [self.rows[i] for i in indices])

    def encode(self, model) -> Encoded:
        pairs = [self._row(seed) for seed in self.rows]
        tokens, twins = (torch.tensor([pair[i][0] for pair in pairs]) for i in (0, 1))
        gold, other = (torch.tensor([pair[i][1] for pair in pairs]) for i in (0, 1))
        direction = torch.zeros(len(pairs), TOKENS)
        rows = torch.arange(len(pairs))
        direction[rows, gold], direction[rows, other] = 1.0, -1.0
        rest = (torch.full_like(gold, LENGTH - 1), torch.arange(TOKENS), direction, gold, torch.zeros_like(gold))
        mask = torch.ones_like(tokens)
        return Encoded(tokens, mask, *rest, corrupted=Encoded(twins, mask, *rest))

    def _row(self, seed: int) -> list[tuple[list[int], int]]:
        """(tokens, answer) of the row and of its twin, which differ in what the early head fetches."""
        generator = torch.Generator().manual_seed(seed)
        letters = torch.randperm(TOKENS, generator=generator).tolist()
        if self.name == "pointer":  # the first token names one of positions 1 to 6
            first, second = (torch.randperm(6, generator=generator)[:2] + 1).tolist()
            rest = [letters[i] for i in range(7)]
            return [([place, *rest], rest[place - 1]) for place in (first, second)]
        # Three pairs and a last letter; the last token repeats the first of a pair. The twin swaps the firsts of two pairs.
        one, two = (2 * torch.randperm(3, generator=generator)[:2]).tolist()
        row, twin = letters[:7], letters[:7]
        twin[one], twin[two] = row[two], row[one]
        return [([*row, row[one]], row[one + 1]), ([*twin, row[one]], row[two + 1])]
