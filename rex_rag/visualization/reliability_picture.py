"""Pictures of token reliability (the paper's figure 3): each token's box coloured by it, with bars for AU and EU.

Drawn as PNG or SVG, several models side by side, and as HTML for the trajectory page. Works on plain data
(`reliability_record`); the figures come from `rex_rag.evaluation.token_reliability`.
"""

from __future__ import annotations

import math
import os
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rex_rag.support.errors import UserError
from rex_rag.visualization.escape import escape, escape_visibly, without_controls
from rex_rag.visualization.files import new_figure, picture_format, write_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from rex_rag.evaluation.token_reliability import TokenReliability

# Nine steps of cividis, least to most reliable: it reads the same with and without colour vision, and in grey.
COLOURS = ("#00224e", "#1a386f", "#434e6c", "#61656f", "#7d7c78", "#9b9476", "#bcae6c", "#dec958", "#fee838")
WHITE_TEXT_UP_TO = 3
AU_COLOUR, EU_COLOUR = "#d55e00", "#0072b2"  # Okabe and Ito: told apart with any colour vision
MOST_TOKENS = 800

_COLUMN = 72  # characters of a model's column
_CHARACTER = 0.0753  # inches: DejaVu Sans Mono at 9 points
_LINE = 0.30
_TEXT_SHARE = 0.6  # of a line's height; the bars are below


def reliability_record(
    model: str, tokens: Iterable[TokenReliability], k: int, *, inserted: bool = False
) -> dict[str, Any]:
    """A model's tokens as plain data to draw, `{"model", "k", "tokens"}`, figures `None` where they are undefined.

    Retrieved text and feedback were not the model's to write: each run of it becomes one box that says its length,
    unless `inserted`.
    """
    entries: list[dict[str, Any]] = []
    for kind, group in groupby(tokens, key=lambda token: token.kind):
        run = list(group)
        if kind.is_trained or inserted:
            entries += [
                {
                    "text": token.text,
                    "kind": kind.name,
                    "aleatoric": _finite(token.aleatoric),
                    "epistemic": token.epistemic,
                    "reliability": _finite(token.reliability),
                }
                for token in run
            ]
        else:
            entries.append({"text": f"[{kind.name}: {len(run)} tokens]", "kind": kind.name, "epistemic": None})
    return {"model": model, "k": k, "tokens": entries}


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def with_shared_scale(pictures: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The same pictures with one `scale` for all, so that equal colours and bars mean equal figures."""
    tokens = [token for picture in pictures for token in picture["tokens"] if token["epistemic"] is not None]
    rated = [token["reliability"] for token in tokens if token["reliability"] is not None]
    scale = {
        "reliability": [min(rated, default=-1.0), max(rated, default=0.0)],
        "aleatoric": max((token["aleatoric"] for token in tokens if token["aleatoric"] is not None), default=0.0),
        "epistemic": max((token["epistemic"] for token in tokens), default=0.0),
    }
    return [{**picture, "scale": scale} for picture in pictures]


def level(value: float, scale: Mapping[str, Any]) -> int:
    """Which of `COLOURS` a reliability gets: 0 for the lowest of the scale, the last for the highest."""
    low, high = scale["reliability"]
    share = 1.0 if high <= low else (value - low) / (high - low)
    return round(min(max(share, 0.0), 1.0) * (len(COLOURS) - 1))


def summary(picture: Mapping[str, Any]) -> str:
    """The means over a model's own tokens, in one line."""
    rated = [token for token in picture["tokens"] if token.get("reliability") is not None]
    without = sum(token["epistemic"] is not None and token["reliability"] is None for token in picture["tokens"])
    text = f"{len(rated) + without} tokens"
    if rated:
        means = (
            sum(token[name] for token in rated) / len(rated) for name in ("reliability", "aleatoric", "epistemic")
        )
        text += ", mean reliability {:.4f}, AU {:.3f}, EU {:.3f}".format(*means)
    return text + (f"; {without} without evidence" if without else "")


def _legend_texts(picture: Mapping[str, Any]) -> tuple[str, str, str]:
    scale = picture["scale"]
    low, high = scale["reliability"]
    return (
        f"reliability -AU·EU from {low:.4f} (dark) to {high:.4f} (light)",
        f"AU, aleatoric: full bar {scale['aleatoric']:.3f}",
        f"EU, epistemic: full bar {scale['epistemic']:.3f}",
    )


_NO_EVIDENCE = "hatched: no evidence, every one of the k logits at most 0"


def reliability_style() -> str:
    """The style rules of `reliability_html`'s colours."""
    return "\n".join(
        f".r{step} {{ background: {colour}; color: {'#fff' if step <= WHITE_TEXT_UP_TO else '#000'}; }}"
        for step, colour in enumerate(COLOURS)
    )


def reliability_html(picture: Mapping[str, Any]) -> str:
    """A model's tokens as a foldable part of the trajectory page; every text in it is escaped."""
    picture = picture if "scale" in picture else with_shared_scale([picture])[0]
    colours, aleatoric, epistemic = _legend_texts(picture)
    swatches = "".join(f'<span class="swatch r{step}">{step}</span>' for step in range(len(COLOURS)))
    legend = (
        f"<p>{escape(summary(picture))}<br>{swatches} {escape(colours)}; "
        f"{_bars_html(1.0, 0.0)} {escape(aleatoric)}; {_bars_html(0.0, 1.0)} {escape(epistemic)}; {_NO_EVIDENCE}; "
        f"k = {int(picture['k'])}</p>"
    )
    tokens = "".join(_token_html(token, picture["scale"]) for token in picture["tokens"])
    return (
        f'<details class="reliability" open><summary>Token reliability, {escape_visibly(picture["model"])}</summary>'
        f'{legend}<div class="tokens">{tokens}</div></details>\n'
    )


def _token_html(token: Mapping[str, Any], scale: Mapping[str, Any]) -> str:
    text = escape_visibly(token["text"].replace("\n", "⏎")) or " "
    if token["epistemic"] is None:
        return f'<span class="token inserted">{text}</span>'
    value = token["reliability"]
    name = "none" if value is None else f"r{level(value, scale)}"
    shares = _shares(token, scale)
    figures = f"EU {token['epistemic']:.4f}"
    if value is not None:
        figures = f"reliability {value:.4f}, AU {token['aleatoric']:.4f}, {figures}"
    line = "<br>" if "\n" in token["text"] else ""
    return f'<span class="token {name}" title="{escape(figures)}">{text}{_bars_html(*shares)}</span>{line}'


def _bars_html(aleatoric: float, epistemic: float) -> str:
    return (
        '<svg viewBox="0 0 100 8" preserveAspectRatio="none" width="40" height="8" aria-hidden="true">'
        f'<rect class="au" width="{100 * aleatoric:.1f}" height="3.5"></rect>'
        f'<rect class="eu" y="4.5" width="{100 * epistemic:.1f}" height="3.5"></rect></svg>'
    )


def _shares(token: Mapping[str, Any], scale: Mapping[str, Any]) -> tuple[float, float]:
    """How full the two bars of a token are, in [0, 1]."""
    values = ((token[name] or 0.0, scale[name]) for name in ("aleatoric", "epistemic"))
    aleatoric, epistemic = (value / full if full else 0.0 for value, full in values)
    return aleatoric, epistemic


def draw_reliability(pictures: Sequence[Mapping[str, Any]], path: str | os.PathLike, title: str) -> Path:
    """Draw models side by side into one PNG or SVG, as the name ends, on one scale; return its path.

    Args:
        pictures: `reliability_record` of each model; of one longer than `MOST_TOKENS` the first ones are drawn.
        path: the image.
        title: above all; usually the question.

    Raises:
        ValueError: without pictures, or for a name that ends otherwise.
    """
    if not pictures:
        raise UserError("there is nothing to draw; give the tokens of at least one model")
    picture_format(path)
    pictures = with_shared_scale(pictures)
    columns = [_lines(picture["tokens"]) for picture in pictures]
    heading = _wrapped(without_controls(title), _COLUMN * len(pictures))
    head, foot, margin, gap = 0.28 * len(heading) + 0.75, 0.75, 0.2, 0.3
    width = _COLUMN * _CHARACTER
    body = max(len(lines) for lines in columns) * _LINE
    total_width = max(len(pictures) * (width + gap) - gap, 9.6) + 2 * margin
    total_height = head + body + foot
    figure = new_figure(total_width, total_height)
    for number, words in enumerate(heading):
        figure.text(
            margin / total_width,
            1 - (0.2 + 0.28 * number) / total_height,
            words,
            fontsize=11,
            va="top",
            parse_math=False,
        )
    for number, (picture, lines) in enumerate(zip(pictures, columns, strict=True)):
        left = margin + number * (width + gap)
        axes = figure.add_axes((left / total_width, foot / total_height, width / total_width, body / total_height))
        axes.set(xlim=(0, _COLUMN), ylim=(body / _LINE, 0))
        axes.axis("off")
        name = _fitting(without_controls(picture["model"]), _COLUMN)
        # The name in the font that its width was counted in.
        bold: dict[str, Any] = {"weight": "bold", "family": "monospace"}
        for text, above, look in ((name, 0.46, bold), (summary(picture), 0.22, {})):
            figure.text(
                left / total_width,
                (foot + body + above) / total_height,
                text,
                fontsize=9,
                va="top",
                parse_math=False,
                **look,
            )
        for row, line in enumerate(lines):
            for place, token in line:
                _draw_token(axes, place, row, token, picture["scale"])
    axes = figure.add_axes(
        (margin / total_width, 0.05 / total_height, 1 - 2 * margin / total_width, 0.6 / total_height)
    )
    _draw_legend(axes, (total_width - 2 * margin) / _CHARACTER, pictures[0])
    return write_figure(figure, path, dpi=130)


def _lines(tokens: Sequence[Mapping[str, Any]]) -> list[list[tuple[float, dict[str, Any]]]]:
    """Tokens broken into lines: (place in characters, token with its `shown` text and `width`)."""
    if len(tokens) > MOST_TOKENS:
        left_out = {"text": f"[{len(tokens) - MOST_TOKENS} more tokens]", "kind": "", "epistemic": None}
        tokens = [*tokens[:MOST_TOKENS], left_out]
    lines: list[list[tuple[float, dict[str, Any]]]] = [[]]
    place = 0.0
    for token in tokens:
        shown = _fitting(without_controls(token["text"]) or " ", _COLUMN - 2)
        width = _columns_of(shown) + 0.7
        if place and place + width > _COLUMN:
            lines.append([])
            place = 0.0
        lines[-1].append((place, {**token, "shown": shown, "width": width}))
        place = _COLUMN + 1.0 if "\n" in token["text"] or token["epistemic"] is None else place + width + 0.25
    return lines


def _columns_of(text: str) -> int:
    wide = sum(unicodedata.east_asian_width(character) in "WF" for character in text)
    return max(len(text) + wide - sum(unicodedata.combining(character) > 0 for character in text), 1)


def _wrapped(text: str, columns: int) -> list[str]:
    """A text in lines of at most so many columns; a wide character, as of Chinese, takes two."""
    lines = [""]
    for word in text.split():
        if lines[-1] and _columns_of(f"{lines[-1]} {word}") > columns:
            lines.append("")
        lines[-1] = f"{lines[-1]} {word}".strip()
        while _columns_of(lines[-1]) > columns:
            fits = next(size for size in range(columns, 0, -1) if _columns_of(lines[-1][:size]) <= columns)
            lines[-1:] = [lines[-1][:fits], lines[-1][fits:]]
    return lines


def _fitting(text: str, columns: int) -> str:
    while _columns_of(text) > columns:
        text = text[:-2] + "…"
    return text


def _draw_token(axes: Axes, place: float, row: int, token: Mapping[str, Any], scale: Mapping[str, Any]) -> None:
    from matplotlib.patches import Rectangle

    text: dict[str, Any] = {"fontsize": 9, "family": "monospace", "va": "center", "ha": "center", "parse_math": False}
    width, height = token["width"], 0.86
    if token["epistemic"] is None:
        axes.add_patch(
            Rectangle((place, row), width, height, facecolor="white", edgecolor="0.5", linestyle="--", lw=0.6)
        )
        axes.text(place + width / 2, row + height / 2, token["shown"], color="0.35", **text)
        return
    value = token["reliability"]
    step = None if value is None else level(value, scale)
    axes.add_patch(
        Rectangle(
            (place, row),
            width,
            _TEXT_SHARE,
            edgecolor="0.6",
            lw=0.4,
            hatch="////" if step is None else None,
            facecolor="white" if step is None else COLOURS[step],
        )
    )
    colour = "white" if step is not None and step <= WHITE_TEXT_UP_TO else "black"
    axes.text(place + width / 2, row + _TEXT_SHARE / 2, token["shown"], color=colour, **text)
    for number, (share, filled) in enumerate(zip(_shares(token, scale), (AU_COLOUR, EU_COLOUR), strict=True)):
        top = row + _TEXT_SHARE + 0.13 * number
        axes.add_patch(Rectangle((place, top), width, 0.12, facecolor="0.93", lw=0))
        axes.add_patch(Rectangle((place, top), width * share, 0.12, facecolor=filled, lw=0))


def _draw_legend(axes: Axes, width: float, picture: Mapping[str, Any]) -> None:
    from matplotlib.patches import Rectangle

    axes.set(xlim=(0, width), ylim=(2, 0))
    axes.axis("off")
    text: dict[str, Any] = {"fontsize": 9, "va": "center", "parse_math": False}
    colours, aleatoric, epistemic = _legend_texts(picture)
    for step, colour in enumerate(COLOURS):
        axes.add_patch(Rectangle((2.0 * step, 0.25), 2.0, 0.5, facecolor=colour, edgecolor="0.6", lw=0.4))
    axes.text(19, 0.5, f"{colours}; k = {picture['k']}", **text)
    for start, colour, label in ((0, AU_COLOUR, aleatoric), (36, EU_COLOUR, epistemic)):
        axes.add_patch(Rectangle((start, 1.4), 3, 0.25, facecolor=colour, lw=0))
        axes.text(start + 4, 1.5, label, **text)
    axes.add_patch(Rectangle((72, 1.25), 3, 0.5, facecolor="white", edgecolor="0.4", hatch="////", lw=0.4))
    axes.text(76, 1.5, _NO_EVIDENCE.removeprefix("hatched: "), **text)
