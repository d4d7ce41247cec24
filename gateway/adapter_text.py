"""The text side of adapters that bring their own chat template or tokenizer. Knows no requests.

The engine, which fetches adapters, is asked for what one brought along before its first prompt is made, and again every
few seconds, so that an adapter published anew is noticed.
"""

import asyncio
import hashlib
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

import msgspec

from engine.protocol import AdapterFiles, AdapterRef
from gateway.chat_template import ChatTemplateError, read_chat_template
from gateway.errors import AdapterInvalidError
from gateway.model_text import ModelText
from gateway.tokenizer import Tokenizer, TokenizerError

RECHECK_S = 5.0
MAX_ADAPTERS = 4096
MAX_TOKENIZERS = 16
TEMPLATE_FILE, CONFIG_FILE, TOKENIZER_FILE = "chat_template.jinja", "tokenizer_config.json", "tokenizer.json"


@dataclass(slots=True)
class _Known:
    version: str
    base: ModelText
    text: ModelText
    checked_s: float


class AdapterTexts:
    """`fetch` asks the engine: the adapter's files, or None when they are still of the version given or unknown."""

    def __init__(self, fetch: Callable[[str, str | None], Awaitable[AdapterFiles | None]]) -> None:
        self._fetch = fetch
        self._known: OrderedDict[str, _Known] = OrderedDict()
        self._tokenizers: OrderedDict[str, Tokenizer] = OrderedDict()

    async def text_of(self, adapter: AdapterRef | None, base: ModelText) -> ModelText:
        """What turns text into tokens for this adapter: the base's, but for what the adapter brought.

        Raises:
            AdapterInvalidError: what it brought cannot be used.
        """
        if adapter is None or adapter.parts:
            return base
        known = self._known.get(adapter.uri)
        if known is not None and known.base is not base:
            known = None
        now = time.monotonic()
        if known is not None and now - known.checked_s < RECHECK_S:
            return known.text
        files = await self._fetch(adapter.uri, known.version if known else None)
        if files is not None:
            # A tokenizer takes up to a second to read, and everybody's streams would wait for it.
            text = await asyncio.to_thread(self._make, adapter.name, files.files, base)
            known = _Known(files.version, base, text, now)
            self._known[adapter.uri] = known
            if len(self._known) > MAX_ADAPTERS:
                self._known.popitem(last=False)
        elif known is None:
            return base
        known.checked_s = now
        return known.text

    def _make(self, name: str, files: dict[str, bytes], base: ModelText) -> ModelText:
        try:
            template = base.template
            config = _config(files.get(CONFIG_FILE, b"{}"))
            if TEMPLATE_FILE in files:
                config["chat_template"] = files[TEMPLATE_FILE].decode()
            if config.get("chat_template"):
                tokens = {key: value for key, value in base.config.items() if key.endswith("_token")}
                template = read_chat_template(msgspec.json.encode(tokens | config))
            tokenizer = base.tokenizer
            if TOKENIZER_FILE in files:
                tokenizer = self._tokenizer(files[TOKENIZER_FILE])
        except (ChatTemplateError, TokenizerError, msgspec.MsgspecError, UnicodeDecodeError) as error:
            text = f"The adapter {name!r} brings a chat template or tokenizer that cannot be used: {error}"
            raise AdapterInvalidError(text, param="model") from error
        if tokenizer.vocab_size > base.facts.vocab_size:
            text = f"The adapter {name!r} brings more tokens than the {base.facts.vocab_size} of its base."
            raise AdapterInvalidError(text, param="model")
        return ModelText(base.facts, tokenizer, template, base.config)

    def _tokenizer(self, content: bytes) -> Tokenizer:
        """Trainers like to save a copy beside every adapter: equal ones are read once."""
        digest = hashlib.sha256(content).hexdigest()
        if digest not in self._tokenizers:
            self._tokenizers[digest] = Tokenizer(content)
            if len(self._tokenizers) > MAX_TOKENIZERS:
                self._tokenizers.popitem(last=False)
        self._tokenizers.move_to_end(digest)
        return self._tokenizers[digest]


def _config(content: bytes) -> dict[str, Any]:
    return msgspec.json.decode(content, type=dict[str, Any])
