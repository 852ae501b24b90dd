"""Which letter an answer to a multiple-choice question means."""

from __future__ import annotations

import re
from collections.abc import Mapping

from rex_rag.answers import normalize_answer

# What may stand around a letter: white space, brackets, quotes, Markdown's emphasis.
_WRAPPING = " \t\r\n()[]{}\"'*_`"
_LEAD_IN = re.compile(
    r"(?:(?:so|thus|therefore|hence),?\s+)?(?:the\s+|my\s+)?(?:(?:best|correct|final|right|most likely)\s+)*"
    r"(?:answer|option|choice)(?:\s+(?:is|would\s+be))?\s*:?\s*(?:(?:option|choice)\s+)?",
    re.IGNORECASE,
)
_LETTERED = re.compile(r"[(\[*_`\"']*([A-Za-z])[)\]*_`\"']*(?:\s*[.):\]]|\s+[-–—])[*_`]*\s*(.*)", re.DOTALL)
_SECOND_LETTER = re.compile(
    r"\W*(?:(?:and|or)\b\W*)?([A-Za-z])\W*|(?:and|or)\b\W*([A-Za-z])\b.*", re.DOTALL | re.IGNORECASE
)


def choice_letter(answer: str | None, choices: Mapping[str, str]) -> str | None:
    """The letter that an answer names, or `None` where it names none or contradicts itself.

    Read strictly, in this order, from the answer alone and never from the reasoning before it:

    1. a letter of the choices by itself, in either case, however wrapped: `B`, `(b)`, `**B.**`;
    2. such a letter, then `.`, `)`, `:` or a dash, then any text: `B. Aspirin`. If that text is another choice's, or
       begins by naming another letter (`B) or C)`), the answer contradicts itself: `None`;
    3. the text of exactly one choice, compared as gold answers are (`rex_rag.answers.normalize_answer`): `aspirin`;
    4. "the answer is", "option" or their like, then one of the above: `The correct answer is (B)`.

    Anything else is `None`: "A or B", a letter somewhere in a sentence, a letter that is no choice.
    """
    if answer is None:
        return None
    texts = {letter: normalize_answer(text) for letter, text in choices.items()}
    answer = answer.strip()
    lead_in = _LEAD_IN.match(answer)
    for candidate in (answer, answer[lead_in.end() :] if lead_in else ""):
        letter = _leading_letter(candidate, texts)
        if letter is not None:
            return letter or None
        spoken = normalize_answer(candidate)
        meant = [letter for letter, text in texts.items() if text and text == spoken]
        if meant:
            return meant[0] if len(meant) == 1 else None
    return None


def _leading_letter(text: str, texts: Mapping[str, str]) -> str | None:
    """The letter by rule 1 or 2; empty for a contradiction, `None` where the text begins otherwise."""
    bare = text.strip(_WRAPPING + ".:,")
    if len(bare) == 1 and bare.upper() in texts:
        return bare.upper()
    found = _LETTERED.fullmatch(text.strip())
    if not found or found[1].upper() not in texts:
        return None
    letter, rest = found[1].upper(), normalize_answer(found[2])
    named = {other for other, text in texts.items() if text and text == rest}
    second = _SECOND_LETTER.fullmatch(found[2])
    if second:
        named |= {(second[1] or second[2]).upper()} & texts.keys()
    return "" if named and letter not in named else letter
