"""How a prompt is put to a model: one rendering for training, evaluation and use."""

from __future__ import annotations

import inspect
import json
import logging
from collections.abc import Mapping, Sequence
from datetime import date
from typing import TYPE_CHECKING, Any

from rex_rag.support.errors import UserError
from rex_rag.support.tokenization import open_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase
    from trl import GRPOConfig

logger = logging.getLogger(__name__)

# The day that Llama 3.1's own template falls back on where nobody tells it the date.
PROMPT_DATE = date(2024, 7, 26)


def template_settings(given: Mapping[str, Any] | str | None) -> dict[str, Any]:
    """What a chat template is rendered with: `chat_template_kwargs`, and the date.

    Templates that put today's date into a prompt, as Llama 3's do, are given `PROMPT_DATE`: a run that goes on
    tomorrow, or is repeated next year, asks the same, and evaluation asks what training asked.

    Args:
        given: a mapping, or one as JSON.

    Raises:
        ValueError: for what is no mapping, and for settings that are not the template's.
    """
    return {"strftime_now": PROMPT_DATE.strftime, **read_settings(given)}


def read_settings(given: Mapping[str, Any] | str | None) -> dict[str, Any]:
    """`chat_template_kwargs` as they are given, checked; see `template_settings`."""
    try:
        settings = json.loads(given) if isinstance(given, str) else given
    except ValueError as error:
        raise UserError(
            f"chat_template_kwargs is {given!r}, which is no JSON ({error}); give a mapping, such as "
            '{"enable_thinking": false}'
        ) from error
    if settings is None or settings == {}:
        return {}
    if not isinstance(settings, Mapping):
        raise UserError(f'chat_template_kwargs is {given!r}; give a mapping, such as {{"enable_thinking": false}}')
    from transformers import PreTrainedTokenizerBase

    taken = {*inspect.signature(PreTrainedTokenizerBase.apply_chat_template).parameters, "messages", "strftime_now"}
    if reserved := sorted(taken.intersection(settings)):
        raise UserError(
            f"chat_template_kwargs names {', '.join(reserved)}, which are not the template's to set: prompts are one "
            "user message, rendered with a fixed date (date_string sets another where the template reads it); leave "
            "them out"
        )
    return dict(settings)


def carry_settings(tokenizer: PreTrainedTokenizerBase, settings: Mapping[str, Any] | str | None) -> None:
    """Make settings the defaults of a tokenizer's chat template, in place.

    Saved beside the model, the template then renders prompts as training did, whoever loads it. What is said at use
    goes over a default.
    """
    guards = "".join(
        f"{{% if {name} is not defined %}}{{% set {name} = {_jinja(value)} %}}{{% endif %}}"
        for name, value in read_settings(settings).items()
        if name.isidentifier()
    )
    template = tokenizer.chat_template
    if guards and isinstance(template, str) and not template.startswith(guards):
        # Behind a block Jinja drops a line break, which may be the template's own; behind an expression it does not.
        tokenizer.chat_template = guards + "{{ '' }}" + template


def _jinja(value: Any) -> str:
    """A JSON value as a literal of a template."""
    if value is None:
        return "none"
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{json.dumps(str(key))}: {_jinja(part)}" for key, part in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(_jinja, value)) + "]"
    return json.dumps(value)


def render_chat(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Mapping[str, Any]],
    settings: Mapping[str, Any] | str | None = None,
    tools: Sequence[Mapping[str, Any]] | None = None,
) -> str:
    """A conversation up to where the model's turn begins, as text.

    Args:
        settings: `chat_template_kwargs`.
        tools: schemas that the template shows.

    Raises:
        ValueError: for a tokenizer without a chat template, or with a broken one.
    """
    return _rendered(tokenizer, messages, settings, tools, tokenize=False)


def encode_chat(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Mapping[str, Any]],
    settings: Mapping[str, Any] | str | None = None,
    tools: Sequence[Mapping[str, Any]] | None = None,
) -> list[int]:
    """The prompt ids of a conversation; arguments and errors as for `render_chat`."""
    return _rendered(tokenizer, messages, settings, tools, tokenize=True)


def _rendered(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Mapping[str, Any]],
    settings: Mapping[str, Any] | str | None,
    tools: Sequence[Mapping[str, Any]] | None,
    *,
    tokenize: bool,
) -> Any:
    if tokenizer.chat_template is None:
        raise UserError(
            f"the tokenizer {tokenizer.name_or_path!r} has no chat template, so there is no way to put a question to "
            "the model; save one with the tokenizer (tokenizer.chat_template)"
        )
    from jinja2 import TemplateError

    try:
        return tokenizer.apply_chat_template(
            list(messages),
            tools=list(tools) if tools else None,
            add_generation_prompt=True,
            tokenize=tokenize,
            return_dict=False,
            **template_settings(settings),
        )
    except TemplateError as error:
        raise UserError(
            f"the chat template of the tokenizer {tokenizer.name_or_path!r} cannot be rendered "
            f"({type(error).__name__}: {error}); repair it, or fetch the tokenizer again"
        ) from error


def policy_tokenizer(model: str | PreTrainedModel, args: GRPOConfig) -> PreTrainedTokenizerBase:
    """The tokenizer that lies with a policy."""
    from trl.trainer.utils import get_config_model_id

    if isinstance(model, str):
        name, revision = model, (args.model_init_kwargs or {}).get("revision")
    else:
        name, revision = get_config_model_id(model.config), None
    return open_tokenizer(name, revision, trust_remote_code=args.trust_remote_code)


def warn_of_unread(tokenizer: PreTrainedTokenizerBase, settings: Mapping[str, Any] | None) -> None:
    """Say so where a chat template never reads a setting, which changes nothing then."""
    template = tokenizer.chat_template
    text = json.dumps(template) if not isinstance(template, str) else template
    for name in settings or ():
        if name not in text:
            logger.warning("chat_template_kwargs sets %r, which the chat template of this tokenizer never reads", name)
