"""Benchmarks: the seven question sets of the paper by name, the same from local files, and a user's own.

Invariant: a benchmark holds every row of its source or does not load at all; ids are unique; `sha256` depends on ids,
questions, gold answers and choices alone, so that equal hashes mean that two runs answered the same questions.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

from rex_rag.data.question_files import open_rows
from rex_rag.data.question_rows import QuestionError, check_answers_column
from rex_rag.evaluation.benchmark_rows import BenchmarkColumns, questions_of
from rex_rag.evaluation.records import Question
from rex_rag.support.wording import describe_unknown

logger = logging.getLogger(__name__)

OPEN = "open"
MULTIPLE_CHOICE = "multiple_choice"
KINDS = (OPEN, MULTIPLE_CHOICE)

FLASHRAG_REPOSITORY = "RUC-NLPIR/FlashRAG_datasets"
# name -> (split, number of questions). FlashRAG (arXiv 2405.13576) and Search-R1 (arXiv 2503.09516) take the test
# split where its answers are public, and the development split of the other three.
FLASHRAG_SETS = {
    "nq": ("test", 3_610),
    "triviaqa": ("test", 11_313),
    "popqa": ("test", 14_267),
    "hotpotqa": ("dev", 7_405),
    "2wikimultihopqa": ("dev", 12_576),
    "musique": ("dev", 2_417),
    "bamboogle": ("test", 125),
}
# A name becomes a folder of a run.
_NAME = re.compile(r"\w[\w.-]*")
# Alike enough to one of the seven to be it, mistyped: `bambogle`, `hotpot_qa`; `nq2` is not.
_NEAR = 0.85
_DESCRIPTION_SUFFIXES = (".yaml", ".yml")


@dataclass(frozen=True)
class Benchmark:
    """Questions to be answered, in a fixed order.

    kind: `open` or `multiple_choice`. source: where the questions came from, for people. size: questions of the whole
    set. subset: how these were chosen if they are a part of it.
    """

    name: str
    kind: str
    questions: tuple[Question, ...]
    source: str
    size: int
    subset: str | None = None

    def __len__(self) -> int:
        return len(self.questions)

    @cached_property
    def sha256(self) -> str:
        """Hash of the canonical questions: one JSON object a line, in order; metadata does not count."""
        digest = hashlib.sha256()
        for question in self.questions:
            row = [question.id, question.question, question.golden_answers, question.choices]
            digest.update(json.dumps(row, ensure_ascii=False, sort_keys=True, separators=(",", ":")).encode() + b"\n")
        return digest.hexdigest()

    def as_row(self) -> dict[str, Any]:
        """What a run card says of a benchmark; JSON-able."""
        return {
            "name": self.name,
            "kind": self.kind,
            "questions": len(self),
            "size": self.size,
            "subset": self.subset,
            "sha256": self.sha256,
            "source": self.source,
        }


@dataclass
class BenchmarkSource:
    """A user's own set, as a YAML file or a mapping in a recipe describes it.

    path: a .jsonl, .jsonl.gz, .json, .csv or .parquet file (relative to the description's folder), or a folder or a
    dataset of the Hub, then with `config`, `split` and `revision`. name: default, the file's. size: rows that there
    must be. `answers_column` may be a list of columns, whose answers are joined.

    kind `multiple_choice`: `choices_column` names a column with a mapping of letters to texts, a list of texts or a
    mapping of `label` and `text` to lists; or it is itself a list of columns, one a choice, or a mapping of letters to
    columns. A null is a choice that this question lacks. Gold answers are letters unless `answers_are` says `index`
    (from 0) or `text`.

    documents_column: a list of ids of gold documents, or of objects with a `docid`, for the metric `document_recall`.
    canary: what question, answers and documents' ids are obfuscated with, see `obfuscation`.

    Raises:
        QuestionError: for values that are out of range or do not go together.
    """

    path: str
    name: str | None = None
    kind: str = OPEN
    question_column: str = "question"
    answers_column: str | list[str] = "golden_answers"
    id_column: str = "id"
    choices_column: str | list[str] | dict[str, str] | None = None
    answers_are: str = "letter"
    documents_column: str | None = None
    canary: str | None = None
    size: int | None = None
    config: str | None = None
    split: str | None = None
    revision: str | None = None

    def __post_init__(self) -> None:
        for name in ("path", "question_column", "id_column"):
            value = getattr(self, name)
            if not isinstance(value, str) or not value.strip():
                raise QuestionError(f"a benchmark has {name}={value!r}; it must be a non-blank string")
        check_answers_column(self.answers_column, self.path)
        if self.name is not None and not isinstance(self.name, str):
            raise QuestionError(f"{self.path}: name={self.name!r}; it must be a string, so put it in quotes")
        if self.choices_column is not None and not isinstance(self.choices_column, str | list | dict):
            raise QuestionError(
                f"{self.path}: choices_column={self.choices_column!r}; it must be a column, a list of columns or a "
                "mapping of letters to columns"
            )
        for name in ("documents_column", "canary"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, str) or not value.strip()):
                raise QuestionError(f"{self.path}: {name}={value!r}; it must be a non-blank string, or left out")
        if self.kind not in KINDS:
            raise QuestionError(f"{self.path}: kind={self.kind!r}; it must be one of {', '.join(KINDS)}")
        if (self.kind == MULTIPLE_CHOICE) != bool(self.choices_column):
            raise QuestionError(
                f"{self.path}: kind={self.kind!r} and choices_column={self.choices_column!r} do not go together; "
                f"choices_column is for kind: {MULTIPLE_CHOICE}, which needs it"
            )
        if self.answers_are not in ("letter", "index", "text"):
            raise QuestionError(f"{self.path}: answers_are={self.answers_are!r}; use letter, index or text")
        if self.size is not None and (isinstance(self.size, bool) or not isinstance(self.size, int) or self.size < 1):
            raise QuestionError(f"{self.path}: size={self.size!r}; it must be an integer of at least 1, or left out")

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any], where: str) -> BenchmarkSource:
        known = [entry.name for entry in fields(cls)]
        # YAML reads a bare `no` as false, and 1 as a number.
        unknown = [str(key) for key in values if key not in known]
        if unknown or "path" not in values:
            problem = describe_unknown(unknown, known) if unknown else "no 'path'"
            raise QuestionError(f"{where}: {problem}; the keys of a benchmark are {', '.join(known)}")
        try:
            return cls(**values)
        except QuestionError as error:  # of a value in the description, not in the file that it describes
            said = str(error).removeprefix(f"{values['path']}: ")
            raise QuestionError(f"{where}: {said}") from error

    @property
    def columns(self) -> BenchmarkColumns:
        return BenchmarkColumns(
            self.question_column,
            self.answers_column,
            self.id_column,
            self.choices_column,
            self.answers_are,
            self.documents_column,
            self.canary,
        )


def load_benchmark(
    spec: str | Path | Mapping[str, Any] | BenchmarkSource,
    *,
    files: Mapping[str, str | Path] | None = None,
    revision: str | None = None,
) -> Benchmark:
    """Load the benchmark that `spec` means.

    - `hotpotqa`, or another of the seven in `FLASHRAG_SETS`: from the Hub, or from `files[name]` if that is given;
    - `NAME=FILE`: a local file in FlashRAG's layout under that name;
    - a .jsonl, .jsonl.gz, .json, .csv or .parquet file in that layout: named after it, or after its folder where
      that tells more (`qa`, `test`, `dev`, `train` say nothing);
    - a .yaml file, or a mapping of the same keys: a user's own set, see `BenchmarkSource`.

    A set under one of the seven names, in upper or lower case, must have that set's size, wherever it comes from. A
    name that is nearly one of them gets a warning.

    Args:
        files: name -> local file, instead of the Hub.
        revision: of the Hub's repository of the seven; default, its newest. The commit ends up in `source`.

    Raises:
        QuestionError: for an unknown name, a file that is missing or malformed, a row that cannot be used (named by
            its line), repeated ids, a set of another size than its name claims.
    """
    files = dict(files or {})
    if isinstance(spec, BenchmarkSource):
        return _load_source(spec)
    if isinstance(spec, Mapping):
        return _load_source(BenchmarkSource.from_mapping(spec, f"benchmark {dict(spec)}"))
    spec = str(spec).strip()
    name, equals, path = spec.partition("=")
    if equals and not Path(spec).exists():
        files, spec = {name: path}, name
    if spec in files:
        return _load_source(BenchmarkSource(path=str(files[spec]), name=spec))
    if spec in FLASHRAG_SETS:
        return _load_flashrag(spec, revision)
    if Path(spec).suffix in _DESCRIPTION_SUFFIXES:
        return _load_description(Path(spec))
    if Path(spec).exists() or "/" in spec:
        return _load_source(BenchmarkSource(path=spec))
    raise QuestionError(
        f"there is no benchmark {spec!r}: it is neither one of {', '.join(FLASHRAG_SETS)} nor a file here "
        f"({Path.cwd()}); a local file goes as NAME=FILE.jsonl, a set of your own as a .yaml description"
    )


def benchmark_specs(given: Any) -> list[Any]:
    """What a command line or a recipe names, as a list of what `load_benchmark` takes: strings are cut at commas."""
    entries = [given] if isinstance(given, str | Path | Mapping | BenchmarkSource) else list(given or [])
    specs: list[Any] = []
    for entry in entries:
        specs += [part.strip() for part in entry.split(",") if part.strip()] if isinstance(entry, str) else [entry]
    return specs


def subset(benchmark: Benchmark, n: int, seed: int = 0) -> Benchmark:
    """The n questions whose SHA-256 of `"<seed>\\n<question>"` (UTF-8) is smallest, in the benchmark's own order.

    The choice needs no random generator: it is the same in every version of everything, wherever the questions came
    from, and a smaller subset is part of a larger one of the same seed. A set of at most n questions stays whole.

    Raises:
        QuestionError: for n below 1, or a benchmark that is a subset already.
    """
    if isinstance(n, bool) or not isinstance(n, int) or n < 1:
        raise QuestionError(f"a subset of {n!r} questions was asked of {benchmark.name}; ask for at least 1")
    if benchmark.subset is not None:
        raise QuestionError(f"{benchmark.name} is a subset already ({benchmark.subset}); take one of the whole set")
    if n >= len(benchmark):
        return benchmark

    def rank(row: int) -> tuple[bytes, int]:
        return hashlib.sha256(f"{seed}\n{benchmark.questions[row].question}".encode()).digest(), row

    rows = sorted(sorted(range(len(benchmark)), key=rank)[:n])
    return replace(
        benchmark,
        questions=tuple(benchmark.questions[row] for row in rows),
        subset=f"{n} of {len(benchmark)} questions, seed {seed}, smallest SHA-256 of seed and question",
    )


def _load_flashrag(name: str, revision: str | None) -> Benchmark:
    from huggingface_hub import hf_hub_download

    split, _ = FLASHRAG_SETS[name]
    file = f"{name}/{split}.jsonl"
    try:
        path = hf_hub_download(FLASHRAG_REPOSITORY, file, repo_type="dataset", revision=revision)
    # The Hub's client raises the network's errors as well as its own; all mean the same to a user.
    except Exception as error:
        raise QuestionError(
            f"{name}: {file} of {FLASHRAG_REPOSITORY} cannot be had: {type(error).__name__}: {error}. Check the "
            f"connection, or fetch the file elsewhere and give it as {name}=FILE.jsonl"
        ) from error
    loaded = _load_source(BenchmarkSource(path=path, name=name))
    # A file of the Hub's cache lies in a folder named after its commit.
    commit = next((after for part, after in pairwise(Path(path).parts) if part == "snapshots"), "")
    return replace(loaded, source=f"{FLASHRAG_REPOSITORY}@{commit}/{file}" if commit else path)


def _load_description(path: Path) -> Benchmark:
    import yaml

    if not path.is_file():
        raise QuestionError(f"{path}: no such description; check the path (working directory: {Path.cwd()})")
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise QuestionError(f"{path}: not readable YAML ({error}); correct it") from error
    if not isinstance(values, dict):
        raise QuestionError(f"{path}: a mapping with `path:` and column names is needed, found {values!r:.80}")
    source = BenchmarkSource.from_mapping(values, str(path))
    beside = path.parent / source.path
    named = source.name or path.stem
    return _load_source(replace(source, path=str(beside) if beside.exists() else source.path, name=named))


def _load_source(source: BenchmarkSource) -> Benchmark:
    name = source.name or _name_of(Path(source.path))
    if not _NAME.fullmatch(name):
        raise QuestionError(f"{source.path}: the name {name!r} cannot name a folder; use letters, digits, . _ and -")
    if name.lower().endswith(".json"):
        raise QuestionError(
            f"{source.path}: the name {name!r} could be that of a run's own file, results.json or such, and names a "
            f"folder beside them; call it {name[:-5]!r}"
        )
    near = difflib.get_close_matches(name.lower(), FLASHRAG_SETS, n=1, cutoff=_NEAR)
    if near and name.lower() not in FLASHRAG_SETS:
        logger.warning(
            "the benchmark %r is not %s: it may have any size and stands beside no published figure; if %s is meant, "
            "name it so",
            name,
            near[0],
            near[0],
        )
    where, held, rows = open_rows(
        source.path,
        question_column=source.question_column,
        name=source.config,
        split=source.split,
        revision=source.revision,
        wanted=source.columns.are_read,
    )
    questions = questions_of(rows, held, source.columns, where)
    # Tables label `hotpotqa` as HotpotQA, so that a part under that name would look like the set.
    _, claimed = FLASHRAG_SETS.get(name.lower(), ("", source.size))
    if claimed is not None and len(questions) != claimed:
        raise QuestionError(
            f"{where} holds {len(questions):,} questions, but {name} has {claimed:,}: another split, a part or a "
            "damaged copy; fetch the whole set, give a part of it a name of its own, or use a seeded subset"
        )
    return Benchmark(name=name, kind=source.kind, questions=questions, source=where, size=len(questions))


def _name_of(path: Path) -> str:
    stem = path.name.split(".")[0]
    return path.resolve().parent.name if stem in ("qa", "test", "dev", "train", "validation") else stem
