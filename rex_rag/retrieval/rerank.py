"""A second look at what a retriever found: a cross-encoder reads query and passage together and orders anew.

Ordering is a function of the scores and of the first ranking: equal scores keep the order of the first ranking.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Protocol

from rex_rag.retrieval.base import RetrievalError, Retriever, check_request, checked_search
from rex_rag.retrieval.dense.checkpoints import LOCAL, find_checkpoint, public_name
from rex_rag.retrieval.indexed import NO_ROW, IndexedRetriever
from rex_rag.types import Passage

if TYPE_CHECKING:
    import numpy as np

logger = logging.getLogger(__name__)

# What is not among the candidates cannot be found: of the gold passages of hotpotqa_sample within 7,113 passages,
# exact search with all-MiniLM-L6-v2 has .81 among the first 10 and .88 among the first 50.
DEFAULT_CANDIDATES = 50
DEFAULT_BATCH_SIZE = 32  # sentence-transformers' own
PAIRS_PER_CALL = 8192  # bounds the texts held at once, a few megabytes


class PairScorer(Protocol):
    """Says how well passages answer queries. Safe to share between threads."""

    @property
    def description(self) -> str: ...

    def score(self, pairs: Sequence[tuple[str, str]]) -> np.ndarray:
        """Return one float32 a (query, passage text) pair, shape (n,), higher is better."""
        ...


class CrossEncoderScorer:
    """A sentence-transformers cross-encoder with one output.

    Scores are its raw outputs: a sigmoid would round clear winners to the same 1.0. Weights are read from safetensors
    alone, and no code from a model repository is run.

    Args:
        model: a name on the Hub, or a directory.
        revision: commit, tag or branch on the Hub.
        device: where it runs; the first GPU if there is one by default.
        batch_size: pairs a forward pass, >= 1.
        max_length: tokens a pair, query and passage together; the model's own limit by default.

    Raises:
        RetrievalError: for a model that cannot be read in this way, or with more than one output.
    """

    def __init__(
        self,
        model: str,
        revision: str | None = None,
        device: str | None = None,
        batch_size: int = DEFAULT_BATCH_SIZE,
        max_length: int | None = None,
    ) -> None:
        import threading

        try:
            from sentence_transformers import CrossEncoder
        except ImportError as error:
            raise RetrievalError(
                "re-ranking needs sentence-transformers: install it with `pip install 'rex-rag[retrieval]'`"
            ) from error
        if batch_size < 1:
            raise RetrievalError(f"batch_size={batch_size}; a forward pass needs at least 1 pair")
        try:
            checkpoint = find_checkpoint(model, revision)
            self._model = CrossEncoder(
                str(checkpoint.folder),
                device=device,
                max_length=max_length,
                trust_remote_code=False,
                model_kwargs={"use_safetensors": True},
            )
        except (OSError, ValueError, RetrievalError) as error:
            raise RetrievalError(
                f"the cross-encoder {model!r} cannot be loaded ({' '.join(str(error).split())[:300]}); it must be a "
                "sequence classification model with safetensors weights that needs no code of its own"
            ) from error
        if self._model.num_labels != 1:
            raise RetrievalError(
                f"the cross-encoder {model!r} has {self._model.num_labels} outputs, and nothing says which one is "
                "relevance; use a model with one"
            )
        name = public_name(model, checkpoint.revision).rsplit("/", 1)[-1]
        self._description = f"cross-encoder {name} ({checkpoint.revision.removeprefix(LOCAL)[:12]})"
        self._batch_size = batch_size
        # The tokenizer keeps truncation settings that two threads must not change under each other.
        self._lock = threading.Lock()

    @property
    def description(self) -> str:
        return self._description

    def score(self, pairs: Sequence[tuple[str, str]]) -> np.ndarray:
        """See `PairScorer.score`."""
        import numpy as np
        from torch.nn import Identity

        with self._lock:
            scores = self._model.predict(
                list(pairs), batch_size=self._batch_size, activation_fn=Identity(), show_progress_bar=False
            )
        return np.asarray(scores, dtype=np.float32)


class RerankedRetriever(IndexedRetriever):
    """Ranks the first `candidates` passages of `inner` anew by `scorer`. Safe to share between threads.

    Scores are the scorer's. `top_k` above `candidates` asks `inner` for as many as are wanted.

    Raises:
        RetrievalError: for `candidates` below 1.
    """

    def __init__(self, inner: IndexedRetriever, scorer: PairScorer, candidates: int = DEFAULT_CANDIDATES) -> None:
        _check_candidates(candidates)
        super().__init__(inner.passages, _describe(inner, scorer, candidates))
        self._inner, self._scorer, self._candidates = inner, scorer, candidates
        self.held = inner.held

    def encode(self, queries: Sequence[str]) -> tuple[list[str], Any]:
        """Keep the queries beside what `inner` makes of them: the cross-encoder reads their words."""
        return list(queries), self._inner.encode(queries)

    def rank(self, encoded: tuple[list[str], Any], top_k: int) -> tuple[np.ndarray, np.ndarray]:
        """See `IndexedRetriever.rank`; the pairs of all queries are scored together."""
        import numpy as np

        queries, inner_encoded = encoded
        _, rows = self._inner.rank(inner_encoded, max(top_k, self._candidates))
        found = rows != NO_ROW
        scores = np.full(rows.shape, -np.inf, dtype=np.float32)
        scores[found] = _score_all(
            self._scorer,
            [(queries[query], int(rows[query, place])) for query, place in np.argwhere(found)],
            self._text,
        )
        width = min(top_k, len(self))
        # Stable, so that ties keep the first ranking; what could not be filled has the lowest score and stays last.
        order = np.argsort(-scores, axis=1, kind="stable")[:, :width]
        return np.take_along_axis(scores, order, axis=1), np.take_along_axis(rows, order, axis=1)

    def _text(self, row: int) -> str:
        return pair_text(self.passages[row])


class RerankedSearch(Retriever):
    """`RerankedRetriever` for retrievers without an index, such as online engines.

    Args:
        candidates: how many passages `inner` is asked for, >= 1, and not more than it gives at once.
    """

    def __init__(self, inner: Retriever, scorer: PairScorer, candidates: int) -> None:
        _check_candidates(candidates)
        self._inner, self._scorer, self._candidates = inner, scorer, candidates
        self._description = _describe(inner, scorer, candidates)
        self.max_top_k, self.passage_count = inner.max_top_k, inner.passage_count

    @property
    def description(self) -> str:
        return self._description

    def check(self) -> None:
        """Check the retriever and score one pair."""
        self._inner.check()
        _score_all(self._scorer, [("query", "passage")], str)

    def search(self, queries: Sequence[str], top_k: int) -> list[list[Passage]]:
        """See `Retriever.search`; scores are the scorer's."""
        check_request(queries, top_k)
        if not queries:
            return []
        rankings = checked_search(self._inner, queries, max(top_k, self._candidates))
        pairs = [(query, passage) for query, found in zip(queries, rankings, strict=True) for passage in found]
        scores = iter(_score_all(self._scorer, pairs, pair_text).tolist())
        scored = [[replace(passage, score=next(scores)) for passage in found] for found in rankings]
        return [sorted(found, key=lambda passage: passage.score or 0.0, reverse=True)[:top_k] for found in scored]

    def read(self, keys: Sequence[str]) -> list[list[Passage]]:
        return self._inner.read(keys)

    def close(self) -> None:
        self._inner.close()

    def hold_to(self, index: str) -> None:
        self._inner.hold_to(index)


def rerank(
    inner: Retriever, model: str, candidates: int = DEFAULT_CANDIDATES, devices: Sequence[str] = ()
) -> RerankedRetriever | RerankedSearch:
    """Put a cross-encoder behind any retriever; it runs on the first of `devices`.

    One that gives at most `max_top_k` passages a search (online engines) is asked for no more.

    Raises:
        RetrievalError: see `CrossEncoderScorer`; also for `candidates` below 1.
    """
    _check_candidates(candidates)
    scorer = CrossEncoderScorer(model, device=devices[0] if devices else None)
    if inner.stages is not None:
        return RerankedRetriever(inner.stages, scorer, candidates)
    most = inner.max_top_k or candidates
    if candidates > most:
        logger.info("%s gives %d passages a search: re-ranking these, not %d", inner.description, most, candidates)
    return RerankedSearch(inner, scorer, min(candidates, most))


def pair_text(passage: Passage) -> str:
    """What a cross-encoder reads of a passage: the title, if there is one, on a line before the text."""
    return f"{passage.title}\n{passage.text}" if passage.title.strip() else passage.text


def _score_all(scorer: PairScorer, pairs: Sequence[tuple[str, Any]], text: Callable[[Any], str]) -> np.ndarray:
    """Scores of (query, key) pairs, shape (n,), the text of a key read only when its turn comes."""
    import numpy as np

    parts = [np.empty(0, dtype=np.float32)]
    for first in range(0, len(pairs), PAIRS_PER_CALL):
        part = [(query, text(key)) for query, key in pairs[first : first + PAIRS_PER_CALL]]
        scores = np.asarray(scorer.score(part), dtype=np.float32)
        if scores.shape != (len(part),) or not np.isfinite(scores).all():
            raise RetrievalError(
                f"{scorer.description} gave scores of shape {scores.shape} for {len(part)} pairs, "
                f"{int((~np.isfinite(scores)).sum())} of them not finite; one finite number a pair is needed"
            )
        parts.append(scores)
    return np.concatenate(parts)


def _check_candidates(candidates: int) -> None:
    if isinstance(candidates, bool) or not isinstance(candidates, int) or candidates < 1:
        raise RetrievalError(f"candidates={candidates!r}; re-ranking needs an integer of at least 1")


def _describe(inner: Retriever, scorer: PairScorer, candidates: int) -> str:
    return f"{inner.description}, the first {candidates} re-ranked by {scorer.description}"
