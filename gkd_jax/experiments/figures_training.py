"""Figures of what training logged: loss, divergences, entropy, lengths."""

from gkd_jax.experiments import metrics, panels, run_folders, studies

_LOGGED = (
  *("loss", "forward_kl", "reverse_kl"),
  *("student_entropy", "sampled_length"),
)


def training_curves(study: studies.Study) -> panels.Picture | None:
  """Draws what training logged over steps, a panel for each quantity."""
  runs = [run for run in study.runs if run.on_grid]
  curves = {}
  for run in runs:
    rows = run_folders.read_metrics(run.folder)
    for name in _LOGGED:
      curve = [(r["step"], r[name]) for r in rows if r.get(name) is not None]
      if len(curve) > 1:
        curves[run.folder, name] = curve
  folders = {folder for folder, _ in curves}
  if not folders:
    return None
  regimes = panels.regimes(study, [r for r in runs if r.folder in folders])
  parts = {
    (*regime, ("metric", metrics.of(name).label)): (found, name)
    for regime, members in regimes.items()
    for name in _LOGGED
    if (found := [r for r in members if (r.folder, name) in curves])
  }
  picture, axes = panels.grid(parts, height=3.0, width=4.8)
  for panel, (members, name) in zip(axes, parts.values(), strict=True):
    for method in study.points("method", members):
      lines = [
        curves[run.folder, name]
        for run in members
        if run.place["method"] == method
      ]
      style = panels.method_style(study, method)
      panels.draw_curves(panel, lines, style, method)
    panel.set(xlabel="step", ylabel=metrics.of(name).unit)
  panels.legend_below(picture, *axes)
  return panels.Picture(
    "training",
    "Training",
    "What training logged, each point a mean since the one before: the loss,"
    " which is another quantity for each method; divergences to the teacher and"
    " entropy on the outputs that were trained on; the length of samples. Means"
    " of the seeds, and the range from the least to the greatest of them.",
    picture,
  )
