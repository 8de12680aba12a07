"""A tokenizer for the tiny random models: words w3 ... w60, one token each, no files."""

from functools import cache
from typing import Any

from models import VOCABULARY, tiny


@cache
def word_tokenizer() -> Any:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from transformers import PreTrainedTokenizerFast

    words = {"<pad>": 0, "<s>": 1, "</s>": 2, **{f"w{i}": i for i in range(3, VOCABULARY)}}
    raw = Tokenizer(WordLevel(words, unk_token="<pad>"))
    raw.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="<pad>", bos_token="<s>", eos_token="</s>")


@cache
def tiny_with_words(family: str) -> Any:
    """A loaded tiny model with the word tokenizer. For tests that change no weight."""
    from circuits import load

    return load(tiny(family), word_tokenizer())
