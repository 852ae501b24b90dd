"""IRCoT: a sentence of reasoning, a search with that sentence, the next sentence."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from rex_rag.evaluation.methods.base import Attempt, Method
from rex_rag.evaluation.methods.extraction import announced_answer, announces_only
from rex_rag.evaluation.methods.prompt_texts import IRCOT
from rex_rag.protocols.inert import make_inert
from rex_rag.rollout.script import Generate, Script, search
from rex_rag.types import Passage, Truncation

# Trivedi et al., section 4.1: at most 15 paragraphs, since more does not fit the models' contexts.
MAX_PARAGRAPHS = 15

# Where a sentence may end. The model is stopped here; `first_sentence` decides whether it is an end.
SENTENCE_STOPS = (". ", "? ", "! ", "\n")
_END = re.compile(r"(?<=\S)(?:[.?!](?=\s)|(?=\n))")
_ABBREVIATION = re.compile(
    r"(?:^|[\s(\"'.])(?:[A-Z]|Mr|Mrs|Ms|Dr|Prof|St|Jr|Sr|Mt|Ft|Gen|Col|Lt|Capt|Sgt|Rev|Hon|Vol|vs|ca|cf|e\.g|i\.e)\.$"
)


def first_sentence(text: str) -> tuple[str, int] | None:
    """The first complete sentence and the offset behind it, or `None` where the text is not yet one.

    A sentence ends at a full stop, question or exclamation mark before white space, or at a line break; a full stop
    after an initial or a common abbreviation ends none, nor does a line break between "So the answer is:" and it.
    """
    for match in _END.finditer(text):
        sentence = text[: match.end()]
        if not (_ABBREVIATION.search(sentence) or announces_only(sentence)):
            return sentence.strip(), match.end()
    return None


def render_paragraphs(passages: Iterable[Passage], forbidden: Iterable[str]) -> str:
    """Title and text of each, a blank line between them."""
    forbidden = tuple(forbidden)
    return "\n\n".join(
        f"Title: {make_inert(passage.title, forbidden)}\n{make_inert(passage.text, forbidden)}" for passage in passages
    )


class IRCoT(Method):
    """Search with the question; then in turn a sentence, and a search with it, until a sentence begins the answer.

    All paragraphs found so far, each once, stand before the question; the sentences so far follow as the model's own,
    as the very ids it wrote. Once `max_turns` searches are spent, the model writes the rest of its reasoning in one
    go. The answer is what follows "So the answer is:" in the sentence that says so.

    The paper lets a second prompt, the reader, answer anew from the paragraphs; here, as in FlashRAG, the answer that
    the interleaved reasoning arrives at counts. Paragraphs beyond 15 are left out and counted as a cut observation.
    """

    name = "ircot"
    revision = 2  # the last announcement of a sentence counts
    title = "IRCoT"
    source = "Trivedi et al., Interleaving Retrieval with Chain-of-Thought Reasoning, arXiv 2212.10509"
    uses_retriever = True
    default_template = IRCOT
    stop_strings = ((), SENTENCE_STOPS)

    def script(self, attempt: Attempt) -> Script:
        attempt.trajectory.prompt_ids = self._prompt(attempt, "")
        known: set[str] = set()
        shown: list[str] = []
        thoughts: list[int] = []
        read = 0  # characters of the thoughts that were searched with
        query = attempt.question.question.strip()
        for _ in range(attempt.tools.budget.max_turns):
            [found] = yield search(query)
            self._show(attempt, found.passages, known, shown)
            prompt = self._prompt(attempt, "\n\n".join(shown))
            left = attempt.tools.budget.max_turn_tokens
            while True:
                written = yield Generate(prompt + thoughts, SENTENCE_STOPS, left)
                thoughts += written.ids
                left -= len(written.ids)
                rest = attempt.tools.decode(thoughts)[read:]
                cut = first_sentence(rest)
                if cut is not None or written.ended or written.truncation:
                    break
                if left <= 0:  # stopped at an abbreviation with the very last token
                    attempt.trajectory.truncations[Truncation.TURN] += 1
                    break
            query, length = cut if cut is not None else (rest.strip(), len(rest))
            read += length
            attempt.trajectory.answer = announced_answer(query)
            if attempt.trajectory.answer is not None or not query or written.truncation is Truncation.SEQUENCE:
                return
        written = yield Generate(self._prompt(attempt, "\n\n".join(shown)) + thoughts)
        rest = attempt.tools.decode(thoughts + written.ids)[read:]
        while (cut := first_sentence(rest)) is not None and announced_answer(cut[0]) is None:
            rest = rest[cut[1] :]
        attempt.trajectory.answer = announced_answer(cut[0] if cut is not None else rest)

    def _prompt(self, attempt: Attempt, passages: str) -> list[int]:
        return attempt.tools.encode_chat(self.prompt_text(attempt.question, passages=passages))

    def _show(self, attempt: Attempt, found: Sequence[Passage], known: set[str], shown: list[str]) -> None:
        """Add the paragraphs that are new to those shown."""
        new = [passage for passage in found if passage.id not in known]
        room = MAX_PARAGRAPHS - len(known)
        if len(new) > room:
            attempt.trajectory.truncations[Truncation.OBSERVATION] += 1
            new = new[:room]
        if new:
            known.update(passage.id for passage in new)
            block = attempt.within_observation(render_paragraphs(new, attempt.tools.control_tokens))
            attempt.inform(block)
            shown.append(block)
