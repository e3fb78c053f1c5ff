"""The progress bar of a run: steps, a bar, times, and as much else as fits."""

import collections
import time

import jax
import rich.console
import rich.progress
import rich.text

_COMPILING = "/jax/core/compile/backend_compile_duration"
_CACHE_HITS = "/jax/compilation_cache/cache_hits"

_events: collections.Counter = collections.Counter()


def _count(event: str, amount: float = 1.0, **_) -> None:
  _events[event] += amount
  _events[f"{event} ended"] += 1


def _begin(event: str, value: float = 0.0, **_) -> None:
  del value
  _events[f"{event} began"] += 1


# Registered at the import, so that no compilation is missed. JAX names an event
# when it begins by a scalar (its start), and when it ends by a duration.
jax.monitoring.register_event_duration_secs_listener(_count)
jax.monitoring.register_event_listener(_count)
jax.monitoring.register_scalar_listener(_begin)


def compile_seconds() -> float:
  """Returns the seconds that XLA has compiled in this process."""
  return _events[_COMPILING]


def cache_hits() -> int:
  """Returns the number of programs that came from the cache on disk."""
  return int(_events[_CACHE_HITS])


def is_compiling() -> bool:
  """Returns whether XLA compiles at this moment."""
  return _events[f"{_COMPILING} began"] > _events[f"{_COMPILING} ended"]


class Pace:
  """The time that a run has taken, and the time that is left.

  The rate is the mean since the first step of this process ended, with all that
  happens between steps, so that neither the first compilation nor one slow step
  makes it jump. The host may count steps that the devices have still to do, until
  it waits for them.

  Args:
    start: step that the run starts at.
    total: last step.
  """

  def __init__(self, start: int, total: int):
    self._started = time.monotonic()
    self._done, self._total = start, total
    self._first: tuple[int, float] | None = None
    self._newest = self._started

  def advance(self) -> None:
    """Counts a step that has ended."""
    self._done += 1
    self._newest = time.monotonic()
    if self._first is None:
      self._first = self._done, self._newest

  def waited(self) -> None:
    """Notes that the devices have ended all steps, as far as counted."""
    self._newest = time.monotonic()

  def elapsed(self) -> float:
    """Returns the seconds since the start."""
    return time.monotonic() - self._started

  def left(self) -> float | None:
    """Returns the seconds until the last step; None before two steps ended."""
    if self._first is None or self._done == self._first[0]:
      return None
    steps = self._done - self._first[0]
    return (self._total - self._done) * (self._newest - self._first[1]) / steps


def clock(seconds: float | None) -> str:
  """Returns a time as people read it.

  >>> clock(5), clock(754.9), clock(36_061), clock(None)
  ('0:05', '12:34', '10:01:01', '-:--')
  """
  if seconds is None:
    return "-:--"
  minutes, seconds = divmod(int(seconds), 60)
  hours, minutes = divmod(minutes, 60)
  if hours:
    return f"{hours}:{minutes:02d}:{seconds:02d}"
  return f"{minutes}:{seconds:02d}"


class _Rest(rich.progress.ProgressColumn):
  """Times, and the parts of the status that fit into the terminal."""

  max_refresh = None

  def __init__(self, console: rich.console.Console, pace: Pace, used: int):
    super().__init__()
    self._console, self._pace, self._used = console, pace, used

  def render(self, task: rich.progress.Task) -> rich.text.Text:
    parts, left = task.fields["status"], self._pace.left()
    if is_compiling():  # the host may be ahead of the devices by then
      parts, left = ["compiling"], None
    text = f"{clock(self._pace.elapsed())}, {clock(left)} left"
    for part in parts:
      if self._used + len(text) + 2 + len(part) > self._console.width:
        break
      text += f"  {part}"
    return rich.text.Text(text, no_wrap=True, overflow="crop")


def bar(
  console: rich.console.Console, start: int, total: int, pace: Pace
) -> tuple[rich.progress.Progress, rich.progress.TaskID]:
  """Returns a bar, with the steps before and times and status behind it.

  Args:
    console: where it is shown.
    start: step that the run starts at.
    total: last step.
    pace: of the run.

  Returns:
    The bar and its task, whose field `status` is a list of texts: the most
    important first.
  """
  width = 10 if console.width < 100 else 20
  count = 2 * len(str(total)) + 1
  progress = rich.progress.Progress(
    rich.progress.MofNCompleteColumn(),
    rich.progress.BarColumn(bar_width=width),
    _Rest(console, pace, count + width + 2),
    console=console,
    refresh_per_second=2,
  )
  task = progress.add_task("", total=total, completed=start, status=[])
  return progress, task
