"""A character tokenizer for the tiny models, word pairs for it, and a hand-built model with one head that carries the task."""

import string
from functools import cache
from typing import Any

import torch

from models import tiny

CHARACTERS = " \n:>," + string.digits + string.ascii_lowercase + "QAXYZBCDEFGHIJKL"
WORDS = ["hot", "cat", "red", "big", "sea", "dry", "wet", "sun", "joy", "map", "fig", "owl"]


@cache
def character_tokenizer() -> Any:
    """One token per character; ids 0-2 are pad, begin and end, which it never writes by itself."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {token: index for index, token in enumerate(["<pad>", "<s>", "</s>", *CHARACTERS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>")


def first_letters(n: int = len(WORDS)) -> Any:
    """Ragged inputs and several tokens to an answer: hot -> ho."""
    from circuits import FewShotTask

    words = [word * (1 + index % 3) for index, word in enumerate(WORDS)]
    return FewShotTask.from_pairs([(word, word[:2]) for word in words[:n]], name="first letters")


@cache
def loaded(family: str) -> Any:
    from circuits import load

    return load(tiny(family), character_tokenizer())


UPPER, HEADS, D_HEAD = "ABCDEFGH", 4, 32
PLANTED = (0, 2)


def planted_model(seed: int = 0) -> Any:
    """Two layers of four heads, built by hand; attention only.

    a0.h2 (planted) attends to capitals and writes "capital"; the other seven, each with its own strength, copy the letter before
    the last token. The unembedding adds the two: "A" = letter a + capital. So "a:" gives "a", and "b:B d:D a:" gives "A".
    """
    import transformers

    from circuits import load

    d_model, positions = HEADS * D_HEAD, 30
    tokenizer = character_tokenizer()
    config = transformers.GPT2Config(
        vocab_size=len(tokenizer),
        n_embd=d_model,
        n_layer=2,
        n_head=HEADS,
        n_positions=positions,
        tie_word_embeddings=False,
        bos_token_id=1,
        eos_token_id=2,
    )
    hf = transformers.GPT2LMHeadModel(config).eval()
    generator = torch.Generator().manual_seed(seed)
    letter = {character: index for index, character in enumerate(UPPER.lower())}
    small, capital, place = len(letter), len(letter) + 1, len(letter) + 2
    with torch.no_grad():
        for parameter in hf.parameters():
            parameter.zero_()
        for module in hf.modules():
            if isinstance(module, torch.nn.LayerNorm):
                module.weight.fill_(1.0)
        embedding, unembedding = hf.transformer.wte.weight, hf.lm_head.weight
        for character, index in letter.items():
            for text, kind in ((character, small), (character.upper(), capital)):
                token = tokenizer.convert_tokens_to_ids(text)
                embedding[token, index] = embedding[token, kind] = 1
                unembedding[token, index] = unembedding[token, kind] = 1
        hf.transformer.wpe.weight[:, place : place + positions] = torch.eye(positions)
        for layer in range(2):
            attention = hf.transformer.h[layer].attn
            for head in range(HEADS):
                if (layer, head) == PLANTED:
                    _plant_case(attention, head, capital, place, positions)
                else:
                    strength = 0.5 + torch.rand((), generator=generator).item()
                    _plant_copy(attention, head, small, place, positions, strength)
    return load(hf, tokenizer)


def _parts(attention: Any, head: int) -> tuple[torch.Tensor, ...]:
    """q, k, v [d_model, d_head] and o [d_head, d_model] of one head, zeroed."""
    start = head * D_HEAD
    width = HEADS * D_HEAD
    weight = attention.c_attn.weight
    parts = [weight[:, part * width + start : part * width + start + D_HEAD] for part in range(3)]
    parts.append(attention.c_proj.weight[start : start + D_HEAD])
    for part in parts:
        part.zero_()
    return tuple(parts)


def _plant_case(attention: Any, head: int, capital: int, place: int, positions: int) -> None:
    q, k, v, o = _parts(attention, head)
    q[place : place + positions, 0] = 2.0
    k[capital, 0] = 2.0
    v[capital, 0] = 0.3
    o[0, capital] = 3.0


def _plant_copy(attention: Any, head: int, small: int, place: int, positions: int, strength: float) -> None:
    q, k, v, o = _parts(attention, head)
    for position in range(1, positions):
        q[place + position, position - 1] = 3.0
    k[place : place + positions, :positions] = 3.0 * torch.eye(positions)
    # Values hold the letter and its case: eight letters, then "small".
    for index in range(small + 1):
        v[index, index] = 0.1
        o[index, index] = strength


def capitals() -> Any:
    from circuits import FewShotTask

    pairs = [(letter.lower(), letter) for letter in UPPER]
    return FewShotTask.from_pairs(pairs * 4, template="{input}:{output}", separator=" ", name="capitals")
