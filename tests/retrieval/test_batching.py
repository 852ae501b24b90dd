"""The batcher on an event loop of its own, over an index whose answers are known by heart."""

import asyncio
import json
import time

import pytest

from rex_rag.retrieval.base import EngineAway, RetrievalError, Retriever
from rex_rag.retrieval.server.batching import MicroBatcher, ResultCache
from rex_rag.retrieval.server.runner import DirectRunner, Overloaded, QueryFailed
from rex_rag.types import Passage
from tests.retrieval.toy_engine import ToyRetriever, expected


def make(engine, **options):
    return MicroBatcher(engine, **{"max_batch": 256, "max_waiting": 1000, **options})


def run(test):
    """Run a coroutine function with a time limit: a batcher that loses a request would wait for ever."""
    asyncio.run(asyncio.wait_for(test(), timeout=20))


def read(served):
    return json.loads(served.body)["result"]


async def until(condition):
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline, "it never happened"
        await asyncio.sleep(0.001)


def test_what_waits_while_a_batch_is_searched_becomes_the_next_batch():
    async def test():
        engine = ToyRetriever()
        engine.gate.clear()
        batcher = make(engine)
        first = batcher.submit(["1"], 3, True)
        await until(lambda: engine.ranked == [["1"]])
        # More than the batch being ranked, so they are encoded meanwhile; what comes after that has to wait longer.
        second = batcher.submit(["2", "3"], 3, True)
        await until(lambda: ["2", "3"] in engine.encoded)
        others = [batcher.submit([str(n)], 3, True) for n in range(4, 10)]
        await asyncio.sleep(0.02)
        assert engine.ranked == [["1"]]
        engine.gate.set()
        for n, future in [(1, first), *zip(range(4, 10), others, strict=True)]:
            assert read(await future) == [expected(str(n), 3)]
        assert read(await second) == [expected("2", 3), expected("3", 3)]
        assert engine.ranked == [["1"], ["2", "3"], ["4", "5", "6", "7", "8", "9"]]
        await batcher.close()

    run(test)


def test_a_batch_smaller_than_the_one_being_ranked_waits_and_grows():
    async def test():
        engine = ToyRetriever()
        engine.gate.clear()
        batcher = make(engine)
        first = batcher.submit(["1", "2", "3"], 3, True)
        await until(lambda: engine.ranked)
        small = [batcher.submit(["4"], 3, True), batcher.submit(["5"], 3, True)]
        await asyncio.sleep(0.02)
        assert engine.encoded == [["1", "2", "3"]]
        engine.gate.set()
        await asyncio.gather(first, *small)
        assert engine.ranked == [["1", "2", "3"], ["4", "5"]]
        await batcher.close()

    run(test)


def test_no_batch_exceeds_the_limit_and_a_request_may():
    async def test():
        engine = ToyRetriever()
        batcher = make(engine, max_batch=4)
        queries = [str(n) for n in range(10)]
        assert read(await batcher.submit(queries, 2, True)) == [expected(query, 2) for query in queries]
        assert [len(batch) for batch in engine.ranked] == [4, 4, 2]
        await batcher.close()

    run(test)


def test_a_batch_waits_for_the_clients_just_answered():
    async def test():
        engine = ToyRetriever()
        batcher = make(engine, wait=0.3)

        async def client(name, pause):
            await batcher.submit([f"{name}1"], 1, True)
            await asyncio.sleep(pause)
            await batcher.submit([f"{name}2"], 1, True)

        # The second queries come 0, 50 and 100 ms after the answers, each sooner after the last one than the limit.
        await asyncio.gather(*(client(name, 0.05 * (name - 1)) for name in (1, 2, 3)))
        assert engine.ranked == [["11", "21", "31"], ["12", "22", "32"]]
        await batcher.close()

    run(test)


def test_a_batch_does_not_wait_for_clients_that_stay_away_nor_a_client_by_itself():
    async def test():
        engine = ToyRetriever()
        batcher = make(engine, wait=0.2)
        await asyncio.gather(*(batcher.submit([str(n)], 1, True) for n in range(3)))
        started = time.monotonic()
        await batcher.submit(["4"], 1, True)
        assert 0.15 < time.monotonic() - started < 1
        for n in range(5, 15):
            await batcher.submit([str(n)], 1, True)
        # Ten waits would have taken two seconds.
        assert time.monotonic() - started < 1.5
        await batcher.close()

    run(test)


def test_each_request_gets_its_own_top_k():
    async def test():
        engine = ToyRetriever()
        batcher = make(engine)
        futures = {top_k: batcher.submit([f"{top_k}0", "5"], top_k, True) for top_k in (1, 3, 2)}
        for top_k, future in futures.items():
            assert read(await future) == [expected(f"{top_k}0", top_k), expected("5", top_k)]
        assert engine.top_ks == [1, 3, 2]
        assert engine.ranked == [["10", "5"], ["30", "5"], ["20", "5"]]
        await batcher.close()

    run(test)


def test_answers_come_with_and_without_scores():
    async def test():
        batcher = make(ToyRetriever())
        with_scores, bare = batcher.submit(["1"], 2, True), batcher.submit(["1"], 2, False)
        assert read(await with_scores) == [expected("1", 2)]
        assert read(await bare) == [[entry["document"] for entry in expected("1", 2)]]
        await batcher.close()

    run(test)


@pytest.mark.parametrize("stage", ["encode", "rank"])
def test_a_broken_query_fails_its_own_request_alone(stage):
    async def test():
        engine = ToyRetriever()
        batcher = make(engine)
        good = [batcher.submit([str(n)], 3, True) for n in range(7)]
        bad = batcher.submit(["7", f"8 broken-{stage}"], 3, True)
        for n, future in enumerate(good):
            assert read(await future) == [expected(str(n), 3)]
        with pytest.raises(QueryFailed, match=rf"query 1 of 2, '8 broken-{stage}', could not .*cannot {stage} 8"):
            await bad
        # A batch of nine, its halves and their halves down to the guilty one: no more than that is searched again.
        assert len(engine.encoded) == 1 + 2 + 2 + 2 + 2
        # The next request meets a working server.
        assert read(await batcher.submit(["9"], 3, True)) == [expected("9", 3)]
        await batcher.close()

    run(test)


def test_two_broken_queries_in_a_batch_are_both_found():
    async def test():
        batcher = make(ToyRetriever())
        futures = [batcher.submit([f"{n} broken-rank" if n in (2, 5) else str(n)], 1, True) for n in range(8)]
        results = await asyncio.gather(*futures, return_exceptions=True)
        assert [n for n, result in enumerate(results) if isinstance(result, QueryFailed)] == [2, 5]
        assert [read(results[n]) for n in (0, 1, 3, 4, 6, 7)] == [[expected(str(n), 1)] for n in (0, 1, 3, 4, 6, 7)]
        await batcher.close()

    run(test)


def test_rankings_that_are_not_full_are_cut_and_empty_or_unordered_ones_fail():
    async def test():
        batcher = make(ToyRetriever())
        short, nothing, nan, good = (
            batcher.submit([f"{word}"], 3, True) for word in ("4 short", "nothing", "nan", "6")
        )
        assert read(await short) == [expected("4", 1)]
        assert read(await good) == [expected("6", 3)]
        with pytest.raises(QueryFailed, match=r"'nothing'.*no passage, which is indistinguishable"):
            await nothing
        with pytest.raises(QueryFailed, match=r"'nan'.*scores that are no numbers"):
            await nan
        await batcher.close()

    run(test)


def test_an_engine_that_returns_too_few_rankings_swaps_nothing():
    async def test():
        engine = ToyRetriever()
        engine.miscount = True
        batcher = make(engine)
        results = await asyncio.gather(*(batcher.submit([str(n)], 3, True) for n in range(3)), return_exceptions=True)
        for result in results:
            assert isinstance(result, QueryFailed)
            assert "returned scores of shape (0, 3) and rows of shape (0, 3) for 1 query" in str(result)
        await batcher.close()

    run(test)


def test_a_ranking_does_not_depend_on_how_many_passages_the_batch_mates_want():
    class Eager(ToyRetriever):
        """Asked for more than one passage it looks further and finds a better first one, as a re-ranker may."""

        def rank(self, encoded, top_k):
            scores, rows = super().rank(encoded, top_k)
            return scores, rows[:, ::-1]

    async def test():
        engine = Eager()
        engine.gate.clear()
        batcher = make(engine, cache_size=10)
        first = batcher.submit(["0"], 1, True)
        await until(lambda: engine.ranked)
        one, mate, same_query, two = (
            batcher.submit([query], top_k, True) for query, top_k in (("7", 1), ("9", 5), ("7", 5), ("8", 1))
        )
        engine.gate.set()
        await first
        assert [[hit["document"]["id"] for hit in ranking] for ranking in read(await one)] == [["p7"]]
        assert [hit["document"]["id"] for hit in read(await same_query)[0]] == ["p11", "p10", "p9", "p8", "p7"]
        assert [ranking[0]["document"]["id"] for ranking in read(await mate) + read(await two)] == ["p13", "p8"]
        assert engine.ranked == [["0"], ["7", "8"], ["9", "7"]]
        assert read(await batcher.submit(["7"], 1, True)) == read(await one)
        await batcher.close()

    run(test)


def test_an_engine_that_is_away_is_not_asked_again_for_every_part_of_the_batch():
    class Away(ToyRetriever):
        def rank(self, encoded, top_k):
            self.ranked.append(list(encoded))
            raise EngineAway("no cluster after 5 attempts")

    async def test():
        engine = Away()
        batcher = make(engine)
        results = await asyncio.gather(*(batcher.submit([str(n)], 3, True) for n in range(64)), return_exceptions=True)
        assert all("no cluster after 5 attempts" in str(result) for result in results)
        assert [len(batch) for batch in engine.ranked] == [64]
        await batcher.close()

    run(test)


def test_a_query_in_flight_is_not_searched_again_unless_for_another_number_of_passages():
    async def test():
        engine = ToyRetriever()
        engine.gate.clear()
        batcher = make(engine)
        first = batcher.submit(["1", "1"], 2, True)
        await until(lambda: engine.ranked)
        same, fewer, more = (batcher.submit(["1"], top_k, True) for top_k in (2, 1, 3))
        engine.gate.set()
        assert read(await first) == [expected("1", 2)] * 2
        assert read(await same) == [expected("1", 2)]
        assert read(await fewer) == [expected("1", 1)]
        assert read(await more) == [expected("1", 3)]
        assert engine.ranked == [["1"], ["1"], ["1"]]
        assert engine.top_ks == [2, 1, 3]
        await batcher.close()

    run(test)


def test_what_waits_is_bounded_and_room_comes_back():
    async def test():
        engine = ToyRetriever()
        engine.gate.clear()
        batcher = make(engine, max_waiting=5)
        running = batcher.submit(["1", "2"], 1, True)
        await until(lambda: engine.ranked)
        waiting = batcher.submit(["3", "4"], 1, True)
        with pytest.raises(Overloaded, match=r"4 queries wait and 2 more would exceed the limit of 5") as refused:
            batcher.submit(["5", "6"], 1, True)
        assert 1 <= refused.value.retry_after <= 30
        last = batcher.submit(["7"], 1, True)
        engine.gate.set()
        await asyncio.gather(running, waiting, last)
        assert read(await batcher.submit(["5", "6", "7", "8", "9"], 1, True))[4] == expected("9", 1)
        # The refused request left nothing behind.
        assert ["5", "6"] not in engine.ranked
        await batcher.close()

    run(test)


def test_nobody_searches_for_a_client_that_went_away_and_its_place_stays_taken_until_then():
    async def test():
        engine = ToyRetriever()
        engine.gate.clear()
        batcher = make(engine, max_waiting=4)
        running = batcher.submit(["1"], 1, True)
        await until(lambda: engine.ranked)
        # "2" and "5" are encoded ahead; "3" still waits, for a client that leaves.
        ahead = batcher.submit(["2", "5"], 1, True)
        await until(lambda: ["2", "5"] in engine.encoded)
        gone = batcher.submit(["3"], 1, True)
        gone.cancel()
        with pytest.raises(Overloaded):
            batcher.submit(["4"], 1, True)
        engine.gate.set()
        await asyncio.gather(running, ahead)
        assert read(await batcher.submit(["4"], 1, True)) == [expected("4", 1)]
        assert engine.ranked == [["1"], ["2", "5"], ["4"]]
        await batcher.close()

    run(test)


def test_the_cache_answers_without_a_search_and_only_for_the_same_top_k():
    async def test():
        engine = ToyRetriever()
        batcher = make(engine, cache_size=10)
        for _ in range(3):
            assert read(await batcher.submit(["1", "2"], 2, True)) == [expected("1", 2), expected("2", 2)]
        assert read(await batcher.submit(["2", "3"], 2, False)) == [
            [entry["document"] for entry in expected(query, 2)] for query in ("2", "3")
        ]
        assert engine.ranked == [["1", "2"], ["3"]]
        await batcher.submit(["1"], 1, True)
        assert engine.ranked[2:] == [["1"]]
        with pytest.raises(QueryFailed):
            await batcher.submit(["broken-rank"], 1, True)
        assert batcher.cache.get("broken-rank", 1) is None
        await batcher.close()

    run(test)


def test_the_cache_keeps_the_latest_used_and_no_more_than_its_size():
    cache = ResultCache(2)
    one, two, three = ([1.0], [1]), ([1.0], [2]), ([1.0], [3])
    cache.put("a", 1, one)
    cache.put("b", 1, two)
    assert cache.get("a", 1) == one  # now "b" is the oldest
    cache.put("c", 1, three)
    assert len(cache) == 2
    assert (cache.get("a", 1), cache.get("b", 1), cache.get("c", 1)) == (one, None, three)
    assert cache.get("a", 2) is None
    off = ResultCache(0)
    off.put("a", 1, one)
    assert len(off) == 0


def test_the_stages_of_a_request_fit_into_its_time():
    async def test():
        engine = ToyRetriever(seconds=0.02)
        batcher = make(engine)
        first, second = batcher.submit(["1"], 1, True), batcher.submit(["2"], 1, True)
        timings = (await first).timings
        assert timings.search >= 0.02
        assert min(timings.queue, timings.encode, timings.fetch) >= 0
        stages = timings.queue + timings.encode + timings.search + timings.fetch
        assert stages == pytest.approx(timings.total)
        await second
        await batcher.close()

    run(test)


def test_closing_fails_what_still_waits_instead_of_leaving_it():
    async def test():
        engine = ToyRetriever()
        engine.gate.clear()
        batcher = make(engine)
        futures = [batcher.submit([str(n)], 1, True) for n in range(3)]
        await until(lambda: engine.ranked)
        await batcher.close()
        engine.gate.set()
        for future in futures:
            with pytest.raises(RetrievalError, match="the server stopped before"):
                await future

    run(test)


def test_an_error_in_the_batcher_itself_fails_requests_instead_of_losing_them():
    class Broken:
        def batch(self, queries):
            raise ZeroDivisionError("a counter broke")

        def cache(self, hits, misses):
            pass

    async def test():
        batcher = make(ToyRetriever(), observer=Broken())
        with pytest.raises(RetrievalError, match="the batcher itself failed: a counter broke"):
            await batcher.submit(["1"], 1, True)
        with pytest.raises(RetrievalError, match="the batcher itself failed"):
            batcher.submit(["2"], 1, True)
        await batcher.close()

    run(test)


class Plain(Retriever):
    """A retriever without an index: passages without scores, and a query that fails."""

    description = "plain"

    def __init__(self):
        self.asked = []

    def check(self):
        pass

    def search(self, queries, top_k):
        self.asked.append(list(queries))
        if "bad" in queries:
            raise ConnectionError("engine away")
        return [[Passage(f"{query}{rank}", "T", query) for rank in range(top_k)] for query in queries]


def test_engines_without_an_index_are_asked_request_by_request_and_never_twice():
    async def test():
        engine = Plain()
        runner = DirectRunner(engine, max_waiting=10)
        good, bad = runner.submit(["a", "b"], 2, True), runner.submit(["bad"], 2, True)
        assert read(await good) == [
            [
                {"document": {"id": f"{query}0", "contents": f'"T"\n{query}'}, "score": 1.0},
                {"document": {"id": f"{query}1", "contents": f'"T"\n{query}'}, "score": 0.5},
            ]
            for query in ("a", "b")
        ]
        with pytest.raises(RetrievalError, match="plain failed: ConnectionError: engine away"):
            await bad
        assert sorted(engine.asked) == [["a", "b"], ["bad"]]
        await asyncio.sleep(0)  # an answer that was there already is counted in the next turn of the loop
        with pytest.raises(Overloaded, match=r"0 queries wait and 11 more would exceed the limit of 10"):
            runner.submit(["a"] * 11, 2, True)
        await runner.close()

    run(test)


def test_indexed_engines_can_be_served_without_merging():
    async def test():
        engine = ToyRetriever()
        runner = DirectRunner(engine, max_waiting=10)
        futures = [runner.submit([str(n)], 2, True) for n in range(3)]
        for n, future in enumerate(futures):
            assert read(await future) == [expected(str(n), 2)]
        assert sorted(engine.ranked) == [["0"], ["1"], ["2"]]
        with pytest.raises(RetrievalError, match="'nothing' could not be answered"):
            await runner.submit(["1", "nothing"], 2, True)
        await runner.close()

    run(test)
