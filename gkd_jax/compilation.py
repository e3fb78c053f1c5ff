"""The cache of compiled programs, and the seconds to the first step."""

import collections
import os
import platform
import time

import jax

import gkd_jax


def use_cache(folder: str | None = None) -> str:
  """Keeps compiled programs on disk, so that a second start is short.

  Args:
    folder: where; "" keeps none; None is `JAX_COMPILATION_CACHE_DIR`, or the
      user's cache, one folder for each machine, whose processor they are for.

  Returns:
    The folder, "" without one.
  """
  given = os.environ.get("JAX_COMPILATION_CACHE_DIR")
  if folder is None and given is not None:
    return given  # JAX has read it
  if folder is None:
    user = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    folder = os.path.join(user, "gkd_jax", f"compiled-{platform.node()}")
  jax.config.update("jax_compilation_cache_dir", folder or None)
  return folder


def first_step(metrics: object) -> str:
  """Waits for the first step's `metrics`, and says how long all took."""
  jax.block_until_ready(metrics)
  return (
    f"first step {time.monotonic() - gkd_jax.STARTED:.1f} s after the start,"
    f" {_spent[_COMPILING]:.1f} s of it compiling;"
    f" {_spent[_READ]:.0f} programs from the cache"
  )


_COMPILING = "/jax/core/compile/backend_compile_duration"
_READ = "/jax/compilation_cache/cache_hits"
_spent: collections.Counter = collections.Counter()


def _add(event, amount=1.0, **_):
  _spent[event] += amount


# From the import on, so that nothing that is compiled is left out.
jax.monitoring.register_event_duration_secs_listener(_add)
jax.monitoring.register_event_listener(_add)
