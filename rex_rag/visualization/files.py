"""Pictures on disk: there whole or not at all."""

from __future__ import annotations

import logging
import os
import re
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rex_rag.support.durable import written_whole
from rex_rag.support.errors import UserError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PICTURE_FORMATS = ("png", "svg")

logger = logging.getLogger(__name__)

_LACKING = r"Glyph (\d+) \("  # how matplotlib begins to warn of a character that its fonts lack
_MOST_NAMED = 20


def write_text(path: str | os.PathLike, text: str) -> Path:
    """Write a UTF-8 file and return its path; half a surrogate pair, which no file can hold, becomes `?`."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with written_whole(path) as file:
        file.write(text.encode("utf-8", errors="replace"))
    return path


def picture_format(path: str | os.PathLike, formats: Sequence[str] = PICTURE_FORMATS) -> str:
    """The format that a picture's name asks for.

    Raises:
        ValueError: for any other name.
    """
    suffix = Path(path).suffix.lower().lstrip(".")
    if suffix not in formats:
        raise UserError(f"{path} does not say what picture to draw; end its name in .{' or .'.join(formats)}")
    return suffix


def new_figure(width: float, height: float, **settings) -> Figure:
    """A figure of its own, not pyplot's: no global state and no choice of backend forced on the caller.

    Raises:
        ImportError: without matplotlib; the message says how to install it.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            "drawing needs matplotlib, one of this package's requirements: `pip install matplotlib`"
        ) from error
    figure = Figure(figsize=(width, height), **settings)
    FigureCanvasAgg(figure)
    return figure


def write_figure(figure: Figure, path: str | os.PathLike, dpi: int) -> Path:
    """Save a figure as its name's suffix says, equal figures as equal bytes, and return its path.

    What the font cannot draw is logged, for an image of pixels, in one line.

    Raises:
        ValueError: for a name that ends neither in .png nor in .svg.
    """
    from matplotlib import rc_context

    path = Path(path)
    kind = picture_format(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # Text stays text in an SVG: small, searchable, and drawn in the reader's own fonts.
    with warnings.catch_warnings(record=True) as caught:
        # Once for each character, whatever else was warned of before and whatever the caller makes of warnings.
        warnings.filterwarnings("always", message=_LACKING, category=UserWarning)
        with rc_context({"svg.fonttype": "none", "svg.hashsalt": "rex_rag"}), written_whole(path) as file:
            figure.savefig(file, format=kind, dpi=dpi, metadata={"Date": None} if kind == "svg" else None)
    lacking: set[str] = set()
    for warning in caught:
        if found := re.match(_LACKING, str(warning.message)):
            lacking.add(chr(int(found[1])))
        else:
            warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)
    if lacking and kind != "svg":
        named = [each if each.isprintable() else f"U+{ord(each):04X}" for each in sorted(lacking)]
        logger.warning(
            "%s: the font has no %s%s, drawn as boxes; a name ending in .svg keeps such text, for the reader's fonts",
            path,
            " ".join(named[:_MOST_NAMED]),
            f" and {len(named) - _MOST_NAMED} more" if len(named) > _MOST_NAMED else "",
        )
    return path
