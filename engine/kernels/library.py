"""cpu.c as a shared library of this machine: compiled with the system's C compiler, cached. Knows no tensors."""

import ctypes
import hashlib
import os
import platform
import shlex
import shutil
import stat
import subprocess
import tempfile
from pathlib import Path

import structlog

log = structlog.get_logger()

SOURCES = [Path(__file__).with_name(name) for name in ("cpu.c", "ops.c", "quant.c")]
FLAGS = [
    "-O3",
    "-march=native",
    "-mprefer-vector-width=512",
    "-ffp-contract=fast",
    "-fopenmp",
    "-shared",
    "-fPIC",
]


class CompileError(Exception):
    """No compiler, or it failed, or what it made cannot be loaded; the message says which."""


def load_library() -> ctypes.CDLL:
    """The kernels for this machine: from the cache, else built now and kept there if that is possible.

    Raises:
        CompileError: with the reason, when they cannot be built or loaded.
    """
    command = [*_compiler(), *FLAGS]
    if platform.machine() != "x86_64":
        command = [flag for flag in command if not flag.startswith("-mprefer")]
    key = hashlib.sha256(" ".join([*command, _cpu_flags()]).encode())
    for source in SOURCES:
        key.update(source.read_bytes())
    name = f"cpu-{key.hexdigest()[:16]}.so"
    try:
        cache = _cache_folder()
        if (cache / name).exists():
            try:
                return ctypes.CDLL(str(cache / name))
            except OSError as error:
                # Cut short when the disk was full, or linked against another machine's C library.
                log.warning("kernels_rebuilt", reason=str(error))
        return ctypes.CDLL(str(_build(command, cache, name)))
    except OSError as error:
        log.warning("kernels_not_cached", reason=str(error), effect="they are compiled at every start")
    try:
        with tempfile.TemporaryDirectory(prefix="loraland-") as folder:
            return ctypes.CDLL(str(_build(command, Path(folder), name)))
    except OSError as error:
        raise CompileError(str(error)) from error


def _compiler() -> list[str]:
    found = os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if found is None:
        raise CompileError("no C compiler (cc, gcc or clang) on the path")
    return shlex.split(found)


def _build(command: list[str], folder: Path, name: str) -> Path:
    """Compile into `folder`. The name appears when the file is whole, whoever else is compiling."""
    with tempfile.TemporaryDirectory(dir=folder) as private:
        built = Path(private) / name
        line = [*command, "-Wno-psabi", "-o", str(built), str(SOURCES[0]), "-lm"]
        try:
            done = subprocess.run(line, capture_output=True, text=True, errors="replace", timeout=300)
        except (FileNotFoundError, PermissionError, subprocess.TimeoutExpired) as error:
            raise CompileError(str(error)) from error
        if done.returncode:
            raise CompileError(f"{shlex.join(line)}: {done.stderr.strip()[-800:]}")
        return built.rename(folder / name)


def _cache_folder() -> Path:
    """Where libraries are kept, made if missing.

    Raises:
        OSError: it cannot be used, or code found in it could be somebody else's.
    """
    try:
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    except RuntimeError as error:
        raise OSError(str(error)) from error
    folder = base / "loraland"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    status = folder.stat()
    if status.st_uid not in (0, os.getuid()) or status.st_mode & stat.S_IWOTH:
        raise PermissionError(f"{folder} belongs to another user, or everyone may write to it")
    return folder


def _cpu_flags() -> str:
    """What `-march=native` depends on, so that a cache shared by different machines stays right."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.startswith(("flags", "Features"))), platform.processor())
