"""Function calls are read out of any family's text, whatever pieces it comes in."""

import itertools
import json

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from gateway.tool_calls import (
    FORCED,
    SYNTAX,
    ArgumentsPiece,
    CallStart,
    Content,
    Event,
    Syntax,
    ToolCallReader,
    format_of_template,
)

NAMES = ("weather", "add")
HERMES, MISTRAL, LLAMA = SYNTAX["hermes"], SYNTAX["mistral"], SYNTAX["llama3"]
Read = tuple[str, list[tuple[str, str]], int]
"""Text, (name, arguments) of the calls, how many are complete."""


def read(
    syntax: Syntax, *pieces: str, single: bool = False, cut_off: bool = False, names: tuple[str, ...] = NAMES
) -> Read:
    reader = ToolCallReader(syntax, names, single=single)
    events: list[Event] = [event for piece in pieces for event in reader.feed(piece)]
    events += reader.finish(cut_off=cut_off)
    text, calls = "", []
    for event in events:
        match event:
            case Content(said):
                assert said
                text += said
            case CallStart(index, name):
                assert index == len(calls), "a call begins after the one before it"
                calls.append((name, ""))
            case ArgumentsPiece(index, piece):
                assert index == len(calls) - 1 and piece
                calls[index] = (calls[index][0], calls[index][1] + piece)
    assert reader.calls >= len(calls)
    return text, calls, reader.complete


WEATHER = ("weather", '{"city": "Köln", "days": [1, {"a": "}"}]}')
ADD = ("add", "{}")
CALL = '{"name": "weather", "arguments": {"city": "Köln", "days": [1, {"a": "}"}]}}'

CASES: list[tuple[Syntax, str, str, list[tuple[str, str]]]] = [
    (HERMES, "just text", "just text", []),
    (HERMES, "1 < 2 and <tool", "1 < 2 and <tool", []),
    (HERMES, "trailing  \n", "trailing  \n", []),
    (HERMES, f"<tool_call>\n{CALL}\n</tool_call>", "", [WEATHER]),
    (HERMES, f"I look.\n<tool_call>\n{CALL}\n</tool_call>", "I look.", [WEATHER]),
    (
        HERMES,
        f'<tool_call>\n{CALL}\n</tool_call>\n<tool_call>{{"arguments": {{}}, "name": "add"}}</tool_call>\n',
        "",
        [WEATHER, ADD],
    ),
    (HERMES, f"<tool_call>{CALL}</tool_call>\n\ndone", "done", [WEATHER]),
    (HERMES, f"<tool_call>{CALL}", "", [WEATHER]),
    (HERMES, f"<tool_call>{CALL}\n</tool_", "", [WEATHER]),
    (HERMES, f'<tool_call>{CALL}{{"name": "add"}}</tool_call>', "", [WEATHER, ADD]),
    (HERMES, '<tool_call>{"name": "add", "arguments": null}</tool_call>', "", [ADD]),
    (
        HERMES,
        '<tool_call>{"name": "add", "arguments": "{\\"a\\": 1}"}</tool_call>',
        "",
        [("add", '{"a": 1}')],
    ),
    (HERMES, '<tool_call>{"id": 1, "x": [{"}": "]"}], "name": "\\u0061dd"}</tool_call>', "", [ADD]),
    (HERMES, '<tool_call>{"name": "other", "arguments": {}}</tool_call>', "", [("other", "{}")]),
    (HERMES, "<tool_call>\nnot json</tool_call>", "<tool_call>\nnot json</tool_call>", []),
    (HERMES, '<tool_call>{"name": 5}</tool_call>', '<tool_call>{"name": 5}</tool_call>', []),
    (HERMES, '<tool_call>{"arguments": {}}</tool_call>', '<tool_call>{"arguments": {}}</tool_call>', []),
    (HERMES, '<tool_call>{"name": "\\ud800"}', '<tool_call>{"name": "\\ud800"}', []),
    (
        HERMES,
        '<tool_call>{"name": "add", "arguments": [1]}',
        '<tool_call>{"name": "add", "arguments": [1]}',
        [],
    ),
    (HERMES, '<tool_call>{"name": "a\\\\", "arguments": {"x": "\\\\"}}', "", [("a\\", '{"x": "\\\\"}')]),
    (HERMES, CALL, CALL, []),
    (MISTRAL, f"[TOOL_CALLS] [{CALL}]", "", [WEATHER]),
    (MISTRAL, f'[TOOL_CALLS][{CALL}, {{"name": "add"}}]', "", [WEATHER, ADD]),
    (MISTRAL, "[1, 2] [TOOL", "[1, 2] [TOOL", []),
    (MISTRAL, f"Sure. [TOOL_CALLS] [{CALL}]\n", "Sure.", [WEATHER]),
    (MISTRAL, "[TOOL_CALLS] nothing", " nothing", []),
    (LLAMA, '{"name": "add", "parameters": {"a": 1}}', "", [("add", '{"a": 1}')]),
    (LLAMA, ' {"type": "function", "name": "add", "parameters": {}}\n', "", [ADD]),
    (LLAMA, '<|python_tag|>{"name": "add", "parameters": {}}', "", [ADD]),
    (LLAMA, f'{CALL}; {{"name": "add", "parameters": {{}}}}', "", [WEATHER, ADD]),
    (LLAMA, '{"name": "Ada", "parameters": {}}', '{"name": "Ada", "parameters": {}}', []),
    (LLAMA, '{"parameters": {}, "name": "Ada"}', '{"parameters": {}, "name": "Ada"}', []),
    (LLAMA, '{"answer": [1]} ', '{"answer": [1]} ', []),
    (LLAMA, ' {"a": ', ' {"a": ', []),
    (LLAMA, f"text {CALL}", f"text {CALL}", []),
    (LLAMA, "<|python_tag|>print(1)", "print(1)", []),
    (FORCED, CALL, "", [WEATHER]),
    (FORCED, f'[{CALL}, {{"name": "add", "arguments": {{}}}}]', "", [WEATHER, ADD]),
]


@pytest.mark.parametrize(("syntax", "text", "said", "calls"), CASES)
def test_calls_and_text_are_told_apart(
    syntax: Syntax, text: str, said: str, calls: list[tuple[str, str]]
) -> None:
    assert read(syntax, text) == (said, calls, len(calls))
    assert read(syntax, *text) == (said, calls, len(calls)), "character by character"


snippets = st.sampled_from(
    [
        "<tool_call>", "</tool_call>", "[TOOL_CALLS]", "<|python_tag|>", "<tool", "[TOOL", "[", "]", "{", "}", ",", ";",
        " ", "\n", '"', "\\", ":", '"name"', '"arguments"', '{"name": "add"', ', "parameters": {', CALL, "null", "x", "é",
        '{"name": "nobody", "arguments": {}}', '"\\ud800"', "5",
    ]
)  # fmt: skip


@settings(max_examples=600, deadline=None)
@given(
    syntax=st.sampled_from([HERMES, MISTRAL, LLAMA, FORCED]),
    pieces=st.lists(st.one_of(snippets, st.text(max_size=3)), max_size=14),
    cuts=st.lists(st.integers(0, 400), max_size=12),
    single=st.booleans(),
    cut_off=st.booleans(),
)
@example(
    syntax=LLAMA,
    pieces=['{"name": "nobody"', "}", "<|python_tag|>", CALL],
    cuts=[5],
    single=False,
    cut_off=False,
)
def test_any_split_of_any_text_reads_the_same(
    syntax: Syntax, pieces: list[str], cuts: list[int], single: bool, cut_off: bool
) -> None:
    text = "".join(pieces)
    bounds = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    split = [text[start:end] for start, end in itertools.pairwise(bounds)]
    whole = read(syntax, text, single=single, cut_off=cut_off)
    assert read(syntax, *split, single=single, cut_off=cut_off) == whole
    assert read(syntax, *text, single=single, cut_off=cut_off) == whole
    if single:
        assert len(whole[1]) <= 1


json_values = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.text(max_size=8)),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=8,
)


@settings(max_examples=300, deadline=None)
@given(
    calls=st.lists(
        st.tuples(st.sampled_from(NAMES), st.dictionaries(st.text(max_size=5), json_values, max_size=3)),
        min_size=1,
        max_size=3,
    ),
    ascii_only=st.booleans(),
)
def test_whatever_is_called_comes_back_in_every_format(
    calls: list[tuple[str, dict]], ascii_only: bool
) -> None:
    def written(name: str, arguments: dict, key: str) -> str:
        return json.dumps({"name": name, key: arguments}, ensure_ascii=ascii_only)

    objects = [written(*call, "arguments") for call in calls]
    texts = {
        HERMES: "\n".join(f"<tool_call>\n{each}\n</tool_call>" for each in objects),
        MISTRAL: f"[TOOL_CALLS] [{', '.join(objects)}]",
        LLAMA: "; ".join(written(*call, "parameters") for call in calls),
        FORCED: f"[{', '.join(objects)}]",
    }
    for syntax, text in texts.items():
        said, found, complete = read(syntax, text)
        assert (said, complete) == ("", len(calls))
        assert [(name, json.loads(arguments)) for name, arguments in found] == calls


def test_arguments_are_given_out_as_they_come() -> None:
    reader = ToolCallReader(HERMES, NAMES)
    assert reader.feed("<tool_call>") == []
    assert reader.feed('{"name": "weather", "arguments": ') == []
    assert reader.feed('{"city": "K') == [CallStart(0, "weather"), ArgumentsPiece(0, '{"city": "K')]
    assert reader.feed('öln"') == [ArgumentsPiece(0, 'öln"')]
    assert (reader.calls, reader.complete) == (1, 0)
    assert reader.feed("}}") == [ArgumentsPiece(0, "}")]
    assert reader.complete == 1
    assert reader.feed("\n</tool_call>") == [] == reader.finish(cut_off=False)


def test_text_is_given_out_as_soon_as_it_cannot_be_a_call() -> None:
    reader = ToolCallReader(HERMES, NAMES)
    assert reader.feed("so 1 <") == [Content("so 1")]
    assert reader.feed(" 2") == [Content(" < 2")]


def test_a_call_that_was_cut_off_is_not_complete_and_its_beginning_is_no_text() -> None:
    first = f"<tool_call>{CALL}</tool_call>"
    assert read(HERMES, first, '<tool_call>{"na', cut_off=True) == ("", [WEATHER], 1)
    text, calls, complete = read(HERMES, first, '<tool_call>{"name": "add", "arguments": {"a', cut_off=True)
    assert (text, calls, complete) == ("", [WEATHER, ("add", '{"a')], 1)
    assert read(FORCED, '{"name": "weath', cut_off=True) == ("", [], 0)
    assert read(LLAMA, '{"name": "weath', cut_off=True)[0] == '{"name": "weath', (
        "it may have become an answer in JSON"
    )


def test_with_a_single_call_the_others_are_dropped() -> None:
    two = f'[TOOL_CALLS] [{CALL}, {{"name": "add", "arguments": {{}}}}]'
    assert read(MISTRAL, two, single=True) == ("", [WEATHER], 1)


def test_a_family_is_known_by_its_template() -> None:
    assert format_of_template("... '<tool_call>\\n{\"name\": ' ...") == "hermes"
    assert format_of_template('{{ "[TOOL_CALLS] [" }}') == "mistral"
    assert format_of_template('in the format {"name": function name, "parameters": dictionary}') == "llama3"
    assert format_of_template("{{ '<|python_tag|>' }}") == "llama3"
    assert format_of_template("<tool_call>\n<function=name>") is None, "Qwen3-Coder's XML"
    assert format_of_template("[TOOL_CALLS]name[ARGS]{}") is None, "Mistral's later form"
    assert format_of_template("{{ messages }}") is None
