"""The compiled kernels' cache: whatever state it is in, the engine gets kernels it can trust, or a reason."""

import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from engine.kernels import library
from engine.kernels.library import CompileError, load_library


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    """Where libraries of a source that compiles at once are cached."""
    if not shutil.which("cc"):
        pytest.skip("no C compiler")
    source = tmp_path / "small.c"
    source.write_text("int answer(void) { return 42; }\n")
    monkeypatch.setattr(library, "SOURCES", [source])
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("CC", raising=False)
    return tmp_path / "cache" / "loraland"


def test_a_library_is_compiled_once(cache, monkeypatch):
    assert load_library().answer() == 42
    assert [path.suffix for path in cache.iterdir()] == [".so"]
    monkeypatch.setattr(library, "_build", None)
    assert load_library().answer() == 42


def test_starts_at_the_same_time_leave_one_whole_library(cache):
    with ThreadPoolExecutor() as threads:
        loaded = list(threads.map(lambda _: load_library(), range(4)))
    assert [each.answer() for each in loaded] == [42] * 4
    assert [path.suffix for path in cache.iterdir()] == [".so"]


def another_cache(cache: Path, monkeypatch) -> Path:
    """The path of the same library in a second cache, where this process has loaded nothing yet."""
    load_library()
    (cached,) = cache.iterdir()
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache.parent.with_name("other")))
    other = cache.parent.with_name("other") / "loraland"
    other.mkdir(parents=True)
    return other / cached.name


@pytest.mark.parametrize("content", [b"", b"not a library"])
def test_a_broken_file_in_the_cache_is_replaced(cache, monkeypatch, content):
    cached = another_cache(cache, monkeypatch)
    cached.write_bytes(content)
    assert load_library().answer() == 42
    assert cached.read_bytes().startswith(b"\x7fELF")


@pytest.mark.parametrize(("mode", "answer"), [(0o755, 666), (0o777, 42)])
def test_a_library_that_anybody_could_have_put_there_is_not_loaded(cache, monkeypatch, mode, answer):
    cached = another_cache(cache, monkeypatch)
    source = library.SOURCES[0].with_name("planted.c")
    source.write_text("int answer(void) { return 666; }\n")
    subprocess.run(["cc", "-shared", "-fPIC", "-o", cached, source], check=True)
    cached.parent.chmod(mode)
    assert load_library().answer() == answer


def test_without_a_folder_for_the_cache_they_are_compiled_at_every_start(cache, monkeypatch):
    cache.parent.write_text("a file where the folder should be")
    assert load_library().answer() == 42

    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", no_home)
    assert load_library().answer() == 42


def test_a_compiler_that_fails_is_quoted(cache, monkeypatch):
    library.SOURCES[0].write_text("int answer(void) { return forty_two; }\n")
    with pytest.raises(CompileError, match="forty_two"):
        load_library()
    monkeypatch.setenv("CC", "no-such-compiler -m64")
    with pytest.raises(CompileError, match="no-such-compiler"):
        load_library()
