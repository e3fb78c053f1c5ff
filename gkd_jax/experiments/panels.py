"""What the figures of a report share: panels, colours, legends, intervals."""

import dataclasses
import functools
import io
from collections.abc import Collection, Sequence
from typing import Any

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
    content = io.BytesIO()
    self.figure.savefig(
      content,
      format="png",
      dpi=_DPI,
      bbox_inches="tight",  # nothing that overhangs is cut
      metadata={"Software": None},
    )
    return content.getvalue()


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
  return ", ".join(
    f"{label} labelled" if axis == "labelled" else label
    for axis, label in regime
    if label
  )


def seeds_note(runs: Sequence[studies.Run], what: str = "Thin lines") -> str:
  """Says what the intervals are, and warns if there are few seeds."""
  places = studies.groups(runs, lambda run: tuple(run.place.items()))
  counts = {len(members) for members in places.values()}
  few, many = min(counts), max(counts)
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
    picture.legend(
      list(found.values()),
      list(found),
      loc="outside lower center",
      ncols=min(max(1, int(picture.get_figwidth() // 1.9)), len(found)),
      frameon=False,
    )
