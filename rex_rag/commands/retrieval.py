"""`rex-rag index`, `serve`, `search` and `bench-retrieval`."""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from rex_rag.commands.sections import parse_section
from rex_rag.commands.terminal import positive, printable
from rex_rag.support.errors import UserError
from rex_rag.support.wording import counted

if TYPE_CHECKING:
    from rex_rag.retrieval.base import Retriever
    from rex_rag.types import Passage


def index(words: Sequence[str]) -> None:
    """Build an index directory, or check one."""
    from rex_rag.retrieval.index.arguments import IndexArguments
    from rex_rag.retrieval.index.builder import build_index
    from rex_rag.retrieval.manifest import verify

    def switches(parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--dry-run", action="store_true", help="say what the build would take, and stop")
        parser.add_argument("--force", action="store_true", help="build even if the machine seems too small")
        # For the help alone: it is taken from the words before they come here.
        parser.add_argument("--verify", metavar="DIR", help="build nothing; hash every file of the index DIR")

    if any(word.partition("=")[0] == "--verify" for word in words):
        name, _, directory = words[0].partition("=")
        rest = [*filter(None, [directory]), *words[1:]]
        if name != "--verify" or len(rest) != 1:
            raise UserError("--verify takes one index directory and nothing else")
        manifest = verify(rest[0])
        print(
            f"{rest[0]}: {counted(manifest.passages, 'passage')}, all {counted(len(manifest.files), 'file')} as built"
        )
        return
    description = (
        "Build an index of a corpus: `--kind bm25`, or `--kind dense` or `late_interaction` with an encoder. The "
        "estimate of time, memory and disk comes first; a build that was killed goes on where it stood. `rex-rag "
        "index --verify DIR` hashes every file of an index and compares it with the manifest."
    )
    arguments, options = parse_section("index", description, "index", (IndexArguments,), words, switches)
    try:
        # Flushed: the estimate is to be read before the build, in a log file too.
        build_index(arguments, partial(print, flush=True), force=options.force, dry_run=options.dry_run)
    except KeyboardInterrupt:
        print("rex-rag index: interrupted; the same command goes on where it stood", file=sys.stderr)
        raise


def serve(words: Sequence[str]) -> None:
    """Answer searches over HTTP until told to stop."""
    from rex_rag.retrieval.load import RetrieverArguments, load_retriever, retriever_identity
    from rex_rag.retrieval.server.options import ServerOptions

    description = (
        "Serve a retriever in the Search-R1 wire format: POST /retrieve, GET /health, /metrics and /openapi.json. "
        "Reachable from this machine alone unless --host says otherwise."
    )
    retrieval, options, _ = parse_section(
        "serve",
        description,
        "serve",
        (RetrieverArguments, ServerOptions),
        _index_as_retriever(words),
        _add_serve_switches,
    )
    from rex_rag.retrieval.server.app import serve as run

    logging.getLogger("rex_rag").setLevel(logging.INFO)
    run(lambda: load_retriever(retrieval), options, lambda loaded: retriever_identity(retrieval, loaded))


def _add_serve_switches(parser: argparse.ArgumentParser) -> None:
    # For the help alone: `_index_as_retriever` spells them out before the words come here.
    parser.add_argument("--index", metavar="DIR", help="short for --retriever DIR")
    parser.add_argument(
        "--gpus",
        metavar="N",
        nargs="+",
        help="where to encode and search: 0 1 is short for --retriever_devices cuda:0 cuda:1",
    )
    parser.epilog = (
        "Any retriever can be served: --corpus FILE holds BM25 in memory, --retriever google asks a search engine."
    )


def _index_as_retriever(words: Sequence[str]) -> list[str]:
    """Spell out the two short forms: `--index DIR` and `--gpus N …`."""
    spelled: list[str] = []
    gpus = False
    for word in words:
        name, equals, value = word.partition("=")
        if name in ("--index", "--gpus"):
            gpus = name == "--gpus"
            spelled.append("--retriever_devices" if gpus else "--retriever")
            if equals:
                spelled.append(f"cuda:{value}" if gpus else value)
            continue
        gpus = gpus and not word.startswith("-")
        spelled.append(f"cuda:{word}" if gpus and word.isdigit() else word)
    return spelled


def add_search(commands: argparse._SubParsersAction) -> None:
    """`rex-rag search`: ask a retriever one question."""
    parser = commands.add_parser(
        "search",
        help="ask a retriever one question",
        description="Search as a rollout would: in-process BM25 over corpus files, an index directory, or a server.",
    )
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument(
        "--corpus",
        action="append",
        metavar="FILE",
        help="JSON lines file of passages, {id, contents} or {id, title, text}; may be given several times",
    )
    source.add_argument("--index", metavar="DIR", help="directory that `rex-rag index` made")
    source.add_argument("--url", help="retrieval server, for example http://127.0.0.1:8000")
    parser.add_argument("--top-k", type=positive, default=3, metavar="K", help="passages to show (default: 3)")
    parser.add_argument("query")
    parser.set_defaults(run=_search)


def _search(options: argparse.Namespace) -> None:
    from rex_rag.retrieval.base import checked_search
    from rex_rag.retrieval.load import RetrieverArguments, load_retriever

    if not options.query.strip():
        raise UserError("the query is empty; give the words to search for")
    if options.url:
        from rex_rag.retrieval.remote.client import RemoteRetriever

        # Someone is waiting: a server that is away is reported at the first attempt.
        retriever: Retriever = RemoteRetriever(options.url, max_attempts=1, limit_names=None)
    elif options.index:
        retriever = load_retriever(RetrieverArguments(retriever=[options.index]))
    else:
        retriever = load_retriever(RetrieverArguments(corpus=options.corpus))
    [ranking] = checked_search(retriever, [options.query], options.top_k)
    print(retriever.description)
    for rank, passage in enumerate(ranking, start=1):
        print(_shown(rank, passage))


def _shown(rank: int, passage: Passage) -> str:
    score = "" if passage.score is None else f"  ({passage.score:.3f})"
    return f"{rank}. {printable(passage.title)}{score}\n   {printable(passage.text)}"


def add_bench(commands: argparse._SubParsersAction) -> None:
    """`rex-rag bench-retrieval`: load on a server."""
    parser = commands.add_parser(
        "bench-retrieval",
        help="put load on a retrieval server and measure",
        description="Send searches over many connections at once; print queries a second, latencies, errors by cause, "
        "and where the time goes: queue, encode, search, fetch and the wire.",
    )
    parser.add_argument("--url", required=True, help="the server, for example http://127.0.0.1:8000")
    parser.add_argument("--concurrency", type=positive, default=64, metavar="N", help="requests under way at once")
    parser.add_argument("--queries", type=positive, default=20_000, metavar="N", help="queries to send in all")
    parser.add_argument("--batch-size", type=positive, default=1, metavar="N", help="queries a request")
    parser.add_argument("--top-k", type=positive, default=3, metavar="K", help="passages a query")
    parser.add_argument(
        "--query-file", metavar="FILE", help="JSON lines with `question` or `query`, or one query a line"
    )
    parser.add_argument(
        "--processes", type=positive, metavar="N", help="processes that send (default: one for every 64 connections)"
    )
    parser.add_argument("--index", metavar="DIR", help="also call this index in process, one batch after the other")
    parser.add_argument("--json", metavar="FILE", type=Path, help="write the figures there too")
    parser.set_defaults(run=_bench)


def _bench(options: argparse.Namespace) -> None:
    from rex_rag.retrieval.server.bench import BenchOptions, bench_in_process, load_queries, run_bench

    wanted = BenchOptions(
        url=options.url,
        concurrency=options.concurrency,
        queries=options.queries,
        batch_size=options.batch_size,
        top_k=options.top_k,
        processes=options.processes,
    )
    queries = load_queries(options.query_file) if options.query_file else None
    results = [run_bench(wanted, queries)]
    print(results[0].table())
    if options.index:
        results.append(_bench_index(options, queries, bench_in_process))
        print(results[1].table())
        share = results[0].queries_per_second / results[1].queries_per_second
        print(f"the server answers {share:.2f} times what the index answers in process")
    if options.json:
        options.json.write_text(json.dumps([result.as_dict() for result in results], indent=1) + "\n")


def _bench_index(options: argparse.Namespace, queries: Sequence[str] | None, bench_in_process):
    from rex_rag.retrieval.load import RetrieverArguments, load_retriever
    from rex_rag.retrieval.server.bench import invent_queries

    retriever = load_retriever(RetrieverArguments(retriever=[options.index]))
    queries = queries or invent_queries(retriever.search, options.queries)
    asked = [queries[number % len(queries)] for number in range(options.queries)]
    return bench_in_process(retriever, asked, options.batch_size, options.top_k)
