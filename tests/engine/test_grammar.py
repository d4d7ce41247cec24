"""Answers follow their grammar, whatever the model wants to say."""

import json
import re
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from engine.checkpoint import open_checkpoint
from engine.grammar import GrammarCompiler, GrammarError
from engine.protocol import FinishReason, Grammar
from engine.sequence import Sequence
from tests.engine.driving import Driver
from tests.engine.tiny import write_tiny_adapter, write_tiny_model

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "tags": {"type": "array", "items": {"enum": ["a", "b"]}, "maxItems": 3},
        "home": {"type": "object", "properties": {"zip": {"type": "string", "pattern": "^[0-9]{4}$"}}},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}


END = 2


class World:
    """A tiny model that says anything, and its compiler."""

    def __init__(self, folder: Path) -> None:
        self.model = write_tiny_model(folder / "model", "llama")
        self.adapters = {"a": write_tiny_adapter(folder / "a", self.model, 4, ["q_proj"], seed=1)}
        checkpoint = open_checkpoint(self.model)
        tokenizer = checkpoint.files["tokenizer.json"]
        self.compiler = GrammarCompiler(tokenizer, checkpoint.spec.vocab_size, checkpoint.spec.eos_token_ids)
        self.tokenizer = Tokenizer.from_buffer(tokenizer)

    def driver(self, **config) -> Driver:
        return Driver(self.model, self.adapters, **config)

    def ask(
        self, driver: Driver, grammar: Grammar | None, adapter: str | None = None, **sampling
    ) -> Sequence:
        sequence = driver.add(
            [5, 6, 7, 8],
            adapter,
            **{"max_tokens": 200, "temperature": 1.0, "ignore_eos": False, **sampling},
        )
        sequence.constraint = None if grammar is None else self.compiler.compile(grammar)
        return sequence

    def text(self, driver: Driver, sequence: Sequence) -> str:
        ids = [token for token in driver.generated(sequence) if token != END]
        return self.tokenizer.decode(ids, skip_special_tokens=False)


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> World:
    return World(tmp_path_factory.mktemp("grammar"))


def is_person(text: str) -> bool:
    person = json.loads(text)
    assert set(person) - {"home"} == {"name", "age", "tags"}
    assert len(person["name"]) <= 8 and 0 <= person["age"] <= 120 and set(person["tags"]) <= {"a", "b"}
    return True


@pytest.mark.parametrize(
    ("grammar", "follows"),
    [
        (Grammar("json_schema", json.dumps(PERSON)), is_person),
        (Grammar("regex", "[a-c]{3}-[0-9]+(x|y)"), lambda text: re.fullmatch("[a-c]{3}-[0-9]+(x|y)", text)),
        (
            Grammar("choice", json.dumps(["yes", 'no "really"', "né"])),
            {"yes", 'no "really"', "né"}.__contains__,
        ),
        (Grammar("lark", 'start: "(" start ")" | "x"'), lambda text: re.fullmatch(r"\(*x\)*", text)),
    ],
)
def test_answers_follow_the_grammar_in_one_batch_with_others(world, grammar, follows):
    driver = world.driver()
    asked = [world.ask(driver, grammar, adapter, seed=seed) for adapter in (None, "a") for seed in range(4)]
    asked.append(world.ask(driver, grammar, temperature=0.0, max_tokens=400))
    free = world.ask(driver, None, seed=9, max_tokens=40, ignore_eos=True)
    driver.run()
    ended = [sequence for sequence in asked if sequence.finish_reason is FinishReason.STOP]
    assert len(ended) >= 4, "most end within their tokens"
    assert all(follows(world.text(driver, sequence)) for sequence in ended)
    alone = world.driver()
    twin = world.ask(alone, None, seed=9, max_tokens=40, ignore_eos=True)
    alone.run()
    assert driver.generated(free) == alone.generated(twin)


def test_json_object_is_an_object(world):
    driver = world.driver()
    asked = [world.ask(driver, Grammar("json_object"), seed=seed) for seed in range(6)]
    driver.run()
    texts = [world.text(driver, s) for s in asked if s.finish_reason is FinishReason.STOP]
    assert texts and all(isinstance(json.loads(text), dict) for text in texts)


@pytest.mark.parametrize("sampling", [{"ignore_eos": True}, {"min_tokens": 50}, {"logit_bias": {2: -100.0}}])
def test_where_the_grammar_ends_the_answer_ends(world, sampling):
    driver = world.driver()
    sequence = world.ask(driver, Grammar("choice", '["ab"]'), **sampling)
    driver.run()
    assert (world.text(driver, sequence), sequence.finish_reason) == ("ab", FinishReason.STOP)


def test_an_answer_that_fills_its_tokens_exactly_has_ended_all_the_same(world):
    driver = world.driver()
    sequence = world.ask(driver, Grammar("choice", '["a"]'), max_tokens=1)
    (progress,) = driver.run()
    assert (world.text(driver, sequence), progress.finish_reason) == ("a", FinishReason.STOP)
    assert progress.token_ids == driver.generated(sequence), "the last token is told"


def test_an_answer_cut_off_says_so(world):
    driver = world.driver()
    sequence = world.ask(driver, Grammar("json_schema", json.dumps(PERSON)), max_tokens=3)
    driver.run()
    assert sequence.finish_reason is FinishReason.LENGTH and len(driver.generated(sequence)) == 3


def test_preemption_and_guesses_change_nothing(world):
    grammar = Grammar("json_schema", json.dumps(PERSON))
    told = []
    for config in ({}, {"pool_blocks": 9}, {"speculative_tokens": 3, "speculative_ngram": 1}):
        driver = world.driver(**config)
        asked = [world.ask(driver, grammar, seed=seed, max_tokens=60) for seed in range(4)]
        driver.run()
        told.append([driver.generated(sequence) for sequence in asked])
        assert driver.scheduler.num_preemptions or "pool_blocks" not in config
    assert told[0] == told[1] == told[2]


def test_logprobs_are_the_models_own(world):
    driver = world.driver()
    world.ask(driver, Grammar("choice", '["zzz"]'), logprobs=1, max_tokens=1)
    (progress,) = driver.run()
    assert progress.logprobs and progress.logprobs[0].logprob < 0
    assert progress.logprobs[0].top[0][0] != progress.token_ids[0]


@pytest.mark.parametrize(
    ("grammar", "part"),
    [
        (Grammar("json_schema", '{"type": "strin"}'), "strin"),
        (Grammar("json_schema", "[1"), "json_schema cannot be used"),
        (Grammar("json_schema", '{"$ref": "#/nowhere"}'), "json_schema cannot be used"),
        (Grammar("regex", "(abc"), "regex cannot be used"),
        (Grammar("lark", "start: foo"), 'unknown name: "foo"'),
        (Grammar("regex", "a" * 300_000), "larger than"),
    ],
)
def test_what_cannot_be_compiled_is_refused_with_the_reason(world, grammar, part):
    with pytest.raises(GrammarError, match=re.escape(part)):
        world.compiler.compile(grammar)


def schemas() -> st.SearchStrategy[dict]:
    leaves = st.sampled_from(
        [
            {"type": "boolean"},
            {"type": "null"},
            {"enum": ["x", 1, None]},
            {"type": "integer", "minimum": -3, "maximum": 12},
            {"const": {"k": [1, 2]}},
        ]
    )

    def nest(inner: st.SearchStrategy[dict]) -> st.SearchStrategy[dict]:
        arrays = st.builds(lambda items: {"type": "array", "items": items, "maxItems": 2}, inner)
        objects = st.builds(
            lambda properties: {
                "type": "object",
                "properties": properties,
                "required": sorted(properties),
                "additionalProperties": False,
            },
            st.dictionaries(st.sampled_from(["a", "b", "long name"]), inner, max_size=2),
        )
        return arrays | objects

    return st.recursive(leaves, nest, max_leaves=4)


def fits(value, schema: dict) -> bool:
    if "enum" in schema:
        return value in schema["enum"]
    if "const" in schema:
        return value == schema["const"]
    match schema["type"]:
        case "boolean":
            return isinstance(value, bool)
        case "null":
            return value is None
        case "integer":
            return type(value) is int and schema["minimum"] <= value <= schema["maximum"]
        case "array":
            return len(value) <= 2 and all(fits(each, schema["items"]) for each in value)
    return value.keys() == schema["properties"].keys() and all(
        fits(value[key], inner) for key, inner in schema["properties"].items()
    )


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(schemas(), st.integers(0, 5))
def test_any_schema_is_followed(world, schema, seed):
    driver = world.driver()
    sequence = world.ask(driver, Grammar("json_schema", json.dumps(schema)), seed=seed)
    driver.run()
    assert sequence.finish_reason is FinishReason.STOP
    assert fits(json.loads(world.text(driver, sequence)), schema)
