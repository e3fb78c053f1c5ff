"""Fills the templates of pages and escapes all values that are put into them."""

import base64
import re
from typing import Any

import jinja2

# Punctuation that Markdown would take for markup.
_MARKDOWN = re.compile(r"[\\`*|]|\](?=\()|~(?=~)|(?<!\w)_|_(?!\w)")


def html(template: str, **values: Any) -> str:
  """Returns a filled HTML template; markup in a value shows as text."""
  environment = _environment(autoescape=True)
  environment.filters["base64"] = lambda data: base64.b64encode(data).decode()
  return environment.get_template(template).render(values)


def markdown(template: str, **values: Any) -> str:
  """Returns a filled Markdown template; a value shows as text, on one line."""
  environment = _environment(autoescape=False, finalize=_escape)
  return environment.get_template(template).render(values)


def _environment(**options):
  return jinja2.Environment(
    loader=jinja2.PackageLoader("gkd_jax.experiments"),
    trim_blocks=True,
    lstrip_blocks=True,
    keep_trailing_newline=True,
    undefined=jinja2.StrictUndefined,
    **options,
  )


def _escape(value):
  text = " ".join(str(value).splitlines())
  text = text.replace("&", "&amp;").replace("<", "&lt;")
  return _MARKDOWN.sub(r"\\\g<0>", text)
