"""Questions with gold answers, from any mixture of Hugging Face datasets and local files, in one fixed layout.

Invariant: every row has a non-blank question and at least one non-blank gold answer; ids are unique. Which rows a
subset holds depends on the seed and on the source alone: a smaller subset is part of a larger one with the same seed,
and further sources in the mixture do not change it.
"""

from __future__ import annotations

import json
import logging
import math
import random
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rex_rag.data.jsonl import iter_json_objects, shorten

if TYPE_CHECKING:
    from datasets import Dataset

logger = logging.getLogger(__name__)

# FlashRAG's names (arXiv 2405.13576); its training sets are the method's.
QUESTION_COLUMN = "question"
ANSWERS_COLUMN = "golden_answers"
ID_COLUMN = "id"
FILE_SUFFIXES = (".jsonl", ".json", ".parquet")
DEFAULT_SPLIT = "train"
_IDS_NAMED_IN_WARNINGS = 5


class QuestionError(ValueError):
    """Questions cannot be loaded; the message names the source, the reason and the way out."""


@dataclass
class QuestionSource:
    """One part of the mixture. `path`, `name`, `data_files` and `split` are those of `datasets.load_dataset`.

    A `path` that exists as a .jsonl, .json or .parquet file or as a folder is read from there. `fraction` of the
    usable rows, in (0, 1], or the first `max_questions` of a seeded order, are kept; not both.
    """

    path: str
    name: str | None = None
    data_files: str | list[str] | dict[str, Any] | None = None
    split: str = DEFAULT_SPLIT
    question_column: str | None = None
    answers_column: str | None = None
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
        if self.fraction is not None and not (_is_number(self.fraction) and 0 < self.fraction <= 1):
            raise QuestionError(f"{self.path}: fraction={self.fraction!r}; it must be in (0, 1]")
        check_count(self.max_questions, f"{self.path}: max_questions")

    @property
    def local_path(self) -> Path | None:
        """The existing file or folder that `path` means, or `None` for a dataset of the Hub."""
        path = Path(self.path).expanduser()
        if path.is_dir() or (path.is_file() and path.suffix in FILE_SUFFIXES):
            return path
        return None

    @property
    def label(self) -> str:
        """Short name: the configuration, folder/stem of a file, or the last part of the path."""
        local = self.local_path
        if local is not None and local.is_file():
            return f"{local.resolve().parent.name}/{local.stem}"
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
        default=QUESTION_COLUMN, metadata={"help": "Column of the question, unless a source names its own."}
    )
    answers_column: str = field(
        default=ANSWERS_COLUMN,
        metadata={"help": "Column of the gold answers, a string or a list, unless a source names its own."},
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
        entries = self.datasets or []
        entries = [entries] if isinstance(entries, str | Mapping | QuestionSource) else entries
        self.datasets = [QuestionSource.from_value(entry) for entry in entries]
        for name in ("question_column", "answers_column"):
            value = getattr(self, name)
            if not isinstance(value, str) or not value:
                raise QuestionError(f"{name}={value!r}; it must be the name of a column")
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
    """The rows of one source in the common layout; unusable ones are dropped, counted and named."""
    question_column = source.question_column or arguments.question_column
    answers_column = source.answers_column or arguments.answers_column
    columns, located_rows = _open_source(source, wanted=(ID_COLUMN, question_column, answers_column))
    for column, setting in ((question_column, "question_column"), (answers_column, "answers_column")):
        if column not in columns:
            raise QuestionError(
                f"{source.path}: there is no column {column!r}; the columns are {', '.join(columns)}. "
                f"Set {setting} to the right one"
            )
    usable, total = [], 0
    dropped: dict[str, list[str]] = {"without a question": [], "without an answer": []}
    for total, (where, row) in enumerate(located_rows, start=1):
        identity = row.get(ID_COLUMN)
        identity = f"{label}/{total}" if identity is None or identity == "" else str(identity)
        question = _question_of(row.get(question_column), f"{where}, column {question_column!r}")
        answers = _answers_of(row.get(answers_column), f"{where}, column {answers_column!r}")
        if not question:
            dropped["without a question"].append(identity)
        elif not answers:
            dropped["without an answer"].append(identity)
        else:
            usable.append({"id": identity, "question": question, "golden_answers": answers, "source": label})
    causes = "; ".join(f"{len(ids)} {cause} ({_first(ids)})" for cause, ids in dropped.items() if ids)
    if not usable:
        raise QuestionError(
            f"{source.path}: none of its {total} rows can be used: {causes or 'it is empty'}. "
            f"Check the columns {question_column!r} and {answers_column!r}, and the split"
        )
    if causes:
        logger.warning("%s: dropped %d of %d rows: %s", source.path, total - len(usable), total, causes)
    return usable


def _open_source(
    source: QuestionSource, wanted: tuple[str, ...]
) -> tuple[list[str], Iterable[tuple[str, Mapping[str, Any]]]]:
    """Return (all column names, rows each with the place to name in an error); rows may lack unwanted columns."""
    local = source.local_path
    if local is None or local.is_dir():
        dataset = _load_dataset(source, local)
        # Decoding metadata, whole documents in some sets, would take longer than all the rest.
        narrow = dataset.select_columns([name for name in dataset.column_names if name in wanted])
        return dataset.column_names, ((f"{source.path}, row {n}", row) for n, row in enumerate(narrow, start=1))
    if source.name is not None or source.data_files is not None or source.split != DEFAULT_SPLIT:
        raise QuestionError(
            f"{local}: name={source.name!r}, data_files={source.data_files!r}, split={source.split!r}: a file has no "
            "configurations or splits; leave these keys out, and use fraction or max_questions for a part of it"
        )
    if local.suffix == ".parquet":
        rows = list(_parquet_rows(local))
    elif local.suffix == ".json" and _starts_with_bracket(local):
        rows = list(_array_rows(local))
    else:
        rows = [(f"{local}, line {number}", row) for number, row in iter_json_objects(local, QuestionError)]
    if not rows:
        raise QuestionError(f"{local}: the file holds no row; write or download it again")
    return list(dict.fromkeys(name for _, row in rows for name in row)), rows


def _load_dataset(source: QuestionSource, folder: Path | None) -> Dataset:
    from datasets import DatasetDict, load_dataset, load_from_disk

    path = Path(source.path).expanduser()
    if folder is None and (path.is_file() or path.is_absolute() or path.suffix in FILE_SUFFIXES):
        reason = f"has none of the endings {', '.join(FILE_SUFFIXES)}" if path.is_file() else "does not exist"
        raise QuestionError(f"{source.path}: the file {reason}; check the path (working directory: {Path.cwd()})")
    saved = folder is not None and any((folder / name).exists() for name in ("state.json", "dataset_dict.json"))
    try:
        if not saved:
            return load_dataset(
                str(folder) if folder else source.path, source.name, data_files=source.data_files, split=source.split
            )
        stored = load_from_disk(str(folder))
        return stored[source.split] if isinstance(stored, DatasetDict) else stored
    # The library raises anything from KeyError to its own and the network's errors here; all mean the same to a user.
    except Exception as error:
        raise QuestionError(
            f"{source.path} (name={source.name!r}, data_files={source.data_files!r}, split={source.split!r}) cannot "
            f"be loaded: {type(error).__name__}: {error}. Check name and split, or download it first and name the file"
        ) from error


def _parquet_rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.read_table(path)
    except (pyarrow.ArrowException, OSError) as error:
        raise QuestionError(f"{path}: not a readable parquet file ({error}); write or download it again") from error
    for number, row in enumerate(table.to_pylist(), start=1):
        yield f"{path}, row {number}", row


def _starts_with_bracket(path: Path) -> bool:
    return path.read_bytes()[:1024].lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"[")


def _array_rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    try:
        rows = json.loads(path.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise QuestionError(f"{path}: broken JSON ({error}); the file must hold one array of objects") from error
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, dict):
            raise QuestionError(f"{path}, entry {number}: an object is needed, found {shorten(row)}")
        yield f"{path}, entry {number}", row


def _question_of(value: Any, where: str) -> str:
    if value is not None and not isinstance(value, str):
        raise QuestionError(f"{where}: {type(value).__name__} {shorten(value)}; a question must be a string")
    return (value or "").strip()


def _answers_of(value: Any, where: str) -> list[str]:
    answers = []
    for answer in value if isinstance(value, list | tuple) else [value]:
        if answer is not None and (isinstance(answer, bool) or not isinstance(answer, str | int | float)):
            raise QuestionError(
                f"{where}: {type(answer).__name__} {shorten(answer)}; give a string or a list of strings"
            )
        answers.append("" if answer is None else str(answer).strip())
    return [answer for answer in answers if answer]


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


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
