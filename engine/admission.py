"""Who may wait when the queue is full. Pure: no clock, no I/O.

The queue is bounded by requests and by prompt tokens. Where one flow fills it, a request of another must not be turned
away for that: the latest waiting request of the flow that holds the most gives up its place, as in fair queueing's
longest-queue drop (McKenney, 1990). A request of a better priority takes the place of a worse one.
"""

from collections import Counter
from collections.abc import Callable, Iterable

from engine.protocol import AdapterRef, Generate
from engine.sequence import Sequence


def make_room(
    newcomer: Generate, waiting: Iterable[Sequence], max_requests: int, max_tokens: int
) -> list[Sequence] | None:
    """The waiting sequences to refuse so that `newcomer` may wait; None when it is the one to be refused.

    Only sequences that have no token yet lose their place. A request that would wait alone is never too large.
    """
    left, refused = list(waiting), []
    for bound, weight in ((max_requests, _one), (max_tokens, _prompt_tokens)):
        while left and sum(weight(sequence.request) for sequence in left) + weight(newcomer) > bound:
            victim = _victim(newcomer, left, weight)
            if victim is None:
                return None
            left.remove(victim)
            refused.append(victim)
    return refused


def _victim(
    newcomer: Generate, waiting: list[Sequence], weight: Callable[[Generate], int]
) -> Sequence | None:
    """Whom to refuse instead, or None: nobody matters less, and no flow would still hold as much as the newcomer's."""
    held: Counter[tuple[str, AdapterRef | None]] = Counter()
    for sequence in waiting:
        held[_flow(sequence.request)] += weight(sequence.request)
    own = held[_flow(newcomer)] + weight(newcomer)
    eligible = [
        sequence
        for sequence in waiting
        if sequence.num_generated == 0
        and (
            sequence.request.priority > newcomer.priority
            or (
                sequence.request.priority == newcomer.priority
                and held[_flow(sequence.request)] - weight(sequence.request) >= own
            )
        )
    ]

    def least(sequence: Sequence) -> tuple[int, int, int]:
        return sequence.request.priority, held[_flow(sequence.request)], sequence.key

    return max(eligible, key=least, default=None)


def _flow(request: Generate) -> tuple[str, AdapterRef | None]:
    # By name, not by digest: the adapter of a waiting request may not be read yet.
    return request.tenant, request.adapter


def _one(request: Generate) -> int:
    return 1


def _prompt_tokens(request: Generate) -> int:
    return len(request.prompt)
