"""The paper's serving figures as far as they are known, each with where it was seen. Knows no run.

The paper is LoRA Land (arXiv 2405.00732): 25 fine-tuned Mistral-7B adapters on one A100. Its tables could not be read;
these figures come from one reader's research note that cites it, and nobody checked them against the paper.
"""

import msgspec


class PaperFigure(msgspec.Struct, frozen=True, kw_only=True):
    """One figure of the paper; a time in ms."""

    what: str
    figure: str
    source: str


SECOND_HAND = "second-hand: one reader's note on the paper"

PAPER_FIGURES = (
    PaperFigure(what="TTFT, average: 25 adapters, 50 users", figure="153.89 ms", source=SECOND_HAND),
    PaperFigure(
        what="total request time, average: 25 adapters, 50 users", figure="3,336 ms", source=SECOND_HAND
    ),
    PaperFigure(
        what="total request time, added by many adapters under load", figure="7.21 ms", source=SECOND_HAND
    ),
    PaperFigure(what="TTFT, bound", figure="about 200 ms", source=SECOND_HAND),
    PaperFigure(
        what="time per generated token (one stream, low load)", figure="12–13.5 ms", source=SECOND_HAND
    ),
)
