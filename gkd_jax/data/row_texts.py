"""What a row of a file asks, and what it answers: texts, or conversations."""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any

Messages = Sequence[Mapping[str, Any]]


class BadRow(ValueError):
  """A row that cannot be used; the message says why."""


@dataclasses.dataclass(frozen=True)
class RowForm:
  """Where a row has its prompt and its answer.

  The fields that TRL reads are read as well: `messages`, whose last message is the
  answer if it is the assistant's, or `prompt` and `completion`, each a text or a
  list of messages.

  Attributes:
    input_field: field of the prompt, a text or a list of messages.
    target_field: field of the answer, a text or one message in a list; None: rows
      are prompts.
    prompt_template: makes the prompt from a row's fields, such as
      'translate: {source}'; None: the prompt is `input_field`.
    chat: a prompt that is a text is what a user says in a conversation.
  """

  input_field: str = "inputs"
  target_field: str | None = "targets"
  prompt_template: str | None = None
  chat: bool = False


def prompt_and_answer(
  fields: Mapping[str, Any], form: RowForm
) -> tuple[str | Messages, str | None]:
  """Returns a row's prompt, a text or messages, and its answer.

  Args:
    fields: of the row.
    form: where they are.

  Returns:
    The prompt, and the answer; None where the row has none.

  Raises:
    BadRow: a field is missing, or is not what it should be.
  """
  prompt, answer, name = _parts(fields, form)
  if not isinstance(prompt, str):
    prompt = _messages(prompt, name)
  elif form.chat:
    prompt = [{"role": "user", "content": prompt}]
  return prompt, answer


def _parts(fields, form):
  """Returns the prompt, the answer, and the prompt's field."""
  if form.prompt_template is not None:
    prompt = _filled(form.prompt_template, fields)
    return prompt, _answer(fields, form), "PROMPT_TEMPLATE"
  if fields.get(form.input_field) is not None:
    name = form.input_field
  elif fields.get("messages") is not None:
    *before, last = _messages(fields["messages"], "messages")
    if last["role"] != "assistant":
      return [*before, last], None, "messages"
    if not before:
      raise BadRow("no message before the answer in 'messages'")
    if form.target_field is None:
      return before, None, "messages"
    return before, _said(last, "messages"), "messages"
  elif fields.get("prompt") is not None:
    name = "prompt"
  else:
    names = dict.fromkeys([form.input_field, "messages", "prompt"])
    raise BadRow(
      f"no field {' or '.join(map(repr, names))} among"
      f" {', '.join(map(repr, fields)) or 'none'}"
    )
  value = fields[name]
  prompt = value if isinstance(value, list) else _text(value, name)
  if isinstance(prompt, str) and not prompt:
    raise BadRow(f"an empty {name!r}")
  return prompt, _answer(fields, form), name


def _answer(fields, form):
  if form.target_field is None:
    return None
  for name in (form.target_field, "completion"):
    value = fields.get(name)
    if value is None:
      continue
    if isinstance(value, list):
      (last, *others) = _messages(value, name)
      if others or last["role"] != "assistant":
        raise BadRow(f"{name!r} is not one message of the assistant")
      value = _said(last, name)
    if not (text := _text(value, name)):
      raise BadRow(f"an empty {name!r}")
    return text
  return None


def _filled(template, fields):
  def value(match):
    if fields.get(match[1]) is None:
      raise BadRow(f"no field {match[1]!r} of PROMPT_TEMPLATE")
    return _text(fields[match[1]], match[1])

  return re.sub(r"\{(\w+)\}", value, template)


def _text(value, name):
  """Returns a text, or a number as one."""
  if isinstance(value, str):
    return value
  if isinstance(value, int | float) and not isinstance(value, bool):
    return str(value)
  raise BadRow(f"{type(value).__name__} and no text in {name!r}")


def _said(message, name):
  """Returns an answer's text, which is all that is trained on."""
  _refuse_calls(message, name)
  return _text(message["content"], name)


def _messages(value, name):
  is_list = isinstance(value, list) and value
  if not is_list or not all(isinstance(m, Mapping) for m in value):
    raise BadRow(f"no messages with 'role' and 'content' in {name!r}")
  for message in value:
    if message.get("content") is None:
      _refuse_calls(message, name)
    if not isinstance(message.get("role"), str) or (
      message.get("content") is None
    ):
      raise BadRow(f"no messages with 'role' and 'content' in {name!r}")
  return value


def _refuse_calls(message, name):
  if message.get("tool_calls") or message.get("function_call"):
    raise BadRow(f"tool calls in {name!r}, which are not supported")
