"""Which letter an answer to a multiple-choice question means."""

from __future__ import annotations

import re
from collections.abc import Mapping

from rex_rag.answers import normalize_answer

# What may stand around a letter: white space, brackets, quotes, Markdown's emphasis; Chinese sets have their own.
_WRAPPING = " \t\r\n()[]{}\"'*_`\uff08\uff09\u3010\u3011\u201c\u201d"
_ENDS = ".:,\uff0e\uff1a\uff0c\u3001\u3002"
_LEAD_IN = re.compile(
    r"[*_`#\s]*(?:(?:so|thus|therefore|hence),?\s+)?(?:the\s+|my\s+)?(?:(?:best|correct|final|right|most likely)\s+)*"
    r"(?:answer|option|choice)(?:\s+(?:is|would\s+be))?\s*:?[*_`]*\s*(?:(?:option|choice)\s+)?",
    re.IGNORECASE,
)
# Normalisation drops both, and would take 1.5 for 15 and -5 for 5.
_POINT_OR_SIGN = re.compile(r"\.(?=\d)|(?<!\w)-(?=\d)")
_LETTERED = re.compile(
    r"[(\[*_`\"'\uff08\u3010]*([A-Za-z])[)\]*_`\"']*"
    r"(?:\s*[.):\]\uff0e\uff1a\u3001\uff09\u3011]|\s+[-–—])[*_`]*\s*(.*)",
    re.DOTALL,
)
_SECOND_LETTER = re.compile(
    r"(?:\W*(?:(?:and|or)\b\W*)?([A-Za-z])\b)+\W*|(?:and|or)\b\W*([A-Za-z])\b.*", re.DOTALL | re.IGNORECASE
)


def choice_letter(answer: str | None, choices: Mapping[str, str]) -> str | None:
    """The letter that an answer names, or `None` where it names none or contradicts itself.

    Read strictly, in this order, from the answer alone and never from the reasoning before it:

    1. a letter of the choices by itself, in either case, however wrapped: `B`, `(b)`, `**B.**`;
    2. the text of exactly one choice: `aspirin`, `E. coli`. Literally, but for case and white space; or else compared
       as gold answers are (`rex_rag.answers.normalize_answer`), with the decimal points and signs of numbers kept;
    3. such a letter, then `.`, `)`, `:` or a dash, then any text: `B. Aspirin`. If that text is another choice's, or
       begins by naming another letter (`B) or C)`), or the whole begins with another choice's text (`E. coli, as a
       rule` where B is E. coli), the answer contradicts itself: `None`;
    4. "the answer is", "option" or their like, then one of the above: `The correct answer is (B)`.

    Anything else is `None`: "A or B", a letter somewhere in a sentence, a letter that is no choice.
    """
    if answer is None:
        return None
    answer = answer.strip()
    lead_in = _LEAD_IN.match(answer)
    for candidate in (answer, answer[lead_in.end() :] if lead_in else ""):
        bare = candidate.strip(_WRAPPING + _ENDS).upper()
        if len(bare) == 1 and bare in choices:
            return bare
        meant = _texts_like(candidate, choices)
        if meant:
            return meant.pop() if len(meant) == 1 else None
        found = _LETTERED.fullmatch(candidate.strip())
        if found and found[1].upper() in choices:
            letter = found[1].upper()
            return None if _contradicts(letter, found[2], candidate, choices) else letter
    return None


def _texts_like(text: str, choices: Mapping[str, str]) -> set[str]:
    """The letters of the choices whose text this is."""
    for form in (_literal, _normalized):
        letters = {letter for letter, choice in choices.items() if form(choice) and form(choice) == form(text)}
        if letters:
            return letters
    return set()


def _literal(text: str) -> str:
    return " ".join(text.strip(_WRAPPING).rstrip(_WRAPPING + _ENDS).lower().split())


def _normalized(text: str) -> str:
    return normalize_answer(_POINT_OR_SIGN.sub(lambda found: {".": "\u00b7", "-": "\u2212"}[found[0]], text))


def _contradicts(letter: str, rest: str, whole: str, choices: Mapping[str, str]) -> bool:
    """Whether a lettered answer's text speaks for another choice and not for its own."""
    named = _texts_like(rest, choices)
    second = _SECOND_LETTER.fullmatch(rest)
    if second:
        named |= {(second[1] or second[2]).upper()} & choices.keys()
    begun = _literal(whole)
    for other, text in ((other, _literal(choice)) for other, choice in choices.items()):
        # A text of one letter says no more than the letter itself: `B. Oslo` where A is "b".
        if len(text) > 1 and begun.startswith(text) and not begun[len(text) : len(text) + 1].isalnum():
            named.add(other)
    return bool(named) and letter not in named
