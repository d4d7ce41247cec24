"""The tokenizer inside a GGUF file, rebuilt as `tokenizer.json` and its companions. Knows no tensors.

What cannot be rebuilt exactly is refused: a tokenizer that is nearly right makes a model that is quietly wrong.
"""

import json
from collections.abc import Mapping
from typing import Any

_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = range(1, 7)

_GPT2_SPLIT = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_QWEN2_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_LLAMA3_SPLIT = _QWEN2_SPLIT.replace(r"|\p{N}|", r"|\p{N}{1,3}|")


class TokenizerError(Exception):
    """The tokenizer cannot be rebuilt exactly; the message says which part is missing or unknown."""


def tokenizer_files(metadata: Mapping[str, Any]) -> dict[str, bytes]:
    """tokenizer.json, tokenizer_config.json and generation_config.json. Raises `TokenizerError`."""
    tokens = _Vocabulary(metadata)
    kind = metadata.get("tokenizer.ggml.model")
    if kind == "gpt2":
        tokenizer = _byte_level_bpe(metadata, tokens)
    elif kind == "llama":
        tokenizer = _sentencepiece_bpe(metadata, tokens)
    else:
        raise TokenizerError(f"tokenizer.ggml.model {kind!r} is not supported (gpt2 and llama are)")
    config = _tokenizer_config(metadata, tokens)
    generation = {
        "bos_token_id": tokens.special("bos"),
        "eos_token_id": list(
            dict.fromkeys(t for t in map(tokens.special, ("eos", "eot", "eom")) if t is not None)
        ),
        "pad_token_id": tokens.special("padding"),
    }
    generation = {key: value for key, value in generation.items() if value not in (None, [])}
    documents = {
        "tokenizer.json": tokenizer,
        "tokenizer_config.json": config,
        "generation_config.json": generation,
    }
    return {
        name: json.dumps(document, ensure_ascii=False, indent=1).encode()
        for name, document in documents.items()
    }


class _Vocabulary:
    """Tokens by id with their types, checked."""

    def __init__(self, metadata: Mapping[str, Any]) -> None:
        self._metadata = metadata
        self.texts: list[str] = _array(metadata, "tokens", str)
        self.types: list[int] = _array(metadata, "token_type", int)
        if len(self.types) != len(self.texts):
            raise TokenizerError("tokenizer.ggml.token_type does not give one type per token")

    def ids(self) -> dict[str, int]:
        """Token text → id, without the ids that only fill up the embedding."""
        used = [(text, index) for index, text in enumerate(self.texts) if self.types[index] != _UNUSED]
        vocabulary = dict(used)
        if len(vocabulary) != len(used):
            raise TokenizerError("tokenizer.ggml.tokens holds the same token twice")
        return vocabulary

    def added(self, special: tuple[int, ...]) -> list[dict[str, Any]]:
        """Tokens found in the text before anything else: control tokens and the user's own."""
        return [
            {
                "id": index,
                "content": self.texts[index],
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": False,
                "special": kind in special,
            }
            for index, kind in enumerate(self.types)
            if kind in special or kind == _USER_DEFINED
        ]

    def special(self, role: str) -> int | None:
        """The id of "bos", "eos", "eot", ..., when the file names one."""
        index = self._metadata.get(f"tokenizer.ggml.{role}_token_id")
        if index is None:
            return None
        if not isinstance(index, int) or not 0 <= index < len(self.texts):
            raise TokenizerError(f"tokenizer.ggml.{role}_token_id is {index!r}, outside of the vocabulary")
        return index

    def special_text(self, role: str) -> str | None:
        index = self.special(role)
        return None if index is None else self.texts[index]


def _byte_level_bpe(metadata: Mapping[str, Any], tokens: _Vocabulary) -> dict[str, Any]:
    name = metadata.get("tokenizer.ggml.pre")
    if not isinstance(name, str) or name not in _PRE_TOKENIZERS:
        raise TokenizerError(
            f"tokenizer.ggml.pre {name!r} is not supported; supported: {', '.join(_PRE_TOKENIZERS)}"
        )
    pairs = [merge.split(" ") for merge in _array(metadata, "merges", str)]
    if not all(len(pair) == 2 for pair in pairs):
        raise TokenizerError("tokenizer.ggml.merges: a merge is not two tokens")
    llama3 = name in ("llama-bpe", "llama3", "llama-v3")
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": tokens.added(special=(_UNKNOWN, _CONTROL)),
        "normalizer": {"type": "NFC"} if name == "qwen2" else None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": _PRE_TOKENIZERS[name]},
        "post_processor": _template(metadata, tokens, bos_by_default=llama3),
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": llama3,
            "vocab": tokens.ids(),
            "merges": pairs,
        },
    }


def _sentencepiece_bpe(metadata: Mapping[str, Any], tokens: _Vocabulary) -> dict[str, Any]:
    """Llama-2 and Mistral: BPE ordered by score, a space before the text, unknown characters as bytes."""
    scores = _array(metadata, "scores", float)
    if len(scores) != len(tokens.texts):
        raise TokenizerError("tokenizer.ggml.scores does not give one score per token")
    unknown = tokens.special_text("unknown")
    if unknown is None:
        raise TokenizerError("tokenizer.ggml.unknown_token_id is missing")
    if tokens.types.count(_BYTE) != 256:
        raise TokenizerError("a SentencePiece vocabulary without its 256 byte tokens is not supported")
    spaces: list[dict[str, Any]] = [{"type": "Replace", "pattern": {"String": " "}, "content": "▁"}]
    strip: list[dict[str, Any]] = []
    if metadata.get("tokenizer.ggml.add_space_prefix", True):
        spaces.insert(0, {"type": "Prepend", "prepend": "▁"})
        strip.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": tokens.added(special=(_UNKNOWN, _CONTROL)),
        "normalizer": {"type": "Sequence", "normalizers": spaces},
        "pre_tokenizer": None,
        "post_processor": _template(metadata, tokens, bos_by_default=True),
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
                *strip,
            ],
        },
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": unknown,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": True,
            "ignore_merges": False,
            "vocab": tokens.ids(),
            "merges": _merges_by_score(tokens, scores),
        },
    }


def _merges_by_score(tokens: _Vocabulary, scores: list[float]) -> list[list[str]]:
    """SentencePiece merges the pair whose result scores best; as a list, every split of every token, best first."""
    mergeable = {text: i for i, text in enumerate(tokens.texts) if tokens.types[i] == _NORMAL}
    ranked: list[tuple[float, int, int, str, str]] = []
    for text, index in mergeable.items():
        for cut in range(1, len(text)):
            left, right = mergeable.get(text[:cut]), mergeable.get(text[cut:])
            if left is not None and right is not None:
                ranked.append((-scores[index], left, right, text[:cut], text[cut:]))
    return [[left, right] for _, _, _, left, right in sorted(ranked)]


def _template(
    metadata: Mapping[str, Any], tokens: _Vocabulary, bos_by_default: bool
) -> dict[str, Any] | None:
    """What is put around a text that is no chat: begin and end tokens, when the model wants them."""
    bos = tokens.special("bos") if metadata.get("tokenizer.ggml.add_bos_token", bos_by_default) else None
    eos = tokens.special("eos") if metadata.get("tokenizer.ggml.add_eos_token", False) else None
    if bos is None and eos is None:
        return None

    def around(piece: str, type_id: int) -> list[dict[str, Any]]:
        parts = [None if bos is None else tokens.texts[bos], None, None if eos is None else tokens.texts[eos]]
        sequence = {"Sequence": {"id": piece, "type_id": type_id}}
        first, last = [
            [] if text is None else [{"SpecialToken": {"id": text, "type_id": type_id}}]
            for text in (parts[0], parts[2])
        ]
        return [*first, sequence, *last]

    return {
        "type": "TemplateProcessing",
        "single": around("A", 0),
        "pair": around("A", 0) + around("B", 1),
        "special_tokens": {
            tokens.texts[index]: {"id": tokens.texts[index], "ids": [index], "tokens": [tokens.texts[index]]}
            for index in (bos, eos)
            if index is not None
        },
    }


def _tokenizer_config(metadata: Mapping[str, Any], tokens: _Vocabulary) -> dict[str, Any]:
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
    }
    for role, key in (
        ("bos", "bos_token"),
        ("eos", "eos_token"),
        ("unknown", "unk_token"),
        ("padding", "pad_token"),
    ):
        text = tokens.special_text(role)
        if text is not None:
            config[key] = text
    template = metadata.get("tokenizer.chat_template")
    if isinstance(template, str):
        config["chat_template"] = template
    return config


def _array(metadata: Mapping[str, Any], key: str, kind: type) -> list[Any]:
    values = metadata.get(f"tokenizer.ggml.{key}")
    if not isinstance(values, list) or not all(isinstance(value, kind) for value in values):
        raise TokenizerError(f"tokenizer.ggml.{key} is missing or not a list of {kind.__name__}")
    return values


def _split(pattern: str) -> dict[str, Any]:
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


def _byte_level(use_regex: bool) -> dict[str, Any]:
    return {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": use_regex}


_DIGITS_THEN_GPT2 = [{"type": "Digits", "individual_digits": True}, _byte_level(use_regex=True)]
_QWEN2 = [_split(_QWEN2_SPLIT), _byte_level(use_regex=False)]
_LLAMA3 = [_split(_LLAMA3_SPLIT), _byte_level(use_regex=False)]

_PRE_TOKENIZERS: dict[str, list[dict[str, Any]]] = {
    "smollm": _DIGITS_THEN_GPT2,
    "starcoder": _DIGITS_THEN_GPT2,
    "gpt-2": [_byte_level(use_regex=True)],
    # llama.cpp's own fallback, as it runs it: four splits, one after the other.
    "default": [
        _split(r"[\p{P}\$\+<=>\^~\|]+"),
        _split(_GPT2_SPLIT),
        _split(r"\p{N}+"),
        _split(r"[0-9][0-9][0-9]"),
        _byte_level(use_regex=False),
    ],
    "qwen2": _QWEN2,
    "llama-bpe": _LLAMA3,
    "llama3": _LLAMA3,
    "llama-v3": _LLAMA3,
}
"""How text is cut before merging, by `tokenizer.ggml.pre`."""
