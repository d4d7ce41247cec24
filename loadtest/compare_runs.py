"""`loraland loadtest compare A B …`: reads finished runs, prints them side by side, fails on a regression."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import msgspec
import typer
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from loadtest.record import ROWS_FILE, RUN_FILE, read_rows, read_run
from loadtest.run_comparison import (
    THRESHOLD,
    Cell,
    Line,
    MeasuredRun,
    RunComparison,
    Verdict,
    compare_runs,
)

EXIT_REGRESSION = 1
EXIT_USAGE = 2
NOTHING = "–"
_MARKS = {Verdict.worse: "worse", Verdict.better: "better", Verdict.unsure: "unsure"}
_STYLES = {Verdict.worse: "bold red", Verdict.better: "green", Verdict.unsure: "yellow"}

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)


@app.command()
def compare(
    runs: Annotated[
        list[Path],
        typer.Argument(help="Directories of finished runs (or their run.json); the first is the measure."),
    ],
    threshold: Annotated[
        float, typer.Option(min=0.0, help="Worse by more than this part is a regression: 0.1 is 10 %.")
    ] = THRESHOLD,
    figure: Annotated[
        list[str] | None,
        typer.Option(
            help="Judge and show only figures whose name begins so (TTFT, total, throughput); repeatable."
        ),
    ] = None,
    markdown: Annotated[
        Path | None, typer.Option(help="Write the table here as Markdown.", dir_okay=False)
    ] = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write everything here as JSON.", dir_okay=False)
    ] = None,
) -> None:
    """Put load-test runs side by side: figures, ratios to the first, 95 % intervals of the ratios.

    Exit code 0: no regression; 1: a figure is worse by more than the threshold and by more than chance, or more
    requests failed; 2: the runs cannot be compared.
    """
    console = Console(width=None if sys.stdout.isatty() else 160)
    try:
        comparison = compare_runs(read_runs(runs), threshold)
    except (OSError, ValueError, msgspec.DecodeError) as error:
        console.print(f"error: {error}", style="red", markup=False, highlight=False)
        raise typer.Exit(EXIT_USAGE) from None
    if figure:
        wanted = tuple(name.casefold() for name in figure)
        kept = tuple(line for line in comparison.lines if line.figure.casefold().startswith(wanted))
        comparison = msgspec.structs.replace(comparison, lines=kept)
    if not comparison.lines:
        console.print("error: the runs have no stage and figure in common", style="red", highlight=False)
        raise typer.Exit(EXIT_USAGE)
    console.print(comparison_table(comparison))
    for said in comparison.differences:
        console.print(f"note: {said}", style="yellow", markup=False, highlight=False)
    for name, line, cell in comparison.regressions:
        said = f"regression: {name}, {line.stage}: {line.figure} {_value(line, cell)}{_beside(cell)}"
        console.print(said, style="bold red", markup=False, highlight=False)
    if not comparison.regressions:
        console.print(
            f"No figure is worse by more than {threshold:.0%} and by more than chance.", highlight=False
        )
    try:
        if markdown:
            markdown.write_text(as_markdown(comparison), encoding="utf-8")
        if json_file:
            json_file.write_bytes(msgspec.json.format(msgspec.json.encode(comparison), indent=1) + b"\n")
    except OSError as error:
        console.print(f"error: {error}", style="red", markup=False, highlight=False)
        raise typer.Exit(EXIT_USAGE) from None
    raise typer.Exit(EXIT_REGRESSION if comparison.regressions else 0)


def read_runs(paths: Sequence[Path]) -> list[MeasuredRun]:
    """The runs of these directories or `run.json` files, each under the shortest name that tells it from the others.

    Raises OSError, msgspec.DecodeError, or ValueError for the same run twice.
    """
    directories = [path.parent if path.name == RUN_FILE else path for path in paths]
    if len({directory.resolve() for directory in directories}) < len(directories):
        raise ValueError("the same run is named twice")
    read: list[MeasuredRun] = []
    for directory, name in zip(directories, _short_names(directories), strict=True):
        rows = read_rows((directory / ROWS_FILE).read_bytes().splitlines())
        read.append(MeasuredRun(name=name, record=read_run(directory), rows=rows))
    return read


def comparison_table(comparison: RunComparison) -> Table:
    """A section a stage, a line a figure, a column a run."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("stage", no_wrap=True)
    table.add_column("figure", no_wrap=True)
    for name in comparison.names:
        table.add_column(name, justify="right")
    last: str | None = None
    for line in comparison.lines:
        if last not in (None, line.stage):
            table.add_section()
        shown = [
            Text(f"{_value(line, cell)}{_beside(cell)}", style=_STYLES.get(cell.verdict, ""))
            for cell in line.cells
        ]
        table.add_row("" if line.stage == last else line.stage, f"{line.figure}, {_unit(line)}", *shown)
        last = line.stage
    return table


def as_markdown(comparison: RunComparison) -> str:
    """The same table for a pull request, what differed, and the verdict."""
    heads = ["stage", "figure", *(_cell_text(name) for name in comparison.names)]
    lines = [_row(heads), _row(["---", "---", *("--:" for _ in comparison.names)])]
    for line in comparison.lines:
        cells = [_value(line, cell) + _beside(cell) for cell in line.cells]
        bold = [
            f"**{text}**" if cell.verdict is Verdict.worse else text
            for text, cell in zip(cells, line.cells, strict=True)
        ]
        lines.append(_row([_cell_text(line.stage), f"{line.figure}, {_unit(line)}", *bold]))
    lines.append("")
    lines.append(
        f"Ratios are to {comparison.names[0]}, with 95 % intervals; worse and better: by more than "
        f"{comparison.threshold:.0%}, and the interval leaves 1 out. Regressions: {len(comparison.regressions)}."
    )
    lines += [f"- {said}" for said in comparison.differences]
    return "\n".join(lines) + "\n"


def _value(line: Line, cell: Cell) -> str:
    if cell.value is None:
        return NOTHING
    if line.unit == "share":
        return f"{cell.value:.1%}"
    value = cell.value * 1000 if line.unit == "s" else cell.value
    return f"{value:,.1f}" if value < 1000 else f"{value:,.0f}"


def _beside(cell: Cell) -> str:
    if cell.ratio is None:
        return f" {_MARKS[cell.verdict]}" if cell.verdict in _MARKS else ""
    between = ""
    if cell.interval and cell.interval.low is not None and cell.interval.high is not None:
        between = f" ({cell.interval.low:.2f}–{cell.interval.high:.2f})"
    mark = f" {_MARKS[cell.verdict]}" if cell.verdict in _MARKS else ""
    return f" ×{cell.ratio:.2f}{between}{mark}"


def _unit(line: Line) -> str:
    return {"s": "ms", "share": "of all"}.get(line.unit, line.unit)


def _short_names(directories: Sequence[Path]) -> list[str]:
    parts = [directory.resolve().parts for directory in directories]
    for length in range(1, max(map(len, parts)) + 1):
        names = ["/".join(part[-length:]) for part in parts]
        if len(set(names)) == len(names):
            return names
    raise AssertionError("different paths have different names")


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _cell_text(text: str) -> str:
    return text.replace("|", "\\|")


def main() -> None:
    app(prog_name="loraland loadtest compare")


if __name__ == "__main__":
    main()
