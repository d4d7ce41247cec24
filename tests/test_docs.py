"""The documentation against the code: every key is in README.md, with the default that holds."""

import re
from pathlib import Path
from typing import Any

import msgspec
import pytest

from engine.config import EngineConfig
from engine.config import load_config as load_engine_config
from gateway.config import GatewayConfig, ModelConfig, UpstreamConfig, UpstreamModelConfig
from gateway.config import load_config as load_gateway_config
from scripts import api_tables

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
TABLES: dict[str, type[msgspec.Struct]] = {
    "### `[engine]`": EngineConfig,
    "### `[gateway]`": GatewayConfig,
    "### `[[gateway.models]]`": ModelConfig,
    "### `[[gateway.upstreams]]`": UpstreamConfig,
    "### `[[gateway.upstreams.models]]`": UpstreamModelConfig,
}
ELSEWHERE = {"models", "upstreams"}
"""Keys that have a section of their own."""


def documented(heading: str) -> dict[str, str]:
    """Key -> default, as the table under the heading has them; `–` for none."""
    section = README[README.index(heading) :].split("\n#", 1)[0]
    keys: dict[str, str] = {}
    for line in section.splitlines():
        cells = [cell.strip() for cell in line.split("|")[1:-1]]
        if len(cells) == 3 and cells[0].startswith("`"):
            names, defaults = cells[0].split(", "), cells[1].split(", ")
            if len(defaults) != len(names):
                defaults = [cells[1]]
            keys |= {
                name.strip("`"): default.strip("`") for name, default in zip(names, defaults, strict=True)
            }
    return keys


def defaults(config: type[msgspec.Struct]) -> dict[str, Any]:
    """Key -> default of a configuration; `–` for a key that must be given."""
    found: dict[str, Any] = {}
    for key in msgspec.structs.fields(config):
        if key.default is not msgspec.NODEFAULT:
            found[key.name] = key.default
        elif key.default_factory is not msgspec.NODEFAULT:
            found[key.name] = key.default_factory()
        else:
            found[key.name] = "–"
    return found


def as_toml(value: Any) -> str:
    match value:
        case "–":
            return "–"
        case bool():
            return str(value).lower()
        case str():
            return f'"{value}"'
        case list() | tuple():
            return f"[{', '.join(map(as_toml, value))}]"
        case _:
            return str(value)


@pytest.mark.parametrize("heading", TABLES)
def test_every_configuration_key_is_documented_with_its_default(heading: str):
    expected = {
        key: as_toml(value) for key, value in defaults(TABLES[heading]).items() if key not in ELSEWHERE
    }
    assert documented(heading) == expected


def test_the_demo_configuration_is_valid():
    engine = load_engine_config(ROOT / "scripts" / "loraland.toml")
    gateway = load_gateway_config(ROOT / "scripts" / "loraland.toml")
    assert [model.name for model in gateway.models] == [engine.name]
    assert gateway.models[0].engine == f"http://{engine.host}:{engine.port}"


def test_the_tables_of_the_api_are_those_of_the_code():
    assert api_tables.documented(README) == api_tables.tables(), "run: python -m scripts.api_tables"


@pytest.mark.parametrize("page", ["README.md", "ARCHITECTURE.md", "CHANGELOG.md"])
def test_every_link_into_the_repository_leads_somewhere(page: str):
    links = re.findall(r"\]\((?!https?://|#)([^)#]+)", (ROOT / page).read_text())
    assert [link for link in links if not (ROOT / link).exists()] == []


def test_every_file_in_the_architecture_exists():
    section = ""
    missing: list[str] = []
    for line in (ROOT / "ARCHITECTURE.md").read_text().splitlines():
        if line.startswith("#"):
            section = line.lstrip("# ").strip("/` ")
        elif line.startswith("| `"):
            names = re.findall(r"`([\w./]+)`", line.split("|")[1])
            missing += [name for name in names if not (ROOT / section / name).exists()]
    assert missing == []
