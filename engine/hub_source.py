"""Adapters on the Hugging Face hub: `hf://org/repo`, `hf://org/repo@revision`. Uses HF_TOKEN and HF_ENDPOINT."""

import tempfile
from pathlib import Path

import httpx
from huggingface_hub import HfApi, hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, GatedRepoError, HfHubHTTPError, RepositoryNotFoundError

from engine.host_adapter import AdapterError, AdapterNotFoundError
from engine.peft_config import CONFIG_FILE, WEIGHTS_FILE
from engine.sources import SIDE_FILES, Limits, RemoteSource, SourceUnreachableError, check_size


class HubSource(RemoteSource):
    """A model repository; its revision is resolved to a commit first, and that commit is fetched."""

    def __init__(self, uri: str, limits: Limits) -> None:
        repo, _, revision = uri.removeprefix("hf://").partition("@")
        if repo.count("/") != 1:
            raise AdapterError(f"{uri}: must be hf://organisation/repository, with @revision or without")
        self._repo, self._revision, self._limits = repo, revision or None, limits
        self._commit: str | None = None
        self._sizes: dict[str, int] = {}

    def signature(self) -> str:
        try:
            info = HfApi().model_info(self._repo, revision=self._revision, files_metadata=True, timeout=30.0)
        except GatedRepoError as error:
            raise AdapterError(f"{self._repo}: access to it must be granted; set HF_TOKEN") from error
        except RepositoryNotFoundError as error:
            raise AdapterNotFoundError(
                f"{self._repo}: there is no such repository, or it is private"
            ) from error
        except (HfHubHTTPError, httpx.HTTPError, OSError, ValueError) as error:
            raise SourceUnreachableError(
                f"{self._repo}: the hub does not answer: {type(error).__name__}"
            ) from error
        self._commit = info.sha
        self._sizes = {file.rfilename: file.size or 0 for file in info.siblings or []}
        return str(info.sha)

    def fetch(self) -> dict[str, bytes]:
        if self._commit is None:
            self.signature()
        missing = [name for name in (CONFIG_FILE, WEIGHTS_FILE) if name not in self._sizes]
        if missing:
            raise AdapterError(f"{self._repo}: it has no {' and no '.join(missing)}")
        names = [name for name in (CONFIG_FILE, WEIGHTS_FILE, *SIDE_FILES) if name in self._sizes]
        for name in names:
            check_size(name, self._sizes[name], self._limits)
        with tempfile.TemporaryDirectory(prefix="loraland-hub-") as folder:
            try:
                return {name: self._download(name, folder) for name in names}
            except EntryNotFoundError as error:
                raise AdapterNotFoundError(f"{self._repo}: a file has gone: {error}") from error
            except (HfHubHTTPError, httpx.HTTPError, OSError) as error:
                raise SourceUnreachableError(
                    f"{self._repo}: cannot be fetched: {type(error).__name__}"
                ) from error

    def _download(self, name: str, folder: str) -> bytes:
        path = hf_hub_download(self._repo, name, revision=self._commit, local_dir=folder)
        return Path(path).read_bytes()
