"""What a kind of index is: how it is estimated, built into a directory, and opened from one."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from rex_rag.types import Passage

if TYPE_CHECKING:
    from rex_rag.retrieval.estimate import Estimate
    from rex_rag.retrieval.index.arguments import IndexArguments
    from rex_rag.retrieval.indexed import IndexedRetriever
    from rex_rag.retrieval.manifest import Manifest
    from rex_rag.retrieval.passages import PassageStore


@dataclass(frozen=True)
class SearchOptions:
    """How an index is searched, as far as that is open once it is built."""

    engine: str = "auto"
    devices: tuple[str, ...] = ()
    encoder: str | None = None
    nprobe: int | None = None
    ef_search: int | None = None


class IndexKind(ABC):
    """What a kind of index adds to the passages of a directory.

    settings: the `IndexArguments` that it reads and not every kind does, all of them unset by default.
    """

    name: ClassVar[str]
    settings: ClassVar[tuple[str, ...]] = ()

    def __init__(self, arguments: IndexArguments) -> None:
        self.arguments = arguments

    @staticmethod
    def problems(arguments: IndexArguments) -> Iterator[str]:
        """What is wrong with its settings."""
        yield from ()

    @staticmethod
    @abstractmethod
    def identity(arguments: IndexArguments) -> dict[str, Any]:
        """The arguments that make the index what it is, `kind` among them."""

    @staticmethod
    def options(manifest: Manifest) -> tuple[str, ...]:
        """The `SearchOptions`, besides devices, that such an index takes."""
        return ()

    @abstractmethod
    def estimate(self, sample: Sequence[Passage], total: int) -> Estimate:
        """What building over `total` passages like those of the sample will take."""

    @abstractmethod
    def build(
        self, passages: PassageStore, corpus_sha256: str, directory: Path, work: Path
    ) -> tuple[dict[str, Any] | None, dict[str, Any]]:
        """Write the index's files into `directory`; `work` is for what is thrown away at the end.

        Both may hold what a killed build left. Returns what the manifest says of encoder and index.
        """

    @staticmethod
    @abstractmethod
    def open(
        directory: Path, manifest: Manifest, passages: PassageStore, options: SearchOptions, name: str
    ) -> IndexedRetriever:
        """Open what `build` wrote. `name` says of the directory what a description ends with.

        Raises:
            RetrievalError: for options that the index does not take.
        """
