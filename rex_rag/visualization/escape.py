"""Untrusted text on a page: nothing in it is markup, and nothing in it can hide or reorder what stands around it."""

from __future__ import annotations

import html
import re

# Embeddings, overrides and isolates turn the reading order around; control characters and characters without width or
# glyph let unlike texts look alike: an answer with one in it is wrong, whatever it looks like. Marks that scripts use
# in running text (U+200C to U+200F, U+061C) stay as they are.
_INVISIBLE = re.compile(
    "[\u202a-\u202e\u2066-\u2069\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff"
    "\u00ad\u200b\u2028\u2029\u2060-\u2065\ufeff\U000e0000-\U000e007f]"
)


def escape(text: object) -> str:
    """HTML of a text, for content and for attributes in quotes."""
    return html.escape(str(text).replace("\r\n", "\n"))


def escape_visibly(text: object) -> str:
    """HTML of a text with invisible control characters spelled out, as `U+202E`; for content alone."""
    return _INVISIBLE.sub(
        lambda found: f'<span class="control">U+{ord(found[0]):04X}</span>',
        escape(text),
    )


def without_controls(text: str) -> str:
    """A text for a picture: one line, line ends as `⏎`, control characters as `·`."""
    return without_invisible(text.replace("\r\n", "\n").replace("\n", "⏎").replace("\t", "⇥"))


def without_invisible(text: str) -> str:
    """A text for a terminal: control characters but line ends and tabs as `·`."""
    return _INVISIBLE.sub("·", text)
