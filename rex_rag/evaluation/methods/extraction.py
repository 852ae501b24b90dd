"""Where a method's answer stands in text that the model wrote. Pure text; `None` where there is no answer."""

from __future__ import annotations

import re

from rex_rag.protocols.inert import ANSWER_TAGS, THINK_TAGS

# From the last opening tag before the closing one, as protocols read it.
_TAGGED = re.compile(
    f"{ANSWER_TAGS[0]}((?:(?!{ANSWER_TAGS[0]}).)*?){ANSWER_TAGS[1]}",
    re.DOTALL,
)
# "So the answer is:", as the prompts ask for it; IRCoT stops there (arXiv 2212.10509, section 3.1). With a closing
# quote behind it, it is only talked about.
_ANNOUNCED = re.compile(
    r"(?:\bso\s+)?(?:\bthe\s+)?(?:\bfinal\s+)?\banswer is[\s*_]*[:\uff1a](?![\"'\u2019\u201d](?!\w))", re.IGNORECASE
)
_NEXT_QUESTION = re.compile(r"\n[\s*_#]*Question[*_]*:")
_BOX = re.compile(r"\\boxed\s*\{")
_TEXT_COMMAND = re.compile(r"\\(?:text|mathrm|mathbf|textbf)\s*\{([^{}]*)\}")
_EMPHASIS = "*_`"


def tagged_answer(text: str) -> str | None:
    """The content of the first complete `<answer>…</answer>`."""
    match = _TAGGED.search(text)
    return (match.group(1).strip() or None) if match else None


def bare_answer(text: str) -> str | None:
    """The first line that is not blank; where the model used answer tags, their content.

    What a reasoning model thinks first is no answer: lines count from the end of its thoughts on.
    """
    tagged = tagged_answer(text)
    if tagged is not None:
        return tagged
    return next((line.strip() for line in behind_thoughts(text).splitlines() if line.strip()), None)


def behind_thoughts(text: str) -> str:
    """What a reasoning model writes once it has thought; the whole text of one that uses no think tags."""
    # A chat template may have opened the thoughts already; thoughts that are left open reach to the end.
    return text.rpartition(THINK_TAGS[1])[2].partition(THINK_TAGS[0])[0]


def announces_only(text: str) -> bool:
    """Whether the text ends with "So the answer is:", so that the answer is yet to come."""
    match = _ANNOUNCED.search(text)
    return match is not None and not text[match.end() :].strip(_EMPHASIS + " \t\n")


def announced_answer(text: str) -> str | None:
    """The rest of the line behind the last "So the answer is:" or "answer is:", without its full stop; or the next
    line that is not blank where nothing follows on that line. One that nothing follows announces nothing, nor does
    any behind a question that a base model goes on to ask itself."""
    first = _ANNOUNCED.search(text)
    beyond = _NEXT_QUESTION.search(text, first.end()) if first else None
    text = text[: beyond.start()] if beyond else text
    for match in reversed(list(_ANNOUNCED.finditer(text))):
        text, rest = text[: match.start()], text[match.end() :].replace(THINK_TAGS[1], "\n")
        line = next((line for line in rest.splitlines() if line.strip(_EMPHASIS + " \t")), "")
        answer = line.strip().strip(_EMPHASIS).strip()
        answer = answer.removesuffix(".").strip(_EMPHASIS).strip()
        if answer:
            return answer
    return None


def boxed_answer(text: str) -> str | None:
    r"""The content of the last complete `\boxed{…}`, braces balanced, without a `\text{…}` around all of it."""
    for match in reversed(list(_BOX.finditer(text))):
        depth = 1
        for position in range(match.end(), len(text)):
            depth += {"{": 1, "}": -1}.get(text[position], 0)
            if depth == 0:
                content = text[match.end() : position].strip()
                command = _TEXT_COMMAND.fullmatch(content)
                content = command.group(1).strip() if command else content
                if content:
                    return content
                break
    return None
