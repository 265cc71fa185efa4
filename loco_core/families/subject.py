"""Which tokens of a prompt are the subject."""

import re
from collections.abc import Callable
from typing import Any

__all__ = ["span_of"]


def span_of(
    prompt: str, subject: str, tokenizer: Any, worded: Callable[[str], str] = str
) -> tuple[int, int]:
    """(first, last) token positions of `subject` in `prompt`, both inclusive.

    The subject is matched as whole words without regard to case; of several occurrences the last
    counts, because a causal text encoder gathers the earlier ones there. worded: a text as the
    tokenizer gets it, where textual inversions of several tokens are spelled out.
    Raises ValueError for a subject that is not there, is joined with a neighbour to one token, or
    stands behind the last token that the pipeline reads.
    """
    found = list(re.finditer(rf"(?<!\w){re.escape(subject)}(?!\w)", prompt, re.IGNORECASE))
    if not subject.strip() or not found:
        raise ValueError(
            f"subject {subject!r} is not in the prompt {prompt!r}: "
            "pass a prompt that contains it, word for word"
        )

    def ids(text: str) -> list[int]:
        return tokenizer(worded(text), add_special_tokens=False, truncation=False).input_ids

    start, stop = found[-1].span()
    whole, before, upto = ids(prompt), ids(prompt[:start].rstrip()), ids(prompt[:stop])
    if whole[: len(before)] != before or whole[: len(upto)] != upto:
        raise ValueError(
            f"the tokenizer joins {subject!r} with its neighbours in {prompt!r}: "
            "put spaces around it"
        )
    full = tokenizer(worded(prompt), truncation=False).input_ids
    shift = next(i for i in range(len(full)) if full[i : i + len(whole)] == whole)
    first, last = shift + len(before), shift + len(upto) - 1
    room = tokenizer.model_max_length - (len(full) - len(whole) - shift)
    if last >= room:
        raise ValueError(
            f"subject {subject!r} is cut off: it ends at token {last} of {prompt!r}, but this "
            f"pipeline reads tokens 0 to {room - 1}; shorten the prompt"
        )
    return first, last
