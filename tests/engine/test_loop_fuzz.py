"""The whole loop under a random load: every request ends once, with its own tokens, and nothing is left behind."""

import random
import threading
import time

import pytest
import torch

from engine.config import EngineConfig
from engine.host_adapter import AdapterError, HostAdapter, LoraWeights
from engine.loop import EngineLoop, ModelLimits
from engine.protocol import AdapterRef, Generate, RejectCode, Rejected, SamplingParams, StepOutput
from tests.engine.paged_runner import EOS, VOCABULARY, PagedRunner, alone

MAX_LEN = 64
TEMPLATES = ([1, 2, 3, 4, 5, 6] * 3, [3, 1] * 8, [2] * 5)


class Published:
    """Adapters on a disk: published anew now and then, one of them broken."""

    def __init__(self) -> None:
        self.versions = dict.fromkeys("abcd", 1) | {"broken": 1}

    def version_of(self, ref: AdapterRef) -> int:
        return self.versions[ref.uri]

    def read(self, ref: AdapterRef) -> HostAdapter:
        time.sleep(0.001)
        if ref.uri == "broken":
            raise AdapterError("the file is cut off")
        weights = LoraWeights(torch.zeros(2, 4), torch.zeros(4, 2), 1.0)
        return HostAdapter(f"{ref.uri}-{self.versions[ref.uri]}", {(0, "q_proj"): weights}, 64, 2)


class Clients:
    """What every request was told, and how often it ended."""

    def __init__(self) -> None:
        self.tokens: dict[tuple[int, str], list[int]] = {}
        self.endings: dict[tuple[int, str], list[object]] = {}
        self.changed = threading.Condition()

    def receive(self, outbox) -> None:
        with self.changed:
            for connection, messages in outbox.items():
                for message in messages:
                    self._read(connection, message)
            self.changed.notify_all()

    def _read(self, connection: int, message: StepOutput | Rejected) -> None:
        if isinstance(message, Rejected):
            self.endings.setdefault((connection, message.request_id), []).append(message.code)
            return
        for output in message.outputs:
            key = connection, output.request_id
            assert key not in self.endings, "more came after the end"
            self.tokens.setdefault(key, []).extend(output.token_ids)
            if output.finish_reason is not None:
                self.endings.setdefault(key, []).append(output.finish_reason)


def random_request(dice: random.Random, number: int, earlier: list[Generate]) -> Generate:
    sampling = SamplingParams(
        max_tokens=dice.randint(1, 25),
        min_tokens=dice.choice([0, 0, 3]),
        temperature=dice.choice([0.0, 0.0, 0.7]),
        seed=dice.randrange(100),
        repetition_penalty=dice.choice([1.0, 1.1]),
        ignore_eos=dice.random() < 0.5,
    )
    prompt = dice.choice(TEMPLATES) + [dice.randrange(VOCABULARY) for _ in range(dice.randrange(6))]
    name = dice.choice([None, None, "a", "b", "c", "d", "broken"])
    adapter = None if name is None else AdapterRef(name, name)
    follows = None
    if earlier and dice.random() < 0.3:
        prompt, adapter, follows = earlier[-1].prompt, earlier[-1].adapter, earlier[-1].request_id
    return Generate(
        f"r{number}",
        prompt,
        sampling,
        adapter,
        follows=follows,
        priority=dice.choice([0, 0, 0, 1]),
        deadline_s=dice.choice([None, None, None, 0.005, 30.0]),
        tenant=dice.choice(["", "other"]),
        cache_salt=dice.choice(["", "", "salt"]),
    )


@pytest.mark.parametrize("seed", range(4))
def test_every_request_ends_once_with_its_own_tokens_and_nothing_is_left(seed):
    dice = random.Random(seed)
    published, clients, crashed = Published(), Clients(), threading.Event()
    runner = PagedRunner(24, 4)
    config = EngineConfig(
        model="none",
        name="toy",
        adapter_slots=2,
        max_sequences=5,
        max_batch_tokens=16,
        max_waiting=40,
        speculative_tokens=dice.choice([0, 3]),
        speculative_ngram=1,
    )
    engine = EngineLoop(
        runner,
        config,
        ModelLimits(VOCABULARY, MAX_LEN, (EOS,)),
        clients.receive,
        read_adapter=published.read,
        device_bytes=lambda adapter: 64,
        version_of=published.version_of,
        on_crash=crashed.set,
    )
    engine.start()
    sent: dict[tuple[int, str], Generate] = {}
    dropped: set[tuple[int, str]] = set()
    for number in range(150):
        connection = dice.choice([1, 1, 2])
        earlier = [request for (owner, _), request in sent.items() if owner == connection]
        request = random_request(dice, number, earlier)
        sent[connection, request.request_id] = request
        engine.submit(connection, request)
        if dice.random() < 0.15:
            victim = dice.choice(list(sent))
            dropped.add(victim)
            engine.abort(*victim)
        if dice.random() < 0.02:
            dropped |= {key for key in sent if key[0] == 2}
            engine.disconnect(2)
        if dice.random() < 0.05:
            published.versions[dice.choice("abcd")] += 1
        time.sleep(dice.choice([0, 0, 0.001, 0.004]))
    with clients.changed:
        ended = clients.changed.wait_for(lambda: sent.keys() - dropped <= clients.endings.keys(), timeout=20)
    assert ended, f"no end: {sorted(sent.keys() - dropped - clients.endings.keys())}"
    deadline = time.monotonic() + 5
    while engine.status().waiting or engine.status().running:
        assert time.monotonic() < deadline
        time.sleep(0.002)
    engine.stop()
    assert not crashed.is_set()
    engine.pool.check([])
    assert engine.pool.num_available == engine.pool.num_blocks
    leftovers = (engine._sequences, engine._versions, engine._waiting_adapter, engine._last_token_s)
    assert not any(leftovers) and not engine.scheduler._flows
    assert engine.scheduler.num_waiting == 0
    assert all(len(endings) == 1 for endings in clients.endings.values())
    expected_codes = {RejectCode.ADAPTER_INVALID, RejectCode.EXPIRED, RejectCode.OVERLOADED}
    finished = 0
    for key, request in sent.items():
        tokens, (ending,) = clients.tokens.get(key, []), clients.endings.get(key, [None])
        if isinstance(ending, RejectCode):
            assert ending in expected_codes
            assert ending is not RejectCode.ADAPTER_INVALID or request.adapter == AdapterRef(
                "broken", "broken"
            )
        possible = answers(request, published)
        if ending is None or isinstance(ending, RejectCode):
            assert not tokens or tokens in [found[: len(tokens)] for found, _ in possible]
        else:
            assert (tokens, ending) in possible
            finished += 1
    assert finished > 40


def answers(request: Generate, published: Published) -> list[tuple[list[int], object]]:
    """What the request may be answered with: by any version of its adapter that was ever published."""
    digests: list[str | None] = [None]
    if request.adapter is not None:
        name = request.adapter.uri
        digests = [f"{name}-{version}" for version in range(1, published.versions[name] + 1)]
    found = [alone(request, request.sampling.seed or 0, digest, MAX_LEN) for digest in digests]
    return [(tokens, reason) for tokens, _, reason in found]
