"""The plots of a run, as SVG to stand inside a page of either brightness. Knows figures and rows, no page."""

import io
from collections.abc import Callable, Sequence
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from loadtest.metrics import StageFigures

COLOURS = ("#3d7edb", "#e0792b", "#2b9c74", "#a663cc", "#cc4a63", "#7d8f2e", "#3aa0b5", "#9a7b5b")
"""By adapter choice, in the order of the run; each legible on white and on near-black."""
_MARKERS = "os^DvPX*"
_INK = "#010203"
"""Stands for the page's text colour; replaced by `currentColor` in the SVG."""
_SIZE_INCHES = (4.2, 2.9)
_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "loadtest",
    "font.family": "sans-serif",
    "font.size": 10.5,
    "axes.titlesize": 11.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.edgecolor": _INK,
    "axes.labelcolor": _INK,
    "axes.titlecolor": _INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "grid.color": _INK,
    "grid.alpha": 0.14,
    "grid.linewidth": 0.8,
    "text.color": _INK,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "lines.linewidth": 1.8,
    "lines.markersize": 5,
}

Pick = Callable[[StageFigures], float | None]


def against_users(
    title: str, unit: str, figures: Sequence[StageFigures], solid: Pick, dashed: Pick | None = None
) -> str:
    """A line a choice of adapters over the number of users. `solid` and `dashed` pick the value of a stage."""

    def draw(axes: Axes) -> None:
        counts = sorted({stage.users for stage in figures})
        for number, mode in enumerate(modes(figures)):
            stages = [stage for stage in figures if stage.mode == mode]
            for pick, line in ((dashed, "--"), (solid, "-")):
                points = [(s.users, v) for s in stages if pick is not None and (v := pick(s)) is not None]
                if points:
                    axes.plot(
                        *zip(*points, strict=True),
                        line,
                        color=_colour(number),
                        marker=_MARKERS[number % len(_MARKERS)] if line == "-" else None,
                        alpha=1.0 if line == "-" else 0.65,
                    )
        if counts and counts[-1] > 16 * counts[0]:
            axes.set_xscale("log", base=2)
        axes.set_xticks(counts, [str(count) for count in counts])
        axes.minorticks_off()
        axes.set_ylim(0, axes.dataLim.ymax * 1.1 if axes.has_data() and axes.dataLim.ymax > 0 else 1)
        axes.set_xlabel("concurrent users")

    return _svg(title, unit, draw)


def cumulative(
    title: str,
    unit: str,
    samples: Sequence[tuple[str, Sequence[float]]],
    order: Sequence[str],
    of: str = "requests",
) -> str:
    """The share of requests (or of what `of` names) that took at most so long; a curve a choice of adapters."""

    def draw(axes: Axes) -> None:
        for mode, values in samples:
            ordered = sorted(values)
            if ordered:
                shares = [(number + 1) / len(ordered) for number in range(len(ordered))]
                axes.step(
                    [ordered[0], *ordered], [0.0, *shares], where="post", color=_colour(order.index(mode))
                )
        axes.set_ylim(0, 1.02)
        axes.set_yticks([0, 0.25, 0.5, 0.75, 0.9, 1], ["0", "25 %", "50 %", "75 %", "90 %", ""])
        axes.set_xlim(left=0)
        axes.set_xlabel(unit)

    return _svg(title, f"share of {of}", draw)


def modes(figures: Sequence[StageFigures]) -> list[str]:
    """The adapter choices in the order of the run; the index of each is that of its colour."""
    return list(dict.fromkeys(stage.mode for stage in figures))


def _colour(number: int) -> str:
    return COLOURS[number % len(COLOURS)]


def _svg(title: str, unit: str, draw: Callable[[Axes], None]) -> str:
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=_SIZE_INCHES, layout="constrained")
        axes = figure.add_subplot()
        draw(axes)
        axes.set_title(title)
        axes.set_ylabel(unit)
        target = io.StringIO()
        figure.savefig(target, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    svg = target.getvalue()
    return svg[svg.index("<svg") :].replace(_INK, "currentColor")
