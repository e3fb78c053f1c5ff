"""Google's notice that a machine is about to be taken away, as a SIGTERM.

Its metadata server is asked in threads of their own. What to do then is
`preemption`'s: with several processes, whichever is told, all save the same step.
Source: cloud.google.com/compute/docs/metadata (queries that wait for a change),
.../instances/create-use-preemptible and .../metadata/getting-live-migration-notice.
"""

import os
import signal
import threading
import urllib.parse
import urllib.request
from collections.abc import Callable

GCE = "http://metadata.google.internal/computeMetadata/v1/instance"
# Key to the value that means an end, and whether it counts if it is there at the
# start. Maintenance is announced long before: a run that was started again on the
# same machine would else stop at once, again and again.
_KEYS = {
  "preempted": ("TRUE", True),
  "maintenance-event": ("TERMINATE_ON_HOST_MAINTENANCE", False),
}
# Straight to the server, whatever proxy the environment names.
_OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))


def watch(
  address: str = GCE,
  *,
  wait_s: int = 60,
  retry_s: float = 60.0,
  say: Callable[[str], None] = print,
  ended: threading.Event | None = None,
) -> list[threading.Thread]:
  """Sends this process a SIGTERM when the machine is to be preempted or ended.

  A server that does not answer stops nothing: that is said once, and it is asked
  again.

  Args:
    address: of the keys `preempted` and `maintenance-event`.
    wait_s: longest time in seconds that the server lets a question wait.
    retry_s: seconds until a question that failed is asked again.
    say: is told that notices are not watched.
    ended: when it is set, what comes afterwards is no notice.

  Returns:
    The threads, which end with the program, or after a notice.
  """
  once, ended = _Once(say), ended or threading.Event()
  threads = [
    threading.Thread(
      target=_watch,
      args=(f"{address}/{key}", *_KEYS[key], wait_s, retry_s, once, ended),
      name=f"notices of {key}",
      daemon=True,
    )
    for key in _KEYS
  ]
  for thread in threads:
    thread.start()
  return threads


class _Once:
  """Says the first thing that it is told to."""

  def __init__(self, say: Callable[[str], None]):
    self._say, self._lock, self._said = say, threading.Lock(), False

  def __call__(self, text: str) -> None:
    with self._lock:
      said, self._said = self._said, True
    if not said:
      self._say(text)


def _watch(url, value, at_start, wait_s, retry_s, once, ended):
  first, tag = None, None
  while not ended.is_set():
    try:
      found, tag = _ask(url, tag, wait_s)
    except (OSError, ValueError) as error:
      once(
        f"preemption notices are not watched: no answer of {url} ({error});"
        " leave out --preemption_notice where there is no such server"
      )
      tag = None
      ended.wait(retry_s)
      continue
    first = found if first is None else first
    counts = at_start or first != value
    if found == value and counts and not ended.is_set():
      os.kill(os.getpid(), signal.SIGTERM)
      return


def _ask(url, tag, wait_s):
  """The value, once it is another than the one with the tag, and its own tag."""
  if tag is not None:
    query = {"wait_for_change": "true", "timeout_sec": wait_s, "last_etag": tag}
    url = f"{url}?{urllib.parse.urlencode(query)}"
  request = urllib.request.Request(url, headers={"Metadata-Flavor": "Google"})
  with _OPENER.open(request, timeout=2 * wait_s) as answer:
    tag = answer.headers.get("ETag")
    if tag is None:
      raise ValueError("its answer has no ETag")
    return answer.read().decode().strip(), tag
