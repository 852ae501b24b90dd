"""The driver: lock-step and streaming give the same trajectories, and tools run beside generation."""

from __future__ import annotations

import threading
import time
from dataclasses import replace

import pytest
from parts import BUDGET, PASSAGES

from rex_rag.models.generation import Generation
from rex_rag.protocols import SearchR1
from rex_rag.retrieval.base import RetrievalError
from rex_rag.retrieval.bm25.retriever import BM25Retriever
from rex_rag.rollout.agent import Agent
from rex_rag.tools import SearchTool

SEARCH, ANSWER = "<search> {} </search>", "<answer> {} </answer>"


class Replies:
    """A stream that answers each row by its first id: so many steps later, with what stands there for its turn."""

    def __init__(self, tokenizer, replies: dict[int, list[tuple[int, str]]]) -> None:
        self.tokenizer, self.replies = tokenizer, {row: list(turns) for row, turns in replies.items()}
        self.under_way: dict[int, list] = {}
        self.keys: list[tuple[int, ...]] = []
        self.left: list[int] = []

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.left = sorted(self.under_way)

    def submit(self, prompt_ids, max_new_tokens, stop_strings, key):
        self.keys.append(key)
        steps, text = self.replies[prompt_ids[0]].pop(0)
        ticket = len(self.keys)
        self.under_way[ticket] = [steps, self.tokenizer(text, add_special_tokens=False)["input_ids"]]
        return ticket

    def step(self, patience):
        time.sleep(0.001)
        for row in self.under_way.values():
            row[0] -= 1
        done = [ticket for ticket, (steps, _) in self.under_way.items() if steps <= 0]
        return [(ticket, Generation(self.under_way.pop(ticket)[1])) for ticket in done]


class Recorded(SearchTool):
    """Notes its batches, may be slow, and notices when it runs beside itself."""

    def __init__(self, seconds: float = 0.0, concurrent: bool = False) -> None:
        super().__init__(BM25Retriever(PASSAGES), 1)
        self.seconds, self.concurrent = seconds, concurrent
        self.batches: list[list[str]] = []
        self.running = self.most = 0
        self.lock = threading.Lock()

    @property
    def is_concurrent(self):
        return self.concurrent

    def run(self, calls):
        with self.lock:
            self.running += 1
            self.most = max(self.most, self.running)
            self.batches.append([call["query"] for call in calls])
        time.sleep(self.seconds)
        with self.lock:
            self.running -= 1
        return super().run(calls)


def streamed(tokenizer, replies, tool) -> tuple[list, Replies]:
    stream = Replies(tokenizer, replies)
    agent = Agent(None, [tool], tokenizer, SearchR1(), BUDGET, stream=stream)
    return agent.rollout([[row] for row in replies]), stream


def test_both_schedules_give_the_same_trajectories(word_tokenizer):
    """What is written follows from the ids so far alone, as with a greedy model; when it is there, does not."""
    texts = [SEARCH.format("owl"), ANSWER.format("oak"), "<think> so </think>", SEARCH.format("fox"), "red " * 50]

    def write(ids, limit):
        text = texts[sum(ids) % len(texts)]
        return Generation(word_tokenizer(text, add_special_tokens=False)["input_ids"][:limit])

    class LockStep:
        equal_rows = False

        def generate(self, prompt_ids, max_new_tokens):
            return [write(ids, max_new_tokens) for ids in prompt_ids]

    class Uneven(Replies):
        def submit(self, prompt_ids, max_new_tokens, stop_strings, key):
            self.keys.append(key)
            self.under_way[len(self.keys)] = [1 + 5 * (key[0] % 3), write(prompt_ids, max_new_tokens).ids]
            return len(self.keys)

    prompts, budget = [[word] for word in range(5, 29)], replace(BUDGET, max_turns=3)
    lock_step = Agent(lambda stop: LockStep(), [Recorded()], word_tokenizer, SearchR1(), budget).rollout(prompts)
    stream = Uneven(word_tokenizer, {})
    streaming = Agent(None, [Recorded()], word_tokenizer, SearchR1(), budget, stream=stream).rollout(prompts)
    assert streaming == lock_step
    assert {len(one.searches) for one in lock_step} >= {0, 1, 3} and {one.answer for one in lock_step} == {None, "oak"}
    assert sum(one.truncations.total() for one in lock_step) > 0


def test_a_trajectory_goes_on_while_others_wait_for_a_slow_tool(word_tokenizer):
    tool = Recorded(seconds=0.15, concurrent=True)
    replies = {
        5: [(1, SEARCH.format("owl")), (1, ANSWER.format("oak"))],
        6: [(30, ANSWER.format("red"))],  # generates all the while
        7: [(12, SEARCH.format("fox")), (1, ANSWER.format("red"))],
    }
    started = time.perf_counter()
    rows, stream = streamed(word_tokenizer, replies, tool)
    assert [row.answer for row in rows] == ["oak", "red", "red"]
    assert tool.batches == [["owl"], ["fox"]] and tool.most == 2  # the second did not wait for the first
    assert time.perf_counter() - started < 0.29
    assert stream.keys == [(0, 0), (1, 0), (2, 0), (0, 1), (2, 1)]  # row and turn, whatever came first


def test_calls_that_come_together_are_asked_together(word_tokenizer):
    tool = Recorded()
    replies = {row: [(1, SEARCH.format("owl")), (1, ANSWER.format("oak"))] for row in range(5, 11)}
    streamed(word_tokenizer, replies, tool)
    assert tool.batches == [["owl"] * 6]


def test_a_tool_that_may_not_run_beside_itself_does_not(word_tokenizer):
    tool = Recorded(seconds=0.03)
    replies = {row: [(1 + 9 * (row - 5), SEARCH.format("owl")), (1, ANSWER.format("oak"))] for row in range(5, 9)}
    streamed(word_tokenizer, replies, tool)
    assert len(tool.batches) > 1 and tool.most == 1


def test_an_error_of_a_tool_ends_the_run_and_drops_what_is_under_way(word_tokenizer):
    class Broken(Recorded):
        def run(self, calls):
            raise RetrievalError("the index is gone")

    stream = Replies(word_tokenizer, {5: [(1, SEARCH.format("owl"))], 6: [(500, ANSWER.format("oak"))]})
    agent = Agent(None, [Broken()], word_tokenizer, SearchR1(), BUDGET, stream=stream)
    with pytest.raises(RetrievalError, match="the index is gone"):
        agent.rollout([[5], [6]])
    assert stream.left == [2]
