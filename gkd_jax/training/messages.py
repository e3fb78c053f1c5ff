"""Sentences about a run: how it ended, and what comes next."""

import math

from gkd_jax import types


def finished(
  model_dir: str, step: int, failed_evaluations: int, *, scored: bool
) -> str:
  """Returns where a finished run's files lie, and the next command.

  Args:
    model_dir: the run's folder.
    step: its last one.
    failed_evaluations: how many there were.
    scored: it has a final evaluation, which a report needs.
  """
  lost = (
    f"{failed_evaluations} evaluations failed; " if failed_evaluations else ""
  )
  if scored:
    then = f"report {model_dir} --output_path={model_dir}/report"
  else:
    then = f"export --checkpoint_path={model_dir} --output_path={model_dir}/hf"
    then += " --format=hf"
  return (
    f"done: {lost}checkpoint {model_dir}/checkpoint_{step}, metrics"
    f" {model_dir}/metrics.jsonl; next: gkd {then}"
  )


def interrupted(model_dir: str, step: int) -> str:
  """Returns what a run says that saved a step and stops after a signal."""
  return (
    f"interrupted at step {step}; last checkpoint {model_dir}/checkpoint_{step};"
    " the same command goes on"
  )


def not_finite(
  model_dir: str,
  step: int,
  skipped: int,
  metrics: types.Metrics,
  saved: int | None,
) -> str:
  """Returns what a run ends with whose updates stay non-finite.

  Args:
    model_dir: the run's folder.
    step: steps done.
    skipped: updates that were skipped, one after the other.
    metrics: of the last step.
    saved: step of the newest checkpoint, which was looked at when it was saved
      or restored; None if there is none.
  """
  values = {
    name: float(metrics[name][0])
    for name in ("loss", "gradient_norm", "learning_rate")
  }
  wrong = [f"{k} {x}" for k, x in values.items() if not math.isfinite(x)]
  good = "none is saved"
  if saved is not None:
    good = f"{model_dir}/checkpoint_{saved} is finite"
  return (
    f"expected finite updates, got {skipped} non-finite ones in a row up to step"
    f" {step} ({', '.join(wrong) or 'parameters or optimizer after the update'});"
    f" {good}; set LEARNING_RATE"
  )
