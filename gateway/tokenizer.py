"""Text -> token ids, and token id -> bytes, from a model's `tokenizer.json`. Knows no requests and no chats."""

import asyncio
from collections.abc import Iterator
from typing import Any

import msgspec
import tokenizers

LONG_TEXT_CHARACTERS = 2000
"""Longer texts are encoded in a thread: a hop costs less than the wait it spares everyone else."""
SPACE = "▁"
"""What sentencepiece writes for a space."""


class TokenizerError(Exception):
    """The tokenizer file cannot be used; the message says why."""


class Tokenizer:
    """One model's tokenizer. Encodes as transformers does; added tokens in the text are recognised.

    Raises:
        TokenizerError: not a `tokenizer.json`, or its decoder is of a kind we do not know.
    """

    def __init__(self, tokenizer_json: bytes) -> None:
        try:
            self._tokenizer = tokenizers.Tokenizer.from_buffer(tokenizer_json)
            description = msgspec.json.decode(tokenizer_json)
        except Exception as error:
            raise TokenizerError(f"tokenizer.json cannot be read: {error}") from error
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        added = self._tokenizer.get_added_tokens_decoder()
        self.special_ids = frozenset(token_id for token_id, token in added.items() if token.special)
        decoders = list(_flatten(description.get("decoder")))
        self.strips_first_space = any(
            (d["type"] == "Strip" and d.get("start")) or (d["type"] == "Metaspace" and _prepends(d))
            for d in decoders
        )
        """Sentencepiece models write a space before the first word, which is no part of the text."""
        self._bytes = _token_bytes(
            self._tokenizer.get_vocab(with_added_tokens=True), {d["type"] for d in decoders}
        )

    @property
    def vocab_size(self) -> int:
        return len(self._bytes)

    async def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        """Token ids of `text`; off the event loop when it is long."""
        if len(text) <= LONG_TEXT_CHARACTERS:
            return self.encode_now(text, add_special_tokens=add_special_tokens)
        return await asyncio.to_thread(self.encode_now, text, add_special_tokens=add_special_tokens)

    def encode_now(self, text: str, *, add_special_tokens: bool) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=add_special_tokens).ids

    def offsets(self, text: str, *, add_special_tokens: bool) -> list[int]:
        """For each token that `encode` gives, where in `text` it begins, in characters."""
        starts = self._tokenizer.encode(text, add_special_tokens=add_special_tokens).offsets
        return [start for start, _ in starts]

    def text_of(self, token_id: int) -> str:
        """The token as the vocabulary writes it, e.g. `Ġworld`; empty for an id that has none."""
        return self._tokenizer.id_to_token(token_id) or ""

    def id_of(self, token: str) -> int | None:
        """The id of the token that is written so, if there is one."""
        return self._tokenizer.token_to_id(token)

    def bytes_of(self, token_id: int) -> bytes:
        """The token's bytes; not always whole characters. Empty for an id that the tokenizer has no token for."""
        return self._bytes[token_id] if 0 <= token_id < len(self._bytes) else b""


def _flatten(decoder: dict[str, Any] | None) -> Iterator[dict[str, Any]]:
    if decoder is None:
        return
    if decoder["type"] == "Sequence":
        for part in decoder["decoders"]:
            yield from _flatten(part)
    else:
        yield decoder


def _prepends(metaspace: dict[str, Any]) -> bool:
    scheme = metaspace.get("prepend_scheme")
    return metaspace.get("add_prefix_space", True) if scheme is None else scheme != "never"


def _token_bytes(vocab: dict[str, int], decoders: set[str]) -> list[bytes]:
    """Per token id the bytes that it adds to a text: what the tokenizer's own decoder would do, token by token."""
    if "ByteLevel" in decoders:
        to_bytes = _byte_level_bytes()
    elif decoders & {"ByteFallback", "Metaspace", "Replace"}:
        to_bytes = _piece_bytes
    else:
        raise TokenizerError(
            f"tokenizer.json: decoders {sorted(decoders)} are not supported (byte-level or sentencepiece)."
        )
    table = [b""] * (max(vocab.values(), default=-1) + 1)
    for token, token_id in vocab.items():
        table[token_id] = to_bytes(token)
    return table


def _byte_level_bytes() -> Any:
    """GPT-2's alphabet: printable bytes stand for themselves, the others for the characters from 256 on."""
    plain = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    others = (byte for byte in range(256) if byte not in plain)
    alphabet = {chr(byte): byte for byte in plain} | {chr(256 + i): byte for i, byte in enumerate(others)}

    def to_bytes(token: str) -> bytes:
        try:
            return bytes([alphabet[character] for character in token])
        except KeyError:  # an added token, written as it is
            return token.encode()

    return to_bytes


def _piece_bytes(piece: str) -> bytes:
    if len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">"):
        try:
            return bytes([int(piece[3:5], 16)])
        except ValueError:
            pass
    return piece.replace(SPACE, " ").encode()
