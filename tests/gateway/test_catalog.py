"""Names become adapters by table and templates; nothing outside them can be reached."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.protocol import AdapterRef
from gateway.catalog import Catalog, is_safe_name
from gateway.config import ModelConfig


def put(directory: Path) -> Path:
    directory.mkdir(parents=True)
    (directory / "adapter_config.json").write_text("{}")
    return directory


def catalog(*templates: str, table: dict[str, str] | None = None) -> Catalog:
    return Catalog(ModelConfig(name="org/base", engine="http://e", adapters=templates, table=table or {}))


def test_the_first_template_with_the_adapter_wins(tmp_path: Path) -> None:
    put(tmp_path / "b" / "task")
    adapters = catalog(f"{tmp_path}/a/{{task}}", f"{tmp_path}/b/{{task}}")
    assert adapters.find("task") == AdapterRef("org/base/task", f"{tmp_path}/b/task")
    put(tmp_path / "a" / "task")
    assert adapters.find("task") == AdapterRef("org/base/task", f"{tmp_path}/a/task")


def test_the_table_goes_before_templates(tmp_path: Path) -> None:
    put(tmp_path / "a" / "task")
    elsewhere = put(tmp_path / "elsewhere")
    adapters = catalog(
        f"{tmp_path}/a/{{task}}", table={"task": str(elsewhere), "gone": str(tmp_path / "gone")}
    )
    assert adapters.find("task") == AdapterRef("org/base/task", str(elsewhere))
    assert adapters.find("gone") is None
    assert [adapter.task for adapter in adapters.listed()] == ["task"]


def test_uris_are_passed_on_unseen_and_unlisted(tmp_path: Path) -> None:
    adapters = catalog("hf://org/lora-{task}", table={"one": "s3://bucket/one"})
    assert adapters.find("one") == AdapterRef("org/base/one", "s3://bucket/one")
    assert adapters.find("a b?") == AdapterRef("org/base/a b?", "hf://org/lora-a%20b%3F")
    assert adapters.listed() == []


def test_listing_finds_what_fits_the_template_and_is_an_adapter(tmp_path: Path) -> None:
    put(tmp_path / "lora-x" / "final")
    put(tmp_path / "lora-y" / "final")
    put(tmp_path / "other" / "final")
    put(tmp_path / "lora-")
    (tmp_path / "lora-empty" / "final").mkdir(parents=True)
    (tmp_path / "lora-file").write_text("")
    adapters = catalog(f"{tmp_path}/lora-{{task}}/final", f"{tmp_path}/absent/{{task}}")
    assert [adapter.task for adapter in adapters.listed()] == ["x", "y"]
    assert all(adapters.find(adapter.task) for adapter in adapters.listed())


def test_a_directory_without_adapter_config_is_no_adapter(tmp_path: Path) -> None:
    (tmp_path / "half").mkdir()
    adapters = catalog(f"{tmp_path}/{{task}}")
    assert adapters.find("half") is None
    assert adapters.listed() == []


def test_hidden_directories_are_not_served(tmp_path: Path) -> None:
    put(tmp_path / ".tmp-upload")
    adapters = catalog(f"{tmp_path}/{{task}}")
    assert adapters.find(".tmp-upload") is None
    assert adapters.listed() == []


@pytest.mark.parametrize(
    "name", ["", ".", "..", "../x", "a/b", "a\\b", "a\0b", "a\nb", ".hidden", "x" * 300, "\ud800"]
)
def test_unsafe_names_are_no_names(name: str) -> None:
    assert not is_safe_name(name)


@given(st.text(max_size=300))
def test_no_name_leaves_the_directory(name: str) -> None:
    found = catalog("/nonexistent/{task}").find(name)
    assert found is None
    if is_safe_name(name):
        assert (Path("/root") / name).resolve().parent == Path("/root").resolve()


def test_an_entry_of_the_table_may_pin_its_weights(tmp_path: Path) -> None:
    place = put(tmp_path / "a")
    table = {"local": f"{place}#sha256=ab", "remote": "hf://org/repo@v1#sha256=cd", "plain": str(place)}
    pinned = catalog(table=table)
    found = {task: pinned.find(task) for task in table}
    assert {task: (ref.uri, ref.sha256) for task, ref in found.items() if ref} == {
        "local": (str(place), "ab"),
        "remote": ("hf://org/repo@v1", "cd"),
        "plain": (str(place), None),
    }
    assert [adapter.task for adapter in pinned.listed()] == ["local", "plain"]
