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
COPY = (1, 1)


def planted_model(seed: int = 0) -> Any:
    """Two layers of four heads, built by hand; attention only.

    a0.h2 (planted) attends to capitals and writes "capital"; a1.h1 copies the letter before the last token. The unembedding
    adds the two: "A" = letter a + capital. So "a:" gives "a", and "b:B d:D a:" gives "A". The other six heads are noise.
    """
    import transformers

    from circuits import load

    d_model, positions = HEADS * D_HEAD, 30
    tokenizer = character_tokenizer()
    config = transformers.GPT2Config(
        vocab_size=len(tokenizer), n_embd=d_model, n_layer=2, n_head=HEADS, n_positions=positions, tie_word_embeddings=False
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
            attention.c_attn.weight.copy_(0.02 * torch.randn(d_model, 3 * d_model, generator=generator))
            attention.c_proj.weight.copy_(0.02 * torch.randn(d_model, d_model, generator=generator))
        _plant_case(hf.transformer.h[0].attn, capital, place, positions)
        _plant_copy(hf.transformer.h[1].attn, small, place, positions)
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


def _plant_case(attention: Any, capital: int, place: int, positions: int) -> None:
    q, k, v, o = _parts(attention, PLANTED[1])
    q[place : place + positions, 0] = 2.0
    k[capital, 0] = 2.0
    v[capital, 0] = 0.3
    o[0, capital] = 3.0


def _plant_copy(attention: Any, small: int, place: int, positions: int) -> None:
    q, k, v, o = _parts(attention, COPY[1])
    for position in range(1, positions):
        q[place + position, position - 1] = 3.0
    k[place : place + positions, :positions] = 3.0 * torch.eye(positions)
    # Values hold the letter and its case: eight letters, then "small".
    for index in range(small + 1):
        v[index, index] = 0.3
        o[index, index] = 3.0


def capitals() -> Any:
    from circuits import FewShotTask

    pairs = [(letter.lower(), letter) for letter in UPPER]
    return FewShotTask.from_pairs(pairs * 4, template="{input}:{output}", separator=" ", name="capitals")
