"""The engine's own thread: inbox -> adapters -> schedule -> run -> outputs. Knows no sockets and no tensors.

All bookkeeping (sequences, blocks, residency) happens on this thread. Adapter files are read on a loader thread, whose
results come back through the same inbox as the requests.
"""

import heapq
import math
import queue
import random
import threading
import time
from collections.abc import Callable, Hashable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

import msgspec
import numpy as np
import structlog

from engine.adapter_report import adapter_report
from engine.admission import make_room
from engine.config import EngineConfig
from engine.grammar import Constraint, GrammarCompiler, GrammarError
from engine.host_adapter import AdapterError, AdapterNotFoundError, HostAdapter
from engine.kv_blocks import BlockPool
from engine.metrics import MERGED_ADAPTER, UNKNOWN_ADAPTER, EngineMetrics, Observation
from engine.protocol import (
    AdapterRef,
    AdapterReport,
    AdapterTier,
    EngineStatus,
    Generate,
    Grammar,
    RejectCode,
    Rejected,
    SamplingParams,
    SequenceOutput,
    StepOutput,
)
from engine.residency import Copy, Drop, Evict, Fetch, Residency, Version
from engine.scheduler import Progress, Scheduler
from engine.sequence import Sequence, SequenceState
from engine.step import Runner, StepPlan
from engine.tally import Tally

log = structlog.get_logger()

SMALLEST_TOP_P = 1e-10
"""A top-p below this keeps the likeliest token alone in any vocabulary; in float32 a smaller one would keep none."""
LARGEST_WEIGHT = 1e6
"""Bound of temperature, penalties (repetition: both ways) and biases, within which float32 stays finite."""

Message = StepOutput | Rejected
Deliver = Callable[[dict[int, list[Message]]], None]
"""Called on the loop's thread with what each connection is to be sent; must not block."""


@dataclass(frozen=True, slots=True)
class ModelLimits:
    """What the loop must know of the model to judge a request."""

    vocab_size: int
    max_model_len: int
    eos_token_ids: tuple[int, ...]


class EngineLoop:
    """Start it, submit and abort from any thread, stop it.

    Args:
        read_adapter: Reads and checks an adapter's files (loader thread); raises `AdapterError`.
        version_of: Changes when an adapter is published anew; must not wait. Raises `AdapterError`.
        device_bytes: Bytes of an adapter in device form.
        grammars: Compiles what answers must follow; without it such requests are refused.
        on_crash: Called on the loop's thread when its own bookkeeping failed and it had to end. The process must
            then end too, so that every gateway notices.
    """

    def __init__(
        self,
        runner: Runner,
        config: EngineConfig,
        limits: ModelLimits,
        deliver: Deliver,
        *,
        read_adapter: Callable[[AdapterRef], HostAdapter],
        device_bytes: Callable[[HostAdapter], int],
        metrics: EngineMetrics | None = None,
        version_of: Callable[[AdapterRef], Hashable],
        clock: Callable[[], float] = time.monotonic,
        on_crash: Callable[[], None] = lambda: None,
        grammars: GrammarCompiler | None = None,
    ) -> None:
        self._runner = runner
        self._config = config
        self._limits = limits
        self._deliver = deliver
        self._read_adapter = read_adapter
        self._device_bytes = device_bytes
        self._version_of = version_of
        self._clock = clock
        self._on_crash = on_crash
        self._grammars = grammars
        self._compiler = ThreadPoolExecutor(1, "grammar-compiler")
        self.metrics = metrics or EngineMetrics(config.name)
        self.metrics.watch(self.observe)
        self.pool = BlockPool(runner.num_blocks, runner.block_size, config.prefix_caching)
        self.scheduler = Scheduler(
            self.pool,
            max_batch_tokens=config.max_batch_tokens,
            max_sequences=config.max_sequences,
            max_model_len=limits.max_model_len,
            eos_token_ids=limits.eos_token_ids,
            speculative_tokens=config.speculative_tokens,
            speculative_ngram=config.speculative_ngram,
        )
        mib = 2**20
        self.residency = Residency(
            config.adapter_slots,
            config.adapter_host_mib * mib,
            config.adapter_device_mib * mib,
            config.adapter_loaders,
        )
        self._inbox: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._loader = ThreadPoolExecutor(
            config.adapter_loaders, "adapter-loader", initializer=runner.enter_loader_thread
        )
        self._host: dict[Version, HostAdapter] = {}
        self._sequences: dict[tuple[int, str], Sequence] = {}
        self._versions: dict[int, Version] = {}
        self._waiting_adapter: dict[Version, list[Sequence]] = {}
        self._last_token_s: dict[int, float] = {}
        self._outbox: dict[int, list[Message]] = {}
        self._resident_names: list[str] = []
        self._next_key = 0
        self._tokens_per_s = 0.0
        """Of prompts and answers, smoothed over some fifty steps."""
        self._deadlines: list[tuple[float, int, Sequence]] = []
        """A heap: when, and which sequence then expires unless it is finished."""
        self._stopping = False
        self.alive_s = clock()
        """When the loop last came round; a health check compares it with the clock."""
        self._thread = threading.Thread(target=self._run, name="engine-loop", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self, timeout_s: float = 5.0) -> None:
        """Refuse what is open and end the thread."""
        self._inbox.put(self._stop)
        self._thread.join(timeout_s)
        self._loader.shutdown(wait=False, cancel_futures=True)
        self._compiler.shutdown(wait=False, cancel_futures=True)

    def submit(self, connection: int, request: Generate) -> None:
        self._inbox.put(partial(self._accept, connection, request))

    def abort(self, connection: int, request_id: str) -> None:
        self._inbox.put(partial(self._abort, connection, request_id))

    def disconnect(self, connection: int) -> None:
        """Abort everything of a connection that is gone."""
        self._inbox.put(partial(self._disconnect, connection))

    def pin(self, ref: AdapterRef) -> None:
        """Load an adapter now and keep it on the device. Raises `AdapterError` when it cannot be there."""
        version = Version(ref, self._version_of(ref))
        self._inbox.put(lambda: self.residency.pin(version, self._clock()))

    def unpin(self, ref: AdapterRef) -> None:
        """It may be evicted again."""
        self._inbox.put(lambda: self.residency.unpin(ref))

    def status(self) -> EngineStatus:
        """A snapshot, from any thread."""
        return EngineStatus(
            running=self.scheduler.num_running,
            waiting=max(0, len(self._sequences) - self.scheduler.num_running),
            kv_blocks_total=self.pool.num_blocks,
            kv_blocks_free=self.pool.num_available,
            adapters_resident=self._resident_names,
        )

    def adapters(self) -> AdapterReport:
        """What is known of every adapter, from any thread."""
        versions = self._versions.copy()
        using = [
            (version, sequence.state is SequenceState.RUNNING)
            for sequence in list(self._sequences.values())
            if (version := versions.get(sequence.key)) is not None
        ]
        return adapter_report(self.residency, using, self._clock())

    def observe(self) -> Observation:
        """What the metrics show beside what they count, from any thread."""
        status, scheduler = self.status(), self.scheduler
        return Observation(
            running=status.running,
            waiting=status.waiting,
            kv_blocks=status.kv_blocks_total,
            kv_blocks_available=status.kv_blocks_free,
            preemptions=scheduler.num_preemptions,
            proposed_tokens=scheduler.num_proposed,
            accepted_tokens=scheduler.num_accepted,
            evictions=self.residency.num_evictions,
            adapters=self.adapters(),
        )

    def _run(self) -> None:
        log.info("loop_started", kv_blocks=self.pool.num_blocks, block_size=self.pool.block_size)
        try:
            self._runner.enter_loop_thread()
            self._work()
        except Exception:
            log.exception("loop_crashed", open_requests=len(self._sequences))
            self._on_crash()
        log.info("loop_stopped")

    def _work(self) -> None:
        worked = False
        while not self._stopping:
            self._drain_inbox(block=not worked)
            if self._stopping:
                break
            self._expire()
            self._load_adapters()
            worked = self._step()
            self._send()
        self._send()

    def _drain_inbox(self, block: bool) -> None:
        """Do what has arrived; with nothing else to do, wait for it (but look round every second)."""
        self.alive_s = self._clock()
        try:
            if block:
                until_s = self._deadlines[0][0] - self.alive_s if self._deadlines else 1.0
                self._inbox.get(timeout=min(1.0, max(0.0, until_s)))()
            while True:
                self._inbox.get_nowait()()
        except queue.Empty:
            return

    def _expect(self, sequence: Sequence, deadline_s: float) -> None:
        if len(self._deadlines) > 64 + 2 * len(self._sequences):
            # Most have ended long before: they must not be kept for hours.
            self._deadlines = [d for d in self._deadlines if d[2].state is not SequenceState.FINISHED]
            heapq.heapify(self._deadlines)
        heapq.heappush(self._deadlines, (deadline_s, sequence.key, sequence))

    def _expire(self) -> None:
        """Answer the requests whose deadline has passed; nothing more is computed for them."""
        while self._deadlines and self._deadlines[0][0] <= self._clock():
            _, _, sequence = heapq.heappop(self._deadlines)
            if sequence.state is not SequenceState.FINISHED:
                text = f"The request was not finished within {sequence.request.deadline_s:g} s."
                self._reject(sequence, RejectCode.EXPIRED, text)

    def _step(self) -> bool:
        """Compute one step, if there is anything to compute."""
        plan = self.scheduler.schedule()
        if not plan.chunks:
            return False
        started = self._clock()
        for chunk in plan.chunks:
            if not chunk.sequence.has_run:
                self._count_start(chunk.sequence, started)
        try:
            result = self._runner.run(plan)
        except Exception:
            log.exception("step_failed", sequences=len(plan.chunks), tokens=plan.num_tokens)
            for chunk in plan.chunks:
                self._reject(
                    chunk.sequence, RejectCode.INTERNAL, "The engine failed while working on this request."
                )
            return True
        now = self._clock()
        self._count_step(plan, now - started)
        rate = plan.num_tokens / max(now - started, 1e-4)
        self._tokens_per_s += (0.02 if self._tokens_per_s else 1.0) * (rate - self._tokens_per_s)
        self._report(self.scheduler.apply(plan, result), now)
        for chunk, found in zip(plan.chunks, result.results, strict=True):
            if found.error is not None:
                self._reject(chunk.sequence, RejectCode.GRAMMAR_INVALID, found.error)
        return True

    def _count_start(self, sequence: Sequence, now: float) -> None:
        """It is in a step for the first time."""
        sequence.has_run = True
        metrics, tally, waited_s = self.metrics, self._tally(sequence), now - sequence.arrival_s
        metrics.queue_seconds.observe(waited_s)
        metrics.prompt_tokens.inc(sequence.num_prompt_tokens)
        metrics.cached_tokens.inc(sequence.num_cached)
        tally.queue.observe(waited_s)
        tally.prompt_tokens += sequence.num_prompt_tokens
        tally.cached_tokens += sequence.num_cached

    def _count_step(self, plan: StepPlan, seconds: float) -> None:
        self.metrics.step_seconds.observe(seconds)
        self.metrics.step_sequences.observe(len(plan.chunks))
        self.metrics.step_tokens.observe(plan.num_tokens)
        slots = {chunk.sequence.slot for chunk in plan.chunks}
        self.metrics.step_adapters.observe(len(slots - {None}))

    def _tally(self, sequence: Sequence) -> Tally:
        """Where to count what it does. Names that lead to nothing usable are invented by callers: no label for them."""
        adapter = sequence.request.adapter
        if adapter is None:
            return self.metrics.adapters.of("")
        if adapter.parts:
            return self.metrics.adapters.of(MERGED_ADAPTER)
        version = self._versions.get(sequence.key)
        known = version is not None and self.residency.is_read(version)
        return self.metrics.adapters.of(adapter.name if known else UNKNOWN_ADAPTER)

    def _report(self, progress: list[Progress], now: float) -> None:
        outputs: dict[int, list[SequenceOutput]] = {}
        for made in progress:
            sequence, tally = made.sequence, self._tally(made.sequence)
            first = sequence.key not in self._last_token_s
            prompt_logprobs = None
            if first:
                self.metrics.time_to_first_token.observe(now - sequence.arrival_s)
                tally.time_to_first_token.observe(now - sequence.arrival_s)
                if sequence.request.sampling.prompt_logprobs is not None:
                    prompt_logprobs = sequence.prompt_logprobs
            else:
                gap_s = now - self._last_token_s[sequence.key]
                self.metrics.inter_token.observe(gap_s)
                tally.inter_token.observe(gap_s)
            self._last_token_s[sequence.key] = now
            self.metrics.generated_tokens.inc(len(made.token_ids))
            tally.generated_tokens += len(made.token_ids)
            outputs.setdefault(sequence.connection, []).append(
                SequenceOutput(
                    sequence.request.request_id,
                    made.token_ids,
                    made.finish_reason,
                    sequence.num_cached if first else 0,
                    made.logprobs,
                    prompt_logprobs,
                    _embedding(sequence),
                )
            )
            if made.finish_reason is not None:
                self._forget(sequence, str(made.finish_reason))
        for connection, found in outputs.items():
            self._outbox.setdefault(connection, []).append(StepOutput(found))

    def _accept(self, connection: int, request: Generate) -> None:
        now = self._clock()
        refusal = self._refusal(connection, request) or self._make_room(request)
        if refusal is not None:
            label = UNKNOWN_ADAPTER if request.adapter else ""
            self.metrics.adapters.of(label).requests[refusal.code] += 1
            self._outbox.setdefault(connection, []).append(refusal)
            return
        request = _with_computable_top_p(request)
        seed = request.sampling.seed
        sequence = Sequence(
            key=self._next_key,
            request=request,
            arrival_s=now,
            connection=connection,
            seed=random.getrandbits(63) if seed is None else seed,
            leader=self._leader_of(connection, request),
        )
        self._next_key += 1
        if request.deadline_s is not None:
            self._expect(sequence, now + request.deadline_s)
        self._sequences[connection, request.request_id] = sequence
        if request.sampling.grammar is None:
            self._place(sequence)
        else:
            self._compiler.submit(self._compile, sequence, request.sampling.grammar)

    def _compile(self, sequence: Sequence, grammar: Grammar) -> None:
        """On the compiler's thread."""
        try:
            if self._grammars is None:
                raise GrammarError("This engine has no grammars.")
            constraint = self._grammars.compile(grammar)
        except GrammarError as error:
            self._inbox.put(partial(self._compiled, sequence, None, str(error)))
        except Exception:
            log.exception("grammar_failed")
            text = f"The engine failed while compiling the {grammar.kind}."
            self._inbox.put(partial(self._compiled, sequence, None, text, RejectCode.INTERNAL))
        else:
            self._inbox.put(partial(self._compiled, sequence, constraint, ""))

    def _compiled(
        self,
        sequence: Sequence,
        constraint: Constraint | None,
        reason: str,
        code: RejectCode = RejectCode.GRAMMAR_INVALID,
    ) -> None:
        if sequence.state is SequenceState.FINISHED:
            return
        if constraint is None:
            self._reject(sequence, code, reason)
            return
        sequence.constraint = constraint
        self._place(sequence)

    def _place(self, sequence: Sequence) -> None:
        """Hand a sequence to the scheduler, or have its adapter fetched first."""
        request, now = sequence.request, self._clock()
        if request.adapter is None:
            self.scheduler.add(sequence)
            return
        try:
            version = Version(request.adapter, self._version_of(request.adapter))
        except AdapterError as error:
            log.warning("adapter_refused", adapter=request.adapter.name, reason=str(error))
            if isinstance(error, AdapterNotFoundError):
                text = f"The adapter {request.adapter.name!r} does not exist."
                self._reject(sequence, RejectCode.ADAPTER_NOT_FOUND, text)
            else:
                self._reject(sequence, RejectCode.ADAPTER_INVALID, _explain(request.adapter, error))
            return
        except (OSError, ValueError) as error:
            log.warning("adapter_refused", adapter=request.adapter.name, reason=str(error))
            text = f"The adapter {request.adapter.name!r} cannot be looked up: {type(error).__name__}."
            self._reject(sequence, RejectCode.ADAPTER_INVALID, text)
            return
        self._versions[sequence.key] = version
        self._waiting_adapter.setdefault(version, []).append(sequence)
        self.residency.want(version, now)

    def _refusal(self, connection: int, request: Generate) -> Rejected | None:
        """Why a request is not even queued, or None."""
        limits, sampling, length = self._limits, request.sampling, len(request.prompt)

        def refuse(code: RejectCode, message: str, retry_after_s: float | None = None) -> Rejected:
            return Rejected(request.request_id, code, message, retry_after_s)

        if (connection, request.request_id) in self._sequences:
            return refuse(RejectCode.INVALID, f"The request id {request.request_id!r} is in use.")
        if self._stopping:
            return refuse(RejectCode.UNAVAILABLE, "The engine is shutting down.", 1.0)
        if not length:
            return refuse(RejectCode.INVALID, "The prompt is empty.")
        if length >= self.scheduler.max_len:
            limit = self.scheduler.max_len
            return refuse(
                RejectCode.CONTEXT_LENGTH,
                f"This model's maximum context length is {limit} tokens, however the prompt has {length} tokens "
                "and at least one must be left for the answer. Shorten the prompt.",
            )
        parts = request.adapter.parts if request.adapter else ()
        if not all(math.isfinite(part.weight) for part in parts):
            return refuse(RejectCode.INVALID, "The weights of merged adapters must be finite.")
        ids = [*request.prompt, *sampling.logit_bias, *sampling.stop_token_ids]
        if min(ids) < 0 or max(ids) >= limits.vocab_size:
            return refuse(RejectCode.INVALID, f"Token ids must lie between 0 and {limits.vocab_size - 1}.")
        wrong = _out_of_range(sampling)
        if wrong is not None:
            return refuse(RejectCode.INVALID, wrong)
        if not (request.deadline_s is None or request.deadline_s > 0):
            return refuse(RejectCode.INVALID, f"Out of range: deadline_s ({request.deadline_s}).")
        return None

    def _make_room(self, request: Generate) -> Rejected | None:
        """With a full queue, refuse others' requests that must give way, or this one; say when to come again."""
        waiting = [s for s in self._sequences.values() if s.state is not SequenceState.RUNNING]
        refused = make_room(request, waiting, self._config.max_waiting, self._config.max_waiting_tokens)
        if refused == []:
            return None
        tokens = sum(sequence.num_prompt_tokens for sequence in waiting)
        message = f"The engine's queue is full ({len(waiting)} requests, {tokens} prompt tokens)."
        tokens += sum(sequence.request.sampling.max_tokens for sequence in waiting)
        wait_s = min(60.0, max(1.0, tokens / max(self._tokens_per_s, 1.0)))
        if refused is None:
            return Rejected(request.request_id, RejectCode.OVERLOADED, message, wait_s)
        for sequence in refused:
            self._reject(sequence, RejectCode.OVERLOADED, message, wait_s)
        return None

    def _leader_of(self, connection: int, request: Generate) -> Sequence | None:
        """The sequence whose prompt blocks a request shares, if it is still there and really has its prompt."""
        leader = None if request.follows is None else self._sequences.get((connection, request.follows))
        same = leader is not None and (
            (leader.request.prompt, leader.request.adapter, leader.request.cache_salt)
            == (request.prompt, request.adapter, request.cache_salt)
        )
        return leader if same else None

    def _abort(self, connection: int, request_id: str) -> None:
        sequence = self._sequences.get((connection, request_id))
        if sequence is not None:
            self._forget(sequence, "abort")

    def _disconnect(self, connection: int) -> None:
        for key, request_id in list(self._sequences):
            if key == connection:
                self._abort(connection, request_id)
        self._outbox.pop(connection, None)

    def _reject(
        self, sequence: Sequence, code: RejectCode, message: str, retry_after_s: float | None = None
    ) -> None:
        self._outbox.setdefault(sequence.connection, []).append(
            Rejected(sequence.request.request_id, code, message, retry_after_s)
        )
        self._forget(sequence, code)

    def _forget(self, sequence: Sequence, outcome: str) -> None:
        """Free everything a sequence holds, whatever state it is in."""
        now = self._clock()
        self._tally(sequence).requests[outcome] += 1
        waited_for_adapter = sequence.state is SequenceState.WAITING_ADAPTER
        if sequence.state is not SequenceState.FINISHED:
            self.scheduler.abort(sequence)
        version = self._versions.pop(sequence.key, None)
        if version is not None and waited_for_adapter:
            self._waiting_adapter[version].remove(sequence)
            if not self._waiting_adapter[version]:
                del self._waiting_adapter[version]
            self.residency.cancel(version, now)
        elif version is not None:
            self.residency.release(version, now)
        self._last_token_s.pop(sequence.key, None)
        del self._sequences[sequence.connection, sequence.request.request_id]

    def _load_adapters(self) -> None:
        """Admit what has become resident, refuse what failed, and start the I/O that residency asks for."""
        if not (self._waiting_adapter or self._versions or self._host or self.residency.num_pins):
            return
        now = self._clock()
        for version, sequences in list(self._waiting_adapter.items()):
            failure = self.residency.failure(version)
            for sequence in list(sequences):
                if failure is not None:
                    self._reject(sequence, RejectCode.ADAPTER_INVALID, failure)
                elif self.residency.ready(version):
                    sequence.slot, sequence.adapter_digest = self.residency.admit(version, now)
                    sequences.remove(sequence)
                    self.scheduler.add(sequence)
            if not sequences:
                self._waiting_adapter.pop(version, None)
        for action in self.residency.actions(now):
            match action:
                case Fetch(version):
                    self._loader.submit(self._fetch, version)
                case Copy(version, slot):
                    self._loader.submit(self._copy, version, slot, self._host[version])
                case Evict(version, slot):
                    self._empty(version, slot)
                case Drop(version):
                    self._host.pop(version, None)
        self._resident_names = self.residency.resident_names()

    def _fetch(self, version: Version) -> None:
        """On the loader thread."""
        started = self._clock()
        try:
            adapter = self._read_adapter(version.ref)
        except AdapterError as error:
            self._inbox.put(partial(self._adapter_failed, version, _explain(version.ref, error)))
        except Exception as error:
            log.exception("adapter_failed", adapter=version.ref.name)
            reason = f"The adapter {version.ref.name!r} cannot be read: {type(error).__name__}: {error}"
            self._inbox.put(partial(self._adapter_failed, version, reason))
        else:
            self._inbox.put(partial(self._fetched, version, adapter, self._clock() - started))

    def _copy(self, version: Version, slot: int, adapter: HostAdapter) -> None:
        """On the loader thread."""
        started = self._clock()
        try:
            prepared = self._runner.prepare_adapter(adapter)
        except AdapterError as error:
            self._inbox.put(partial(self._adapter_failed, version, _explain(version.ref, error)))
        except Exception as error:
            log.exception("adapter_failed", adapter=version.ref.name)
            reason = f"The adapter {version.ref.name!r} cannot be loaded: {type(error).__name__}: {error}"
            self._inbox.put(partial(self._adapter_failed, version, reason))
        else:
            self.metrics.load_seconds.labels(AdapterTier.DEVICE).observe(self._clock() - started)
            self._inbox.put(partial(self._copied, version, slot, prepared))

    def _fetched(self, version: Version, adapter: HostAdapter, seconds: float) -> None:
        self.metrics.load_seconds.labels(AdapterTier.HOST).observe(seconds)
        self._host[version] = adapter
        log.info(
            "adapter_fetched",
            adapter=version.ref.name,
            digest=adapter.digest[:12],
            ms=round(seconds * 1e3, 1),
        )
        device_bytes = self._device_bytes(adapter)
        self.residency.fetched(
            version, adapter.digest, adapter.num_bytes, device_bytes, self._clock(), adapter.rank
        )

    def _copied(self, version: Version, slot: int, prepared: Any) -> None:
        try:
            self._runner.install_adapter(slot, prepared)
        except Exception as error:
            log.exception("adapter_failed", adapter=version.ref.name, slot=slot)
            self._empty(version, slot)
            reason = f"The adapter {version.ref.name!r} cannot be loaded: {type(error).__name__}: {error}"
            self._adapter_failed(version, reason)
        else:
            self.residency.copied(version)

    def _empty(self, version: Version, slot: int) -> None:
        try:
            self._runner.remove_adapter(slot)
        except Exception:
            log.exception("slot_not_emptied", adapter=version.ref.name, slot=slot)

    def _adapter_failed(self, version: Version, reason: str) -> None:
        log.warning("adapter_refused", adapter=version.ref.name, reason=reason)
        self._host.pop(version, None)
        self.residency.failed(version, reason, self._clock())

    def _send(self) -> None:
        """Hand over what has gathered."""
        if self._outbox:
            outbox, self._outbox = self._outbox, {}
            self._deliver(outbox)

    def _stop(self) -> None:
        for sequence in list(self._sequences.values()):
            self._reject(sequence, RejectCode.UNAVAILABLE, "The engine is shutting down.")
        self._stopping = True


def _embedding(sequence: Sequence) -> bytes | None:
    """What was pooled, made a vector of length 1: whether it was a sum or a mean makes no difference then."""
    if sequence.pooled is None:
        return None
    pooled_H = sequence.pooled.astype("<f4")
    return (pooled_H / max(float(np.linalg.norm(pooled_H)), 1e-12)).astype("<f4").tobytes()


def _out_of_range(sampling: SamplingParams) -> str | None:
    """What of it cannot be computed, or None. One bad row would fail the step of everybody in its batch."""
    # NaN fails every comparison.
    within = {
        "max_tokens": sampling.max_tokens >= 1,
        "temperature": 0 <= sampling.temperature <= LARGEST_WEIGHT,
        "top_p": 0 < sampling.top_p <= 1,
        "min_p": 0 <= sampling.min_p <= 1,
        "repetition_penalty": 1 / LARGEST_WEIGHT <= sampling.repetition_penalty <= LARGEST_WEIGHT,
        "frequency_penalty": abs(sampling.frequency_penalty) <= LARGEST_WEIGHT,
        "presence_penalty": abs(sampling.presence_penalty) <= LARGEST_WEIGHT,
        "logit_bias": all(abs(bias) <= LARGEST_WEIGHT for bias in sampling.logit_bias.values()),
        "logprobs": sampling.logprobs is None or sampling.logprobs >= 0,
        "prompt_logprobs": sampling.prompt_logprobs is None or sampling.prompt_logprobs >= 0,
    }
    wrong = [f"{key} ({getattr(sampling, key)})" for key, fine in within.items() if not fine]
    return f"Out of range: {', '.join(wrong)}." if wrong else None


def _with_computable_top_p(request: Generate) -> Generate:
    """A vanishing top-p is said as what it means: the likeliest token."""
    if request.sampling.top_p >= SMALLEST_TOP_P:
        return request
    greedy = msgspec.structs.replace(request.sampling, temperature=0.0, top_p=1.0)
    return msgspec.structs.replace(request, sampling=greedy)


def _explain(ref: AdapterRef, error: AdapterError) -> str:
    """The reason for people who use the API: which file, but not where this machine keeps it."""
    reason = str(error)
    for each in [part.ref for part in ref.parts] or [ref]:
        reason = reason.replace(each.uri.removeprefix("file://").rstrip("/") + "/", "")
    return f"The adapter {ref.name!r} cannot be used: {reason}"
