"""Chat templates: how a model reads a conversation, in jinja2.

As transformers renders them, in a sandbox that changes nothing. One thing differs:
`strftime_now` is not defined, and templates fall back on the date that they were
trained with. A prompt is the same every day.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import jinja2
import jinja2.ext
import jinja2.sandbox


class _Generation(jinja2.ext.Extension):
  """`{% generation %}`, which marks what the model says, and renders as is."""

  tags: ClassVar = {"generation"}

  def parse(self, parser: Any) -> Any:
    """Returns the nodes inside of the tag."""
    next(parser.stream)
    return parser.parse_statements(["name:endgeneration"], drop_needle=True)


class ChatTemplate:
  """Renders conversations as text."""

  def __init__(self, source: str, tokens: Mapping[str, str]):
    """Compiles a template.

    Args:
      source: in jinja2.
      tokens: `bos_token` and so on to their text.

    Raises:
      ValueError: the source is no template.
    """
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
      trim_blocks=True,
      lstrip_blocks=True,
      extensions=[_Generation, jinja2.ext.loopcontrols],
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _refuse
    self.source, self._tokens = source, dict(tokens)
    try:
      self._template = environment.from_string(source)
    except jinja2.TemplateError as error:
      raise ValueError(
        f"expected a chat template in jinja2, got {error}; set VOCABULARY_PATH"
      ) from error

  def render(
    self,
    messages: Sequence[Mapping[str, Any]],
    tools: Sequence[Any] | None = None,
    *,
    to_answer: bool = True,
  ) -> str:
    """Returns a conversation as text.

    Args:
      messages: each with `role`, and `content` or `tool_calls`.
      tools: JSON schemas of what the model may call.
      to_answer: end where the model's answer begins.

    Raises:
      ValueError: the template refuses the messages.
    """
    calls = any(message.get("tool_calls") for message in messages)
    if calls and "tool_calls" not in self.source:
      raise ValueError(
        "expected a chat template that shows tool calls, got one that leaves"
        " them out; set VOCABULARY_PATH"
      )
    try:
      return self._template.render(
        messages=messages,
        tools=tools,
        documents=None,
        add_generation_prompt=to_answer,
        **self._tokens,
      )
    except (jinja2.TemplateError, TypeError, AttributeError) as error:
      raise ValueError(
        f"expected messages that the chat template takes, got {error}; change"
        " the roles and contents of the row"
      ) from error


def source_of(config: Mapping[str, Any]) -> str | None:
  """Returns the template of a `tokenizer_config.json`, None without one.

  Args:
    config: its content. Of several templates by name, `default` is meant.
  """
  found = config.get("chat_template")
  if isinstance(found, list):
    found = {row["name"]: row["template"] for row in found}.get("default")
  return found


def map_strings(value: Any, change: Callable[[str], str]) -> Any:
  """Returns a value of JSON with each string in it changed, but no key."""
  if isinstance(value, str):
    return change(value)
  if isinstance(value, Mapping):
    return {key: map_strings(x, change) for key, x in value.items()}
  if isinstance(value, Sequence):
    return [map_strings(x, change) for x in value]
  return value


def _to_json(value, indent=None, **options):
  # jinja2's own escapes HTML.
  return json.dumps(value, ensure_ascii=False, indent=indent, **options)


def _refuse(message):
  raise jinja2.TemplateError(message)
