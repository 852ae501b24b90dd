"""Rows of a trainer's log history: which evaluation sets they speak of."""

from __future__ import annotations

import re
from collections.abc import Iterable

EXACT_MATCH = "em/originals"
# What people are told of a set without a name.
UNNAMED_SET = "evaluation questions"
_EVALUATED = re.compile(rf"(eval_(?:(.+)_)?){EXACT_MATCH}")


def evaluated_sets(names: Iterable[str]) -> dict[str, str]:
    """Evaluation set -> what its metrics' names begin with, of the sets whose exact match is among the names.

    A trainer with several sets logs `eval_<set>_em/originals`; with a single nameless one `eval_em/originals`, which
    is "" here.
    """
    return {match[2] or "": match[1] for name in names if (match := _EVALUATED.fullmatch(name))}
