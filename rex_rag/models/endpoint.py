"""Any endpoint that speaks OpenAI's formats, as a client: bounded attempts, answers that are checked, keys unseen."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Any, TypeVar

import httpx

from rex_rag.support.errors import UserError
from rex_rag.support.http import bounded_client, parse_json
from rex_rag.support.politeness import PassingTrouble, persist, retry_after
from rex_rag.support.secrets import hide
from rex_rag.support.tables import one_line
from rex_rag.support.wording import counted, shorten

logger = logging.getLogger(__name__)

DEFAULT_KEY_VARIABLE = "OPENAI_API_KEY"
BACKOFF_SECONDS = 0.5
MAX_BACKOFF_SECONDS = 30.0
# Those below 500 after which OpenAI's own client asks again.
_PASSING_STATUSES = (408, 409, 429)
MOST_NAME_CHARACTERS = 100


_T = TypeVar("_T")


class EndpointError(ConnectionError):
    """The endpoint gave no usable answer; the message names address, attempts and cause, never the key."""


class Refused(EndpointError):
    """The server understood the request and will not answer it."""


@dataclass(frozen=True, slots=True)
class EndpointOptions:
    """Where a model is served and how patiently it is asked.

    url: base address, `http://host:port` or with its path (`https://host/v1`). model: the name it is served under.
    timeout: seconds of one attempt. attempts: before it is an error. concurrency: requests under way at once.
    key_variable: environment variable that holds the key; none is sent where it is unset.
    """

    url: str
    model: str
    timeout: float = 600.0
    attempts: int = 6
    concurrency: int = 32
    key_variable: str = DEFAULT_KEY_VARIABLE


def check_endpoint_url(url: str) -> httpx.URL:
    """The base address without a slash at its end, `/v1` where it names no path.

    Raises:
        ValueError: for anything but a plain http(s) address; a user name or password in it is refused too.
    """
    try:
        parsed = httpx.URL(url)
    except (httpx.InvalidURL, TypeError) as error:
        raise UserError(f"the endpoint {url!r} is malformed ({error}); use http://host:port/v1") from error
    if parsed.userinfo:
        raise UserError(
            f"the endpoint at {parsed.host!r} has a user name or password in its address, which would end up in logs; "
            f"put the key into the environment variable {DEFAULT_KEY_VARIABLE}"
        )
    if parsed.scheme not in ("http", "https") or not parsed.host or parsed.query or parsed.fragment:
        raise UserError(f"the endpoint {url!r} is not a plain http(s) address; use http://host:port/v1")
    return parsed.copy_with(path=parsed.path.rstrip("/") or "/v1")


def _only_choice(answer: dict[str, Any]) -> dict[str, Any]:
    [choice] = answer["choices"]
    if not isinstance(choice["text"], str):
        raise TypeError(f"text is a {type(choice['text']).__name__}")
    for name in ("token_ids", "prompt_token_ids"):
        check_ids(choice.get(name), name)
    return {**choice, "prompt_tokens": (answer.get("usage") or {}).get("prompt_tokens")}


def check_ids(ids: object, name: str, below: int = 2**31) -> None:
    """Raise a TypeError or ValueError unless `ids` is None or a list of integers from 0 to `below` - 1."""
    if ids is None:
        return
    if not isinstance(ids, list):
        raise TypeError(f"{name} is a {type(ids).__name__}")
    for token in ids:
        if isinstance(token, bool) or not isinstance(token, int) or not 0 <= token < below:
            raise ValueError(f"{shorten(token)} among {name} is no token id, an integer from 0 to {below - 1:,}")


def chat_reply(answer: dict[str, Any]) -> dict[str, Any]:
    """Of a chat completion, which every such server has: `text`, and whether it `is_cut` by the limit."""
    choice = answer["choices"][0]
    text = choice["message"]["content"]
    if text is None:  # a refusal, or thoughts that took all tokens: asked again, it would be the same
        text = ""
    if not isinstance(text, str):
        raise TypeError(f"the reply is a {type(text).__name__}")
    return {"text": text, "is_cut": choice.get("finish_reason") == "length"}


class EndpointClient:
    """Asks a server that the user named, `concurrency` threads at once; each attempt is bounded in time and size.

    Args:
        path: what `complete` asks.
        read: what it gives of an answer; a KeyError, IndexError, TypeError, AttributeError or ValueError says that it
            is none.
    """

    def __init__(
        self,
        options: EndpointOptions,
        path: str = "/completions",
        read: Callable[[dict[str, Any]], dict[str, Any]] = _only_choice,
    ) -> None:
        self.options = options
        self._path = path
        self._read = read
        base = check_endpoint_url(options.url)
        self.url = str(base)
        self._key = _key(options.key_variable)
        self._http = bounded_client(
            base.host,
            options.timeout,
            options.concurrency,
            headers={"Authorization": f"Bearer {self._key}"} if self._key else {},
        )
        self.threads = ThreadPoolExecutor(options.concurrency, thread_name_prefix="endpoint")

    def close(self) -> None:
        self.threads.shutdown(cancel_futures=True)
        self._http.close()

    def models(self) -> list[dict[str, Any]]:
        """What the server says it serves; empty where it has no such list."""
        try:
            listed = self._ask(f"{self.url}/models").get("data")
        except Refused:
            return []
        rows = listed if isinstance(listed, list) else []
        return [entry for entry in rows if isinstance(entry, dict) and isinstance(entry.get("id"), str)]

    def version(self) -> str | None:
        """vLLM's version, `None` for other servers."""
        try:
            found = self._ask(f"{self.url.removesuffix('/v1')}/version").get("version")
        except EndpointError:
            return None
        return one_line(found)[:MOST_NAME_CHARACTERS] if isinstance(found, str) else None

    def complete(self, body: dict[str, Any]) -> dict[str, Any]:
        """What the server's answer to one request says.

        Raises:
            EndpointError: once the attempts are spent, or at once for a request that the server refuses.
        """
        return self._ask(self.url + self._path, {"model": self.options.model, **body})

    def _ask(self, url: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        made = 0

        def attempt() -> dict[str, Any]:
            nonlocal made
            made += 1
            return self._attempt(url, body)

        try:
            return persist(
                attempt,
                attempts=self.options.attempts,
                backoff=BACKOFF_SECONDS,
                longest=MAX_BACKOFF_SECONDS,
                say=lambda number, trouble, delay: logger.debug("%s: %s, again in %.2f s", url, trouble, delay),
            )
        except PassingTrouble as trouble:
            raise EndpointError(
                f"{url} gave no usable answer in {counted(made, 'attempt')}, last cause: {trouble}. Check that the "
                "server runs and is reachable, or allow it more time (endpoint_timeout, endpoint_attempts)"
            ) from trouble.__cause__

    def _attempt(self, url: str, body: dict[str, Any] | None) -> dict[str, Any]:
        # Half a surrogate pair, which a data set's escapes may hold, cannot be sent as it is.
        content = None if body is None else json.dumps(body, ensure_ascii=False).encode("utf-8", "replace")
        try:
            response = self._http.request(
                "GET" if body is None else "POST", url, content=content, headers={"Content-Type": "application/json"}
            )
        except httpx.RequestError as error:
            raise PassingTrouble(self._without_key(f"{type(error).__name__}: {error}")) from error
        status = response.status_code
        if status != 200:
            # Without the key first: a part of it that is left by the cut would not be recognised.
            said = f"HTTP {status}: {shorten(self._without_key(response.text), 400)}"
            if status >= 500 or status in _PASSING_STATUSES:
                raise PassingTrouble(said, retry_after=retry_after(response.headers, MAX_BACKOFF_SECONDS))
            raise Refused(
                f"{url} refuses the request, {said}. Check the model's name, the key, and that prompt and completion "
                "fit what the server takes (max_sequence_length)"
            )
        try:
            answer = parse_json(response.content)
            if not isinstance(answer, dict):
                raise TypeError(f"a JSON object is needed, found {type(answer).__name__}")
            return answer if body is None else self._read(answer)
        except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
            said = self._without_key(f"an answer of another form ({type(error).__name__}: {error})")
            raise PassingTrouble(said[:400]) from error

    def _without_key(self, text: str) -> str:
        """Servers may quote what they were sent."""
        return hide(text, self._key)


def in_order(futures: Sequence[Future[_T]]) -> list[_T]:
    """The results. The first error, or an interrupt, ends what is not under way yet; what is, is waited for."""

    def end_others(done: Future[_T] | None = None) -> None:
        if done is None or (not done.cancelled() and done.exception()):
            for future in futures:
                future.cancel()

    for future in futures:  # called by the thread that failed, before it takes up another
        future.add_done_callback(end_others)
    try:
        wait(futures)
    except BaseException:
        end_others()
        wait(futures)
        raise
    failed = [future for future in futures if not future.cancelled() and future.exception()]
    return [future.result() for future in failed or futures]


def _key(variable: str) -> str:
    """The key in an environment variable, without the white space that files leave around it; empty where unset.

    Raises:
        ValueError: for a key that no header can carry. HTTP libraries would quote it in their errors.
    """
    key = os.environ.get(variable, "").strip()
    if not (key.isascii() and key.isprintable()):
        raise UserError(
            f"the key in the environment variable {variable} holds a control or non-ASCII character, which no HTTP "
            "header can carry; set it again"
        )
    return key
