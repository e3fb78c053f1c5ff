"""What the figures of a report share: panels, colours, legends, intervals."""

import contextlib
import dataclasses
import functools
import io
import textwrap
from collections.abc import Collection, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib import figure

from gkd_jax.experiments import studies

# Okabe and Ito's palette, which colour-blind readers tell apart.
_COLORS = (
  *("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9"),
  *("#8B4513", "#6A3D9A", "#555555", "#B0B000"),
)
# One fewer than the colours: a pair repeats after ninety lines.
_MARKERS = "osD^vP*Xh"
_DPI = 130
# A name in a chart: letters of a line, and letters at most.
_LINE, _LONGEST = 24, 72
# Lines and letters take the colour of the page, which may be dark.
_SVG_STYLE = (
  "<style>:root { color-scheme: light dark; color: #1d2733 }"
  " @media (prefers-color-scheme: dark) { :root { color: #dfe5ec } }</style>"
)
HOW = {"greedy": "greedy", "sampled": "sampled at temperature 1"}
# Pairs (axis, point) that a panel is about.
Regime = tuple[tuple[str, str], ...]


@dataclasses.dataclass(frozen=True)
class Picture:
  """A figure, the name of its file, its heading and its caption."""

  name: str
  title: str
  caption: str
  figure: figure.Figure

  @functools.cached_property
  def png(self) -> bytes:
    """The figure as PNG, the same bytes for the same data."""
    return self._save(format="png", dpi=_DPI, metadata={"Software": None})

  @functools.cached_property
  def svg(self) -> bytes:
    """The figure as SVG, for light and dark pages alike.

    Its letters are outlines, so that no font is needed.
    """
    with matplotlib.rc_context({"svg.hashsalt": self.name}):
      content = self._save(
        format="svg",
        transparent=True,
        metadata={"Date": None, "Creator": None},
      )
    text = content.decode().replace("#000000", "currentColor")
    end = text.index(">", text.index("<svg"))
    # Matplotlib leaves out a black fill, as black is SVG's default.
    fill = ' fill="currentColor">'
    return (text[:end] + fill + _SVG_STYLE + text[end + 1 :]).encode()

  def _save(self, **options) -> bytes:
    content = io.BytesIO()
    # "tight": nothing that overhangs is cut.
    self.figure.savefig(content, bbox_inches="tight", **options)
    return content.getvalue()


@contextlib.contextmanager
def plain_text():
  """Draws dollar signs of names as they are, where Matplotlib has mathematics."""
  with matplotlib.rc_context({"text.parse_math": False}):
    yield


def wrapped(name: str) -> str:
  """Returns a name in lines that a chart has room for; the middle may be cut.

  >>> wrapped("on-policy KD")
  'on-policy KD'
  """
  if len(name) > _LONGEST:
    half = _LONGEST // 2
    name = f"{name[: half - 1]}…{name[-half:]}"
  return "\n".join(textwrap.wrap(name, _LINE)) or name


def color(i: int) -> str:
  """Returns the colour of line `i`."""
  return _COLORS[i % len(_COLORS)]


def style(i: int) -> dict[str, str]:
  """Returns colour and marker of line `i`."""
  return {"color": color(i), "marker": _MARKERS[i % len(_MARKERS)]}


def method_style(study: studies.Study, method: str) -> dict[str, str]:
  """Returns colour and marker of a method, the same in every figure."""
  return style(list(study.axes["method"]).index(method))


def regimes(
  study: studies.Study, runs: Sequence[studies.Run]
) -> dict[Regime, list[studies.Run]]:
  """Groups runs by student size and labelled examples, in the study's order.

  A run without one of them, such as the teacher's, is in every regime.
  """
  places: list[Regime] = [()]
  for axis in ("size", "labelled"):
    if labels := study.points(axis, runs):
      places = [(*p, (axis, label)) for p in places for label in labels]
  found = {}
  for place in places:
    members = [r for r in runs if all(r.place.get(a, x) == x for a, x in place)]
    if any(all(a in r.place for a, _ in place) for r in members):
      found[place] = members
  return found


def regime_title(regime: Regime) -> str:
  """Returns a panel's heading, such as "small, 3k labelled, greedy"."""
  parts = [
    f"{label} labelled" if axis == "labelled" else label
    for axis, label in regime
    if label
  ]
  return "\n".join(textwrap.wrap(", ".join(parts), 2 * _LINE))


def seeds_note(runs: Sequence[studies.Run], what: str = "Thin lines") -> str:
  """Says what the intervals are, and warns if there are few seeds."""
  places = studies.groups(runs, lambda run: tuple(run.place.items()))
  counts = {len(members) for members in places.values()}
  few, many = min(counts), max(counts)
  if many == 1 and any(any(run.intervals.values()) for run in runs):
    return (
      "One seed: no interval over seeds, differences may be chance; intervals"
      " over examples are in the table."
    )
  if many == 1:
    return "One seed: no interval can be given, differences may be chance."
  text = f"{few} to {many}" if few != many else f"{many}"
  note = f"{what}: 95 % t-intervals of the mean over {text} seeds."
  if few < 4:
    note += " So few seeds make wide intervals"
    note += ", and one seed none." if few == 1 else "."
  return note


def grid(
  regimes: Collection[Regime],
  *,
  height: float,
  width: float,
  columns: int | None = None,
  **options: Any,
):
  """Returns a figure and a panel for each regime, with its heading.

  Args:
    regimes: what the panels are about.
    height: of one panel, in inches.
    width: of one panel, in inches.
    columns: most panels in a row.
    **options: of matplotlib's `subplots`.
  """
  number = len(regimes)
  # More than three are read two by two: that is what a page is wide enough for.
  columns = min(columns or (3 if number < 4 else 2), number)
  rows = -(-number // columns)
  picture = figure.Figure(
    figsize=(width * columns, height * rows + 0.7), layout="constrained"
  )
  axes = picture.subplots(rows, columns, squeeze=False, **options).ravel()
  for panel, regime in zip(axes, regimes, strict=False):
    panel.set_title(regime_title(regime))
    panel.spines[["top", "right"]].set_visible(False)
    panel.grid(alpha=0.3)
  for panel in axes[number:]:
    panel.set_visible(False)
  return picture, list(axes[:number])


def legend_below(picture: figure.Figure, *axes):
  """Draws one legend for all panels, with each name once."""
  found = {}
  for panel in axes:
    for handle, label in zip(*panel.get_legend_handles_labels(), strict=True):
      found.setdefault(label, handle)
  if found:
    names = [wrapped(name) for name in found]
    longest = max(len(line) for name in names for line in name.splitlines())
    width = max(1.9, 0.6 + 0.09 * longest)  # of a column, in inches
    picture.legend(
      list(found.values()),
      names,
      loc="outside lower center",
      ncols=min(max(1, int(picture.get_figwidth() // width)), len(found)),
      frameon=False,
    )


def draw_curves(panel, lines, style, label):
  """Draws the mean of curves at the steps that all have, and their range."""
  common = sorted(set.intersection(*({x for x, _ in line} for line in lines)))
  table = np.array([[dict(line)[x] for x in common] for line in lines])
  panel.plot(common, table.mean(0), **style, markersize=3.5, label=label)
  if len(lines) > 1:
    shade = {"color": style["color"], "alpha": 0.15, "linewidth": 0}
    panel.fill_between(common, table.min(0), table.max(0), **shade)
