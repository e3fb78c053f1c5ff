"""Notices of a metadata server, here one of our own, end a run as SIGTERM does."""

import contextlib
import functools
import http.server
import itertools
import socket
import threading
import time
import urllib.parse

import pytest
from absl import flags

from gkd_jax import main, training
from gkd_jax.training import preemption_notice


class Server(http.server.ThreadingHTTPServer):
  """Google's metadata server as its documentation has it, for some keys."""

  daemon_threads = True

  def __init__(self, **values):
    super().__init__(("localhost", 0), Handler)
    self.values, self.changed = values, threading.Condition()
    self.asked = []

  def set(self, key, value):
    with self.changed:
      self.values[key] = value
      self.changed.notify_all()

  @property
  def address(self):
    return f"http://localhost:{self.server_port}/instance"


class Handler(http.server.BaseHTTPRequestHandler):
  """One question."""

  def do_GET(self):
    server = self.server
    url = urllib.parse.urlparse(self.path)
    query = dict(urllib.parse.parse_qsl(url.query))
    key = url.path.removeprefix("/instance/")
    with server.changed:
      server.asked.append((key, query))
      if query.get("wait_for_change") == "true":
        server.changed.wait_for(
          lambda: str(server.values[key]) != query["last_etag"],
          timeout=float(query["timeout_sec"]),
        )
      value = server.values[key]
    ours = self.headers["Metadata-Flavor"] == "Google"
    self.send_response(200 if ours else 403)
    self.send_header("ETag", value)
    self.end_headers()
    self.wfile.write(f"{value}\n".encode())

  def log_message(self, *_):
    pass


@pytest.fixture
def watch():
  """`preemption_notice.watch`, whose threads end with the test."""
  ended = threading.Event()
  yield functools.partial(preemption_notice.watch, ended=ended)
  ended.set()


@contextlib.contextmanager
def serving(**values):
  server = Server(
    **{"preempted": "FALSE", "maintenance-event": "NONE"} | values
  )
  thread = threading.Thread(target=server.serve_forever, args=(0.01,))
  thread.start()
  try:
    yield server
  finally:
    server.shutdown()
    thread.join()
    server.server_close()


def until(condition, seconds=20):
  end = time.monotonic() + seconds
  while not condition() and time.monotonic() < end:
    time.sleep(0.01)
  assert condition()


def run(stop, saved, before_step):
  """The end of each step as `train.train` has it."""
  for step in itertools.count(1):
    before_step(step)
    if stop.asked(step):
      saved.append(step)
      raise training.Stopped


@pytest.mark.parametrize(
  ("key", "value"),
  [
    ("preempted", "TRUE"),
    ("maintenance-event", "TERMINATE_ON_HOST_MAINTENANCE"),
  ],
)
def test_a_notice_during_a_run_saves_and_stops_it(watch, key, value):
  said, saved = [], []
  with serving() as server, training.StopSignal() as stop:
    threads = watch(server.address, wait_s=1, say=said.append)
    (thread,) = [t for t in threads if t.name.endswith(key)]

    def before_step(step):
      if step == 3:  # both keys are waited for by now: nothing has stopped
        until(lambda: sum(bool(query) for _, query in server.asked) >= 2)
        server.set(key, value)
        until(lambda: not thread.is_alive())

    with pytest.raises(SystemExit) as end:
      run(stop, saved, before_step)
    assert end.value.code == 143 and saved == [3] and not said


def test_maintenance_announced_before_the_start_stops_nothing(watch):
  event = {"maintenance-event": "TERMINATE_ON_HOST_MAINTENANCE"}
  with serving(**event) as server, training.StopSignal() as stop:
    watch(server.address, wait_s=1)
    # It was read, and is waited for again.
    until(lambda: [k for k, _ in server.asked].count("maintenance-event") == 2)
    assert not stop.asked(1)
    server.set("preempted", "TRUE")
    until(lambda: stop.asked(2))


def test_without_a_server_the_run_goes_on_and_says_so_once(watch):
  with socket.socket() as free:
    free.bind(("localhost", 0))
    port = free.getsockname()[1]
  said, saved = [], []
  with training.StopSignal() as stop:
    threads = watch(f"http://localhost:{port}", retry_s=0.01, say=said.append)
    until(lambda: said)
    time.sleep(0.1)  # some ten more tries
    assert not stop.asked(1) and all(thread.is_alive() for thread in threads)
  assert len(said) == 1 and not saved
  assert said[0].startswith("preemption notices are not watched: no answer of")


def test_the_flag(monkeypatch):
  # The flag has no address: the true `watch` would ask Google's server.
  watched = []
  monkeypatch.setattr(preemption_notice, "watch", lambda: watched.append(1))
  values = flags.FlagValues()
  values["preemption_notice"] = main.FLAGS["preemption_notice"]
  monkeypatch.setattr(main, "FLAGS", values)
  try:
    for arguments, expected in (([], []), (["--preemption_notice=gce"], [1])):
      values(["gkd", *arguments])
      main._watch_notices()
      assert watched == expected
    with pytest.raises(flags.IllegalFlagValueError, match="gce"):
      values(["gkd", "--preemption_notice=aws"])
  finally:
    values["preemption_notice"].unparse()
