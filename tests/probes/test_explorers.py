"""What each explorer proposes, and its place in eq. 6: with its densities, weights average to one."""

from __future__ import annotations

import math
from itertools import product

import pytest
import torch
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from parts import BUDGET, PROBE_POOL, Drawn, ScriptedGenerator, agent_for

from rex_rag.correction.densities import probe_log_density, sequence_log_weights
from rex_rag.models.endpoint import EndpointClient, EndpointError, EndpointOptions, chat_reply
from rex_rag.models.generation import Generation
from rex_rag.probes.backtracking import BacktrackingExplorer
from rex_rag.probes.explorer import Failed, reopen
from rex_rag.probes.model_written import EndpointExplorer, ModelWrittenExplorer
from rex_rag.probes.pool import ExplorationPool
from rex_rag.types import SegmentKind
from tests.retrieval.running import AppServer

SEARCH, WRONG = "<think> so </think> <search> owl </search>", "<think> so </think> <answer> red </answer>"
ROOMY = BUDGET.__class__(max_turns=3, max_turn_tokens=60, max_observation_tokens=60, max_sequence_length=400, top_k=1)


class Sequence:
    """Random numbers that are known."""

    def __init__(self, *numbers: int) -> None:
        self.numbers = list(numbers)

    def integers(self, count: int) -> int:
        return self.numbers.pop(0)


def failed_original(tokenizer, retriever, searches: int):
    agent = agent_for(ScriptedGenerator(tokenizer, [*[[SEARCH]] * searches, [WRONG]]), retriever, tokenizer, ROOMY)
    return agent.rollout([[5, 6]])[0]


def test_backtracking_cuts_behind_an_observation_and_keeps_the_ids(word_tokenizer, retriever):
    original = failed_original(word_tokenizer, retriever, searches=2)
    explorer = BacktrackingExplorer(ExplorationPool(PROBE_POOL, word_tokenizer))
    for cut, searches in ((0, 1), (1, 2)):
        [proposal] = explorer.propose([Failed(original, 4, Sequence(cut, 2))])
        probe = reopen(original, proposal, 400)
        assert [segment.kind.name for segment in probe.segments] == ["POLICY", "INFORMATION"] * searches + ["PROBE"]
        assert probe.completion_ids[: probe.cut] == original.completion_ids[: probe.cut]
        assert (probe.parent, probe.turns, len(probe.searches)) == (4, searches, searches)
        # 1/3 for the prompt, 1/2 for the cut
        assert sum(proposal.logprobs) == pytest.approx(math.log(1 / 3) + math.log(1 / 2))
        agent = agent_for(
            ScriptedGenerator(word_tokenizer, [["<answer> oak </answer>"]]), retriever, word_tokenizer, ROOMY
        )
        agent.resume([probe])
        assert (probe.answer, probe.turns) == ("oak", searches + 1)


def test_backtracking_has_nothing_to_go_back_to_without_a_search(word_tokenizer, retriever):
    original = failed_original(word_tokenizer, retriever, searches=0)
    explorer = BacktrackingExplorer(ExplorationPool(PROBE_POOL, word_tokenizer))
    assert explorer.propose([Failed(original, 0, Sequence())]) == [None]


@pytest.mark.parametrize("scored", [False, True])
def test_the_policy_writes_a_doubt_and_its_ids_are_inserted_as_sampled(word_tokenizer, retriever, scored):
    original = failed_original(word_tokenizer, retriever, searches=1)
    doubts = ["Wait the oak .", "Wait <search> fox .", "Wait the"]  # a mark, and no end: both are thrown away
    agent = agent_for(ScriptedGenerator(word_tokenizer, [doubts]), retriever, word_tokenizer, ROOMY)
    asked = []

    def score(contexts, ids):
        asked.append((contexts, ids))
        return [[-2.0] * len(row) for row in ids]

    explorer = ModelWrittenExplorer(agent, score if scored else None)
    first, marked, unended = explorer.propose([Failed(original, row, Drawn(0)) for row in range(3)])
    assert marked is None and unended is None
    sampled = word_tokenizer(doubts[0], add_special_tokens=False)["input_ids"]
    assert first.ids[-4:] == sampled and first.text == " <think> Wait the oak ."
    # What opens the thought follows from the original; the sentence has what it was sampled with.
    assert first.logprobs == [0.0] * (len(first.ids) - 4) + [-2.0 if scored else -1.0] * 4
    probe = reopen(original, first, 400)
    assert probe.segments[-1].kind is SegmentKind.PROBE and probe.pool_logprobs == first.logprobs
    [shown] = agent.driver.generator(()).seen[0][:1]
    text = word_tokenizer.decode(shown)
    assert (
        "<search>" not in text and "<information>" not in text
    )  # what is quoted can neither act nor be an observation
    if scored:
        assert asked == [([shown], [sampled])]


# --- Enumeration: two turns, each of which may be behind an observation; x1 decides whether the original fails.

PRIOR = torch.tensor([0.7, 0.3], dtype=torch.float64)  # of x1; 1 fails
SECOND = torch.tensor([[0.4, 0.6], [0.8, 0.2]], dtype=torch.float64)  # of x2 behind x1
DOUBT = torch.tensor([0.1, 0.05], dtype=torch.float64)  # that the policy writes doubt d behind (x1, x2) by itself
TRY = torch.tensor([[0.5, 0.3, 0.2], [0.1, 0.2, 0.7]], dtype=torch.float64)  # of c behind doubt d
RARELY = 1e-7  # it hardly ever doubts behind x1, so that originals have two observations
SHARE = 0.2


def mixture_times_weights(cut_logprob: float, doubt_logprobs) -> float:
    """The sum of mu * pi / mu over all trajectories, mu enumerated and pi / mu by the package.

    Args:
        cut_logprob: the log-probability of each of two cuts.
        doubt_logprobs: (x1, d) -> log-probability of the doubt, the cut not counted.
    """
    z = PRIOR[1].item()
    total = 0.0
    rows = []  # log pi of up to 4 tokens, kinds, log pool, density under the true probe policy
    for x1, x2 in product(range(2), range(2)):
        at_once = [PRIOR[x1], SECOND[x1, x2], 1 - DOUBT.sum()]
        rows.append(([v.log().item() for v in at_once], "PPP", [0.0] * 3, 0.0))
        for d, c in product(range(2), range(3)):
            tokens = [PRIOR[x1], SECOND[x1, x2], DOUBT[d], TRY[d, c]]
            inserted = doubt_logprobs(x1, d) + cut_logprob
            true = PRIOR[x1] / z * SECOND[x1, x2] * math.exp(inserted) * TRY[d, c] if x1 else 0.0
            rows.append(([v.log().item() for v in tokens], "PPXP" if x1 else "PPPP", [0, 0, inserted, 0], float(true)))
    for x1, d, c in product(range(2), range(2), range(3)):
        tokens = [PRIOR[x1].item(), RARELY, TRY[d, c].item()]
        inserted = doubt_logprobs(x1, d) + cut_logprob
        true = PRIOR[x1] / z * math.exp(inserted) * TRY[d, c] if x1 else 0.0
        rows.append(([math.log(v) for v in tokens], "PXP" if x1 else "PPP", [0, inserted, 0], float(true)))
    assert sum(true for *_, true in rows) == pytest.approx(1.0)
    for logps, kinds, pool, true in rows:
        old = torch.tensor([logps], dtype=torch.float64)
        codes = torch.tensor([[SegmentKind.PROBE if kind == "X" else SegmentKind.POLICY for kind in kinds]])
        density = probe_log_density(old, codes, torch.tensor([pool], dtype=torch.float64), z)
        weight = sequence_log_weights(old, density, torch.ones_like(codes), SHARE).exp().item()
        total += ((1 - SHARE) * old.sum().exp().item() + SHARE * true) * weight
    return total


def test_backtracking_weights_average_to_one():
    """Also -log(2) for the cut, or else they would not."""
    assert mixture_times_weights(math.log(1 / 2), lambda x1, d: math.log(1 / 2)) == pytest.approx(1.0, abs=1e-5)


def test_model_written_weights_average_to_one():
    """The doubt's density depends on the prefix, as a policy's does. Two cuts, to share the enumeration."""
    written = torch.tensor([[0.5, 0.5], [0.9, 0.1]], dtype=torch.float64).log()
    assert mixture_times_weights(math.log(1 / 2), lambda x1, d: written[x1, d].item()) == pytest.approx(1.0, abs=1e-5)


@pytest.mark.parametrize("first", [[], [None]])
def test_a_generation_without_log_probabilities_of_all_its_tokens_gives_none(word_tokenizer, retriever, first):
    class Silent(ScriptedGenerator):
        def generate(self, prompt_ids, max_new_tokens):
            rows = super().generate(prompt_ids, max_new_tokens)
            return [Generation(row.ids, [*first, *row.logprobs[1:]] if first else None) for row in rows]

    original = failed_original(word_tokenizer, retriever, searches=1)
    agent = agent_for(Silent(word_tokenizer, [["Wait the oak ."]]), retriever, word_tokenizer, ROOMY)
    [proposal] = ModelWrittenExplorer(agent).propose([Failed(original, 0, Drawn(0))])
    assert proposal.logprobs is None


class DoubtServer:
    """A chat endpoint over real HTTP that says what it is told to."""

    def __init__(self, *replies: str) -> None:
        self.asked: list[dict] = []
        self._replies = iter(replies)
        app = FastAPI()
        app.post("/v1/chat/completions")(self.answer)
        self.server = AppServer(app)

    async def answer(self, request: Request):
        self.asked.append(await request.json())
        reply = next(self._replies, None)
        if reply is None:
            return JSONResponse({"error": "over quota"}, 403)
        return {"choices": [{"message": {"role": "assistant", "content": reply}, "finish_reason": "stop"}]}


def test_an_endpoint_writes_a_doubt_and_what_cannot_be_one_is_no_proposal(word_tokenizer, retriever):
    original = failed_original(word_tokenizer, retriever, searches=1)
    replies = [
        "<think> Is the oak red? </think>\n Wait the oak . And more .",
        "Wait <search> fox .",
        "Wait the",
        "red " * 41 + ".",
    ]
    asked = DoubtServer(*replies)
    agent = agent_for(ScriptedGenerator(word_tokenizer, []), retriever, word_tokenizer, ROOMY)
    client = EndpointClient(
        EndpointOptions(asked.server.url, "big", attempts=1, concurrency=1), "/chat/completions", chat_reply
    )
    try:
        explorer = EndpointExplorer(agent.script, client)
        drawn = [Failed(original, row, Drawn(7)) for row in range(4)]
        first, *others = explorer.propose(drawn)
        assert others == [None] * 3  # a mark, no end, too long
        assert first.text == " <think> Wait the oak ." and first.logprobs is None
        assert first.ids == word_tokenizer(first.text, add_special_tokens=False)["input_ids"]
        assert reopen(original, first, 400).pool_logprobs is None
        [message] = asked.asked[0]["messages"]
        assert (asked.asked[0]["model"], asked.asked[0]["seed"]) == ("big", 7)
        assert "Wrong answer: red" in message["content"] and "<search>" not in message["content"]
        with pytest.raises(EndpointError, match="over quota"):
            explorer.propose(drawn[:1])
    finally:
        client.close()
        asked.server.stop()
