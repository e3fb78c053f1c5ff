"""What a row of a file asks, and what it answers: texts, or conversations."""

import dataclasses
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

Message = Mapping[str, Any]
Messages = Sequence[Message]


class BadRow(ValueError):
  """A row that cannot be used; the message says why."""


@dataclasses.dataclass(frozen=True)
class RowForm:
  """Where a row has its prompt and its answer.

  The fields that TRL reads are read as well: `messages`, whose last message is the
  answer if it is the assistant's, or `prompt` and `completion`, each a text or a
  list of messages. Messages may have `tool_calls` in place of a content, and a row
  `tools`.

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
) -> tuple[str | Messages, str | Message | None]:
  """Returns a row's prompt, a text or messages, and its answer.

  Args:
    fields: of the row.
    form: where they are.

  Returns:
    The prompt, and the answer: a text, the message if it has tool calls, or None
    where the row has none.

  Raises:
    BadRow: a field is missing, or is not what it should be.
  """
  prompt, answer, name = _parts(fields, form)
  if not isinstance(prompt, str):
    prompt = _messages(prompt, name)
  elif form.chat:
    prompt = [{"role": "user", "content": prompt}]
  return prompt, answer


def tools(fields: Mapping[str, Any]) -> list[Any] | None:
  """Returns the JSON schemas in a row's `tools`, a list or a list as JSON.

  Args:
    fields: of the row.

  Raises:
    BadRow: it is no list.
  """
  found = fields.get("tools")
  if isinstance(found, str):
    try:
      found = json.loads(found)
    except ValueError as error:
      raise BadRow(f"not JSON in 'tools' ({error})") from error
  if found is not None and not isinstance(found, list):
    raise BadRow(f"{type(found).__name__} and no list in 'tools'")
  return _without_none(found) or None


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
    if empty := [name for name in names if name in fields]:
      raise BadRow(f"null in {' and '.join(map(repr, empty))}")
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
      if not isinstance(value, str):
        return value
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
  """Returns an answer's text, which is all that is trained on, or its calls."""
  if message.get("function_call"):
    raise BadRow(f"function_call in {name!r}, whose form now is tool_calls")
  return (
    message if message.get("tool_calls") else _text(message["content"], name)
  )


def _messages(value, name):
  """Returns messages without what is null: Parquet has each field in all."""
  is_list = isinstance(value, list) and value
  if not is_list or not all(isinstance(m, Mapping) for m in value):
    raise BadRow(f"no messages with 'role' and 'content' in {name!r}")
  messages = _without_none(value)
  for message in messages:
    if not isinstance(message.get("role"), str):
      raise BadRow(f"no messages with 'role' and 'content' in {name!r}")
    if "content" not in message and not message.get("tool_calls"):
      raise BadRow(
        f"a message of {message['role']!r} with neither 'content' nor"
        f" 'tool_calls' in {name!r}"
      )
  return messages


def _without_none(value):
  if isinstance(value, Mapping):
    return {k: _without_none(v) for k, v in value.items() if v is not None}
  if isinstance(value, list):
    return [_without_none(v) for v in value]
  return value
