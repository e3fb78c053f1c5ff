"""Fills the templates of pages and escapes all values that are put into them."""

import base64
from typing import Any

import jinja2

from gkd_jax.training import markdown as escaping


def html(template: str, **values: Any) -> str:
  """Returns a filled HTML template; markup in a value shows as text."""
  environment = _environment(autoescape=True)
  environment.filters["base64"] = lambda data: base64.b64encode(data).decode()
  return environment.get_template(template).render(values)


def markdown(template: str, **values: Any) -> str:
  """Returns a filled Markdown template; a value shows as text, on one line."""
  environment = _environment(autoescape=False, finalize=escaping.escape)
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
