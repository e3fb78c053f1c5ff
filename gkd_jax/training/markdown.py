"""Markdown in which values show as text, whatever they contain."""

import re
from collections.abc import Iterable
from typing import Any

# Punctuation that Markdown, or GitHub's mathematics, would take for markup.
_MARKUP = re.compile(r"[\\`*|~$]|\](?=\()|(?<!\w)_|_(?!\w)")


def escape(value: Any) -> str:
  """Returns a value as text on one line, with its markup escaped.

  >>> escape("<b> *a* | b")
  '&lt;b> \\\\*a\\\\* \\\\| b'
  """
  text = " ".join(str(value).splitlines())
  text = text.replace("&", "&amp;").replace("<", "&lt;")
  return _MARKUP.sub(r"\\\g<0>", text)


def table(rows: Iterable[Iterable[Any]]) -> str:
  """Returns rows as a table; the first one names the columns."""
  head, *body = [[escape(cell) for cell in row] for row in rows]
  lines = [head, ["---"] * len(head), *body]
  return "\n".join(f"| {' | '.join(line)} |" for line in lines)
