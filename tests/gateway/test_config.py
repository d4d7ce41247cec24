"""The `[gateway]` table: what it may hold, and clear words about what it may not."""

from pathlib import Path

import pytest

from gateway.__main__ import main
from gateway.config import ConfigError, load_config

GOOD = """
[engine]
anything = "of somebody else"
[gateway]
port = 0
[[gateway.models]]
name = "base"
engine = "http://127.0.0.1:8100/"
adapters = ["adapters/{task}", "/absolute/{task}", "hf://org/{task}"]
[gateway.models.table]
special = "../elsewhere"
far = "s3://bucket/far"
"""


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "loraland.toml"
    path.write_text(text)
    return path


def test_paths_are_relative_to_the_file(tmp_path: Path) -> None:
    (tmp_path / "etc").mkdir()
    model = load_config(write(tmp_path / "etc", GOOD)).models[0]
    assert model.engine == "http://127.0.0.1:8100"
    assert model.adapters == (f"{tmp_path}/etc/adapters/{{task}}", "/absolute/{task}", "hf://org/{task}")
    assert model.table == {"special": f"{tmp_path}/elsewhere", "far": "s3://bucket/far"}


def test_defaults_are_for_one_machine(tmp_path: Path) -> None:
    config = load_config(write(tmp_path, GOOD))
    assert (config.host, config.port, config.cors_allow_origins) == ("127.0.0.1", 0, ())


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", r"no \[gateway\] table"),
        ("[gateway", "gateway"),
        ("gateway = 1", "object"),
        ("[gateway]\nmodels = []", "at least one"),
        ("[gateway]", "models"),
        (GOOD.replace("port = 0", "prot = 0"), "prot"),
        (GOOD.replace("port = 0", "port = 70000"), "port"),
        (GOOD.replace("port = 0", 'port = "8000"'), "port"),
        (GOOD.replace("port = 0", "max_body_mib = -1"), "max_body_mib"),
        (GOOD.replace('engine = "http', 'engines = "http'), "engine"),
        (GOOD.replace("http://127.0.0.1:8100/", "127.0.0.1:8100"), "http://"),
        (GOOD.replace("/absolute/{task}", "/absolute"), "{task}"),
        (GOOD.replace('name = "base"', 'name = ""'), "name"),
        (GOOD + GOOD[GOOD.index("[[gateway") :], "twice"),
    ],
)
def test_a_mistake_is_named_with_its_file(tmp_path: Path, text: str, words: str) -> None:
    path = write(tmp_path, text)
    with pytest.raises(ConfigError, match=words) as caught:
        load_config(path)
    assert str(path) in str(caught.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nowhere\.toml"):
        load_config(tmp_path / "nowhere.toml")


@pytest.mark.parametrize(
    ("text", "extra", "words"),
    [
        ("", [], "loraland.toml"),
        (GOOD, ["--port", "70000"], "command line: port"),
        (GOOD, ["--engine", "nonsense"], "http://"),
        (
            GOOD + GOOD[GOOD.index("[[gateway") :].replace("base", "other"),
            ["--engine", "http://x"],
            "several models",
        ),
    ],
)
def test_the_program_ends_with_one_line_about_a_mistake(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str, extra: list[str], words: str
) -> None:
    assert main(["--config", str(write(tmp_path, text)), *extra]) == 2
    said = capsys.readouterr().err
    assert words in said
    assert said.count("\n") == 1
