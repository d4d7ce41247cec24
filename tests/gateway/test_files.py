"""`/v1/files` through the official SDK; uploads that break off or cannot be kept leave nothing behind."""

import io
import socket
from collections.abc import Iterator
from pathlib import Path

import httpx
import openai
import pytest

from gateway.config import GatewayConfig, ModelConfig
from gateway.errors import StorageUnavailableError
from gateway.file_store import FileStore
from gateway.storage import Storage
from gateway.stored_files import StoredFiles
from gateway.tables import StoredFile
from tests.gateway.conftest import Background, Gateway, wait_until
from tests.gateway.fake_engine import FakeEngine

FORM = {"content-type": "multipart/form-data; boundary=xyz"}


@pytest.fixture
def contents(stored: Path, http: httpx.Client) -> Path:
    """The directory of the files, empty."""
    for file in http.get("/v1/files").json()["data"]:
        http.delete(f"/v1/files/{file['id']}")
    return stored / "files"


def kept(contents: Path) -> list[str]:
    return [path.name for path in contents.glob("*")]


def upload(sdk: openai.OpenAI, data: bytes = b"{}\n", name: str = "a.jsonl") -> openai.types.FileObject:
    return sdk.files.create(file=(name, data), purpose="batch")


def test_a_file_is_taken_shown_read_and_deleted(sdk: openai.OpenAI, contents: Path):
    data = bytes(range(256)) * 100
    file = upload(sdk, data, "näme.jsonl")
    assert (file.bytes, file.filename, file.purpose, file.object) == (
        len(data),
        "näme.jsonl",
        "batch",
        "file",
    )
    assert file.status == "processed" and file.expires_at is None
    assert sdk.files.retrieve(file.id) == file
    assert sdk.files.content(file.id).content == data
    assert kept(contents) == [file.id]
    assert sdk.files.delete(file.id).deleted
    assert kept(contents) == []
    for use in (sdk.files.retrieve, sdk.files.content, sdk.files.delete):
        with pytest.raises(openai.NotFoundError):
            use(file.id)


def test_an_empty_file_is_a_file(sdk: openai.OpenAI, contents: Path):
    file = upload(sdk, b"")
    assert file.bytes == 0
    assert sdk.files.content(file.id).content == b""


def test_files_are_listed_in_pages_by_purpose_and_order(sdk: openai.OpenAI, contents: Path):
    made = [upload(sdk, name=f"{number}.jsonl").id for number in range(5)]
    other = sdk.files.create(file=("x", b"x"), purpose="user_data").id
    assert [file.id for file in sdk.files.list(limit=2)] == [other, *reversed(made)]
    assert [file.id for file in sdk.files.list(limit=2, order="asc", purpose="batch")] == made
    page = sdk.files.list(limit=2, after=made[3])
    assert [file.id for file in page.data] == [made[2], made[1]] and page.has_more
    sdk.files.delete(made[3])
    assert sdk.files.list(limit=2, after=made[3]).data == page.data
    for wrong in ({"limit": 0}, {"limit": 10_001}, {"order": "up"}):
        with pytest.raises(openai.BadRequestError) as refusal:
            sdk.files.list(**wrong)  # pyright: ignore[reportArgumentType]
        assert refusal.value.param in wrong


def test_a_file_may_be_larger_than_a_request_but_not_than_its_limit(sdk: openai.OpenAI, contents: Path):
    data = b"0123456789abcdef" * 2**17
    file = upload(sdk, data)
    assert sdk.files.content(file.id).content == data
    with pytest.raises(openai.APIStatusError) as refusal:
        upload(sdk, b"x" * (3 * 2**20 + 1))
    assert (refusal.value.status_code, refusal.value.code) == (413, "file_too_large")
    assert kept(contents) == [file.id]


def test_a_file_may_expire(sdk: openai.OpenAI, contents: Path):
    file = sdk.files.create(
        file=("a", b"a"), purpose="batch", expires_after={"anchor": "created_at", "seconds": 3600}
    )
    assert file.expires_at == file.created_at + 3600
    with pytest.raises(openai.BadRequestError) as refusal:
        sdk.files.create(
            file=("a", b"a"), purpose="batch", expires_after={"anchor": "created_at", "seconds": 1}
        )
    assert refusal.value.param == "expires_after"
    assert kept(contents) == [file.id]


@pytest.mark.parametrize("purpose", ["batch_output", "nothing"])
def test_a_purpose_that_is_not_for_uploads_is_refused(sdk: openai.OpenAI, contents: Path, purpose: str):
    with pytest.raises(openai.BadRequestError) as refusal:
        sdk.files.create(file=("a", b"a"), purpose=purpose)  # pyright: ignore[reportArgumentType]
    assert refusal.value.param == "purpose"
    assert kept(contents) == []


@pytest.mark.parametrize(
    ("headers", "body"),
    [
        ({"content-type": "application/json"}, b"{}"),
        ({"content-type": "multipart/form-data"}, b"--xyz--"),
        (FORM, b""),
        (FORM, b"no form at all"),
        (FORM, b"--xyz--\r\n"),
        (FORM, b'--xyz\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nbatch\r\n--xyz--\r\n'),
        (FORM, b'--xyz\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\nabc'),
        (
            FORM,
            b'--xyz\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\nabc\r\n--xyz--\r\n',
        ),
        (
            FORM,
            b'--xyz\r\nContent-Disposition: form-data; name="f"\r\n\r\n' + b"x" * 9999 + b"\r\n--xyz--\r\n",
        ),
    ],
)
def test_a_form_that_is_no_upload_is_refused_and_leaves_nothing(
    http: httpx.Client, contents: Path, headers: dict[str, str], body: bytes
):
    response = http.post("/v1/files", headers=headers, content=body)
    assert response.status_code == 400
    assert response.json()["error"]["type"] == "invalid_request_error"
    assert kept(contents) == []


def test_the_fields_of_a_form_may_follow_the_file_and_its_name_is_only_a_name(
    http: httpx.Client, contents: Path
):
    body = (
        b'--xyz\r\nContent-Disposition: form-data; name="file"; filename="../../x; y.txt"\r\n\r\nabc\r\n'
        b'--xyz\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nbatch\r\n--xyz--\r\n'
    )
    file = http.post("/v1/files", headers=FORM, content=body).json()
    assert file["bytes"] == 3
    assert kept(contents) == [file["id"]]
    response = http.get(f"/v1/files/{file['id']}/content")
    assert response.content == b"abc"
    assert "/" not in response.headers["content-disposition"]


def test_a_client_that_leaves_in_the_middle_of_an_upload_leaves_nothing(
    gateway: Gateway, contents: Path, http: httpx.Client
):
    address = httpx.URL(gateway.url)
    with socket.create_connection((address.host, address.port)) as client:
        client.sendall(
            b"POST /v1/files HTTP/1.1\r\nHost: x\r\nContent-Type: multipart/form-data; boundary=xyz\r\n"
            b"Content-Length: 1000000\r\n\r\n"
            b'--xyz\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\nabc'
        )
        wait_until(lambda: kept(contents))
    wait_until(lambda: not kept(contents))


@pytest.fixture
def homeless(background: Background, engine: FakeEngine, tmp_path: Path) -> Iterator[openai.OpenAI]:
    """A gateway whose database and files have nowhere to be: a file is where their directories should be."""
    (tmp_path / "nowhere").touch()
    config = GatewayConfig(
        models=(ModelConfig(name="base", engine=engine.url),),
        database=str(tmp_path / "nowhere" / "gateway.db"),
        files=str(tmp_path / "nowhere" / "files"),
    )
    gateway = Gateway(background, config)
    gateway.wait_until_ready()
    with openai.OpenAI(base_url=gateway.url + "/v1", api_key="none", max_retries=0) as client:
        yield client
    gateway.close()


def test_without_storage_files_are_refused_and_the_rest_works(homeless: openai.OpenAI, tmp_path: Path):
    for use in (lambda: upload(homeless), lambda: homeless.files.list(), lambda: homeless.files.delete("x")):
        with pytest.raises(openai.InternalServerError) as refusal:
            use()
        assert (refusal.value.status_code, refusal.value.code) == (503, "storage_unavailable")
        assert refusal.value.response.headers["retry-after"]
        assert str(tmp_path) not in refusal.value.message
    assert homeless.completions.create(model="base", prompt="hello", max_tokens=2).choices


async def test_contents_may_be_wherever_fsspec_can_write():
    store = FileStore("memory://files/here")
    async with store.writing("file-1") as writer:
        await writer.write(b"abc" * 2**20)
    parts = [part async for part in store.chunks("file-1")]
    assert b"".join(parts) == b"abc" * 2**20 and len(parts) == 3
    with pytest.raises(ZeroDivisionError):
        async with store.writing("file-2") as writer:
            raise ZeroDivisionError
    await store.delete("file-1")
    await store.delete("file-1")
    for gone in ("file-1", "file-2"):
        with pytest.raises(StorageUnavailableError):
            [part async for part in store.chunks(gone)]


async def test_a_store_whose_package_is_missing_is_unavailable(monkeypatch: pytest.MonkeyPatch):
    def url_to_fs(place: str):
        raise ImportError(f"Install something to reach {place}")

    monkeypatch.setattr("fsspec.url_to_fs", url_to_fs)
    with pytest.raises(StorageUnavailableError):
        async with FileStore("s3://bucket").writing("file-1"):
            pass


async def test_what_has_expired_is_gone_and_then_removed(tmp_path: Path):
    now = 100.0
    storage = Storage(str(tmp_path / "gateway.db"))
    files = StoredFiles(storage, FileStore(str(tmp_path / "files")), now=lambda: now)
    for name, expires_at in (("file-1", 200), ("file-2", None)):
        async with files.store.writing(name) as writer:
            await writer.write(io.BytesIO(b"abc").read())
        await files.add(
            StoredFile(id=name, filename="a", purpose="batch", bytes=3, created_at=100, expires_at=expires_at)
        )
    now = 200.0
    assert await files.get("file-1") is None
    assert kept(tmp_path / "files") != ["file-2"]
    await files.delete_expired()
    assert kept(tmp_path / "files") == ["file-2"]
    await storage.close()
