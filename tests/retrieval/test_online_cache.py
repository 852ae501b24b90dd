"""The record/replay cache and the count of paid requests, between threads and processes too."""

import json
import multiprocessing
import threading
import time

import pytest

from rex_rag.retrieval.base import RetrievalError
from rex_rag.retrieval.online.cache import CacheMode, Hit, OnlineCache, SpendCapReached, normalize_query

HITS = [Hit("Müller", "https://a.example/1", "first"), Hit("Two", "https://a.example/2", "zweites – Ende")]


def make(directory, mode=CacheMode.RECORD, engine="google", parameters=None, source=None):
    return OnlineCache(directory, engine, mode, {"num": 10} if parameters is None else parameters, source)


def records(directory):
    return sorted(directory.glob("*/??/*.json"))


@pytest.mark.parametrize(
    ("query", "normal"),
    [
        ("  who\twrote\n Hamlet ? ", "who wrote Hamlet ?"),
        ("Mu\u0308ller", "M\u00fcller"),
        ("NASA OR nasa", "NASA OR nasa"),
        ("half \ud800 pair", "half ? pair"),
    ],
)
def test_queries_that_an_engine_cannot_tell_apart_share_a_spelling(query, normal):
    assert normalize_query(query) == normal


def test_what_is_written_is_read_by_every_spelling_and_by_a_replay(tmp_path):
    make(tmp_path).write("who wrote  Mu\u0308ller", HITS)
    assert make(tmp_path).read("who wrote M\u00fcller ") == HITS
    assert make(tmp_path, CacheMode.REPLAY).read(" who wrote M\u00fcller") == HITS
    assert make(tmp_path).read("Who wrote M\u00fcller") is None


def test_nothing_found_is_a_record_and_not_a_missing_one(tmp_path):
    cache = make(tmp_path)
    cache.write("gibberish", [])
    assert cache.read("gibberish") == []
    assert cache.read("something else") is None


def test_engine_and_parameters_keep_records_apart(tmp_path):
    make(tmp_path).write("q", HITS)
    assert make(tmp_path, engine="serpapi").read("q") is None
    assert make(tmp_path, parameters={"num": 5}).read("q") is None
    assert make(tmp_path, parameters={"num": 10}).read("q") == HITS


def test_a_replay_without_the_record_names_the_query_and_without_any_record_the_directory(tmp_path):
    with pytest.raises(RetrievalError, match="holds no recorded search to replay"):
        make(tmp_path, CacheMode.REPLAY)
    assert list(tmp_path.iterdir()) == []
    make(tmp_path).write("q", HITS)
    with pytest.raises(
        RetrievalError, match=r"the search 'another one' was never recorded in .*google.*asks no engine"
    ):
        make(tmp_path, CacheMode.REPLAY).read("another one")


def test_off_neither_reads_nor_writes(tmp_path):
    make(tmp_path).write("q", HITS)
    off = make(tmp_path, CacheMode.OFF)
    assert off.read("q") is None
    off.write("r", HITS)
    assert len(records(tmp_path)) == 1


@pytest.mark.parametrize("damage", [b"", b"{", b'"text"', b'{"request": 1, "hits": []}', b"\xff", None])
def test_a_damaged_record_is_refused_by_name(tmp_path, damage):
    cache = make(tmp_path)
    cache.write("q", HITS)
    (path,) = records(tmp_path)
    if damage is None:
        damage = json.dumps({**json.loads(path.read_bytes()), "hits": [{"title": "x"}]}).encode()
    path.write_bytes(damage)
    with pytest.raises(RetrievalError, match=rf"{path.name} is no record of the search 'q'"):
        cache.read("q")


def test_records_of_another_configuration_are_not_mixed_in(tmp_path):
    make(tmp_path, source="cx-one").write("q", HITS)
    assert make(tmp_path, source="cx-one").read("q") == HITS
    assert make(tmp_path, CacheMode.REPLAY).read("q") == HITS  # without credentials there is nothing to compare
    for mode in (CacheMode.RECORD, CacheMode.REPLAY):
        with pytest.raises(RetrievalError, match="recorded from another search engine configuration"):
            make(tmp_path, mode, source="cx-two")
    everything = b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    assert b"cx-one" not in everything


def test_the_count_outlives_the_cache_object_and_stops_at_the_cap(tmp_path):
    assert [make(tmp_path).spend(3) for _ in range(3)] == [1, 2, 3]
    with pytest.raises(SpendCapReached, match=r"3 of 3 paid requests to google are used up.*raise max_searches"):
        make(tmp_path).spend(3)
    assert make(tmp_path).spent() == 3
    assert make(tmp_path, engine="serpapi").spent() == 0
    assert make(tmp_path).spend(4) == 4


@pytest.mark.parametrize("text", ["", "-3", "3.5", "many", "²"])
def test_a_damaged_count_is_refused_and_not_taken_for_zero(tmp_path, text):
    cache = make(tmp_path)
    cache.spend(10)
    (tmp_path / "google/spent").write_text(text, encoding="utf-8")
    with pytest.raises(RetrievalError, match="no number of paid requests"):
        cache.spend(10)


def _spend_many(directory, allowed, results):
    cache, granted = make(directory), 0
    for _ in range(40):
        try:
            cache.spend(allowed)
            granted += 1
        except SpendCapReached:
            pass
    results.put(granted)


def _ask_once(directory, log, results):
    cache = make(directory)
    with cache.claim("q"):
        if cache.read("q") is None:
            with open(log, "a", encoding="utf-8") as file:
                file.write("asked\n")
            time.sleep(0.05)
            cache.write("q", HITS)
    results.put(cache.read("q") == HITS)


def _in_processes(target, arguments, count):
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    processes = [context.Process(target=target, args=(*arguments, results)) for _ in range(count)]
    for process in processes:
        process.start()
    answers = [results.get(timeout=30) for _ in processes]
    for process in processes:
        process.join(timeout=30)
    return answers


def test_processes_together_never_exceed_the_cap(tmp_path):
    assert sum(_in_processes(_spend_many, (tmp_path, 70), 4)) == 70
    assert make(tmp_path).spent() == 70


def test_processes_that_ask_the_same_at_once_pay_once(tmp_path):
    log = tmp_path / "log"
    assert _in_processes(_ask_once, (tmp_path, log), 4) == [True] * 4
    assert log.read_text() == "asked\n"


def test_threads_that_write_and_read_the_same_record_never_see_half_of_it(tmp_path):
    cache = make(tmp_path)
    long = [Hit("t", f"https://a.example/{number}", "x" * 1000) for number in range(10)]
    cache.write("q", long)
    seen = []

    def work():
        for _ in range(20):
            cache.write("q", long)
            seen.append(cache.read("q") == long)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seen == [True] * 80
    assert [path.name for path in tmp_path.rglob("*.tmp")] == []


def test_an_unknown_mode_is_refused(tmp_path):
    with pytest.raises(RetrievalError, match="cache mode 'always'; use one of record, replay, off"):
        make(tmp_path, "always")
