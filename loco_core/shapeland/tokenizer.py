"""A byte-level BPE tokenizer of Shapeland's words, as a real `CLIPTokenizer`."""

from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import CLIPTokenizer

from .vocabulary import ATTRIBUTES, PLAIN_TEMPLATES, STYLE_TEMPLATES, caption

MAX_LENGTH = 24  # the longest caption has 18 tokens with start and end
_SPECIAL = ("<|startoftext|>", "<|endoftext|>")


def _corpus() -> Iterator[str]:
    for attribute, values in ATTRIBUTES.items():
        for value in values:
            yield from (caption(**{attribute: value}), value)
    yield from (frame.format("an emblem", "a thing") for frame in STYLE_TEMPLATES)
    yield from (frame.format("an orange thing") for frame in PLAIN_TEMPLATES)


def build_tokenizer() -> CLIPTokenizer:
    """Learn the merges from every word of the world (each becomes one token) and return the
    tokenizer. Other words fall apart into letters, as in any byte-level BPE.

    >>> build_tokenizer().tokenize("a star by Mira Holt")
    ['a</w>', 'star</w>', 'by</w>', 'mira</w>', 'holt</w>']
    """
    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>", unk_token=_SPECIAL[1]))
    bpe.normalizer = normalizers.Lowercase()
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Whitespace(), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=2000,
        special_tokens=list(_SPECIAL),
        initial_alphabet=sorted(alphabet),
        end_of_word_suffix="</w>",
        show_progress=False,
    )
    bpe.train_from_iterator(_corpus(), trainer)
    learned = bpe.model
    vocab = bpe.get_vocab()
    for letter in sorted(alphabet):  # the trainer only knows word ends that it has seen
        vocab.setdefault(letter + "</w>", len(vocab))
    merges = _merges_of(learned)
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=MAX_LENGTH)


def _merges_of(model: models.BPE) -> list[tuple[str, str]]:
    with TemporaryDirectory() as folder:
        model.save(folder)
        text = (Path(folder) / "merges.txt").read_text(encoding="utf8")
    return [tuple(line.split()) for line in text.splitlines() if not line.startswith("#version")]
