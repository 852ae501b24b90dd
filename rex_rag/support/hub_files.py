"""Files of the Hub, put whole into a folder: their sizes are known before, a broken download goes on, hashes are held.

The Hub's own client resumes within a process and starts anew in the next one; here the next one goes on too.

Invariant: a file has its own name only if all of it is there and has the hash that the Hub states.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from rex_rag.support.durable import sync_folder
from rex_rag.support.errors import UserError

_BLOCK_BYTES = 1 << 22


@dataclass(frozen=True, slots=True)
class HubFile:
    """path: in the repository. size: bytes. digest: `sha256:…`, or `git:…` (Git's hash of a blob) of a small file."""

    path: str
    size: int
    digest: str


@dataclass(frozen=True, slots=True)
class HubListing:
    """The files of a dataset repository at one commit, which is `revision`."""

    repository: str
    revision: str
    files: tuple[HubFile, ...]


def list_files(repository: str, revision: str | None = None) -> HubListing:
    """Ask the Hub what a dataset repository holds; `revision` is a branch, tag or commit, by default the newest.

    Raises:
        UserError: where the Hub does not answer, or knows no such repository or revision.
    """
    from huggingface_hub import HfApi

    with _hub_errors(f"the list of {repository}'s files"):
        info = HfApi().dataset_info(repository, revision=revision, files_metadata=True)
    files = []
    for entry in info.siblings or ():
        place = PurePosixPath(entry.rfilename)
        if place.is_absolute() or ".." in place.parts:
            raise UserError(
                f"{repository} names a file {entry.rfilename!r}, outside of any folder; nothing is fetched"
            )
        digest = f"sha256:{entry.lfs.sha256}" if entry.lfs else f"git:{entry.blob_id}"
        files.append(HubFile(entry.rfilename, entry.size or 0, digest))
    return HubListing(repository, str(info.sha), tuple(files))


def partial(file: HubFile, target: Path) -> Path:
    """Where the beginning of a file waits for the rest; named by its hash, so that versions are never mixed."""
    return target.with_name(f".{target.name}.{file.digest[-16:]}.part")


def bytes_left(file: HubFile, target: Path) -> int:
    """How much of a file that is not yet `target` is still to come."""
    part = partial(file, target)
    return file.size - min(file.size, part.stat().st_size if part.exists() else 0)


def fetch_file(listing: HubListing, file: HubFile, target: Path) -> None:
    """Download a file to `target`, going on behind what an earlier attempt left.

    Raises:
        UserError: where the connection breaks for good (the same call goes on), or the bytes are not the Hub's.
    """
    from huggingface_hub import hf_hub_url
    from huggingface_hub.file_download import http_get
    from huggingface_hub.utils import build_hf_headers

    part = partial(file, target)
    part.parent.mkdir(parents=True, exist_ok=True)
    url = hf_hub_url(listing.repository, file.path, repo_type="dataset", revision=listing.revision)
    with part.open("ab") as out:
        if out.tell() > file.size:
            out.truncate(0)
        # Compressed on the way, a file could not be resumed by its length.
        headers = {**build_hf_headers(), "accept-encoding": "identity"}
        try:
            with _hub_errors(f"{file.path} of {listing.repository}"):
                http_get(
                    url,
                    out,
                    resume_size=out.tell(),
                    headers=headers,
                    expected_size=file.size,
                    displayed_filename=file.path,
                )
        finally:
            out.flush()
            os.fsync(out.fileno())
    if digest_of(part, file) != file.digest:
        part.unlink()
        raise UserError(
            f"{target}: what came for {file.path} of {listing.repository} is not what the Hub says it holds "
            f"({file.digest}); give the same command again, and look at what stands between (a proxy, a mirror)"
        )
    os.replace(part, target)
    sync_folder(target.parent)


def read_beginning(listing: HubListing, file: HubFile, limit: int) -> bytes:
    """The first bytes of a file, at most `limit`: too few to be held against its hash.

    Raises:
        UserError: as `fetch_file`.
    """
    from huggingface_hub import hf_hub_url
    from huggingface_hub.utils import build_hf_headers, hf_raise_for_status, http_backoff

    url = hf_hub_url(listing.repository, file.path, repo_type="dataset", revision=listing.revision)
    end = min(limit, file.size)
    blocks = []
    for start in range(0, end, _BLOCK_BYTES):
        stop = min(end, start + _BLOCK_BYTES)
        span = {"range": f"bytes={start}-{stop - 1}", "accept-encoding": "identity"}
        with _hub_errors(f"{file.path} of {listing.repository}"):
            answer = http_backoff("GET", url, headers={**build_hf_headers(), **span}, follow_redirects=True)
            hf_raise_for_status(answer)
        if len(answer.content) != stop - start:
            raise UserError(
                f"{file.path} of {listing.repository}: asked for bytes {start:,} to {stop:,}, "
                f"{len(answer.content):,} came; a mirror or proxy that serves no parts of files cannot be used here"
            )
        blocks.append(answer.content)
    return b"".join(blocks)


def digest_of(path: Path, file: HubFile) -> str:
    """The hash of a file on this machine, of the kind that `file.digest` is."""
    kind = file.digest.partition(":")[0]
    digest = hashlib.sha256() if kind == "sha256" else hashlib.sha1(f"blob {path.stat().st_size}\0".encode())
    with path.open("rb") as content:
        while block := content.read(_BLOCK_BYTES):
            digest.update(block)
    return f"{kind}:{digest.hexdigest()}"


@contextmanager
def _hub_errors(what: str) -> Iterator[None]:
    """Make what the Hub's client raises one line that says how to go on."""
    import httpx
    from huggingface_hub import constants
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    try:
        yield
    except OfflineModeIsEnabled as error:
        raise UserError(
            f"{what} cannot be had: this machine is offline ({constants.ENDPOINT} does not answer, or HF_HUB_OFFLINE "
            "is set). Connect it, name a mirror in HF_ENDPOINT, or give the same command on a machine that is online "
            "and copy the folder it writes here"
        ) from error
    except HfHubHTTPError as error:
        raise UserError(f"{what} cannot be had: {error}".strip()) from error
    # Its check of the length is an OSError without a number.
    except (httpx.HTTPError, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise UserError(
            f"{what}: the connection broke ({type(error).__name__}: {error}); what came is kept, and the same command "
            "goes on there"
        ) from error
