"""A served model as a generation backend: any endpoint that speaks OpenAI's completions format.

Token ids are sent and received where the server can (vLLM). Elsewhere text is sent, or text comes back and the local
tokenizer encodes it again; `describe` says which, since those ids need not be the ones that the model sampled.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from typing import TYPE_CHECKING, Any

from rex_rag.models.endpoint import (
    MOST_NAME_CHARACTERS,
    EndpointClient,
    EndpointError,
    EndpointOptions,
    Refused,
    check_ids,
)
from rex_rag.support.errors import UserError
from rex_rag.support.tables import one_line
from rex_rag.support.tokenization import encode_on

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from rex_rag.models.generation import Generation

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
            names = ", ".join(one_line(entry["id"])[:MOST_NAME_CHARACTERS] for entry in served[:10])
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
            except Refused:
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
                check_ids(choice["token_ids"], "token_ids", len(self.tokenizer) + _PADDING_IDS)
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
        return encode_on(self.tokenizer, [text])[0]


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
