"""Builds an index over synthetic passages and measures what building and searching take.

    python scripts/benchmark_retrieval.py --kind bm25 --passages 1000000 --output DIR

writes (once) DIR/passages.jsonl and its offsets: passages of about 100 words as in the 2018 Wikipedia split, drawn
from a seed. Words follow Zipf's law with the steeper tail that makes a vocabulary grow as that of English text does,
the most frequent ones are English stop words, and a passage repeats words of its own topic; 7,000 passages hold 35,600
different terms, 7,113 real ones of HotpotQA and 2WikiMultihopQA 34,000. Then it builds the index in DIR/KIND through
the library's own builder, opens it in a fresh process and searches, and prints one JSON object: seconds, peak memory
of the build (all its processes), bytes a passage, queries a second one by one and in batches. Where other work runs on
the machine, the CPU times and the load average beside the wall times tell how much of them it took.

Every kind is one class below with `build` and `open`; the corpus and the questions are the same for all.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import resource
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from benchmark_dense import dense_kinds

from rex_rag.retrieval.passages import OFFSETS_FILE, PASSAGES_FILE, PassageStore, passage_json
from rex_rag.support.progress_bars import progress_bar
from rex_rag.types import Passage

# Ranks below the knee follow 1/r, those above r^-1.8: n words of text then hold about n^(1/1.8) different ones.
KNEE, TAIL_EXPONENT = 4_000, 1.8
WORDS_PER_PASSAGE = 100
TOPIC_WORDS, TOPIC_SHARE = 8, 0.25
CHUNK = 10_000
STOP_WORDS = [
    *("the", "of", "and", "in", "to", "a", "was", "is", "for", "on", "as", "with", "by", "that", "at", "it", "an"),
    *("be", "are", "this", "or", "not", "but", "their", "they", "there", "such", "will", "if", "into", "no", "then"),
    "these",
]
SYLLABLES = [consonant + vowel for consonant in "bcdfghklmnprstvz" for vowel in ("a", "e", "i", "o", "u", "or", "en")]
QUESTION_WORDS = (2, 12)


class Words(dict):
    """Rank (from 1) to word: stop words first, then syllables that spell the number."""

    def __missing__(self, rank: int) -> str:
        if rank <= len(STOP_WORDS):
            word = STOP_WORDS[rank - 1]
        else:
            left, parts = rank + len(SYLLABLES), []
            while left:
                left, digit = divmod(left, len(SYLLABLES))
                parts.append(SYLLABLES[digit])
            word = "".join(parts)
        self[rank] = word
        return word


def draw_ranks(random_numbers: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """Word ranks from 1 by the two-part power law."""
    head, tail = np.log(KNEE), 1 / (TAIL_EXPONENT - 1)
    share = random_numbers.random(shape) * (head + tail)
    # Above 1 - 2^-53 the tail is cut, which bounds the largest rank.
    beyond = np.maximum((head + tail - share) / tail, 2.0**-53)
    ranks = np.where(share < head, np.exp(np.minimum(share, head)), KNEE * beyond ** (-1 / (TAIL_EXPONENT - 1)))
    return ranks.astype(np.int64)


def synthetic_passages(count: int, seed: int) -> Iterator[Passage]:
    """`count` passages; the same for the same seed, whatever `count`."""
    words = Words()
    for start in range(0, count, CHUNK):
        numbers = np.random.default_rng([seed, start])
        texts = draw_ranks(numbers, (CHUNK, WORDS_PER_PASSAGE))
        topics = draw_ranks(numbers, (CHUNK, TOPIC_WORDS)) + len(STOP_WORDS)
        choice = numbers.integers(0, TOPIC_WORDS, texts.shape)
        from_topic = numbers.random(texts.shape) < TOPIC_SHARE
        texts = np.where(from_topic, np.take_along_axis(topics, choice, axis=1), texts)
        lengths = np.where(
            numbers.random(CHUNK) < 0.1, numbers.integers(20, WORDS_PER_PASSAGE, CHUNK), WORDS_PER_PASSAGE
        )
        for number in range(min(CHUNK, count - start)):
            row = texts[number, : lengths[number]].tolist()
            title = " ".join(words[rank] for rank in topics[number, :2].tolist()).title()
            yield Passage(str(start + number), title, " ".join(map(words.__getitem__, row)))


def write_store(directory: Path, count: int, seed: int) -> None:
    """Write the passages and their offsets, unless they are there."""
    mark = directory / "corpus.json"
    wanted = {"passages": count, "seed": seed}
    if mark.exists() and json.loads(mark.read_text()) == wanted:
        return
    directory.mkdir(parents=True, exist_ok=True)
    mark.unlink(missing_ok=True)
    offsets = np.zeros(count + 1, "<u8")
    with (directory / PASSAGES_FILE).open("wb") as out, progress_bar(count, "writing passages") as bar:
        for row, passage in enumerate(synthetic_passages(count, seed)):
            offsets[row + 1] = offsets[row] + out.write(passage_json(passage) + b"\n")
            bar.update()
    offsets.tofile(directory / OFFSETS_FILE)
    mark.write_text(json.dumps(wanted))


def questions(count: int, seed: int) -> list[str]:
    """Questions of 2 to 12 words with the word frequencies of the passages."""
    lengths = random.Random(seed)
    numbers, words = np.random.default_rng([seed, 1]), Words()
    drawn = draw_ranks(numbers, (count, QUESTION_WORDS[1])).tolist()
    return [" ".join(words[rank] for rank in ranks[: lengths.randint(*QUESTION_WORDS)]) for ranks in drawn]


class BM25Kind:
    """The streaming BM25 builder and the memory-mapped index."""

    @staticmethod
    def build(passages: PassageStore, directory: Path, arguments: argparse.Namespace) -> dict[str, Any]:
        from rex_rag.retrieval.bm25.build import build_bm25
        from rex_rag.retrieval.bm25.estimate import estimate_bm25

        step = max(1, len(passages) // arguments.sample)
        sample = [passages[row] for row in range(0, len(passages), step)]
        estimate = estimate_bm25(sample, len(passages))
        build_bm25(passages, directory)
        return {"estimate": vars(estimate)}

    @staticmethod
    def open(passages: PassageStore, directory: Path) -> Any:
        from rex_rag.retrieval.bm25.retriever import BM25Retriever

        return BM25Retriever.load(directory, passages)


KINDS = {"bm25": BM25Kind, **dense_kinds(Words())}


class PeakMemory:
    """The most memory that this process and its children held together, in bytes, sampled twice a second.

    `resident` counts pages of mapped files, which the kernel takes back when it needs them; `own` leaves them out.
    """

    def __init__(self) -> None:
        self.resident = self.own = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> PeakMemory:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        import psutil

        own = psutil.Process()
        while not self._stop.wait(0.5):
            resident = own_only = 0
            for process in [own, *own.children(recursive=True)]:
                with suppress(psutil.NoSuchProcess):
                    memory = process.memory_info()
                    resident += memory.rss
                    own_only += memory.rss - memory.shared
            self.resident, self.own = max(self.resident, resident), max(self.own, own_only)


def measure_build(arguments: argparse.Namespace, kind: Any) -> dict[str, Any]:
    passages = PassageStore(arguments.output)
    directory = arguments.output / arguments.kind
    started = time.perf_counter()
    with PeakMemory() as peak:
        figures = kind.build(passages, directory, arguments)
    usages = [resource.getrusage(whose) for whose in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return figures | {
        "build_seconds": round(time.perf_counter() - started, 1),
        "build_cpu_seconds": round(sum(usage.ru_utime + usage.ru_stime for usage in usages), 1),
        "load_average_after_build": round(os.getloadavg()[0], 1),
        "peak_resident_bytes": peak.resident,
        "peak_own_bytes": peak.own,
        "maxrss_bytes_main": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "maxrss_bytes_largest_child": resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024,
    }


def measure_search(arguments: argparse.Namespace, kind: Any) -> dict[str, Any]:
    passages = PassageStore(arguments.output)
    directory = arguments.output / arguments.kind
    started = time.perf_counter()
    retriever = kind.open(passages, directory)
    figures: dict[str, Any] = {"open_seconds": round(time.perf_counter() - started, 3)}
    asked = questions(arguments.queries, arguments.seed)
    retriever.search(asked[:64], arguments.top_k)
    seconds, cpu = [], time.process_time()
    for question in asked:
        started = time.perf_counter()
        retriever.search([question], arguments.top_k)
        seconds.append(time.perf_counter() - started)
    figures["single_queries_per_second"] = round(len(asked) / sum(seconds), 1)
    figures["single_cpu_milliseconds_mean"] = round(1000 * (time.process_time() - cpu) / len(asked), 3)
    figures["single_milliseconds"] = {
        f"p{part}": round(1000 * float(np.percentile(seconds, part)), 2) for part in (50, 95, 99)
    }
    started, cpu = time.perf_counter(), time.process_time()
    for start in range(0, len(asked), arguments.batch):
        retriever.search(asked[start : start + arguments.batch], arguments.top_k)
    figures[f"batch_{arguments.batch}_queries_per_second"] = round(len(asked) / (time.perf_counter() - started), 1)
    figures[f"batch_{arguments.batch}_cpu_milliseconds_per_query"] = round(
        1000 * (time.process_time() - cpu) / len(asked), 3
    )
    stages, batch = {}, asked[: arguments.batch]
    started = time.perf_counter()
    encoded = retriever.encode(batch)
    stages["encode"] = time.perf_counter() - started
    ranked = retriever.rank(encoded, arguments.top_k)
    stages["rank"] = time.perf_counter() - started - stages["encode"]
    retriever.fetch(*ranked)
    stages["fetch"] = time.perf_counter() - started - stages["encode"] - stages["rank"]
    figures["batch_stage_milliseconds_per_query"] = {
        name: round(1000 * value / len(batch), 3) for name, value in stages.items()
    }
    figures["load_average_after_search"] = round(os.getloadavg()[0], 1)
    figures["searching_maxrss_bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kind", choices=sorted(KINDS), required=True)
    parser.add_argument("--passages", type=int, default=1_000_000)
    parser.add_argument("--output", type=Path, required=True, help="folder for corpus and indexes")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--sample", type=int, default=5_000, help="passages that the estimate is made from")
    parser.add_argument("--queries", type=int, default=2_560)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--top-k", type=int, default=3)
    parser.add_argument("--stage", choices=("all", "build", "search"), default="all")
    arguments = parser.parse_args()
    kind = KINDS[arguments.kind]
    if arguments.stage != "all":
        measure = measure_build if arguments.stage == "build" else measure_search
        print(json.dumps(measure(arguments, kind)))
        return
    write_store(arguments.output, arguments.passages, arguments.seed)
    figures = vars(arguments) | {"output": str(arguments.output), "python": platform.python_version()}
    figures["cores"] = len(os.sched_getaffinity(0))
    for stage in ("build", "search"):
        # A process of its own for each, so that memory is counted apart.
        command = [sys.executable, __file__, *sys.argv[1:], "--stage", stage]
        figures |= json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)
    sizes = {
        path.relative_to(arguments.output / arguments.kind).as_posix(): path.stat().st_size
        for path in sorted((arguments.output / arguments.kind).rglob("*"))
        if path.is_file()
    }
    figures["files"] = sizes
    figures["index_bytes_per_passage"] = round(sum(sizes.values()) / arguments.passages, 1)
    figures["passage_bytes_per_passage"] = round(
        sum((arguments.output / name).stat().st_size for name in (PASSAGES_FILE, OFFSETS_FILE)) / arguments.passages, 1
    )
    print(json.dumps(figures, indent=2))


if __name__ == "__main__":
    main()
