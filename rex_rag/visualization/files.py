"""Pictures on disk: there whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rex_rag.durable import written_whole

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PICTURE_FORMATS = ("png", "svg")


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
        raise ValueError(f"{path} does not say what picture to draw; end its name in .{' or .'.join(formats)}")
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

    Raises:
        ValueError: for a name that ends neither in .png nor in .svg.
    """
    from matplotlib import rc_context

    path = Path(path)
    kind = picture_format(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # Text stays text in an SVG: small, searchable, and drawn in the reader's own fonts.
    settings = {"svg.fonttype": "none", "svg.hashsalt": "rex_rag"}
    with rc_context(settings), written_whole(path) as file:
        figure.savefig(file, format=kind, dpi=dpi, metadata={"Date": None} if kind == "svg" else None)
    return path
