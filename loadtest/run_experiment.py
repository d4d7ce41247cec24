"""`loraland loadtest run NAME`: an experiment's file → plan → run. Measures nothing itself."""

import os
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from loadtest.adapters import (
    Catalog,
    CatalogError,
    NoModelListError,
    choose_model,
    order_adapters,
    read_catalog,
)
from loadtest.experiment import Experiment, experiment_names, read_experiment
from loadtest.plan import RunPlan
from loadtest.run import EXIT_USAGE, execute, new_nonce, new_run_name

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)


@app.command()
def run(
    name: Annotated[str, typer.Argument(help="A packaged experiment, a path of a TOML file, or `list`.")],
    url: Annotated[str, typer.Option(help="The server, with or without /v1.")] = "http://127.0.0.1:8000",
    model: Annotated[
        str | None, typer.Option(help="Base model; the server's only one when left out.")
    ] = None,
    short: Annotated[
        bool,
        typer.Option("--short", help="The same shape for a small machine: seconds, few users, short texts."),
    ] = False,
    adapters: Annotated[
        list[str] | None, typer.Option(help="Only adapters that match this pattern; may be repeated.")
    ] = None,
    api_key_env: Annotated[
        str, typer.Option(help="Environment variable that holds the API key, if one is needed.")
    ] = "OPENAI_API_KEY",
    out: Annotated[
        Path | None, typer.Option(help="Directory for rows, run.json and report.html.", file_okay=False)
    ] = None,
    fail_on_error: Annotated[
        bool, typer.Option("--fail-on-error", help="Exit with 1 if any request failed.")
    ] = False,
) -> None:
    """Runs an experiment by name against an OpenAI-compatible server; `list` shows what there is."""
    console = Console(width=None if sys.stdout.isatty() else 132)
    if name == "list":
        for known in experiment_names():
            console.print(
                f"{known:22} {read_experiment(known).about}", markup=False, highlight=False, soft_wrap=True
            )
        return
    address = url.rstrip("/").removesuffix("/v1")
    try:
        experiment = read_experiment(name)
        catalog = _ask(address, os.environ.get(api_key_env), experiment, model)
        base = choose_model(catalog, model)
        offered = order_adapters(catalog.adapters.get(base, ()), adapters or ())
        if short:
            experiment = experiment.shortened(len(offered))
        stages = experiment.stages(base, offered)
    except CatalogError as error:
        console.print(f"error: {error}", style="red", markup=False, highlight=False)
        raise typer.Exit(EXIT_USAGE) from None
    plan = RunPlan(
        run=new_run_name(),
        base_url=address,
        endpoint=experiment.endpoint,
        model=base,
        stages=stages,
        stage_seconds=experiment.seconds,
        ramp_seconds=experiment.ramp_seconds,
        think_seconds=experiment.think_seconds,
        prompt_kind=experiment.prompts,
        prompt_tokens=experiment.input_tokens[0],
        prompt_tokens_most=experiment.input_tokens[1],
        max_tokens=experiment.output_tokens[1],
        max_tokens_least=experiment.output_tokens[0],
        shared_prefix_tokens=experiment.shared_prefix_tokens,
        ignore_eos=experiment.ignore_eos,
        warm_up=experiment.warm_up,
        arrivals=experiment.arrivals,
        limits=experiment.limits,
        experiment=name,
        api_key_env=api_key_env,
        seed=experiment.seed,
        nonce=new_nonce(),
    )
    raise typer.Exit(execute(plan, catalog, out, console, fail_on_error=fail_on_error))


def _ask(url: str, api_key: str | None, experiment: Experiment, model: str | None) -> Catalog:
    """The server's models. A server without a model list will do when the experiment needs none of it."""
    try:
        return read_catalog(url, api_key)
    except NoModelListError:
        if model is None or set(experiment.adapters) != {"base"}:
            raise
        return Catalog((), {}, None)


if __name__ == "__main__":
    app(prog_name="loraland loadtest run")
