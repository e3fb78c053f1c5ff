"""Figures of what training logged, and of what it cost."""

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


def cost_and_quality(study: studies.Study) -> panels.Picture | None:
  """Draws the greedy score over the seconds that all training steps took."""
  key = f"greedy/{study.metric}"
  runs = [
    run
    for run in study.runs
    if run.on_grid and key in run.scores and run.scores.get("step_seconds")
  ]
  if not runs:
    return None
  regimes = panels.regimes(study, runs)
  picture, axes = panels.grid(regimes, height=3.4, width=4.8)
  for panel, members in zip(axes, regimes.values(), strict=True):
    for method in study.points("method", members):
      seeds = [run for run in members if run.place["method"] == method]
      x = studies.estimate(studies.scores(seeds, "step_seconds"))
      y = studies.estimate(studies.scores(seeds, key))
      style = panels.method_style(study, method)
      panel.plot(x.mean, y.mean, **style, linestyle="", label=method)
      if y.low is not None:
        panel.plot([x.mean] * 2, [y.low, y.high], color=style["color"])
    panel.set_xlim(left=0)
    panel.set(xlabel="seconds of all training steps", ylabel=study.metric_label)
  panels.legend_below(picture, *axes)
  return panels.Picture(
    "cost",
    "Cost and quality",
    f"Greedy {study.metric_label} against the seconds of training; start,"
    " compilation and evaluation are left out. Runs compare if they had the same"
    f" machine. {panels.seeds_note(runs)}",
    picture,
  )
