"""Chats as tokens, of which only the answers are predicted."""

import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from twa_scale.base.inputs import brief
from twa_scale.base.names import nearest, quoted
from twa_scale.errors import ConfigError
from twa_scale.run.tasks.tokens import Array

ANSWERS = "assistant"
MARK = "Put {% generation %} around the answers in the template"
_OWN = {
    "messages",
    "conversation",
    "chat_template",
    "add_generation_prompt",
    "continue_final_message",
    "tokenize",
    "padding",
    "truncation",
    "max_length",
    "return_tensors",
    "return_dict",
    "return_assistant_tokens_mask",
    "tokenizer_kwargs",
}
"""The variables that `apply_chat_template` or the task sets."""
_GENERATION = re.compile(r"\{%-?\s*(end)?generation\s*-?%\}")
_MARKED = re.compile(r"\{%-?\s*generation\s*-?%\}")


class ChatEncoder:
    """Encodes chats with the chat template of a tokenizer.

    The answers are the messages of the role `assistant`. Their tokens are those that the template marks with `{%
    generation %}`, or otherwise the tokens that a message adds to the preceding chat with its generation prompt. If the
    template renders an answer differently when messages follow it, as templates of reasoning models do, its tokens are
    not predicted, and `num_not_found` counts it.
    """

    def __init__(
        self,
        tokenizer: Any,
        directory: str,
        variables: Mapping[str, Any] | None = None,
        key: str = "task.chat_template_kwargs",
    ) -> None:
        """Check that the tokenizer has a chat template, which uses the variables.

        Args:
            tokenizer: a tokenizer of transformers.
            directory: the model directory, for messages.
            variables: values of variables of the template, in addition to the messages.
            key: the setting of the variables, for messages.

        Raises:
            ConfigError: the tokenizer has no template, or the template does not use one of the variables.
        """
        self._tokenizer = tokenizer
        self._variables = dict(variables or {})
        self.num_not_found = 0
        try:
            template = tokenizer.get_chat_template()
        except (ValueError, AttributeError) as error:
            raise ConfigError(
                f"task.chat: the tokenizer of {directory!r} has no chat template. Copy chat_template.jinja or "
                "tokenizer_config.json of a chat model with this tokenizer into the directory."
            ) from error
        _require_used(self._variables, template, key)
        self._marked = bool(_MARKED.search(template)) and bool(tokenizer.is_fast)

    def encode(self, messages: Any, location: str) -> tuple[Array, Array]:
        """Return the tokens of a chat (int64), and for each whether it is not predicted.

        Args:
            messages: a list of {"role": ..., "content": ...}.
            location: the record in error messages.

        Raises:
            ConfigError: the messages are malformed, have no answer, or cannot be rendered; or the tokens of the answers
                cannot be found.
        """
        chat = _checked(messages, location)
        if self._marked:
            encoded = self._render(chat, location, return_dict=True, return_assistant_tokens_mask=True)
            tokens = np.asarray(encoded["input_ids"], np.int64)
            hidden = np.asarray(encoded["assistant_masks"], np.int64) == 0
        else:
            tokens, hidden = self._by_prefixes(chat, location)
        if hidden.all():
            raise ConfigError(
                f"{location}: the chat template marks no token as an answer. {MARK}, or remove its markers."
            )
        return tokens, hidden

    def _by_prefixes(self, chat: list[dict[str, Any]], location: str) -> tuple[Array, Array]:
        tokens = self._tokens(chat, location)
        hidden = np.ones(len(tokens), bool)
        not_found: list[int] = []
        for i, message in enumerate(chat):
            if message["role"] != ANSWERS:
                continue
            before = (
                self._tokens(chat[:i], location, add_generation_prompt=True) if i else self._start(message, location)
            )
            after = self._tokens(chat[: i + 1], location)
            if _begins(after, before) and _begins(tokens, after):
                hidden[len(before) : len(after)] = False
            else:
                not_found.append(i + 1)
        if not_found and hidden.all():
            raise ConfigError(
                f"{location}: the tokens of message {not_found[0]} cannot be found, because the chat template renders "
                f"a chat differently when messages follow. {MARK}, or write one record for each answer, which ends "
                "with it."
            )
        self.num_not_found += len(not_found)
        return tokens, hidden

    def _start(self, answer: dict[str, Any], location: str) -> Array:
        """Return the tokens before an answer at the start of a chat, which do not depend on its content."""
        first, second = (self._tokens([{"role": answer["role"], "content": text}], location) for text in ("a", "b"))
        size = min(len(first), len(second))
        return first[: int(np.append(first[:size] != second[:size], True).argmax())]

    def _tokens(self, chat: list[dict[str, Any]], location: str, **options: Any) -> Array:
        return np.asarray(self._render(chat, location, return_dict=False, **options), np.int64)

    def _render(self, chat: list[dict[str, Any]], location: str, **options: Any) -> Any:
        try:
            return self._tokenizer.apply_chat_template(chat, tokenize=True, **self._variables, **options)
        except Exception as error:  # a template may raise anything
            reason = (str(error).strip() or type(error).__name__).split("\n")[0]
            raise ConfigError(
                f"{location}: the chat template cannot render the chat: {reason}. Change the messages or the template."
            ) from error


def _require_used(variables: Mapping[str, Any], template: str, key: str) -> None:
    """Check that a chat template uses the variables, and that the task does not set them itself."""
    used = _variables_of(template) - _OWN if variables else set()
    for name in variables:
        if name in _OWN:
            raise ConfigError(f"{key}: {name!r} is set by the task; give variables of the chat template only.")
        if name not in used:
            raise ConfigError(
                f"{key}: the chat template does not use {name!r}{nearest(name, used) or '.'} A variable that has no "
                "effect is not accepted; the template is in chat_template.jinja or tokenizer_config.json."
            )


def _variables_of(template: str) -> set[str]:
    """Return the names of the variables of a template."""
    from jinja2 import Environment, TemplateSyntaxError, meta  # used by apply_chat_template

    plain = _GENERATION.sub("", template)  # remove a tag of transformers
    try:
        return meta.find_undeclared_variables(Environment(extensions=["jinja2.ext.loopcontrols"]).parse(plain))
    except TemplateSyntaxError:  # tags of a later transformers
        return set(re.findall(r"[A-Za-z_]\w*", template))


def _begins(tokens: Array, prefix: Array) -> bool:
    return bool(np.array_equal(tokens[: len(prefix)], prefix))


def _checked(messages: Any, location: str) -> list[dict[str, Any]]:
    """Return messages without keys whose value is null, because Arrow has all keys in all messages."""
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        raise ConfigError(f"{location}: {brief(messages)} is not a list of messages with `role` and `content`.")
    chat = [{key: value for key, value in message.items() if value is not None} for message in messages]
    for number, message in enumerate(chat, 1):
        if not isinstance(message.get("role"), str) or not {"content", "tool_calls"} & set(message):
            raise ConfigError(
                f"{location}: message {number} has the keys {quoted(message)}. Each message needs `role` and "
                "`content`: rename `from` to `role` (`human` to `user`, `gpt` to `assistant`) and `value` to `content`."
            )
    if not any(message["role"] == ANSWERS for message in chat):
        raise ConfigError(
            f"{location}: no message has the role `{ANSWERS}`, so that there is nothing to predict. Remove the record."
        )
    return chat
