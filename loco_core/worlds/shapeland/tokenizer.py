"""A byte-level BPE tokenizer of Shapeland's words, as a real `CLIPTokenizer`."""

from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import pairwise

from tokenizers import pre_tokenizers
from transformers import CLIPTokenizer

from .vocabulary import ATTRIBUTES, PLAIN_TEMPLATES, STYLE_TEMPLATES, caption

MAX_LENGTH = 24  # the longest caption has 18 tokens with start and end
_SPECIAL = ("<|startoftext|>", "<|endoftext|>")


def build_tokenizer() -> CLIPTokenizer:
    """The tokenizer of all minis: every word of the world is one token, and other words fall apart
    into letters.

    >>> build_tokenizer().tokenize("a star by Mira Holt")
    ['a</w>', 'star</w>', 'by</w>', 'mira</w>', 'holt</w>']
    """
    return learn_tokenizer(_words(), MAX_LENGTH)


def learn_tokenizer(words: Iterable[str], max_length: int) -> CLIPTokenizer:
    """Byte-pair encoding: join the most frequent pair of pieces until every word is one piece.

    Of equally frequent pairs the alphabetically last is joined, so that the same words give the
    same ids everywhere (the trainer of `tokenizers` gives others in every process).
    """
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    parts = [[*word[:-1], word[-1] + "</w>"] for word in words]
    merges: list[tuple[str, str]] = []
    while pairs := Counter(pair for part in parts for pair in pairwise(part)):
        merges.append(max(pairs, key=lambda pair: (pairs[pair], pair)))
        parts = [_joined(part, merges[-1]) for part in parts]
    pieces = [*_SPECIAL, *letters, *(letter + "</w>" for letter in letters)]
    pieces += ["".join(pair) for pair in merges]
    vocab = {piece: index for index, piece in enumerate(dict.fromkeys(pieces))}
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=max_length)


def _joined(part: list[str], pair: tuple[str, str]) -> list[str]:
    """`part` with every occurrence of `pair` joined, from left to right."""
    result: list[str] = []
    for piece in part:
        if result and (result[-1], piece) == pair:
            result[-1] += piece
        else:
            result.append(piece)
    return result


def _words() -> list[str]:
    """Every word of every caption, lower-cased, each once, in alphabetical order."""
    return sorted({word for text in _captions() for word in text.lower().split()})


def _captions() -> Iterator[str]:
    for attribute, values in ATTRIBUTES.items():
        yield from (caption(**{attribute: value}) for value in values)
    yield from (frame.format("an emblem", "a thing") for frame in STYLE_TEMPLATES)
    yield from (frame.format("an orange thing") for frame in PLAIN_TEMPLATES)
