"""Token ids -> text, a few at a time. Never splits a character; knows no stop strings and no streams."""

import codecs
from collections.abc import Iterable

from gateway.tokenizer import Tokenizer


class Detokenizer:
    """The text of one sequence as its tokens come. What it returns, put together, is the whole text.

    Bytes that are no UTF-8 become U+FFFD, as in the tokenizers library.

    Args:
        continues: The text goes on from a prompt, so that a first space belongs to it.
        keep_special: Write special tokens out instead of skipping them.
        keep: Special tokens to write out though others are skipped.
    """

    __slots__ = ("_decoder", "_skipped", "_strip", "_tokenizer")

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        continues: bool = False,
        keep_special: bool = False,
        keep: frozenset[int] = frozenset(),
    ) -> None:
        self._tokenizer = tokenizer
        self._skipped = frozenset() if keep_special else tokenizer.special_ids - keep
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._strip = tokenizer.strips_first_space and not continues

    def feed(self, token_ids: Iterable[int]) -> str:
        """The text that became certain with `token_ids`; bytes of an unfinished character wait."""
        bytes_of, skipped = self._tokenizer.bytes_of, self._skipped
        return self._cut(self._decoder.decode(b"".join([bytes_of(t) for t in token_ids if t not in skipped])))

    def flush(self) -> str:
        """The rest, when no more tokens come."""
        return self._cut(self._decoder.decode(b"", True))

    def _cut(self, text: str) -> str:
        if self._strip and text:
            self._strip = False
            return text.removeprefix(" ")
        return text


def detokenize(tokenizer: Tokenizer, token_ids: Iterable[int], *, keep_special: bool = False) -> str:
    """The text of a whole sequence."""
    detokenizer = Detokenizer(tokenizer, keep_special=keep_special)
    return detokenizer.feed(token_ids) + detokenizer.flush()
