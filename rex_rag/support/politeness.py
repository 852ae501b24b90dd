"""Politeness towards servers that falter: how long they are spared, and how often they are asked again."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Mapping
from email.utils import parsedate_to_datetime
from typing import Any, TypeVar

import tenacity

T = TypeVar("T")

# Our own generator: waiting must not advance the seeded global one that a run draws from. tenacity draws from that.
_jitter = random.Random()


class PassingTrouble(Exception):
    """A failed attempt that is worth another one. retry_after: seconds that the server asks to be spared."""

    def __init__(self, cause: str, *, retry_after: float = 0.0) -> None:
        super().__init__(cause)
        self.retry_after = retry_after


def pause(attempt: int, backoff: float, longest: float) -> float:
    """Seconds to wait after the n-th failed attempt in a row: `backoff`, doubled each time up to `longest`, and
    shortened by a random part of up to a half, so that many workers do not return at the same moment."""
    # Beyond 2**60 a float would only overflow.
    return min(longest, backoff * 2 ** min(attempt - 1, 60)) * _jitter.uniform(0.5, 1.0)


def longest_wait(attempts: int, backoff: float, longest: float) -> float:
    """Seconds that so many attempts wait for each other at most, without what they take themselves."""
    return sum(min(longest, backoff * 2 ** min(attempt - 1, 60)) for attempt in range(1, attempts))


def retry_after(headers: Mapping[str, str], longest: float) -> float:
    """Seconds that an HTTP answer asks to be spared, 0 to `longest`; it may name a number or a date."""
    value = headers.get("retry-after", "").strip()
    try:
        seconds = float(value) if value.isdecimal() else parsedate_to_datetime(value).timestamp() - time.time()
    except (ValueError, OverflowError):
        return 0.0
    return min(max(seconds, 0.0), longest) if math.isfinite(seconds) else 0.0


def persist(
    attempt: Callable[[], T],
    *,
    attempts: int,
    backoff: float,
    longest: float,
    say: Callable[[int, PassingTrouble, float], Any],
    sleep: Callable[[float], Any] = time.sleep,
) -> T:
    """Call until it succeeds, `attempts` times at most; the last `PassingTrouble` is raised, any other error at once.

    Args:
        say: given the number of the failed attempt, its trouble and the seconds until the next.
    """

    def trouble(state: tenacity.RetryCallState) -> PassingTrouble:
        error = state.outcome.exception() if state.outcome else None
        assert isinstance(error, PassingTrouble)  # no other is waited for
        return error

    def wait(state: tenacity.RetryCallState) -> float:
        return min(longest, max(trouble(state).retry_after, pause(state.attempt_number, backoff, longest)))

    return tenacity.Retrying(
        retry=tenacity.retry_if_exception_type(PassingTrouble),
        stop=tenacity.stop_after_attempt(attempts),
        wait=wait,
        before_sleep=lambda state: say(state.attempt_number, trouble(state), state.upcoming_sleep),
        sleep=sleep,
        reraise=True,
    )(attempt)
