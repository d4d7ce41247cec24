"""Fetches a base model's files from the Hugging Face hub into its cache. Knows no tensors.

Environment: HF_TOKEN for gated and private models, HF_HOME for the cache, HF_ENDPOINT for a mirror, HF_HUB_OFFLINE=1 to
use the cache only.
"""

import re
from pathlib import Path
from typing import cast

import structlog
from huggingface_hub import snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

log = structlog.get_logger()

SCHEME = "hf://"
_FILES = ["*.json", "*.jinja", "model*.safetensors"]
"""Never pickles and never code; only the top folder, because some models lie there twice."""
_URI = re.compile(r"hf://(?P<model>[\w.-]+/[\w.-]+)(?:@(?P<revision>[\w./-]+))?")
_HttpError = cast(type[Exception], HfHubHTTPError.__bases__[0])
"""Of the HTTP library, which is another one in each major version of huggingface_hub."""


class HubError(Exception):
    """The model cannot be fetched; the message says what to change."""


def fetch_model(uri: str, *, endpoint: str | None = None, cache: Path | None = None) -> Path:
    """The directory of "hf://org/name" or "hf://org/name@revision" in the cache; its name is the commit.

    What the cache has already is not fetched again; without a network it has to be there. Raises `HubError`.
    """
    match = _URI.fullmatch(uri)
    if match is None:
        raise HubError(f"{uri}: must be hf://organisation/name or hf://organisation/name@revision")
    model, revision = match["model"], match["revision"]
    log.info("fetching", model=model, revision=revision or "main")
    try:
        return Path(
            snapshot_download(
                model,
                revision=revision,
                allow_patterns=_FILES,
                ignore_patterns=["*/*"],
                endpoint=endpoint,
                cache_dir=cache,
            )
        )
    except GatedRepoError as error:
        raise HubError(
            f"{uri}: the model is gated: accept its terms at https://huggingface.co/{model} and set HF_TOKEN"
        ) from error
    except RepositoryNotFoundError as error:
        raise HubError(
            f"{uri}: no such model; if it is private, set HF_TOKEN to a token that may read it"
        ) from error
    except RevisionNotFoundError as error:
        raise HubError(f"{uri}: the model has no revision {revision or 'main'}") from error
    except LocalEntryNotFoundError as error:
        raise HubError(
            f"{uri}: not (completely) in the cache, and the hub cannot be reached: {_first_line(error)}"
        ) from error
    except (_HttpError, OSError, ValueError) as error:
        raise HubError(f"{uri}: cannot be fetched: {_first_line(error)}") from error


def _first_line(error: BaseException) -> str:
    """Of what is behind it: the library's own words are many, and about its Python interface."""
    cause = error.__cause__ or error
    return f"{type(cause).__name__}: {cause}".partition("\n")[0]
