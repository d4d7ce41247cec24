"""Files of remote adapters on the local disk: verified, bounded, safe to share between engines. Knows no network.

An entry is a directory named by what it was fetched from: the files, and `entry.json` with their sha256. It appears by
one rename, so it is whole or not there; what no longer matches its sha256 is dropped and fetched again.
"""

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

import structlog

log = structlog.get_logger()

ENTRY_FILE = "entry.json"


class DiskCache:
    """Least recently used entries go when `max_bytes` are exceeded. All methods may be called from any thread."""

    def __init__(self, directory: Path, max_bytes: int) -> None:
        self._directory = directory
        self._max_bytes = max_bytes

    def get(self, uri: str, signature: str | None) -> dict[str, bytes] | None:
        """The files of `uri` as it was with this signature (None: as it was last), if they are there and whole."""
        for entry in [self._place(uri, signature)] if signature is not None else self._entries_of(uri):
            files = self._read(entry)
            if files is not None:
                return files
        return None

    def put(self, uri: str, signature: str, files: Mapping[str, bytes]) -> None:
        """Keep the files. A disk that is full, or cannot be written, is logged and otherwise nobody's problem."""
        size = sum(map(len, files.values()))
        if size > self._max_bytes:
            return
        try:
            self._directory.mkdir(parents=True, exist_ok=True, mode=0o700)
            self._make_room(size)
            with tempfile.TemporaryDirectory(dir=self._directory, prefix=".new-") as folder:
                whole = Path(folder) / "entry"
                whole.mkdir()
                for name, content in files.items():
                    (whole / name).write_bytes(content)
                facts = {
                    "uri": uri,
                    "signature": signature,
                    "sha256": {name: _sha256(content) for name, content in files.items()},
                }
                (whole / ENTRY_FILE).write_text(json.dumps(facts), encoding="utf-8")
                place = self._place(uri, signature)
                shutil.rmtree(place, ignore_errors=True)
                whole.rename(place)
        except OSError as error:
            log.warning("adapter_not_kept_on_disk", reason=error.strerror or str(error))

    @property
    def num_bytes(self) -> int:
        return sum(_size(entry) for entry in self._entries())

    def _place(self, uri: str, signature: str) -> Path:
        return self._directory / f"{_sha256(uri.encode())[:16]}-{_sha256(signature.encode())[:24]}"

    def _entries(self) -> list[Path]:
        """The most recently used first."""
        try:
            found = [path for path in self._directory.iterdir() if not path.name.startswith(".")]
        except OSError:
            return []
        return sorted(found, key=_used, reverse=True)

    def _entries_of(self, uri: str) -> list[Path]:
        start = f"{_sha256(uri.encode())[:16]}-"
        return [entry for entry in self._entries() if entry.name.startswith(start)]

    def _read(self, entry: Path) -> dict[str, bytes] | None:
        try:
            facts = json.loads((entry / ENTRY_FILE).read_text(encoding="utf-8"))
            files = {name: (entry / name).read_bytes() for name in facts["sha256"]}
            whole = all(_sha256(files[name]) == digest for name, digest in facts["sha256"].items())
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError):
            whole, files = False, {}
        if not whole:
            log.warning("cached_adapter_dropped", entry=entry.name, reason="it is damaged")
            shutil.rmtree(entry, ignore_errors=True)
            return None
        with suppress(OSError):  # it was evicted meanwhile; its files are in memory
            os.utime(entry)
        return files

    def _make_room(self, num_bytes: int) -> None:
        entries = [(entry, _size(entry)) for entry in self._entries()]
        used = sum(size for _, size in entries)
        while entries and used + num_bytes > self._max_bytes:
            entry, size = entries.pop()
            shutil.rmtree(entry, ignore_errors=True)
            used -= size


def _used(entry: Path) -> float:
    try:
        return entry.stat().st_mtime
    except OSError:
        return 0.0


def _size(entry: Path) -> int:
    try:
        return sum(path.stat().st_size for path in entry.iterdir())
    except OSError:
        return 0


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
