"""Exploration prompts: the pool, its exact next-token log-probabilities, and the explorer that draws from it.

The probability of an inserted token is the frequency with which it follows the prompt's tokens so far among the
tokenised pool prompts (a trie), computed with the tokenizer in use for the characters actually inserted. The product
over a prompt is the probability of having drawn it: 1/n for n distinct prompts (METHOD: probe policy density, eq. 6).
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rex_rag.probes.explorer import Explorer, Failed, Proposal, Score
from rex_rag.protocols.inert import ANSWER_TAGS, INFORMATION_TAGS, SEARCH_TAGS, THINK_TAGS
from rex_rag.rollout.cuts import tokens_before
from rex_rag.support.errors import UserError
from rex_rag.support.tokenization import encode_on

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from rex_rag.rollout.agent import Agent, AgentScript
    from rex_rag.training.config import REXRAGConfig

DEFAULT_POOL: tuple[str, ...] = (
    "<think> Wait, I may have overlooked part of the question.",
    "<think> Wait, I may have misread the question.",
    "<think> Hold on, one step of my reasoning is missing.",
    "<think> Hold on, did I stop one step too early?",
    "<think> Let me check this again, I am not sure the last step follows.",
    "<think> Let me check whether I answered the question that was asked.",
    "<think> Something is missing here, I should search again.",
    "<think> Something does not fit, I should read the passages again.",
    "<think> I am not sure about this, another search could help.",
    "<think> I am not sure I have found everything I need.",
    "<think> Did I mix up two different names?",
    "<think> Did I take the first thing I found as the answer?",
    "<think> Maybe the answer needs one more step.",
    "<think> Maybe I used the wrong passage.",
    "<think> Maybe my search was about the wrong thing.",
    "<think> Actually, this may only be a part of the answer.",
    "<think> Actually, I did not check the last part of the question.",
    "<think> Actually, the passage says something different from what I assumed.",
    "<think> Before I answer, what does the question really ask for?",
    "<think> Before I answer, I should check the step I skipped.",
    "<think> Looking back, I assumed something that no passage says.",
    "<think> Looking back, my first search may have been wrong.",
    "<think> I could be wrong, let me look for what is still missing.",
    "<think> I could be wrong, let me read the question again.",
    "<think> The question asks for more than I have found so far.",
    "<think> The last passage may not be about what was asked.",
    "<think> Is this really the thing that was asked for?",
    "<think> Is there a name in the question that I overlooked?",
    "<think> My reasoning went too fast, one more search is needed.",
    "<think> My answer does not follow from the passages yet.",
)

_FORBIDDEN_TAGS = (*SEARCH_TAGS, *ANSWER_TAGS, *INFORMATION_TAGS)


@dataclass(frozen=True, slots=True)
class EncodedPool:
    """The pool for one tokenizer and one head of leftover characters: ids and log-frequencies, prompt by prompt."""

    texts: list[str]
    ids: list[list[int]]
    logprobs: list[list[float]]


class ExplorationPool:
    """A pool of exploration prompts, drawn from uniformly.

    Args:
        prompts: distinct texts, each beginning with `<think>` and free of action and information tags.
        tokenizer: the policy's tokenizer.
        density: `"exact"` for the trie frequencies, `"coarse"` for 1/n on the first token and 1 on the rest
            (an ablation).

    Raises:
        ValueError: naming the offending prompt, for an empty pool, a prompt that breaks the rules, or prompts whose
            token ids are a prefix of another's (their probability could not be told from the tokens).
    """

    def __init__(self, prompts: Sequence[str], tokenizer: PreTrainedTokenizerBase, density: str = "exact") -> None:
        if density not in ("exact", "coarse"):
            raise UserError(f"probe_density is {density!r}; choose 'exact' (trie frequencies) or 'coarse' (1/n first)")
        _validate(prompts)
        self.prompts = tuple(prompts)
        self.tokenizer = tokenizer
        self.density = density
        self._encoded: dict[str, EncodedPool] = {}
        self._refuse_shared_ids(self.encode(""))

    @classmethod
    def of(cls, agent: Agent, args: REXRAGConfig) -> ExplorationPool:
        """The pool of a run."""
        return cls(args.exploration_pool(), agent.script.tokenizer, args.probe_density)

    def __len__(self) -> int:
        return len(self.prompts)

    def encode(self, leftover: str) -> EncodedPool:
        """Tokenise every prompt behind `leftover`, the characters that a dropped straddling token leaves over."""
        if leftover not in self._encoded:
            texts = [leftover + prompt for prompt in self.prompts]
            ids = encode_on(self.tokenizer, texts)
            if self.density == "exact":
                logprobs = pool_log_probs(ids)
            else:
                logprobs = [[-math.log(len(ids))] + [0.0] * (len(row) - 1) for row in ids]
            self._encoded[leftover] = EncodedPool(texts=texts, ids=ids, logprobs=logprobs)
        return self._encoded[leftover]

    def _refuse_shared_ids(self, encoded: EncodedPool) -> None:
        order = sorted(range(len(self)), key=lambda index: encoded.ids[index])
        for first, second in itertools.pairwise(order):
            ids = encoded.ids[first]
            if encoded.ids[second][: len(ids)] == ids:
                raise UserError(
                    f"exploration prompts {first} ({self.prompts[first]!r}) and {second} ({self.prompts[second]!r}) "
                    "cannot be told apart by this tokenizer: the token ids of one begin the other. Reword one of them"
                )


def load_pool(path: str | Path | None, size: int | None = None) -> tuple[str, ...]:
    """Read a pool, one prompt a line (blank lines skipped); `None` gives the built-in 30. `size` keeps the first ones.

    Raises:
        ValueError: for a missing or empty file, or a `size` that the pool does not hold.
    """
    if path is None:
        prompts: tuple[str, ...] = DEFAULT_POOL
    else:
        file = Path(path)
        if not file.is_file():
            raise UserError(f"exploration_prompts is {str(path)!r}, which is not a file; give a text file, one a line")
        prompts = tuple(line.strip() for line in file.read_text(encoding="utf-8").splitlines() if line.strip())
    if size is not None:
        if not 1 <= size <= len(prompts):
            raise UserError(
                f"exploration_pool_size is {size}, but the pool holds {len(prompts)} prompts; use 1..{len(prompts)}"
            )
        prompts = prompts[:size]
    _validate(prompts)
    return prompts


def _validate(prompts: Sequence[str]) -> None:
    if not prompts:
        raise UserError("the exploration pool is empty; give at least one prompt, or leave exploration_prompts unset")
    for index, prompt in enumerate(prompts):
        if not prompt.startswith(THINK_TAGS[0]):
            raise UserError(
                f"exploration prompt {index} is {prompt!r}; it must begin with {THINK_TAGS[0]} so that the policy "
                "goes on reasoning"
            )
        for tag in _FORBIDDEN_TAGS:
            if tag in prompt:
                raise UserError(f"exploration prompt {index} contains {tag}, which would act in the model's place")
    repeated = [prompt for prompt, count in Counter(prompts).items() if count > 1]
    if repeated:
        raise UserError(f"exploration prompt {repeated[0]!r} stands in the pool twice; prompts must be distinct")


def pool_log_probs(ids: Sequence[Sequence[int]]) -> list[list[float]]:
    """Exact next-token log-frequencies of a uniformly drawn prompt, token by token.

    Args:
        ids: the tokenised prompts.

    Returns:
        For prompt j and position i, log(#prompts beginning with ids[j][:i+1] / #prompts beginning with ids[j][:i]).
    """
    starts: Counter = Counter()
    for row in ids:
        starts.update(tuple(row[:end]) for end in range(len(row) + 1))
    return [
        [math.log(starts[tuple(row[: end + 1])] / starts[tuple(row[:end])]) for end in range(len(row))] for row in ids
    ]


class PoolExplorer(Explorer):
    """The paper's (section 3.3): re-opened before the answer, with a prompt drawn uniformly from a pool.

    Its place in eq. 6: the cut follows from the original, so all that was drawn is the prompt, whose tokens have their
    frequency in the pool. A token that straddles the first character of the answer is dropped; the characters that it
    held before the answer head the inserted text, and the frequencies are those of the texts so headed.
    """

    name = "pool"

    @classmethod
    def make(cls, agent: Agent, args: REXRAGConfig, score: Score | None) -> PoolExplorer:
        return cls(ExplorationPool.of(agent, args), agent.script)

    def __init__(self, pool: ExplorationPool, script: AgentScript) -> None:
        self.pool = pool
        self._script = script

    def propose(self, failed: Sequence[Failed]) -> list[Proposal | None]:
        return [self._propose(one) for one in failed]

    def _propose(self, failed: Failed) -> Proposal:
        span = failed.original.answer_span
        if span is None:
            raise UserError("only an original that answered can be probed before its answer; this one has none")
        answered = failed.original.segments[span.segment]
        kept, leftover = tokens_before(answered, span.offset, self._script.decode)
        encoded = self.pool.encode(leftover)
        prompt = int(failed.draws.integers(len(self.pool)))
        head = answered.text[: span.offset - len(leftover)]
        return Proposal(
            failed.index,
            span.segment,
            kept,
            head,
            encoded.ids[prompt],
            encoded.texts[prompt],
            encoded.logprobs[prompt],
        )
