"""The report: one self-contained file and a table, also of a run that went wrong."""

import re
from html.parser import HTMLParser
from pathlib import Path

import msgspec
from rich.console import Console

from loadtest.metrics import stage_figures
from loadtest.plan import Stage
from loadtest.record import ROWS_FILE, RequestRow, write_run
from loadtest.report import headline, print_report, results_table, rewrite, write_page
from tests.loadtest.rows import BASE, ended, record, row

ADAPTER = Stage(mode="1 adapter", users=2, models=("m/<script>a</script>",), adapters=1)
ENDS = (ended(), ended(30.0, 40.0, stage=1))
ROWS = [
    *(row(11.0 + n / 10, [12.0 + n / 10, 13.0 + n / 10]) for n in range(12)),
    *(row(31.0, [33.0, 35.0], mode="1 adapter", model=ADAPTER.models[0]) for _ in range(4)),
]
FIGURES = [stage_figures(BASE, ENDS[0], ROWS[:12]), stage_figures(ADAPTER, ENDS[1], ROWS[12:])]
RUN = record((BASE, ADAPTER), ENDS)


def table_text(rows: list[RequestRow] = ROWS) -> str:
    console = Console(width=132, record=True, quiet=False, file=None, force_terminal=False)
    with console.capture() as captured:
        console.print(results_table(FIGURES))
    return captured.get()


def test_table_has_averages_p90_and_ratios_to_the_base() -> None:
    lines = table_text().splitlines()
    base = next(line for line in lines if line.strip().startswith("base"))
    adapter = next(line for line in lines if line.strip().startswith("1 adapter"))
    assert "2,000 / 2,000" in base
    assert "1,000 / 1,000" in base
    assert "4,000 / –" in adapter, "four requests are too few for a p90"
    assert "×2.00" in adapter
    assert "×0.33" in adapter


def test_headline_compares_the_most_adapters_with_the_base() -> None:
    said = headline(FIGURES)
    assert said is not None
    assert said.startswith("1 adapter at 2 users: 1 output tokens/s, 0.33 times the base's 2")
    assert headline(FIGURES[:1]) is None


def test_page_is_one_well_formed_file_that_fetches_nothing(tmp_path: Path) -> None:
    html = write_page(tmp_path, RUN, ROWS, FIGURES).read_text()
    fetched = Fetches()
    fetched.feed(html)
    assert fetched.found == []
    assert "@import" not in html and "url(http" not in html
    assert fetched.svgs == 7
    assert "currentColor" in html and "prefers-color-scheme: dark" in html


def test_page_escapes_names_and_says_what_was_run(tmp_path: Path) -> None:
    html = write_page(tmp_path, RUN, ROWS, FIGURES).read_text()
    assert "<script" not in html
    assert "m/&lt;script&gt;a" in html
    for said in (
        "abacus",
        "<span>loadtest</span>",
        "http://example.test",
        "total request time",
        "closed loop",
    ):
        assert said in html


def test_page_says_how_sure_percentiles_are_and_where_the_papers_figures_come_from(tmp_path: Path) -> None:
    html = write_page(tmp_path, RUN, ROWS, FIGURES).read_text()
    assert "<td>1,000 (1,000 to 1,000)</td>" in html, "twelve requests bound the median from both ends"
    assert "153.89 ms" in html and "second-hand" in html


def test_page_shows_the_banner_when_the_client_was_the_bottleneck(tmp_path: Path) -> None:
    sound = [row(10.0, [10.1, 19.9])] * 2
    for share, shown in ((0.1, False), (0.95, True)):
        end = ended(client_cpu_share=share)
        page = write_page(tmp_path, record((BASE,), (end,)), sound, [stage_figures(BASE, end, sound)])
        assert ('class="banner"' in page.read_text()) is shown


def test_page_of_a_run_without_results_can_be_written(tmp_path: Path) -> None:
    broken = record((BASE,), (), trouble="out of memory")
    html = write_page(tmp_path, broken, [], []).read_text()
    assert "out of memory" in html
    end = ended()
    failed = [row(11.0, [], outcome="failed", done=None)]
    html = write_page(
        tmp_path, record((BASE,), (end,)), failed, [stage_figures(BASE, end, failed)]
    ).read_text()
    assert "1 failed" in html


def test_report_can_be_made_again_from_its_files(tmp_path: Path) -> None:
    write_run(tmp_path, RUN)
    (tmp_path / ROWS_FILE).write_bytes(b"".join(msgspec.json.encode(r) + b"\n" for r in ROWS))
    first = write_page(tmp_path, RUN, ROWS, FIGURES).read_text()
    console = Console(width=132)
    with console.capture() as captured:
        rewrite(tmp_path, console)
    assert (tmp_path / "report.html").read_text() == first
    assert "×2.00" in captured.get()


def test_terminal_report_names_what_is_wrong(tmp_path: Path) -> None:
    console = Console(width=132)
    with console.capture() as captured:
        print_report(console, record((BASE,), (), trouble="[odd] markup"), [], [], tmp_path / "report.html")
    assert "[odd] markup" in captured.get()
    assert re.search(r"report: .*report\.html", captured.get())


class Fetches(HTMLParser):
    """Everything in a page that a browser would load from elsewhere."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, str]] = []
        self.svgs = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.svgs += tag == "svg"
        for name, value in attrs:
            if name in ("src", "href", "xlink:href", "data") and value and not value.startswith("#"):
                self.found.append((tag, value))
