"""A served model as a generation backend: any endpoint that speaks OpenAI's completions format.

Token ids are sent and received where the server can (vLLM). Elsewhere text is sent, or text comes back and the local
tokenizer encodes it again; `describe` says which, since those ids need not be the ones that the model sampled.
"""

from __future__ import annotations

import itertools
import json
import logging
import os
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import httpx

from rex_rag.support.errors import UserError
from rex_rag.support.http import bounded_client, parse_json
from rex_rag.support.politeness import PassingTrouble, persist, retry_after
from rex_rag.support.secrets import hide
from rex_rag.support.tables import one_line
from rex_rag.support.wording import counted, shorten

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from rex_rag.models.generation import Generation

logger = logging.getLogger(__name__)

DEFAULT_KEY_VARIABLE = "OPENAI_API_KEY"
BACKOFF_SECONDS = 0.5
MAX_BACKOFF_SECONDS = 30.0
# Those below 500 after which OpenAI's own client asks again.
_PASSING_STATUSES = (408, 409, 429)
_MOST_NAME_CHARACTERS = 100
# Models have rows for more ids than their tokenizers, to a round number, and may sample one.
_PADDING_IDS = 1024
# vLLM's own parameters. A served model's repetition penalty or top-k (generation_config.json) would otherwise apply.
# No limit on k is -1: vLLM takes it beside 0, SGLang refuses 0 as soon as a temperature is set.
_EXTENSIONS = {
    "top_k": -1,
    "repetition_penalty": 1.0,
    "return_token_ids": True,
    "include_stop_str_in_output": True,
    "skip_special_tokens": False,
    "spaces_between_special_tokens": False,
    "add_special_tokens": False,
}
_TRIAL_TEXT = "Question: who wrote Hamlet, and when? <search> Hamlet </search>"


_T = TypeVar("_T")


class EndpointError(ConnectionError):
    """The endpoint gave no usable answer; the message names address, attempts and cause, never the key."""


class _Refused(EndpointError):
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
        _check_ids(choice.get(name), name)
    return {**choice, "prompt_tokens": (answer.get("usage") or {}).get("prompt_tokens")}


def _check_ids(ids: object, name: str, below: int = 2**31) -> None:
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
        except _Refused:
            return []
        rows = listed if isinstance(listed, list) else []
        return [entry for entry in rows if isinstance(entry, dict) and isinstance(entry.get("id"), str)]

    def version(self) -> str | None:
        """vLLM's version, `None` for other servers."""
        try:
            found = self._ask(f"{self.url.removesuffix('/v1')}/version").get("version")
        except EndpointError:
            return None
        return one_line(found)[:_MOST_NAME_CHARACTERS] if isinstance(found, str) else None

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
            raise _Refused(
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


class EndpointModel:
    """A served model behind the interface of `rex_rag.models.language_model.LanguageModel`.

    Raises:
        EndpointError: for a server that does not answer, or serves no model of that name.
        ValueError: for a tokenizer that encodes text otherwise than the server does.
    """

    def __init__(
        self,
        options: EndpointOptions,
        tokenizer: PreTrainedTokenizerBase,
        *,
        temperature: float,
    ) -> None:
        self.tokenizer = tokenizer
        self.client = EndpointClient(options)
        self._temperature = temperature
        self._served = self._find()
        self._extensions, self._sends_ids, self._receives_ids = self._try_out()
        self._check_tokenizer()

    @property
    def max_length(self) -> int | None:
        """Prompt and completion in tokens, where the server tells."""
        length = self._served.get("max_model_len")
        return length if isinstance(length, int) and not isinstance(length, bool) and length > 0 else None

    def describe(self) -> dict[str, Any]:
        version = self.client.version()
        return {
            "name": self.client.options.model,
            "revision": None,
            "weights_sha256": None,
            "server": f"vllm {version}" if version and self._receives_ids else None,
            "prompts": "token ids" if self._sends_ids else "text",
            "completions": "token ids" if self._receives_ids else "text, encoded again by the local tokenizer",
        }

    def submit(
        self, prompt: Sequence[int], max_new_tokens: int, stop_strings: tuple[str, ...], seed: int
    ) -> Future[Generation]:
        """Continue one row, whatever becomes of others. seed: of its draws, unused at temperature 0."""
        return self.client.threads.submit(self._continue, prompt, max_new_tokens, stop_strings, seed)

    def close(self) -> None:
        self.client.close()

    def _find(self) -> dict[str, Any]:
        name = self.client.options.model
        served = self.client.models()
        for entry in served:
            if entry["id"] == name:
                return entry
        if served:
            names = ", ".join(one_line(entry["id"])[:_MOST_NAME_CHARACTERS] for entry in served[:10])
            raise EndpointError(
                f"{self.client.url} serves no model {name!r}; it serves {names}. Set `model` to one of them, and "
                "`tokenizer` to where its tokenizer lies"
            )
        return {}

    def _try_out(self) -> tuple[dict[str, Any], bool, bool]:
        """What the server can do: the extensions it takes, whether it reads ids, whether it returns ids."""
        ids = self._encode(_TRIAL_TEXT)
        plain = {"max_tokens": 1, "temperature": 0}
        for extensions in (_EXTENSIONS, {}):
            try:
                choice = self.client.complete({**plain, **extensions, "prompt": ids})
            except _Refused:
                continue
            # A server that took the numbers for text counts other tokens.
            reads_ids = choice["prompt_tokens"] == len(ids)
            returns_ids = reads_ids and isinstance(choice.get("token_ids"), list)
            return extensions, reads_ids, returns_ids
        self.client.complete({**plain, "prompt": _TRIAL_TEXT})
        return {}, False, False

    def _check_tokenizer(self) -> None:
        """Have the server encode a text; where it does not return ids, their number has to do."""
        if not self._sends_ids:
            return
        answer = self.client.complete({"max_tokens": 1, **self._extensions, "prompt": _TRIAL_TEXT})
        ours = self._encode(_TRIAL_TEXT)
        theirs, count = answer.get("prompt_token_ids"), answer["prompt_tokens"]
        if theirs is not None:
            is_same, said = theirs == ours, f"{len(theirs)} ({theirs[:5]}…)"
        else:  # a server may put a token of its own before text
            is_same, said = count in (None, len(ours), len(ours) + 1), count
        if not is_same:
            raise UserError(
                f"the tokenizer {self.tokenizer.name_or_path!r} encodes a text into {len(ours)} tokens "
                f"({ours[:5]}…), the server's into {said}; set `tokenizer` to that of the served model "
                f"{self.client.options.model!r}"
            )

    def _continue(
        self, prompt: Sequence[int], max_new_tokens: int, stop_strings: tuple[str, ...], seed: int
    ) -> Generation:
        room = max_new_tokens if self.max_length is None else self.max_length - len(prompt)
        body = {
            "prompt": list(prompt) if self._sends_ids else self._prompt_text(prompt),
            "max_tokens": max(1, min(max_new_tokens, room)),
            "temperature": self._temperature,
            "top_p": 1.0,
            **self._extensions,
        }
        # A server that cuts a stop string off without a word must not be given one that nothing brings back.
        if sent := [stop for stop in stop_strings if self._receives_ids or _opening(stop)]:
            body["stop"] = sent
        if self._temperature:
            body["seed"] = seed
        return self._generation(self.client.complete(body), stop_strings)

    def _prompt_text(self, prompt: Sequence[int]) -> str:
        text = self.tokenizer.decode(list(prompt), skip_special_tokens=False, clean_up_tokenization_spaces=False)
        bos = self.tokenizer.bos_token
        # A server puts the first token before text by itself where this tokenizer does.
        if bos and text.startswith(bos) and self.tokenizer("a")["input_ids"][:1] == [self.tokenizer.bos_token_id]:
            return text[len(bos) :]
        return text

    def _generation(self, choice: dict[str, Any], stop_strings: tuple[str, ...]) -> Generation:
        from rex_rag.models.generation import Generation

        if self._receives_ids and choice.get("token_ids"):
            try:
                _check_ids(choice["token_ids"], "token_ids", len(self.tokenizer) + _PADDING_IDS)
            except ValueError as error:
                raise EndpointError(
                    f"{self.client.url} wrote a token that the tokenizer does not have ({error}); set `tokenizer` to "
                    f"that of the served model {self.client.options.model!r}"
                ) from error
            return Generation(list(choice["token_ids"]))
        text = choice["text"]
        if choice.get("finish_reason") == "stop":
            text += missing_stop(text, stop_strings, choice.get("stop_reason", choice.get("matched_stop")))
        ends = [text.index(stop) + len(stop) for stop in stop_strings if stop in text]
        text = text[: min(ends, default=len(text))]
        ids = self._encode(text) or [self.tokenizer.eos_token_id or 0]
        # Encoded again, a text need not have as many tokens as the server counted.
        return Generation(ids, is_cut=choice.get("finish_reason") == "length" and not ends)

    def _encode(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]


def missing_stop(text: str, stop_strings: Sequence[str], reason: object = None) -> str:
    """The stop string that a server cut off a stopped text, empty where it cut none.

    reason: what the server says ended the text, if it does; a number is a token, no stop string. Otherwise a closing
    mark among the stop strings whose opening mark stands last in the text is taken to have been there: without it the
    text would have gone on.
    """
    if isinstance(reason, int) or any(text.endswith(stop) for stop in stop_strings):
        return ""
    if reason in stop_strings:
        return str(reason)
    opened = {stop: text.rfind(opening) for stop in stop_strings if (opening := _opening(stop))}
    open_now = {stop: at for stop, at in opened.items() if at >= 0 and text.find(stop, at) < 0}
    return max(open_now, key=open_now.__getitem__) if open_now else ""


def _opening(stop: str) -> str | None:
    """The mark that a closing one closes, `<search>` for `</search>`, `<|begin_x|>` for `<|end_x|>`; else `None`."""
    for closing, opening in (("</", "<"), ("<|end_", "<|begin_")):
        if stop.startswith(closing):
            return opening + stop.removeprefix(closing)
    return None


class EndpointStream:
    """Requests under way at a served model, each by itself.

    Args:
        seed: a row's key -> the seed of its draws.
    """

    def __init__(self, served: EndpointModel, seed: Callable[[tuple[int, ...]], int]) -> None:
        self._served = served
        self._seed = seed
        self._tickets = itertools.count()
        self._under_way: dict[Future[Generation], int] = {}

    def __enter__(self) -> EndpointStream:
        return self

    def __exit__(self, *exception: object) -> None:
        for future in self._under_way:
            future.cancel()
        self._under_way.clear()

    def submit(
        self, prompt_ids: Sequence[int], max_new_tokens: int, stop_strings: tuple[str, ...], key: tuple[int, ...]
    ) -> int:
        ticket = next(self._tickets)
        self._under_way[self._served.submit(prompt_ids, max_new_tokens, stop_strings, self._seed(key))] = ticket
        return ticket

    def step(self, patience: float) -> list[tuple[int, Generation]]:
        done = wait(self._under_way, timeout=patience, return_when=FIRST_COMPLETED).done
        return [(self._under_way.pop(future), future.result()) for future in done]
