"""Questions with gold answers, from any mixture of Hugging Face datasets and local files, in one fixed layout.

Invariant: every row has a non-blank question and at least one non-blank gold answer; ids are unique. Which rows a
subset holds depends on the seed and on the source alone: a smaller subset is part of a larger one with the same seed,
and further sources in the mixture do not change it.
"""

from __future__ import annotations

import logging
import random
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rex_rag.data.question_files import has_file_suffix, open_rows
from rex_rag.data.question_rows import (
    BLANK_ANSWERS,
    Columns,
    QuestionError,
    check_answers_column,
    is_alias_of,
    no_column,
    read_row,
)
from rex_rag.support.numbers import is_number

if TYPE_CHECKING:
    from datasets import Dataset

logger = logging.getLogger(__name__)

DEFAULT_SPLIT = "train"
_IDS_NAMED_IN_WARNINGS = 5


@dataclass
class QuestionSource:
    """One part of the mixture. `path`, `name`, `data_files` and `split` are those of `datasets.load_dataset`.

    A `path` that is a folder, or ends like a file of questions (`question_files.FILE_SUFFIXES`), is read from there.
    `answers_column` may be a list of columns, whose answers are joined. `fraction` of the usable rows, in (0, 1], or
    the first `max_questions` of a seeded order, are kept; not both.
    """

    path: str
    name: str | None = None
    data_files: str | list[str] | dict[str, Any] | None = None
    split: str = DEFAULT_SPLIT
    question_column: str | None = None
    answers_column: str | list[str] | None = None
    fraction: float | None = None
    max_questions: int | None = None

    @classmethod
    def from_value(cls, value: Any) -> QuestionSource:
        """Normalise what a recipe or the command line gives: a source, a mapping or a bare path."""
        if isinstance(value, cls):
            source = value
        elif isinstance(value, str):
            source = cls(path=value)
        elif isinstance(value, Mapping):
            known = [entry.name for entry in fields(cls)]
            unknown = [key for key in value if key not in known]
            if unknown:
                raise QuestionError(
                    f"datasets entry {dict(value)} has unknown keys {unknown}; known keys are {', '.join(known)}"
                )
            if "path" not in value:
                raise QuestionError(f"datasets entry {dict(value)} has no 'path'; name a dataset, a file or a folder")
            source = cls(**value)
        else:
            raise QuestionError(f"datasets entry {value!r} is a {type(value).__name__}; give a mapping or a path")
        source.validate()
        return source

    def validate(self) -> None:
        """Raise `QuestionError` for values that are out of range or do not go together."""
        for name in ("path", "split"):
            value = getattr(self, name)
            if not isinstance(value, str) or not value.strip():
                raise QuestionError(f"datasets entry has {name}={value!r}; it must be a non-blank string")
        if self.fraction is not None and self.max_questions is not None:
            raise QuestionError(
                f"{self.path}: fraction={self.fraction} and max_questions={self.max_questions} both limit the source; "
                "set one of them"
            )
        if self.fraction is not None and not (is_number(self.fraction) and 0 < self.fraction <= 1):
            raise QuestionError(f"{self.path}: fraction={self.fraction!r}; it must be in (0, 1]")
        check_count(self.max_questions, f"{self.path}: max_questions")
        if self.answers_column is not None:
            check_answers_column(self.answers_column, self.path)

    @property
    def local_path(self) -> Path | None:
        """The existing file or folder that `path` means, or `None` for a dataset of the Hub."""
        path = Path(self.path).expanduser()
        if path.is_dir() or (path.is_file() and has_file_suffix(path)):
            return path
        return None

    @property
    def label(self) -> str:
        """Short name: the configuration, folder/stem of a file, or the last part of the path."""
        local = self.local_path
        if local is not None and local.is_file():
            return f"{local.resolve().parent.name}/{Path(local.name.removesuffix('.gz')).stem}"
        return self.name or (local.resolve().name if local else self.path.rstrip("/").rsplit("/", 1)[-1])


@dataclass
class QuestionArguments:
    """Which questions to use.

    Raises:
        QuestionError: for unknown keys of an entry and for values that are out of range or do not go together.
    """

    # The command line gives paths (argparse calls QuestionSource on each), a recipe gives mappings.
    datasets: list[QuestionSource] = field(
        default_factory=list,
        metadata={
            "help": "Question sets to mix. In a recipe: a list of mappings with the keys path, name, data_files, "
            "split, question_column, answers_column, fraction, max_questions. On the command line: paths of local "
            "files or folders, or names of datasets."
        },
    )
    question_column: str = field(
        default=Columns.question, metadata={"help": "Column of the question, unless a source names its own."}
    )
    answers_column: str = field(
        default=str(Columns.answers),
        metadata={"help": "Column of the gold answers, a string or a list, unless a source names its own or several."},
    )
    max_questions: int | None = field(
        default=None, metadata={"help": "Keep at most this many questions of the whole mixture, drawn by subset_seed."}
    )
    subset_seed: int = field(default=0, metadata={"help": "Seed of the subsets and of shuffle_questions."})
    shuffle_questions: bool = field(
        default=False,
        metadata={"help": "Shuffle the mixture once when loading; the trainer's own shuffling is another setting."},
    )

    def __post_init__(self) -> None:
        given: Any = self.datasets or []
        entries = [given] if isinstance(given, str | Mapping | QuestionSource) else given
        self.datasets = [QuestionSource.from_value(entry) for entry in entries]
        for name in ("question_column", "answers_column"):
            value = getattr(self, name)
            if not isinstance(value, str) or not value:
                raise QuestionError(
                    f"{name}={value!r}; it must be the name of a column (an entry of `datasets` may name several of "
                    "answers)"
                )
        check_count(self.max_questions, "max_questions")
        if isinstance(self.subset_seed, bool) or not isinstance(self.subset_seed, int):
            raise QuestionError(f"subset_seed={self.subset_seed!r}; it must be an integer")


def load_questions(arguments: QuestionArguments) -> Dataset:
    """Load the mixture with the columns id (str), question (str), golden_answers (list of str), source (str).

    Rows without a question or without an answer are dropped and named in one warning a source. Sources follow each
    other in the order given, rows in the order of their source, unless `shuffle_questions` is set.

    Raises:
        QuestionError: for no source, a source that is missing, empty or malformed, a missing column (the existing ones
            are listed), or a source that keeps no row.
    """
    from datasets import Dataset, Features, List, Value

    if not arguments.datasets:
        raise QuestionError("no question set was given; name at least one under `datasets`")
    labels = _unique_labels(arguments.datasets)
    parts = [_usable_rows(source, label, arguments) for source, label in zip(arguments.datasets, labels, strict=True)]
    # Before any subset is taken, so that a question keeps its id whichever others are drawn.
    _make_ids_unique(parts)
    rows = []
    for source, label, part in zip(arguments.datasets, labels, parts, strict=True):
        limit = source.max_questions
        if source.fraction is not None:
            limit = max(1, round(source.fraction * len(part)))
        rows += _seeded_subset(part, limit, arguments.subset_seed, label)
    rows = _seeded_subset(rows, arguments.max_questions, arguments.subset_seed, "the mixture")
    if arguments.shuffle_questions:
        random.Random(f"{arguments.subset_seed}/shuffle").shuffle(rows)
    text = Value("string")
    features = Features({"id": text, "question": text, "golden_answers": List(text), "source": text})
    logger.info("loaded %d questions: %s", len(rows), dict(Counter(row["source"] for row in rows)))
    return Dataset.from_dict({name: [row[name] for row in rows] for name in features}, features=features)


def check_count(value: Any, name: str) -> None:
    """Raise `QuestionError` unless the value is `None` or an integer of at least 1."""
    if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
        raise QuestionError(f"{name}={value!r}; it must be an integer of at least 1, or left out for no limit")


def _usable_rows(source: QuestionSource, label: str, arguments: QuestionArguments) -> list[dict[str, Any]]:
    """The rows of one source in the common layout; those without question or answer are dropped, counted and named."""
    columns = Columns(
        source.question_column or arguments.question_column, source.answers_column or arguments.answers_column
    )
    is_file = has_file_suffix(Path(source.path)) and not Path(source.path).expanduser().is_dir()
    where, held, rows = open_rows(
        source.path,
        question_column=columns.question,
        name=source.name,
        data_files=source.data_files,
        split=None if is_file and source.split == DEFAULT_SPLIT else source.split,
        wanted=lambda name: name in (columns.id, columns.question, *columns.of_answers) or is_alias_of(name, columns),
    )
    for names, setting in (([columns.question], "question_column"), (columns.of_answers, "answers_column")):
        if absent := [name for name in names if name not in held]:
            raise no_column(where, absent, setting, held)
    usable, blank = [], 0
    dropped: dict[str, list[str]] = {"without a question": [], "without an answer": []}
    for number, (place, values) in enumerate(rows, start=1):
        row = read_row(values, columns, place)
        identity = row.id or f"{label}/{number}"
        if not row.question:
            dropped["without a question"].append(identity)
        elif not row.answers:
            dropped["without an answer"].append(identity)
        else:
            blank += row.blank
            usable.append({"id": identity, "question": row.question, "golden_answers": row.answers, "source": label})
    causes = "; ".join(f"{len(ids)} {cause} ({_first(ids)})" for cause, ids in dropped.items() if ids)
    if not usable:
        raise QuestionError(
            f"{where}: none of its {len(rows)} rows can be used: {causes or 'it is empty'}. Check the columns "
            f"{columns.question!r} and {columns.answers!r}, and the split"
        )
    if causes:
        logger.warning("%s: dropped %d of %d rows: %s", where, len(rows) - len(usable), len(rows), causes)
    if blank:
        logger.warning(BLANK_ANSWERS, where, blank)
    return usable


def _seeded_subset(rows: list[dict[str, Any]], limit: int | None, seed: int, name: str) -> list[dict[str, Any]]:
    """The first `limit` rows of an order drawn from (seed, name), in the rows' own order."""
    if limit is None or limit >= len(rows):
        if limit is not None and limit > len(rows):
            logger.warning("%s: %d questions were asked for, but only %d exist; all are used", name, limit, len(rows))
        return rows
    order = list(range(len(rows)))
    # Cut a seeded order, not the file's: real sets are sorted by topic, level or origin.
    random.Random(f"{seed}/{name}").shuffle(order)
    return [rows[index] for index in sorted(order[:limit])]


def _unique_labels(sources: list[QuestionSource]) -> list[str]:
    seen: Counter[str] = Counter()
    labels = []
    for source in sources:
        seen[source.label] += 1
        labels.append(source.label if seen[source.label] == 1 else f"{source.label}#{seen[source.label]}")
    return labels


def _make_ids_unique(parts: list[list[dict[str, Any]]]) -> None:
    """Prefix ids that several sources share with the source; number those that a source repeats."""
    owners = Counter(identity for part in parts for identity in {row["id"] for row in part})
    occurrences: Counter[str] = Counter()
    taken: set[str] = set()
    repeated = []
    for row in (row for part in parts for row in part):
        identity = f"{row['source']}:{row['id']}" if owners[row["id"]] > 1 else row["id"]
        unique = identity
        while unique in taken:
            occurrences[identity] += 1
            unique = f"{identity}#{occurrences[identity] + 1}"
        if unique != identity:
            repeated.append(identity)
        taken.add(unique)
        row["id"] = unique
    if repeated:
        logger.warning("%d rows repeat an earlier id (%s); '#2' and so on was added", len(repeated), _first(repeated))


def _first(ids: list[str]) -> str:
    named = ", ".join(ids[:_IDS_NAMED_IN_WARNINGS])
    return named + (", …" if len(ids) > _IDS_NAMED_IN_WARNINGS else "")
