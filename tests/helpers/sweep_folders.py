"""What a sweep reads, and the folders that it and single runs leave."""

import json

from gkd_jax.experiments import sweeps

# Student's t, 97.5 %, of 2 and of 1 degrees of freedom, from a printed table.
T2, T1 = 4.302653, 12.706205


def write_lines(path, rows):
  path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_run(folder, greedy, sampled, curve=(), **more):
  folder.mkdir(parents=True, exist_ok=True)
  rates = lambda wer: {"wer": wer, "per": wer / 4}
  final = {"greedy": rates(greedy), "sampled": rates(sampled), "params": 1234}
  (folder / "final.json").write_text(
    json.dumps(final | {"split": "test", "seconds": 56.7} | more)
  )
  if curve:
    lines = [{"step": 1, "loss": 2.0}]
    lines += [{"step": s, "eval/wer": w} for s, w in curve]
    write_lines(folder / "metrics.jsonl", lines)
  return folder


class Sweep:
  """Writes the folder that a sweep leaves."""

  def __init__(self, folder, **settings):
    self.folder, self.cells, self.axes = folder, [], {}
    self.settings = settings

  def add(self, stage, seed, **axes):
    name = f"{stage}/{'_'.join([*axes.values(), f'seed{seed}'])}"
    self.cells.append(name)
    for axis, label in axes.items():
      self.axes.setdefault(axis, {})[label] = None
    path = self.folder / name
    path.mkdir(parents=True)
    command = "eval" if stage == "eval" else "train"
    done = "metrics.json" if command == "eval" else "final.json"
    cell = {"name": name, "stage": stage, "axes": axes, "seed": seed}
    (path / "cell.json").write_text(
      json.dumps(cell | {"command": command, "done": done})
    )
    self.write()
    return path

  def write(self):
    axes = {axis: list(labels) for axis, labels in self.axes.items()}
    (self.folder / "sweep.json").write_text(
      json.dumps({"axes": axes, "cells": self.cells, "report": self.settings})
    )


def read(tmp_path, text):
  path = tmp_path / "sweep.toml"
  path.write_text(text)
  return sweeps.read(str(path))
