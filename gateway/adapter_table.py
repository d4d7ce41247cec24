"""How the terminal shows where adapters stand. Knows no engine and no HTTP."""

from collections.abc import Iterator

from rich.console import Group
from rich.table import Table
from rich.text import Text

from engine.protocol import AdapterStatus
from gateway.adapter_list import AdapterList, ModelAdapters

_STYLES = {"resident": "green", "failed": "red", "on_host": "", "wanted": "yellow", "fetching": "yellow"}
_NAMES = {"on_host": "in memory", "copying": "loading", "fetching": "loading", "wanted": "waiting"}


def adapter_table(found: AdapterList, *, every: bool) -> Group:
    """For the terminal. `every` lists also the adapters that their engine knows nothing of."""
    return Group(*(part for model in found.models for part in _of_model(model, every)))


def _of_model(model: ModelAdapters, every: bool) -> Iterator[Table | Text]:
    report = model.engine
    if report is None:
        yield Text(f"{model.model}: the engine does not answer\n", style="red")
        return
    yield Text(
        f"{model.model}: {report.slots_used} of {report.slots} slots, "
        f"{_mib(report.device_bytes)} of {_mib(report.device_budget_bytes)} MiB on the device, "
        f"{_mib(report.host_bytes)} of {_mib(report.host_budget_bytes)} MiB in memory, "
        f"{report.evictions} evictions",
        style="bold",
    )
    table = Table(box=None, header_style="dim", pad_edge=False)
    for heading in ("adapter", "state"):
        table.add_column(heading, overflow="fold")
    for heading in ("rank", "MiB", "running", "waiting", "used", "slot"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("digest", no_wrap=True)
    for adapter in report.adapters:
        table.add_row(*_cells(adapter, model.model))
    for name in model.unloaded if every else ():
        table.add_row(_short(name, model.model), Text("not loaded", style="dim"))
    if table.row_count:
        yield table
    for adapter in report.adapters:
        if adapter.reason:
            yield Text(f"{_short(adapter.name, model.model)}: {adapter.reason}", style="red")
    if model.unloaded and not every:
        yield Text(f"{len(model.unloaded)} more are not loaded; --all lists them", style="dim")
    yield Text("")


def _cells(adapter: AdapterStatus, model: str) -> list[str | Text]:
    state = _NAMES.get(adapter.state, adapter.state) + (", pinned" if adapter.pinned else "")
    return [
        _short(adapter.name, model),
        Text(state, style=_STYLES.get(adapter.state, "")),
        str(adapter.rank or ""),
        _mib(adapter.device_bytes or adapter.host_bytes)
        if adapter.device_bytes or adapter.host_bytes
        else "",
        str(adapter.running or ""),
        str(adapter.waiting or ""),
        _ago(adapter.used_s_ago),
        "" if adapter.slot is None else str(adapter.slot),
        adapter.digest,
    ]


def _short(name: str, model: str) -> str:
    return name.removeprefix(f"{model}/")


def _mib(num_bytes: int) -> str:
    mib = num_bytes / 2**20
    return f"{mib:.0f}" if mib >= 10 or mib == int(mib) else f"{mib:.1f}"


def _ago(seconds: float) -> str:
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{seconds / length:.0f} {unit} ago"
    return f"{seconds:.0f} s ago"
