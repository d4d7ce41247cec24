"""Function calls through the official SDK: whole, streamed, forced, and refused where a model cannot make them."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import httpx
import openai
import pytest
from langchain_openai import ChatOpenAI
from tokenizers import AddedToken
from tokenizers import Tokenizer as HfTokenizer

from engine.protocol import Generate, ModelFacts, RejectCode, Rejected
from gateway.config import GatewayConfig, ModelConfig
from tests.gateway.conftest import TEMPLATE, Background, Gateway, build_tokenizer, encode
from tests.gateway.fake_engine import FakeEngine

CHAT = """{% for message in messages %}<|im_start|>{{ message.role }}
{{ message.content }}{% for call in message.tool_calls or [] %}CALL{% endfor %}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""


def template(call: str) -> str:
    shown = "{% if tools %}{{ tools | tojson }}\n{% endif %}"
    return shown + CHAT.replace("CALL", call)


CALL = "{{ {'name': call.function.name, 'arguments': call.function.arguments} | tojson }}"
TEMPLATES = {
    "hermes": template(f"<tool_call>{CALL}</tool_call>"),
    "mistral": template(f"[TOOL_CALLS] [{CALL}]"),
    "llama3": template(f"<|python_tag|>{CALL}"),
    "strange": template(f"<<{CALL}>>"),
    "toolless": TEMPLATE,
}
WEATHER: Any = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Of a city",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
NOW: Any = {"type": "function", "function": {"name": "now"}}
ASKED: Any = [{"role": "user", "content": "hi"}]
ONE = '{"name": "weather", "arguments": {"city": "Köln"}}'
TWO = '{"name": "now", "arguments": {}}'
ANSWERS = {
    "hermes": f"<tool_call>\n{ONE}\n</tool_call>\n<tool_call>\n{TWO}\n</tool_call>",
    "mistral": f"[TOOL_CALLS] [{ONE}, {TWO}]",
    "llama3": f"<|python_tag|>{ONE}; {TWO}",
}


@dataclass
class World:
    engines: dict[str, FakeEngine]
    gateway: Gateway
    tokenizer: HfTokenizer

    def answer(self, model: str, text: str) -> None:
        self.engines[model].reply = lambda request: encode(self.tokenizer, text)

    def asked(self, model: str) -> Generate:
        return self.engines[model].requests[-1]

    def prompt(self, model: str) -> str:
        return self.tokenizer.decode(self.asked(model).prompt, skip_special_tokens=False)


@pytest.fixture(scope="module")
def module_world(background: Background, tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    tokenizer = build_tokenizer()
    tokenizer.add_tokens(
        [AddedToken("[TOOL_CALLS]", special=True), AddedToken("<|python_tag|>", special=True)]
    )
    engines: dict[str, FakeEngine] = {}
    for name, source in TEMPLATES.items():
        files = {
            "tokenizer.json": tokenizer.to_str().encode(),
            "tokenizer_config.json": json.dumps({"chat_template": source}).encode(),
        }
        facts = ModelFacts(
            name=name,
            root="nowhere",
            max_model_len=4000,
            vocab_size=tokenizer.get_vocab_size(),
            eos_token_ids=[2],
            dtype="float32",
            files=list(files),
            digest=name,
        )
        engines[name] = FakeEngine(facts, files)
        background.run(engines[name].start())
    models = tuple(ModelConfig(name=name, engine=engine.url) for name, engine in engines.items())
    told = ModelConfig(name="told", engine=engines["strange"].url, tool_format="hermes")
    database = str(tmp_path_factory.mktemp("tools") / "gateway.db")
    gateway = Gateway(background, GatewayConfig(models=(*models, told), database=database))
    gateway.wait_until_ready()
    yield World(engines, gateway, tokenizer)
    gateway.close()
    for engine in engines.values():
        background.run(engine.kill())


@pytest.fixture
def world(module_world: World) -> World:
    for engine in module_world.engines.values():
        engine.reset()
    return module_world


@pytest.fixture
def client(world: World) -> Iterator[openai.OpenAI]:
    ready = {"status": ""}
    while set(ready) == {"status"} or "unavailable" in ready["models"].values():  # type: ignore[attr-defined]
        ready = httpx.get(world.gateway.url + "/readyz", trust_env=False).json()
    with openai.OpenAI(base_url=world.gateway.url + "/v1", api_key="none", max_retries=0) as client:
        yield client


def stream_calls(stream: Any) -> tuple[str, list[dict[str, str]], str]:
    """Text, calls and finish reason, put together as clients do."""
    text, calls, reason = "", [], ""
    for chunk in stream:
        (choice,) = chunk.choices
        text += choice.delta.content or ""
        for delta in choice.delta.tool_calls or []:
            if delta.id is not None:
                assert delta.index == len(calls) and delta.type == "function" and delta.function.name
                assert delta.function.arguments == ""
                calls.append({"id": delta.id, "name": delta.function.name, "arguments": ""})
            else:
                calls[delta.index]["arguments"] += delta.function.arguments
        reason = choice.finish_reason or reason
    return text, calls, reason


@pytest.mark.parametrize("model", ANSWERS)
def test_a_model_that_chooses_to_call_is_understood_in_its_familys_form(
    world: World, client: openai.OpenAI, model: str
) -> None:
    world.answer(model, ANSWERS[model])
    made = client.chat.completions.create(model=model, messages=ASKED, tools=[WEATHER, NOW])
    (choice,) = made.choices
    assert choice.finish_reason == "tool_calls" and choice.message.content is None
    called: Any = choice.message.tool_calls
    assert [(call.function.name, json.loads(call.function.arguments)) for call in called] == [
        ("weather", {"city": "Köln"}),
        ("now", {}),
    ]
    assert len({call.id for call in called}) == 2
    assert '"description": "Of a city"' in world.prompt(model)
    assert world.asked(model).sampling.grammar is None

    text, calls, reason = stream_calls(
        client.chat.completions.create(model=model, messages=ASKED, tools=[WEATHER, NOW], stream=True)
    )
    assert (text, reason) == ("", "tool_calls")
    assert [(call["name"], json.loads(call["arguments"])) for call in calls] == [
        ("weather", {"city": "Köln"}),
        ("now", {}),
    ]
    if model == "mistral":
        assert all(len(call["id"]) == 9 and call["id"].isalnum() for call in calls)


def test_the_sdks_stream_helper_puts_the_calls_together(world: World, client: openai.OpenAI) -> None:
    world.answer("hermes", f"Let me see.\n{ANSWERS['hermes']}")
    with client.chat.completions.stream(model="hermes", messages=ASKED, tools=[WEATHER, NOW], n=2) as stream:
        final = stream.get_final_completion()
    for choice in final.choices:
        assert choice.message.content == "Let me see."
        assert [call.function.name for call in choice.message.tool_calls or []] == ["weather", "now"]


def test_an_answer_without_a_call_is_text(world: World, client: openai.OpenAI) -> None:
    world.answer("llama3", '{"degrees": 20}')
    made = client.chat.completions.create(model="llama3", messages=ASKED, tools=[WEATHER], logprobs=True)
    (choice,) = made.choices
    assert (choice.finish_reason, choice.message.content) == ("stop", '{"degrees": 20}')
    assert choice.message.tool_calls is None
    streamed = list(
        client.chat.completions.create(
            model="llama3", messages=ASKED, tools=[WEATHER], logprobs=True, stream=True
        )
    )
    tokens = [
        token.token
        for chunk in streamed
        if chunk.choices[0].logprobs
        for token in chunk.choices[0].logprobs.content or []
    ]
    assert "".join(tokens) == '{"degrees": 20}', "no score is lost while text is held back"


def test_calls_and_their_results_are_shown_by_the_template(world: World, client: openai.OpenAI) -> None:
    world.answer("hermes", "20 degrees")
    client.chat.completions.create(
        model="hermes",
        tools=[WEATHER],
        messages=[
            *ASKED,
            {
                "role": "assistant",
                "content": None,
                "tool_calls": [
                    {
                        "id": "a",
                        "type": "function",
                        "function": {"name": "weather", "arguments": '{"city":"Köln"}'},
                    }
                ],
            },
            {"role": "tool", "tool_call_id": "a", "content": [{"type": "text", "text": "20"}]},
        ],
    )
    prompt = world.prompt("hermes")
    assert '<tool_call>{"name": "weather", "arguments": {"city": "Köln"}}</tool_call>' in prompt
    assert "<|im_start|>tool\n20<|im_end|>" in prompt


def schema_of(request: Generate) -> dict[str, Any]:
    grammar = request.sampling.grammar
    assert grammar is not None and grammar.kind == "json_schema"
    return json.loads(grammar.value)


def test_a_named_function_is_forced_by_a_grammar(world: World, client: openai.OpenAI) -> None:
    world.answer("hermes", ONE)
    made = client.chat.completions.create(
        model="hermes",
        messages=ASKED,
        tools=[WEATHER, NOW],
        tool_choice={"type": "function", "function": {"name": "weather"}},
        response_format={"type": "json_object"},
    )
    (choice,) = made.choices
    assert choice.finish_reason == "tool_calls" and choice.message.tool_calls
    assert choice.message.tool_calls[0].function.arguments == '{"city": "Köln"}'  # type: ignore[union-attr]
    schema = schema_of(world.asked("hermes"))
    assert schema["properties"]["name"] == {"const": "weather"}
    assert schema["$defs"]["function0"] == WEATHER["function"]["parameters"]
    assert world.prompt("hermes").endswith("<tool_call>\n"), (
        "the answer goes on where the family's calls begin"
    )


def test_a_required_call_may_be_of_any_function_and_there_may_be_several(
    world: World, client: openai.OpenAI
) -> None:
    for model in ("hermes", "mistral", "llama3", "strange"):
        world.answer(model, f"[{ONE}, {TWO}]")
        stream = client.chat.completions.create(
            model=model, messages=ASKED, tools=[WEATHER, NOW], tool_choice="required", stream=True
        )
        text, calls, reason = stream_calls(stream)
        assert (text, reason) == ("", "tool_calls")
        assert [call["name"] for call in calls] == ["weather", "now"]
        schema = schema_of(world.asked(model))
        assert schema["type"] == "array" and len(schema["items"]["anyOf"]) == 2
        assert '"description": "Of a city"' in world.prompt(model)


def test_without_parallel_calls_there_is_one(world: World, client: openai.OpenAI) -> None:
    world.answer("hermes", ANSWERS["hermes"])
    world.answer("llama3", ONE)
    made = client.chat.completions.create(
        model="hermes", messages=ASKED, tools=[WEATHER, NOW], parallel_tool_calls=False
    )
    assert len(made.choices[0].message.tool_calls or []) == 1
    client.chat.completions.create(
        model="llama3",
        messages=ASKED,
        tools=[WEATHER, NOW],
        tool_choice="required",
        parallel_tool_calls=False,
    )
    assert len(schema_of(world.asked("llama3"))["anyOf"]) == 2, "an object, no list"


def test_references_in_a_schema_lead_where_they_led(world: World, client: openai.OpenAI) -> None:
    world.answer("llama3", TWO)
    tree = {
        "type": "object",
        "properties": {"root": {"$ref": "#/$defs/node"}, "again": {"$ref": "#"}},
        "$defs": {"node": {"type": "object", "properties": {"left": {"$ref": "#/$defs/node"}}}},
    }
    tool: Any = {"type": "function", "function": {"name": "now", "parameters": tree}}
    client.chat.completions.create(
        model="llama3", messages=ASKED, tools=[WEATHER, tool], tool_choice="required"
    )
    moved = schema_of(world.asked("llama3"))["$defs"]["function1"]
    assert moved["properties"] == {
        "root": {"$ref": "#/$defs/function1/$defs/node"},
        "again": {"$ref": "#/$defs/function1"},
    }
    assert moved["$defs"]["node"]["properties"]["left"] == {"$ref": "#/$defs/function1/$defs/node"}


def test_a_call_cut_off_by_max_tokens_is_left_out_and_said_so(world: World, client: openai.OpenAI) -> None:
    world.answer("hermes", ANSWERS["hermes"])
    limit = len(encode(world.tokenizer, ANSWERS["hermes"])) - 14
    asked: Any = {"model": "hermes", "messages": ASKED, "tools": [WEATHER, NOW], "max_tokens": limit}
    (choice,) = client.chat.completions.create(**asked).choices
    assert choice.finish_reason == "length"
    assert [call.function.name for call in choice.message.tool_calls or []] == ["weather"]  # type: ignore[union-attr]
    text, calls, reason = stream_calls(client.chat.completions.create(stream=True, **asked))
    assert (text, reason) == ("", "length")
    assert json.loads(calls[0]["arguments"]) == {"city": "Köln"}


def test_a_model_whose_template_knows_no_tools_can_only_be_forced(
    world: World, client: openai.OpenAI
) -> None:
    with pytest.raises(openai.BadRequestError, match="knows no tools") as refused:
        client.chat.completions.create(model="toolless", messages=ASKED, tools=[WEATHER])
    assert refused.value.param == "tools"
    with pytest.raises(openai.BadRequestError, match="knows no tools"):
        client.chat.completions.create(
            model="toolless",
            messages=[
                *ASKED,
                {
                    "role": "assistant",
                    "tool_calls": [
                        {"id": "a", "type": "function", "function": {"name": "now", "arguments": "{}"}}
                    ],
                },
                {"role": "tool", "tool_call_id": "a", "content": "noon"},
            ],
        )
    world.answer("toolless", ONE)
    made = client.chat.completions.create(
        model="toolless",
        messages=[{"role": "system", "content": "be brief"}, *ASKED],
        tools=[WEATHER],
        tool_choice={"type": "function", "function": {"name": "weather"}},
    )
    assert made.choices[0].message.tool_calls
    prompt = world.prompt("toolless")
    assert prompt.startswith("<|im_start|>system\nbe brief\n\nThese functions") and '"Of a city"' in prompt


def test_an_unknown_form_needs_its_operators_word(world: World, client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="tool_format"):
        client.chat.completions.create(model="strange", messages=ASKED, tools=[WEATHER])
    world.answer("strange", ANSWERS["hermes"])
    made = client.chat.completions.create(model="told", messages=ASKED, tools=[WEATHER])
    assert len(made.choices[0].message.tool_calls or []) == 2


def test_tools_that_must_not_be_called_are_not_shown(world: World, client: openai.OpenAI) -> None:
    world.answer("hermes", "fine")
    client.chat.completions.create(model="hermes", messages=ASKED, tools=[WEATHER], tool_choice="none")
    assert "weather" not in world.prompt("hermes")
    client.chat.completions.create(model="toolless", messages=ASKED, tools=[WEATHER], tool_choice="none")


def test_allowed_tools_narrow_the_choice(world: World, client: openai.OpenAI) -> None:
    world.answer("llama3", TWO)
    chosen: Any = {
        "type": "allowed_tools",
        "allowed_tools": {"mode": "required", "tools": [{"type": "function", "function": {"name": "now"}}]},
    }
    client.chat.completions.create(model="llama3", messages=ASKED, tools=[WEATHER, NOW], tool_choice=chosen)
    assert schema_of(world.asked("llama3"))["items"]["properties"]["name"] == {"const": "now"}


def test_a_schema_the_engine_cannot_follow_is_the_tools_fault(world: World, client: openai.OpenAI) -> None:
    world.engines["hermes"].reject = lambda request: Rejected(
        request.request_id, RejectCode.GRAMMAR_INVALID, "The json_schema cannot be used: no"
    )
    with pytest.raises(openai.BadRequestError) as refused:
        client.chat.completions.create(model="hermes", messages=ASKED, tools=[NOW], tool_choice="required")
    assert refused.value.param == "tools"


def tool(**function: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": "f", **function}}


def deep(levels: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "object"}
    for _ in range(levels):
        schema = {"type": "object", "properties": {"a": schema}}
    return schema


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tools": [{}]}, "tools[0].type"),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
        ({"tools": [{"type": "function"}]}, "tools[0].function"),
        ({"tools": [tool(name="no spaces")]}, "tools[0].function.name"),
        ({"tools": [tool(name="x" * 65)]}, "tools[0].function.name"),
        ({"tools": [tool(description=5)]}, "tools[0].function.description"),
        ({"tools": [tool(parameters=[1])]}, "tools[0].function.parameters"),
        ({"tools": [tool(parameters={"type": "string"})]}, "tools[0].function.parameters"),
        ({"tools": [tool(parameters=deep(100))]}, "tools[0].function.parameters"),
        ({"tools": [tool(strict="yes")]}, "tools[0].function.strict"),
        ({"tools": [tool(strict=True, parameters=deep(1))]}, "tools[0].function.parameters"),
        ({"tools": [tool()] * 129}, "tools"),
        ({"tools": "f"}, "tools"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": [tool()], "tool_choice": "sometimes"}, "tool_choice"),
        ({"tools": [tool()], "tool_choice": {"type": "function", "function": {"name": "g"}}}, "tool_choice"),
        ({"tools": [tool()], "tool_choice": {"type": "custom", "custom": {"name": "f"}}}, "tool_choice"),
        ({"tools": [tool()], "parallel_tool_calls": "no"}, "parallel_tool_calls"),
        ({"tools": [tool()], "response_format": {"type": "json_object"}}, "tool_choice"),
        ({"tools": [tool()], "tool_choice": "required", "guided_regex": "a"}, "tool_choice"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].tool_call_id"),
        ({"messages": [{"role": "tool", "content": "x", "tool_call_id": "a"}]}, "messages[0].tool_call_id"),
        ({"messages": [{"role": "assistant", "tool_calls": [{"id": "a"}]}]}, "messages[0].tool_calls[0]"),
        ({"messages": [{"role": "assistant", "tool_calls": "a"}]}, "messages[0].tool_calls"),
    ],
)
def test_what_is_malformed_is_refused_with_its_parameter(
    world: World, client: openai.OpenAI, fields: dict[str, Any], param: str
) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        client.post(
            "/chat/completions", cast_to=object, body={"model": "hermes", "messages": ASKED, **fields}
        )
    assert refused.value.param == param


def test_strict_functions_are_closed_in_every_depth(world: World, client: openai.OpenAI) -> None:
    def closed(properties: dict[str, Any], **more: Any) -> dict[str, Any]:
        return {
            "type": "object",
            "properties": properties,
            "required": list(properties),
            "additionalProperties": False,
            **more,
        }

    def create(parameters: dict[str, Any]) -> None:
        made: Any = tool(strict=True, parameters=parameters)
        client.chat.completions.create(model="hermes", messages=ASKED, tools=[made])

    world.answer("hermes", "fine")
    create(closed({"a": closed({}), "b": {"anyOf": [closed({"c": {"type": "null"}})]}}))
    for bad in (
        closed({"a": {"type": "object", "properties": {"b": {}}}}),
        closed({"a": {"type": "array", "items": {"type": "object", "properties": {"b": {}}}}}),
        closed({"a": {}}) | {"required": []},
        closed({}, **{"$defs": {"d": {"type": "object", "properties": {"b": {}}}}}),
    ):
        with pytest.raises(openai.BadRequestError, match="strict") as refused:
            create(bad)
        assert refused.value.code == "invalid_function_parameters"


def test_responses_call_functions_and_go_on_from_their_outputs(world: World, client: openai.OpenAI) -> None:
    flat: Any = {"type": "function", **WEATHER["function"]}
    world.answer("hermes", f"Let me see.\n{ANSWERS['hermes']}")
    made = client.responses.create(model="hermes", input="hi", tools=[flat])
    assert [item.type for item in made.output] == ["message", "function_call", "function_call"]
    call: Any = made.output[1]
    assert (call.name, call.status, json.loads(call.arguments)) == ("weather", "completed", {"city": "Köln"})

    streamed = list(client.responses.create(model="hermes", input="hi", tools=[flat], stream=True))
    done: Any = [event for event in streamed if event.type == "response.function_call_arguments.done"]
    assert [json.loads(event.arguments) for event in done] == [{"city": "Köln"}, {}]
    assert [event.sequence_number for event in streamed] == list(range(len(streamed)))

    world.answer("hermes", ONE)
    forced = client.responses.create(
        model="hermes", input="hi", tools=[flat], tool_choice={"type": "function", "name": "weather"}
    )
    assert [item.type for item in forced.output] == ["function_call"]
    assert schema_of(world.asked("hermes"))["properties"]["name"] == {"const": "weather"}

    world.answer("hermes", "20 degrees")
    outputs: Any = [
        {"type": "function_call_output", "call_id": item.call_id, "output": "20"}
        for item in made.output
        if item.type == "function_call"
    ]
    last = client.responses.create(model="hermes", input=outputs, tools=[flat], previous_response_id=made.id)
    assert last.output_text == "20 degrees"
    prompt = world.prompt("hermes")
    assert prompt.count("<tool_call>") == 2 and prompt.count("<|im_start|>assistant\nLet me see.") == 1
    assert prompt.count("<|im_start|>tool\n20") == 2


def test_langchain_calls_tools(world: World, client: openai.OpenAI) -> None:
    world.answer("hermes", ANSWERS["hermes"])
    settings: dict[str, Any] = {"base_url": str(client.base_url), "api_key": "none", "max_retries": 0}
    model = ChatOpenAI(model="hermes", **settings).bind_tools([WEATHER, NOW])
    answer: Any = model.invoke("weather in Köln, and the time")
    assert [(call["name"], call["args"]) for call in answer.tool_calls] == [
        ("weather", {"city": "Köln"}),
        ("now", {}),
    ]
