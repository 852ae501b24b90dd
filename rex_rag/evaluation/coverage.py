"""For how many questions a gold answer stands in the corpus at all, and in the passages that a retriever finds.

The first is a ceiling for any agent that takes its answers from that corpus. On the 2018 Wikipedia, mending what it
lacks is reported to gain more than the differences between training algorithms (arXiv 2605.27881), so scores over
corpora of different coverage do not compare training.

An answer stands in a passage if its words do, in order and side by side, in the title or in the text, both normalised
as answers are scored (`rex_rag.answers`): the same rule as sub-match. That it stands there does not mean that the
passage supports it, so the figures are upper bounds, but for other spellings of answers ("Raimi's" holds no "Raimi").
Where every gold answer is yes or no they say nothing, so they are given without such questions too.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from rex_rag.answers import normalize_answer
from rex_rag.data.corpus import corpus_files, iter_passages
from rex_rag.evaluation.benchmarks import Benchmark
from rex_rag.evaluation.bootstrap import Estimate, bootstrap
from rex_rag.evaluation.records import Question
from rex_rag.retrieval.base import Retriever, checked_search
from rex_rag.retrieval.passages import PassageStore
from rex_rag.support.durable import written_whole
from rex_rag.support.errors import UserError
from rex_rag.support.progress_bars import progress_bar
from rex_rag.support.tables import markdown_table, markdown_text
from rex_rag.types import Passage

DEFAULT_KS = (1, 3, 5, 10)
_YES_NO = frozenset(("yes", "no"))
_QUERIES_A_BATCH = 256
_PASSAGES_REMEMBERED = 20_000
_PASSAGES_A_TICK = 1_000
_END = ""  # no word is empty


class AnswerMatcher:
    """Finds which of many answers stand in a text, as whole normalised words.

    The answers' words form a trie, walked from every word of a text: the time grows with the text and with the longest
    answer that begins there, not with the number of answers. An answer that normalises to nothing is never found.
    """

    def __init__(self, answers: Iterable[str]) -> None:
        self._root: dict[str, Any] = {}
        for answer in answers:
            words = normalize_answer(answer).split()
            node = self._root
            for word in words:
                node = node.setdefault(word, {})
            if words:
                node[_END] = " ".join(words)

    def find(self, text: str) -> set[str]:
        """The normalised forms of the answers in `text`."""
        found = set()
        words = normalize_answer(text).split()
        root = self._root
        for start, word in enumerate(words, start=1):
            node = root.get(word)
            position = start
            while node is not None:
                if _END in node:
                    found.add(node[_END])
                node = node.get(words[position]) if position < len(words) else None
                position += 1
        return found

    def forget(self, form: str) -> None:
        """Look for a normalised form no longer."""
        node, path = self._root, []
        for word in form.split():
            path.append((node, word))
            node = node[word]
        del node[_END]
        for parent, word in reversed(path):
            if parent[word]:
                break
            del parent[word]

    def find_in(self, passage: Passage) -> set[str]:
        """The normalised forms of the answers in title or text; none across the two."""
        return self.find(passage.title) | self.find(passage.text)


@dataclass(frozen=True)
class Coverage:
    """Coverage of one benchmark, question by question in the order of `ids`.

    in_corpus: whether a gold answer stands in the corpus; `None` if no corpus was looked through. ranks: rank from 1
    of the first found passage that holds one, `None` where the first `max(ks)` hold none; `None` altogether if nothing
    was searched. yes_no: whether every gold answer is yes or no. passages: passages of the corpus.
    """

    name: str
    ids: tuple[str, ...]
    yes_no: tuple[bool, ...]
    ks: tuple[int, ...]
    in_corpus: tuple[bool, ...] | None = None
    ranks: tuple[int | None, ...] | None = None
    passages: int | None = None
    retriever: str | None = None

    def estimates(self, *, with_yes_no: bool = True) -> dict[str, Estimate]:
        """`corpus`, `top 1`, `top 3`, ... -> share of questions in [0, 1] with its interval; empty for no question."""
        kept = np.array([with_yes_no or not vague for vague in self.yes_no])
        if not kept.any():
            return {}
        covered = {}
        if self.in_corpus is not None:
            covered["corpus"] = np.array(self.in_corpus)
        if self.ranks is not None:
            ranks = np.array([np.inf if rank is None else rank for rank in self.ranks])
            covered |= {f"top {k}": ranks <= k for k in self.ks}
        return {name: bootstrap(hits[kept].astype(float)) for name, hits in covered.items()}

    def as_row(self) -> dict[str, Any]:
        """Figures, and each question's own; JSON-able."""
        shares = {
            "all": (len(self.ids), self.estimates()),
            "without_yes_no": (self.yes_no.count(False), self.estimates(with_yes_no=False)),
        }
        questions = [
            {
                "id": identity,
                "yes_no": vague,
                "in_corpus": None if self.in_corpus is None else self.in_corpus[row],
                "rank": None if self.ranks is None else self.ranks[row],
            }
            for row, (identity, vague) in enumerate(zip(self.ids, self.yes_no, strict=True))
        ]
        return {
            "name": self.name,
            "passages": self.passages,
            "retriever": self.retriever,
            "searched_to": max(self.ks) if self.ranks is not None else None,
            **{
                group: {"n": n, **{name: estimate.as_row() for name, estimate in estimates.items()}}
                for group, (n, estimates) in shares.items()
            },
            "questions": questions,
        }


def measure_coverage(
    benchmarks: Sequence[Benchmark],
    passages: Iterable[Passage] | None = None,
    retriever: Retriever | None = None,
    ks: Sequence[int] = DEFAULT_KS,
    *,
    total: int | None = None,
) -> list[Coverage]:
    """Look for gold answers in all of `passages`, in one pass for all benchmarks, and in what `retriever` finds.

    Memory holds the answers and the last few thousand passages, however large the corpus. The question itself is the
    query: an agent that searches better finds more, up to the corpus's own figure.

    Args:
        total: how many passages there are, for the progress bar.

    Raises:
        ValueError: for nothing to look through, no passage in it, or `ks` that are not integers from 1 on.
        RetrievalError: when a search could not be answered.
    """
    if passages is None and retriever is None:
        raise UserError("neither passages nor a retriever were given; coverage needs one of them")
    wrong = [k for k in ks if isinstance(k, bool) or not isinstance(k, int) or k < 1]
    if wrong or not ks:
        raise UserError(f"top_k={list(ks)}; give at least one rank, each an integer of at least 1")
    ks = tuple(sorted(set(ks)))
    golden = [[_gold_words(question) for question in benchmark.questions] for benchmark in benchmarks]
    wanted = {form for answers in golden for forms in answers for form in forms}
    held, count = (None, None) if passages is None else _found_in_all(wanted, passages, total)
    matcher = AnswerMatcher(wanted if retriever is not None else ())
    return [
        Coverage(
            name=benchmark.name,
            ids=tuple(question.id for question in benchmark.questions),
            yes_no=tuple(bool(forms) and forms <= _YES_NO for forms in answers),
            ks=ks,
            in_corpus=None if held is None else tuple(not forms.isdisjoint(held) for forms in answers),
            ranks=None if retriever is None else tuple(_ranks(matcher, benchmark, answers, retriever, max(ks))),
            passages=count,
            retriever=None if retriever is None else retriever.description,
        )
        for benchmark, answers in zip(benchmarks, golden, strict=True)
    ]


def open_corpus(sources: Sequence[str | Path]) -> tuple[Iterator[Passage], int | None]:
    """The passages of corpus files and index directories, one after the other, and how many if that is known.

    Raises:
        RetrievalError, CorpusError: for a directory that is no index, and for a file that is missing or malformed.
    """
    opened: list[PassageStore | Path] = [
        PassageStore(path) if path.is_dir() else path for path in corpus_files([Path(source) for source in sources])
    ]
    stores = [one for one in opened if isinstance(one, PassageStore)]
    total = sum(map(len, stores)) if len(stores) == len(opened) else None
    return _passages_of(opened), total


def write_answerable(path: Path, benchmark: Benchmark, measured: Coverage) -> int:
    """Write the questions of which a gold answer stands in the corpus, in FlashRAG's layout; returns how many.

    The file is JSON lines with `id`, `question`, `golden_answers` and what there is of short `metadata`; it appears
    whole or not at all. Questions of yes or no are nearly always among them, since these words stand in any corpus.

    Raises:
        ValueError: where no question is left.
    """
    kept = [question for question, held in zip(benchmark.questions, measured.in_corpus or (), strict=True) if held]
    if not kept:
        raise UserError(
            f"{path} was not written: of {len(benchmark)} questions of {benchmark.name} none has a gold answer in the "
            "corpus; look whether this is the corpus that you mean"
        )
    with written_whole(path) as file:
        for question in kept:
            row: dict[str, Any] = {
                "id": question.id,
                "question": question.question,
                "golden_answers": list(question.golden_answers),
            }
            row |= {"metadata": question.metadata} if question.metadata else {}
            file.write((json.dumps(row, ensure_ascii=False) + "\n").encode())
    return len(kept)


def coverage_table(measured: Sequence[Coverage]) -> str:
    """A Markdown table, one row a benchmark and group of questions, and a line that says what its figures are."""
    names = list(dict.fromkeys(name for one in measured for name in one.estimates()))
    titles = ["benchmark", "questions", "n", *(f"in {name}" for name in names)]
    rows = []
    for one in measured:
        groups = [("all", len(one.ids), one.estimates())]
        if any(one.yes_no):
            groups.append(("without yes/no", one.yes_no.count(False), one.estimates(with_yes_no=False)))
        for group, n, estimates in groups:
            cells = [_cell(estimates.get(name)) for name in names]
            rows.append([markdown_text(one.name), group, f"{n:,}", *cells])
    table = markdown_table(titles, rows, text_columns=2)
    return f"{table}\nPer cent of the questions, in brackets the 95 % bootstrap interval."


def _cell(estimate: Estimate | None) -> str:
    if estimate is None:
        return "–"
    return f"{100 * estimate.mean:.1f} ({100 * estimate.low:.1f}–{100 * estimate.high:.1f})"


def _gold_words(question: Question) -> set[str]:
    """The normalised gold answers; of a multiple-choice question, the texts of the right choices."""
    golden: Sequence[str] = question.golden_answers
    if question.choices is not None:
        golden = [question.choices[letter] for letter in golden]
    return {words for words in map(normalize_answer, golden) if words}


def _found_in_all(forms: Iterable[str], passages: Iterable[Passage], total: int | None) -> tuple[set[str], int]:
    matcher = AnswerMatcher(forms)
    found: set[str] = set()
    count = 0
    # A total of 0 is a bar without an end: nobody knows how many lines a file has.
    with progress_bar(total or 0, "looking for answers", unit="passages") as bar:
        for count, passage in enumerate(passages, start=1):
            # Common answers are found early on, and would cost the most if they were looked for ever after.
            for form in matcher.find_in(passage):
                found.add(form)
                matcher.forget(form)
            if count % _PASSAGES_A_TICK == 0:
                bar.update(_PASSAGES_A_TICK)
        bar.update(count % _PASSAGES_A_TICK)
    if not count:
        raise UserError("there is no passage to look through; name a corpus that is not empty")
    return found, count


def _ranks(
    matcher: AnswerMatcher, benchmark: Benchmark, golden: Sequence[set[str]], retriever: Retriever, top_k: int
) -> Iterator[int | None]:
    find = lru_cache(_PASSAGES_REMEMBERED)(matcher.find_in)
    questions = benchmark.questions
    with progress_bar(len(questions), f"searching, {benchmark.name}", unit="questions") as bar:
        for start in range(0, len(questions), _QUERIES_A_BATCH):
            batch = questions[start : start + _QUERIES_A_BATCH]
            rankings = checked_search(retriever, [question.question for question in batch], top_k)
            for forms, ranking in zip(golden[start : start + len(batch)], rankings, strict=True):
                yield next(
                    # Scores differ from query to query, and would keep a passage from being known again.
                    (
                        rank
                        for rank, passage in enumerate(ranking[:top_k], start=1)
                        if not forms.isdisjoint(find(Passage(passage.id, passage.title, passage.text)))
                    ),
                    None,
                )
            bar.update(len(batch))


def _passages_of(opened: Sequence[PassageStore | Path]) -> Iterator[Passage]:
    for one in opened:
        if isinstance(one, PassageStore):
            yield from one
        else:
            yield from (passage for _, passage in iter_passages(one))
