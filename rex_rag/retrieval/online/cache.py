"""What online searches found, kept on disk: runs repeat, a question is paid for once, and tests need no network.

Layout of a directory, one sub-folder an engine: `ENGINE/ab/<sha256 of the request>.json` holds a request and its hits,
`ENGINE/spent` how many requests were ever sent, `ENGINE/source` a digest of what the answers depend on besides the
query, `ENGINE/locks/` files that processes lock. API keys are in none of them. Each file appears whole or not at all;
any number of threads and processes of one machine may share a directory.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import time
import unicodedata
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

from rex_rag.retrieval.base import RetrievalError
from rex_rag.support.durable import written_whole
from rex_rag.support.errors import UserError
from rex_rag.support.wording import shorten

FORMAT_VERSION = 1


class CacheMode(StrEnum):
    """What a search may do."""

    RECORD = "record"  # answer from the cache; else ask and keep the answer
    REPLAY = "replay"  # answer from the cache alone; a question that it lacks is an error
    OFF = "off"  # always ask, keep nothing but the count of requests


class SpendCapReached(RetrievalError):
    """The allowed number of paid requests is used up."""


@dataclass(frozen=True, slots=True)
class Hit:
    """One result of an online engine, as it is kept."""

    title: str
    link: str
    snippet: str


def normalize_query(query: str) -> str:
    """One spelling for queries that an engine cannot tell apart: composed Unicode, single blanks. Case is kept.

    Half surrogate pairs, which nothing could send, become question marks.
    """
    sendable = query.encode("utf-8", "replace").decode("utf-8")
    return " ".join(unicodedata.normalize("NFC", sendable).split())


class OnlineCache:
    """The records and the request count of one engine in a directory, which is made if need be.

    Args:
        engine: short name, part of the path.
        parameters: what an answer depends on besides the query; part of every request's key.
        source: which account or configuration answers, kept as a digest alone; one directory holds one source. `None`
            where it is not known, as in a replay without credentials.

    Raises:
        RetrievalError: for a directory that was recorded from another source, or in replay holds no record.
    """

    def __init__(
        self,
        directory: str | Path,
        engine: str,
        mode: CacheMode | str,
        parameters: Mapping[str, Any],
        source: str | None = None,
    ) -> None:
        if mode not in list(CacheMode):
            raise RetrievalError(f"cache mode {mode!r}; use one of {', '.join(CacheMode)}")
        self.mode = CacheMode(mode)
        self.directory = Path(directory)
        self._engine = engine
        self._parameters = dict(parameters)
        self._folder = self.directory / engine
        if self.mode is CacheMode.REPLAY:
            if next(self._folder.glob("??/*.json"), None) is None:
                raise RetrievalError(
                    f"{self._folder} holds no recorded search to replay; record them first (mode "
                    f"{CacheMode.RECORD.value!r}), or check the directory"
                )
        else:
            (self._folder / "locks").mkdir(parents=True, exist_ok=True)
        if source is not None:
            self._check_source(hashlib.sha256(source.encode()).hexdigest())

    def read(self, query: str) -> list[Hit] | None:
        """The recorded hits of a query, an empty list where the engine found nothing; `None` without a record.

        Raises:
            RetrievalError: for a missing record in replay, and for a record that cannot be read.
        """
        if self.mode is CacheMode.OFF:
            return None
        request, path = self._locate(query)
        try:
            text = path.read_bytes()
        except FileNotFoundError:
            if self.mode is CacheMode.REPLAY:
                raise RetrievalError(
                    f"the search {query!r} was never recorded in {self._folder}, and a replay asks no engine; record "
                    f"it (mode {CacheMode.RECORD.value!r}), or replay the run that made the records unchanged"
                ) from None
            return None
        try:
            record = json.loads(text)
            if record["request"] != request:
                raise UserError(f"it answers {shorten(record['request'])}")
            return [Hit(str(hit["title"]), str(hit["link"]), str(hit["snippet"])) for hit in record["hits"]]
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise RetrievalError(
                f"{path} is no record of the search {query!r} ({error}); delete the file and record it again"
            ) from error

    def write(self, query: str, hits: list[Hit]) -> None:
        """Keep the hits of a query; does nothing unless recording."""
        if self.mode is not CacheMode.RECORD:
            return
        request, path = self._locate(query)
        recorded = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        record = {"request": request, "recorded": recorded, "hits": [asdict(hit) for hit in hits]}
        path.parent.mkdir(parents=True, exist_ok=True)
        _write_whole(path, json.dumps(record, ensure_ascii=False, indent=1).encode("utf-8"))

    @contextlib.contextmanager
    def claim(self, query: str) -> Iterator[None]:
        """Hold a query against other threads and processes: what is asked twice at once is then paid for once."""
        if self.mode is not CacheMode.RECORD:
            yield
            return
        # A bounded number of files; two queries that share one merely wait for each other.
        with _locked(self._folder / "locks" / self._locate(query)[1].parent.name):
            yield

    def spend(self, allowed: int) -> int:
        """Count one request that is about to be sent; returns how many were sent so far, this one included.

        Raises:
            SpendCapReached: where `allowed` were sent before; nothing is counted then.
            RetrievalError: for a count that cannot be read: guessing it could cost money.
        """
        with _locked(self._folder / "locks" / "spent"):
            spent = self.spent()
            if spent >= allowed:
                raise SpendCapReached(
                    f"{spent:,} of {allowed:,} paid requests to {self._engine} are used up, counted in "
                    f"{self._folder / 'spent'} over all runs; raise max_searches, or replay what is recorded (mode "
                    f"{CacheMode.REPLAY.value!r})"
                )
            _write_whole(self._folder / "spent", f"{spent + 1}\n".encode())
        return spent + 1

    def spent(self) -> int:
        """How many requests were ever sent with this directory."""
        path = self._folder / "spent"
        try:
            text = path.read_text(encoding="utf-8").strip()
        except FileNotFoundError:
            return 0
        except (OSError, UnicodeDecodeError) as error:
            raise RetrievalError(f"{path} cannot be read ({error}); it counts paid requests: repair it") from error
        if not (text.isascii() and text.isdigit()):
            raise RetrievalError(f"{path} holds {shorten(text)}, no number of paid requests; write the number into it")
        return int(text)

    def _locate(self, query: str) -> tuple[dict[str, Any], Path]:
        request = {
            "format": FORMAT_VERSION,
            "engine": self._engine,
            "query": normalize_query(query),
            "parameters": self._parameters,
        }
        text = json.dumps(request, ensure_ascii=False, sort_keys=True)
        digest = hashlib.sha256(text.encode("utf-8")).hexdigest()
        return request, self._folder / digest[:2] / f"{digest}.json"

    def _check_source(self, digest: str) -> None:
        path = self._folder / "source"
        with contextlib.nullcontext() if self.mode is CacheMode.REPLAY else _locked(self._folder / "locks" / "source"):
            found = path.read_text(encoding="utf-8").strip() if path.exists() else None
            if found is None and self.mode is CacheMode.RECORD:
                _write_whole(path, f"{digest}\n".encode())
        if found is not None and found != digest and self.mode is not CacheMode.OFF:
            raise RetrievalError(
                f"{self._folder} was recorded from another search engine configuration than the environment names "
                "now; answers of both would be mixed: use another cache directory, or restore the configuration"
            )


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    # A lock of an own open file excludes other threads of this process as well.
    with path.open("ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _write_whole(path: Path, content: bytes) -> None:
    with written_whole(path, alone=False) as file:
        file.write(content)
