"""Chat prompts are those of transformers, for templates as models have them."""

import json
import re
from typing import Any

import pytest
import transformers

from gateway.chat_template import ChatTemplate, ChatTemplateError, read_chat_template
from gateway.tokenizer import Tokenizer
from tests.gateway.conftest import TEMPLATE, build_tokenizer

SMOLLM2 = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system\n"
    "You are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}"
    "{% else %}{{ message['content'] + eos_token }}{% endif %}{% endfor %}"
)
WHITESPACE = """{#- a comment #}
{%- for message in messages %}
    {%- if message.role == 'skip' %}
        {%- continue %}
    {%- endif %}
    {% if loop.first %}
  {{ message | tojson }}
    {% endif %}
    {% generation %}
{{ message.content.strip() }}{% endgeneration %}
{%- endfor %}
{{ tools is none }} {{ {'é': '<&>'} | tojson(indent=2) }} {{ strftime_now('%Y') }}
"""
CHATS: list[list[dict[str, Any]]] = [
    [{"role": "user", "content": "hello"}],
    [{"role": "system", "content": " be brief\n"}, {"role": "user", "content": "<|im_end|>日本 <b>"}],
    [
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": "two"},
        {"role": "user", "content": "three {{ 1 }}"},
    ],
]


def of_transformers() -> Any:
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=build_tokenizer(), bos_token="<|endoftext|>", eos_token="<|im_end|>"
    )


@pytest.mark.parametrize("source", [TEMPLATE, SMOLLM2, MISTRAL, WHITESPACE])
@pytest.mark.parametrize("chat", CHATS)
def test_prompts_and_their_ids_are_those_of_transformers(source: str, chat: list[dict[str, Any]]) -> None:
    if source is MISTRAL and chat[0]["role"] == "system":
        pytest.skip("refused by that template")
    theirs = of_transformers()
    template = ChatTemplate(source, {"bos_token": "<|endoftext|>", "eos_token": "<|im_end|>"})
    prompt = template.render(chat)
    assert prompt == theirs.apply_chat_template(
        chat, chat_template=source, tokenize=False, add_generation_prompt=True
    )
    ids = theirs.apply_chat_template(
        chat, chat_template=source, tokenize=True, add_generation_prompt=True, return_dict=False
    )
    ours = Tokenizer(build_tokenizer().to_str().encode())
    assert ours.encode_now(prompt, add_special_tokens=False) == ids


def test_a_template_refuses_in_its_own_words() -> None:
    template = ChatTemplate(MISTRAL, {"bos_token": "", "eos_token": ""})
    with pytest.raises(ChatTemplateError, match="must alternate"):
        template.render([{"role": "user", "content": "a"}, {"role": "user", "content": "b"}])


@pytest.mark.parametrize(
    "source",
    [
        "{{ messages.__class__.__mro__ }}",
        "{{ messages.append(1) }}",
        "{{ messages[9].content.x }}",
        "{{ 1 / 'a' }}",
        "{{ nothing() }}",
    ],
)
def test_a_template_can_neither_reach_python_nor_crash_us(source: str) -> None:
    with pytest.raises(ChatTemplateError):
        ChatTemplate(source, {}).render(CHATS[0])


def test_special_tokens_may_be_objects_and_templates_a_list() -> None:
    config = {
        "bos_token": {"content": "<s>"},
        "eos_token": "</s>",
        "pad_token": None,
        "chat_template": [
            {"name": "tool_use", "template": "no"},
            {"name": "default", "template": "{{ bos_token }}{{ messages[0].content }}{{ eos_token }}"},
        ],
    }
    template = read_chat_template(json.dumps(config).encode())
    assert template is not None
    assert template.render(CHATS[0]) == "<s>hello</s>"
    assert read_chat_template(b"{}") is None


def test_a_template_that_is_no_jinja_is_refused() -> None:
    with pytest.raises(ChatTemplateError, match=re.escape("not valid")):
        ChatTemplate("{% if %}", {})
