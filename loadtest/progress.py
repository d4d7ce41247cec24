"""One line a stage while a run goes on: live on a terminal, plain lines elsewhere. Knows no process."""

from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from loadtest.metrics import StageFigures
from loadtest.plan import RunPlan, Stage
from loadtest.record import RequestRow


class StageProgress:
    """`start`, any number of `count`, `finish`, for each stage in turn; a context manager around them all."""

    def __init__(self, console: Console, plan: RunPlan) -> None:
        self._console = console
        self._plan = plan
        self._live = console.is_terminal
        self._number = 0
        self._stage: Stage | None = None
        self._completed = 0
        self._failed = 0
        self._warm = 0
        self._task: TaskID | None = None
        self._bars = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=12),
            TimeElapsedColumn(),
            TextColumn("{task.fields[said]}", markup=False),
            console=console,
            disable=not self._live,
            transient=True,
        )

    def __enter__(self) -> "StageProgress":
        self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bars.stop()

    def start(self, stage: Stage) -> None:
        self._number += 1
        self._stage, self._completed, self._failed, self._warm = stage, 0, 0, 0
        if self._live:
            self._task = self._bars.add_task(self._title(), total=None, said="warming up")

    def count(self, row: RequestRow) -> None:
        if row.phase == "warmup":
            self._warm += 1
        else:
            self._completed += row.outcome == "completed"
            self._failed += row.outcome == "failed"
        if self._task is not None:
            self._bars.update(self._task, said=self._count_text())

    def finish(self, figures: StageFigures) -> None:
        if self._task is not None:
            self._bars.remove_task(self._task)
            self._task = None
        said = f"{figures.measured} requests measured, {figures.failed} failed"
        if figures.ttft.average is not None:
            said += f", TTFT {figures.ttft.average * 1000:,.0f} ms"
        if figures.output_rate is not None:
            said += f", {figures.output_rate:,.1f} tok/s"
        self._console.print(f"{self._title()}: {said}", markup=False, highlight=False)
        self._stage = None

    def _title(self) -> str:
        title = self._stage.title if self._stage else ""
        return f"[{self._number}/{len(self._plan.stages)}] {title}"

    def _count_text(self) -> str:
        if not self._completed and not self._failed:
            return f"warming up, {self._warm}"
        return f"{self._completed} requests, {self._failed} failed"
