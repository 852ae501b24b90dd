"""The methods that let the model write once: from memory, or from passages found with the question."""

from __future__ import annotations

from rex_rag.evaluation.methods.base import Attempt, Method
from rex_rag.evaluation.methods.extraction import announced_answer, bare_answer, behind_thoughts, tagged_answer
from rex_rag.evaluation.methods.prompt_texts import CHAIN_OF_THOUGHT, DIRECT, RETRIEVE_ONCE, THINK_AND_ANSWER
from rex_rag.protocols.inert import ANSWER_TAGS, make_inert
from rex_rag.rollout.script import Generate, Script, search


class Direct(Method):
    """The answer at once. It is the first line the model writes (or what it put into answer tags)."""

    name = "direct"
    title = "Direct answer"
    source = "plain prompting; as in Search-R1, arXiv 2503.09516, table 2"
    uses_retriever = False
    default_template = DIRECT
    stop_strings = ((),)

    def script(self, attempt: Attempt) -> Script:
        prompt = attempt.tools.encode_chat(self.prompt_text(attempt.question))
        attempt.trajectory.prompt_ids = prompt
        written = yield Generate(prompt)
        attempt.trajectory.answer = bare_answer(written.text)


class ChainOfThought(Method):
    """Reasoning, then the answer: what follows the last "So the answer is:", looked for behind the thoughts of a
    reasoning model before it is in them (or what it put into answer tags)."""

    name = "cot"
    revision = 2  # the last announcement counts
    title = "Chain of thought"
    source = "Wei et al., Chain-of-Thought Prompting Elicits Reasoning in Large Language Models, arXiv 2201.11903"
    uses_retriever = False
    default_template = CHAIN_OF_THOUGHT
    stop_strings = ((),)

    def script(self, attempt: Attempt) -> Script:
        prompt = attempt.tools.encode_chat(self.prompt_text(attempt.question))
        attempt.trajectory.prompt_ids = prompt
        written = yield Generate(prompt)
        text = written.text
        attempt.trajectory.answer = (
            tagged_answer(text) or announced_answer(behind_thoughts(text)) or announced_answer(text)
        )


class RetrieveOnce(Method):
    """Search with the question, answer from what was found. The answer is read as in `Direct`.

    `prompt_ids` is the whole prompt, passages included; the INFORMATION segment repeats them for people to read.
    """

    name = "rag"
    title = "RAG"
    source = "Lewis et al., Retrieval-Augmented Generation for Knowledge-Intensive NLP Tasks, arXiv 2005.11401"
    uses_retriever = True
    default_template = RETRIEVE_ONCE
    stop_strings = ((),)

    def script(self, attempt: Attempt) -> Script:
        [found] = yield search(attempt.question.question.strip())
        passages = attempt.within_observation(make_inert(found.text, attempt.tools.control_tokens))
        attempt.inform(passages)
        prompt = attempt.tools.encode_chat(self.prompt_text(attempt.question, passages=passages))
        attempt.trajectory.prompt_ids = prompt
        written = yield Generate(prompt)
        attempt.trajectory.answer = bare_answer(written.text)


class R1(Method):
    """A model trained to think and answer without searching. The answer is the first complete `<answer>`."""

    name = "r1"
    title = "R1"
    source = "Guo et al., DeepSeek-R1, arXiv 2501.12948; trained on the same questions as Search-R1, arXiv 2503.09516"
    uses_retriever = False
    default_template = THINK_AND_ANSWER
    stop_strings = ((ANSWER_TAGS[1],),)

    def script(self, attempt: Attempt) -> Script:
        prompt = attempt.tools.encode_chat(self.prompt_text(attempt.question))
        attempt.trajectory.prompt_ids = prompt
        written = yield Generate(prompt, stop=(ANSWER_TAGS[1],))
        attempt.trajectory.answer = tagged_answer(written.text)
