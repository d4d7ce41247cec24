"""Grammars that answers must follow, as masks over the next token. Knows no scheduling and no model.

The engine has the model's tokenizer file for this alone: a mask over token ids can only be made where the vocabulary
is known, and has to be made where it is used. llguidance does the work: a lexer of derivatives and an Earley parser,
some 50 microseconds a mask.
"""

import json
from collections import OrderedDict
from threading import Lock
from typing import Any

import llguidance
import numpy as np
import torch
from torch import Tensor

from engine.protocol import Grammar

MAX_GRAMMAR_BYTES = 256 * 1024
MAX_COMPILED = 256
"""Grammars kept for requests that ask for the same."""
_JSON_STYLE: dict[str, Any] = {"whitespace_flexible": False, "key_separator": ": ", "item_separator": ", "}
"""As `json.dumps` writes it. With free white space a small model can lose itself in blanks."""


class GrammarError(Exception):
    """The grammar cannot be used; the message is fit for the caller."""


class Constraint:
    """Where one answer stands in its grammar."""

    def __init__(self, matcher: llguidance.LLMatcher, vocab_size: int) -> None:
        self._matcher = matcher
        self._vocab_size = vocab_size
        self._bits = np.zeros((vocab_size + 31) // 32, np.int32)
        self._consumed = 0

    def mask(self, generated: list[int]) -> Tensor:
        """Which tokens may follow those generated so far: bool [vocabulary]. Releases the GIL for most of it.

        Raises:
            GrammarError: the grammar is too complex to be followed, or `generated` does not follow it.
        """
        fresh = generated[self._consumed :]
        if fresh and not self._matcher.consume_tokens(fresh):
            raise GrammarError(f"The grammar cannot be followed: {_reason(self._matcher)}")
        self._consumed = len(generated)
        self._matcher.unsafe_compute_mask_ptr(self._bits.ctypes.data, self._bits.nbytes)
        if self._matcher.is_error():
            raise GrammarError(f"The grammar cannot be followed: {_reason(self._matcher)}")
        allowed = np.unpackbits(self._bits.view(np.uint8), bitorder="little", count=self._vocab_size)
        return torch.from_numpy(allowed).bool()

    def take(self, token_id: int) -> bool:
        """Note the token just sampled (no end token); whether nothing but the end may follow it."""
        self._consumed += 1
        return self._matcher.consume_token(token_id) and self._matcher.is_stopped()


class GrammarCompiler:
    """Makes constraints for one tokenizer. May be called from any thread; slow the first time and for large grammars."""

    def __init__(self, tokenizer_json: bytes, vocab_size: int, eos_token_ids: tuple[int, ...]) -> None:
        self._tokenizer_json = tokenizer_json
        self._vocab_size = vocab_size
        self._eos_token_ids = list(eos_token_ids)
        self._tokenizer: llguidance.LLTokenizer | None = None
        self._compiled: OrderedDict[Grammar, llguidance.LLMatcher] = OrderedDict()
        self._lock = Lock()

    def compile(self, grammar: Grammar) -> Constraint:
        """A constraint at its beginning. Raises `GrammarError`."""
        with self._lock:
            matcher = self._compiled.get(grammar)
            if matcher is not None:
                self._compiled.move_to_end(grammar)
        if matcher is None:
            matcher = self._match(grammar)
            with self._lock:
                self._compiled[grammar] = matcher
                if len(self._compiled) > MAX_COMPILED:
                    self._compiled.popitem(last=False)
        return Constraint(matcher.deep_copy(), self._vocab_size)

    def _match(self, grammar: Grammar) -> llguidance.LLMatcher:
        if len(grammar.value.encode()) > MAX_GRAMMAR_BYTES:
            raise GrammarError(f"The {grammar.kind} is larger than {MAX_GRAMMAR_BYTES} bytes.")
        tokens = self._tokens()
        try:
            matcher = llguidance.LLMatcher(tokens, _source(grammar), log_level=0)
        except (ValueError, RecursionError) as error:
            raise GrammarError(f"The {grammar.kind} cannot be used: {error}") from error
        if matcher.is_error():
            raise GrammarError(f"The {grammar.kind} cannot be used: {_reason(matcher)}")
        return matcher

    def _tokens(self) -> llguidance.LLTokenizer:
        with self._lock:
            if self._tokenizer is None:
                self._tokenizer = llguidance.LLTokenizer(
                    self._tokenizer_json.decode(), n_vocab=self._vocab_size, eos_token=self._eos_token_ids
                )
            return self._tokenizer


def _source(grammar: Grammar) -> str:
    """In llguidance's own form."""
    matcher = llguidance.LLMatcher
    match grammar.kind:
        case "json_schema":
            return matcher.grammar_from_json_schema(grammar.value, overrides=_JSON_STYLE)  # type: ignore[arg-type]
        case "json_object":
            return matcher.grammar_from_json_schema('{"type": "object"}', overrides=_JSON_STYLE)  # type: ignore[arg-type]
        case "regex":
            return matcher.grammar_from_regex(grammar.value)
        case "choice":
            quoted = (json.dumps(choice, ensure_ascii=False) for choice in json.loads(grammar.value))
            return matcher.grammar_from_lark(f"start: {' | '.join(quoted)}")
        case "lark":
            return matcher.grammar_from_lark(grammar.value)


def _reason(matcher: llguidance.LLMatcher) -> str:
    return " ".join(matcher.get_error().split())[:500]
