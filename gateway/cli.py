"""The `loraland` command. Starts programs and asks a running gateway; imports neither torch nor the gateway's parts."""

import asyncio
import importlib.util
import json
import os
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any, NoReturn

import msgspec
import typer
from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from gateway.adapter_list import AdapterList
from gateway.adapter_table import adapter_table
from gateway.supervisor import Program, Supervisor

EXIT_USAGE = 2
WATCH_S = 2.0
_REQUIREMENTS = {
    "engine": ("torch", "numpy", "safetensors", "gguf", "tokenizers"),
    "gateway": ("litestar", "tokenizers", "jinja2", "uvicorn"),
    "loadtest": ("locust", "matplotlib", "numpy", "psutil"),
    "tuning": ("rouge_score",),
}
_PASS_ON = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}
"""For commands whose options another program reads."""

app = typer.Typer(
    name="loraland",
    help="Serve one base model and any number of LoRA adapters behind one OpenAI-compatible address.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

ConfigOption = Annotated[
    Path | None,
    typer.Option("--config", "-c", help="TOML file; else ./loraland.toml, else scripts/loraland.toml."),
]
HostOption = Annotated[str | None, typer.Option(help="Address to listen on, instead of the file's.")]
PortOption = Annotated[
    int | None, typer.Option(min=0, max=65535, help="Port to listen on, instead of the file's.")
]
EngineUrlOption = Annotated[
    str | None, typer.Option("--engine", help="The engine's address, instead of the file's (one model only).")
]
UrlOption = Annotated[
    str, typer.Option(envvar="LORALAND_URL", help="Address of the gateway, with or without /v1.")
]
FakeOption = Annotated[
    bool,
    typer.Option("--fake", help="An engine without a model that makes up its answers, for trying things."),
]


@app.command()
def serve(
    config: ConfigOption = None,
    host: HostOption = None,
    port: PortOption = None,
    engine_port: Annotated[
        int | None, typer.Option(min=1, max=65535, help="Port of the engine, instead of the file's.")
    ] = None,
    fake: FakeOption = False,
) -> None:
    """Run the engine and the gateway on this machine until Ctrl-C.

    When one of the two ends, the other is stopped and the exit code is 1.
    """
    _require("gateway", "engine")
    path = _find_config(config)
    moved = ["--engine", f"http://127.0.0.1:{engine_port}"] if engine_port else []
    engine_command = _command("engine", path, None, engine_port, *(["--fake"] if fake else []))
    gateway_command = _command("gateway", path, host, port, *moved, "--log-format", "console")
    programs = [Program("engine", engine_command), Program("gateway", gateway_command)]
    raise typer.Exit(asyncio.run(Supervisor(programs, _show_line).run()))


@app.command()
def engine(
    config: ConfigOption = None, host: HostOption = None, port: PortOption = None, fake: FakeOption = False
) -> None:
    """Run one engine: the model and its adapters, on this machine's processors."""
    _require("engine")
    _become(_command("engine", _find_config(config), host, port, *(["--fake"] if fake else [])))


@app.command()
def gateway(
    config: ConfigOption = None,
    host: HostOption = None,
    port: PortOption = None,
    engine_url: EngineUrlOption = None,
) -> None:
    """Run one gateway: the OpenAI-compatible API in front of one or more engines."""
    _require("gateway")
    extra = ["--engine", engine_url] if engine_url else []
    _become(_command("gateway", _find_config(config), host, port, *extra))


@app.command()
def models(url: UrlOption = "http://127.0.0.1:8000") -> None:
    """List what a running gateway serves."""
    table = Table("model", "base", "from", box=None, header_style="bold")
    with _open(f"{_v1(url)}/models") as answer:
        listed = json.load(answer)["data"]
    for model in listed:
        table.add_row(model["id"], model.get("parent") or "", model.get("root") or "")
    Console(width=None if sys.stdout.isatty() else 200).print(table)


@app.command()
def adapters(
    url: UrlOption = "http://127.0.0.1:8000",
    every: Annotated[
        bool, typer.Option("--all", "-a", help="Also the adapters that no engine has loaded.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="What the gateway said, for programs.")] = False,
    watch: Annotated[bool, typer.Option("--watch", "-w", help="Look again every two seconds.")] = False,
) -> None:
    """Show where every adapter stands: loaded, waited for, failed; its memory and who uses it."""
    console = Console(width=None if sys.stdout.isatty() else 200)

    def look() -> bytes:
        with _open(f"{_v1(url).removesuffix('/v1')}/adapters") as answer:
            return answer.read()

    def show() -> Group:
        return adapter_table(msgspec.json.decode(look(), type=AdapterList), every=every)

    if as_json:
        typer.echo(msgspec.json.format(look(), indent=2))
    elif not watch:
        console.print(show())
    else:
        with suppress(KeyboardInterrupt), Live(show(), console=console, auto_refresh=False) as live:
            while True:
                time.sleep(WATCH_S)
                live.update(show(), refresh=True)


@app.command()
def chat(
    model: Annotated[str, typer.Argument(help="A base model, or <base>/<adapter>.")],
    question: Annotated[str, typer.Argument(help="What to say; - reads standard input.")],
    system: Annotated[
        str | None, typer.Option(help="System message: what the adapter was trained with.")
    ] = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="Longest answer.")] = 256,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 takes the likeliest token.")] = 0.0,
    url: UrlOption = "http://127.0.0.1:8000",
) -> None:
    """Ask one question and print the answer as it comes."""
    messages = [{"role": "system", "content": system}] if system else []
    messages.append({"role": "user", "content": sys.stdin.read() if question == "-" else question})
    body = {
        "model": model,
        "messages": messages,
        "stream": True,
        "max_tokens": max_tokens,
        "temperature": temperature,
    }
    with _open(f"{_v1(url)}/chat/completions", body) as answer:
        for event in _events(answer):
            if error := event.get("error"):
                raise _failure(error["message"])
            for choice in event["choices"]:
                typer.echo(choice["delta"].get("content") or "", nl=False)
                sys.stdout.flush()
    typer.echo()


@app.command(context_settings=_PASS_ON)
def loadtest(context: typer.Context) -> None:
    """Load a server with users and report the latency they got.

    `loadtest run NAME` runs an experiment by name, `loadtest compare A B` puts runs side by side.
    """
    _require("loadtest")
    module, arguments = "loadtest", context.args
    if arguments[:1] == ["compare"]:
        module, arguments = "loadtest.compare_runs", arguments[1:]
    elif arguments[:1] == ["run"]:
        module, arguments = "loadtest.run_experiment", arguments[1:]
    _become((sys.executable, "-m", module, *arguments))


@app.command(context_settings=_PASS_ON)
def compare(context: typer.Context) -> None:
    """Ask two models the same held-out examples: quality, latency and cost, side by side."""
    _require("loadtest", "tuning")
    _become((sys.executable, "-m", "loadtest.compare_models", *context.args))


def _find_config(given: Path | None) -> Path:
    here = Path("loraland.toml"), Path("scripts/loraland.toml")
    checkout = Path(__file__).parent.parent / "scripts" / "loraland.toml"
    for path in [given] if given else [*here, checkout]:
        if path.is_file():
            return path
    if given:
        raise _failure(f"There is no file {given}.")
    raise _failure("There is neither ./loraland.toml nor scripts/loraland.toml: name a file with --config.")


def _command(package: str, config: Path, host: str | None, port: int | None, *extra: str) -> tuple[str, ...]:
    command = [sys.executable, "-m", package, "--config", str(config)]
    if host is not None:
        command += ["--host", host]
    if port is not None:
        command += ["--port", str(port)]
    return (*command, *extra)


def _require(*extras: str) -> None:
    """End with an explanation when the packages of one of these extras are not installed."""
    for extra in extras:
        missing = [name for name in _REQUIREMENTS[extra] if importlib.util.find_spec(name) is None]
        if missing:
            raise _failure(
                f"The {extra} needs {', '.join(missing)}. In a checkout of this project: pip install '.[{extra}]'"
            )


def _become(command: tuple[str, ...]) -> NoReturn:
    os.execv(command[0], command)


_COLOURS = {"engine": "cyan", "gateway": "green", "serve": "bold"}
_output = Console(soft_wrap=True, highlight=False)


def _show_line(name: str, line: str) -> None:
    _output.print(Text(f"{name:>7} │ ", style=_COLOURS.get(name, "")), Text(line), sep="")


def _v1(url: str) -> str:
    return f"{url.rstrip('/').removesuffix('/v1')}/v1"


def _open(url: str, body: dict[str, Any] | None = None) -> Any:
    """The answer to a GET, or with a body to a POST; ends with the gateway's own message on an error."""
    if not url.startswith(("http://", "https://")):
        raise _failure(f"{url} is not an http:// address.")
    request = urllib.request.Request(
        url,
        data=None if body is None else json.dumps(body).encode(),
        headers={"Content-Type": "application/json"},
    )
    try:
        return urllib.request.urlopen(request, timeout=120)
    except urllib.error.HTTPError as error:
        text = error.read().decode(errors="replace")
        try:
            text = json.loads(text)["error"]["message"]
        except (ValueError, KeyError, TypeError):
            text = f"{error.code} {error.reason}: {text[:300]}"
        raise _failure(text) from None
    except OSError as error:
        reason = getattr(error, "reason", error)
        raise _failure(f"No gateway answers at {url} ({reason}). Start one with: loraland serve") from None


def _events(lines: Any) -> Iterator[dict[str, Any]]:
    """The JSON of every server-sent event up to `[DONE]`."""
    for line in lines:
        data = line.decode().removeprefix("data:").strip()
        if line.startswith(b"data:") and data != "[DONE]":
            yield json.loads(data)


def _failure(message: str) -> typer.Exit:
    typer.echo(message, err=True)
    return typer.Exit(EXIT_USAGE)


if __name__ == "__main__":
    app()
