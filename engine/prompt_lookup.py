"""Speculation without a draft model: what followed the last few tokens when they came before. Knows no model.

Prompt lookup decoding (Saxena, 2023). Answers that copy from their prompt, or repeat themselves, are guessed well.
"""

from array import array
from collections.abc import Sequence as SequenceOf


def propose(token_ids: SequenceOf[int], ngram: int, count: int) -> tuple[int, ...]:
    """Up to `count` tokens that followed the latest earlier occurrence of the last `ngram` tokens."""
    if count < 1 or len(token_ids) <= ngram:
        return ()
    tokens = array("q", token_ids)
    size = tokens.itemsize
    pattern, text = tokens[-ngram:].tobytes(), tokens[:-1].tobytes()
    at = text.rfind(pattern)
    while at % size:  # not found (-1), or not on a token's first byte
        if at < 0:
            return ()
        at = text.rfind(pattern, 0, at + len(pattern) - 1)
    start = at // size + ngram
    return tuple(tokens[start : start + count])
