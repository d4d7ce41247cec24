"""Where adapters come from: what is allowed, what is fetched, what is kept, and what goes wrong."""

import errno
import io
import socket
import tarfile
import threading
import time
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import fsspec
import huggingface_hub
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.disk_cache import DiskCache
from engine.host_adapter import AdapterError, AdapterNotFoundError
from engine.peft_config import CONFIG_FILE, WEIGHTS_FILE
from engine.protocol import AdapterRef
from engine.sources import Limits, Sources, SourceUnreachableError
from engine.web_source import check_literal, unpack

FILES = {CONFIG_FILE: b"{}", WEIGHTS_FILE: b"weights" * 100}


def sources(tmp_path: Path, *allowed: str, **limits: Any) -> Sources:
    limits = {"weights_bytes": 10_000, "stall_s": 0.5, "total_s": 3.0, "allow_private": True} | limits
    return Sources(allowed, DiskCache(tmp_path / "disk", 2**20), Limits(**limits), recheck_s=0.0)


def publish(directory: Path, files: dict[str, bytes] = FILES) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (directory / name).write_bytes(content)
    return directory


class Web:
    """A web server whose answers the test decides: path -> (status, headers, body) or a function of the handler."""

    def __init__(self) -> None:
        self.pages: dict[str, Any] = {}
        self.asked: list[tuple[str, str, str | None]] = []
        web = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                web.asked.append((self.command, self.path, self.headers.get("Authorization")))
                page = web.pages.get(self.path, (404, {}, b""))
                if callable(page):
                    page(self)
                    return
                status, headers, body = page
                self.send_response(status)
                for key, value in ({"Content-Length": str(len(body))} | headers).items():
                    self.send_header(key, value)
                self.end_headers()
                if self.command == "GET":
                    self.wfile.write(body)

            do_HEAD = do_GET

            def log_message(self, *_: Any) -> None: ...

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def publish(self, path: str, files: dict[str, bytes] = FILES, etag: str = "1") -> str:
        for name, content in files.items():
            self.pages[f"{path}/{name}"] = 200, {"ETag": etag}, content
        return f"{self.url}{path}"


@pytest.fixture
def web() -> Iterator[Web]:
    web = Web()
    yield web
    web.server.shutdown()
    web.server.server_close()


def test_nothing_is_read_that_is_not_allowed(tmp_path):
    inside = publish(tmp_path / "root" / "a")
    outside = publish(tmp_path / "secret")
    (tmp_path / "root" / "link").symlink_to(outside)
    some = sources(
        tmp_path, str(tmp_path / "root"), "hf://org/", "s3://bucket/team", "https://host.example/x"
    )
    assert some.read(str(inside)).keys() == FILES.keys()
    assert sources(tmp_path, "file://").read(outside.as_uri()).keys() == FILES.keys()
    for uri in (
        str(outside),
        str(tmp_path / "root" / ".." / "secret"),
        str(tmp_path / "root" / "link"),
        "hf://other/repo",
        "hf://organisation/repo",
        "s3://bucket/teammate/a",
        "s3://bucket/team/../other",
        "https://host.example/x/%2e%2e/y",
        "https://host.example.evil.com/x/a",
        "https://user@evil.com/https://host.example/x",
        "gs://bucket/team",
    ):
        with pytest.raises(AdapterError, match="adapter_sources") as refused:
            some.read(uri)
        with pytest.raises(AdapterError, match="adapter_sources"):
            some.version_of(AdapterRef("m/a", uri))
        assert "secret" not in str(refused.value), "no path of the machine"


def test_a_directory_that_changes_while_it_is_read_is_read_again(tmp_path, monkeypatch):
    place = publish(tmp_path / "a")
    read, times = Path.read_bytes, []

    def read_and_publish(path: Path) -> bytes:
        content = read(path)
        if path.name == CONFIG_FILE and len(times) < 2:
            times.append(1)
            publish(place, {CONFIG_FILE: b"{}" + b" " * len(times), WEIGHTS_FILE: b"new" * len(times)})
        return content

    monkeypatch.setattr(Path, "read_bytes", read_and_publish)
    assert sources(tmp_path, "file://").read(str(place)) == {CONFIG_FILE: b"{}  ", WEIGHTS_FILE: b"newnew"}


def test_a_web_directory_is_fetched_once_and_again_when_published_anew(tmp_path, web, monkeypatch):
    monkeypatch.setenv("LORALAND_TOKEN_127_0_0_1", "t0ken")
    uri = web.publish("/adapters/a")
    some, ref = sources(tmp_path, web.url), AdapterRef("m/a", uri)
    before = some.version_of(ref)
    assert some.read(uri) == FILES == some.read(uri)
    assert [
        path
        for method, path, _ in web.asked
        if (method == "GET" and "weights" in path) or WEIGHTS_FILE in path
    ].count(f"/adapters/a/{WEIGHTS_FILE}") == 3, "asked twice whether it changed, fetched once"
    assert {token for *_, token in web.asked} == {"Bearer t0ken"}
    assert some.version_of(ref) == before
    web.publish("/adapters/a", {**FILES, WEIGHTS_FILE: b"other"}, etag="2")
    deadline = time.monotonic() + 5
    while some.version_of(ref) == before:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    assert some.read(uri)[WEIGHTS_FILE] == b"other"


def test_a_source_that_is_gone_is_answered_from_the_disk(tmp_path, web):
    uri = web.publish("/a")
    sources(tmp_path, web.url).read(uri)
    web.server.shutdown()
    web.server.server_close()
    again = sources(tmp_path, web.url)
    assert again.read(uri) == FILES
    with pytest.raises(SourceUnreachableError):
        again.read(f"{web.url}/never-seen")


def stalls(handler: BaseHTTPRequestHandler) -> None:
    handler.send_response(200)
    handler.send_header("Content-Length", "1000")
    handler.end_headers()
    if handler.command == "GET":
        handler.wfile.write(b"x")
        time.sleep(1.5)


def lies(handler: BaseHTTPRequestHandler) -> None:
    """No length, and more than any adapter has."""
    handler.send_response(200)
    handler.end_headers()
    if handler.command == "GET":
        try:
            for _ in range(1000):
                handler.wfile.write(b"x" * 1000)
        except OSError:
            return


def breaks_off(handler: BaseHTTPRequestHandler) -> None:
    handler.send_response(200)
    handler.send_header("Content-Length", "1000")
    handler.end_headers()
    if handler.command == "GET":
        handler.wfile.write(b"x")
        handler.connection.shutdown(socket.SHUT_RDWR)


@pytest.mark.parametrize(
    ("page", "error", "part"),
    [
        ((404, {}, b""), AdapterNotFoundError, "no such file"),
        ((401, {}, b""), AdapterError, "answers 401"),
        ((503, {}, b""), SourceUnreachableError, "answers 503"),
        ((200, {}, b"x" * 20_000), AdapterError, "more than 10000 bytes"),
        (lies, AdapterError, "more than 10000 bytes"),
        (stalls, SourceUnreachableError, "in time"),
        (breaks_off, SourceUnreachableError, "broke off"),
        ((302, {"Location": "http://169.254.169.254/latest"}, b""), AdapterError, "adapter_sources"),
        ((302, {"Location": "file:///etc/passwd"}, b""), AdapterError, "adapter_sources"),
        ((302, {"Location": "/round"}, b""), AdapterError, "redirects"),
    ],
)
def test_a_source_that_fails_or_lies_gives_its_reason(tmp_path, web, page, error, part):
    uri = web.publish("/a")
    web.pages["/round"] = 302, {"Location": "/round"}, b""
    web.pages[f"/a/{WEIGHTS_FILE}"] = page
    with pytest.raises(error, match=part) as refused:
        sources(tmp_path, web.url).read(uri)
    assert str(tmp_path) not in str(refused.value)


@pytest.mark.parametrize(
    "address", ["127.0.0.1", "169.254.169.254", "10.0.0.8", "::1", "fe80::1", "::ffff:10.0.0.1", "0.0.0.0"]
)
def test_private_addresses_are_refused(address):
    with pytest.raises(AdapterError, match="private address"):
        check_literal(address, allow_private=False)
    check_literal("8.8.8.8", allow_private=False)
    check_literal(address, allow_private=True)


def test_a_name_that_leads_inside_is_refused_when_it_is_used(tmp_path, web):
    port = web.server.server_port
    some = sources(tmp_path, f"http://localhost:{port}/", allow_private=False)
    with pytest.raises(AdapterError, match="private address"):
        some.read(f"http://localhost:{port}/a")
    assert web.asked == []


def archive(kind: str, files: dict[str, bytes]) -> bytes:
    made = io.BytesIO()
    if kind == "zip":
        with zipfile.ZipFile(made, "w") as bundle:
            for name, content in files.items():
                bundle.writestr(name, content)
    else:
        with tarfile.open(fileobj=made, mode="w:gz") as bundle:
            for name, content in files.items():
                member = tarfile.TarInfo(name)
                member.size = len(content)
                bundle.addfile(member, io.BytesIO(content))
    return made.getvalue()


@pytest.mark.parametrize("kind", ["zip", "tar.gz"])
def test_an_archive_gives_the_files_of_an_adapter_and_nothing_else(tmp_path, web, kind):
    content = archive(kind, {f"some/dir/{name}": data for name, data in FILES.items()} | {"../../evil": b"x"})
    web.pages[f"/a.{kind}"] = 200, {"ETag": "1"}, content
    assert sources(tmp_path, web.url).read(f"{web.url}/a.{kind}") == FILES
    assert not (tmp_path.parent / "evil").exists()


@pytest.mark.parametrize("kind", ["zip", "tar.gz"])
@pytest.mark.parametrize(
    ("spoil", "part"),
    [
        (lambda data: data[: len(data) // 2], "damaged|holds no"),
        (lambda data: b"no archive", "damaged"),
    ],
)
def test_a_spoilt_archive_is_refused(kind, spoil, part):
    data = spoil(archive(kind, {CONFIG_FILE: b"{}", WEIGHTS_FILE: bytes(range(256)) * 40}))
    with pytest.raises(AdapterError, match=part):
        unpack(f"a.{kind}", data, Limits(20_000))


@pytest.mark.parametrize("kind", ["zip", "tar.gz"])
def test_an_archive_bomb_is_not_unpacked(kind):
    bomb = archive(kind, {CONFIG_FILE: b"{}", WEIGHTS_FILE: bytes(3_000_000)})
    with pytest.raises(AdapterError, match="at most 10000"):
        unpack(f"a.{kind}", bomb, Limits(10_000))


def test_links_in_an_archive_are_no_files():
    made = io.BytesIO()
    with tarfile.open(fileobj=made, mode="w:gz") as bundle:
        link = tarfile.TarInfo(WEIGHTS_FILE)
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        bundle.addfile(link)
    with pytest.raises(AdapterError, match=f"holds no {CONFIG_FILE}"):
        unpack("a.tar.gz", made.getvalue(), Limits(10_000))


@given(st.binary(max_size=300))
def test_any_bytes_are_an_archive_or_refused(data):
    for kind in ("zip", "tar.gz"):
        with pytest.raises(AdapterError):
            unpack(f"a.{kind}", data, Limits(10_000))


def test_an_object_store_by_fsspec(tmp_path):
    store = fsspec.filesystem("memory")
    for name, content in FILES.items():
        store.pipe(f"/bucket/a/{name}", content)
    some = sources(tmp_path, "memory://bucket/")
    assert some.read("memory://bucket/a") == FILES
    store.pipe(f"/bucket/a/{WEIGHTS_FILE}", b"x" * 20_000)
    with pytest.raises(AdapterError, match="at most 10000"):
        some.read("memory://bucket/a")
    store.rm("/bucket/a", recursive=True)
    with pytest.raises(AdapterNotFoundError):
        some.read("memory://bucket/a")


def test_a_store_whose_package_is_missing_names_it(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "s3fs", None)
    with pytest.raises(AdapterError, match=r"s3:// needs a package.*s3fs"):
        sources(tmp_path, "s3://bucket/").read("s3://bucket/a")


def test_the_hub_at_a_commit(tmp_path, monkeypatch):
    published = publish(tmp_path / "hub" / "c0ffee")
    asked = []

    class Info:
        sha = "c0ffee"
        siblings = [type("F", (), {"rfilename": n, "size": len(c)}) for n, c in FILES.items()]

    def model_info(self, repo, *, revision, files_metadata, timeout):
        asked.append((repo, revision))
        return Info

    def download(repo, name, *, revision, local_dir):
        return str(published.parent / revision / name)

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", model_info)
    monkeypatch.setattr("engine.hub_source.hf_hub_download", download)
    some = sources(tmp_path, "hf://org/")
    assert some.read("hf://org/repo@v1") == FILES
    assert asked == [("org/repo", "v1")]
    Info.siblings = Info.siblings[:1]
    Info.sha = "other"
    with pytest.raises(AdapterError, match=f"no {WEIGHTS_FILE}"):
        some.read("hf://org/repo@v1")
    with pytest.raises(AdapterError, match="must be hf://"):
        some.read("hf://org/a/b")


def test_a_damaged_cache_entry_is_dropped(tmp_path):
    cache = DiskCache(tmp_path, 2**20)
    cache.put("u", "1", FILES)
    assert cache.get("u", "1") == FILES and cache.get("u", "2") is None
    (entry,) = tmp_path.iterdir()
    (entry / WEIGHTS_FILE).write_bytes(b"flipped")
    assert cache.get("u", "1") is None
    assert list(tmp_path.iterdir()) == []
    cache.put("u", "1", FILES)
    (next(tmp_path.iterdir()) / "entry.json").write_text("[]")
    assert cache.get("u", "1") is None


def test_the_cache_keeps_to_its_size_and_drops_the_least_recently_used(tmp_path):
    cache = DiskCache(tmp_path, 3500)
    for number in range(3):
        cache.put(f"u{number}", "1", FILES)
        time.sleep(0.02)
    cache.get("u0", "1")
    cache.put("u3", "1", FILES)
    assert cache.num_bytes <= 3500
    assert cache.get("u0", "1") and cache.get("u3", "1") and cache.get("u1", "1") is None
    cache.put("large", "1", {WEIGHTS_FILE: bytes(4000)})
    assert cache.get("large", "1") is None and cache.get("u3", "1")


@contextmanager
def full_disk(monkeypatch) -> Iterator[None]:
    def fail(path: Path, content: bytes) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(Path, "write_bytes", fail)
        yield


def test_a_full_disk_is_nobodys_problem(tmp_path, monkeypatch):
    cache = DiskCache(tmp_path, 2**20)
    with full_disk(monkeypatch):
        cache.put("u", "1", FILES)
    assert cache.get("u", "1") is None and list(tmp_path.iterdir()) == []
    cache.put("u", "1", FILES)
    assert cache.get("u", "1") == FILES


def test_the_text_side_is_given_apart_from_the_weights(tmp_path):
    some = sources(tmp_path, "file://", "memory://")
    place = publish(tmp_path / "a", {**FILES, "chat_template.jinja": b"t", "README.md": b"r"})
    assert some.side_files(str(place)) == {"chat_template.jinja": b"t"}
    store = fsspec.filesystem("memory")
    for name, content in {**FILES, "tokenizer.json": b"{}"}.items():
        store.pipe(f"/side/a/{name}", content)
    assert some.side_files("memory://side/a") == {"tokenizer.json": b"{}"}
    with pytest.raises(AdapterNotFoundError):
        some.side_files(str(tmp_path / "no"))
