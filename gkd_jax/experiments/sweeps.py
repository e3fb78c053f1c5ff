"""Grids of runs: the cells, what each one needs, and its command.

Flags define a simple grid; a TOML file one whose cells need other cells:

    seeds = 3                                   # or a list of seeds
    gin_file = ["experiments/g2p/student.gin"]  # for every training stage
    [macros]                                    # for every training stage
    TRAIN_STEPS = 1200
    MIXTURE_OR_TASK_NAME = "g2p_cmudict_{labelled}"
    [axes]                                      # each a list of a macro's values,
    STUDENT_DATA_FRACTION = [0, 0.5, 1]
    labelled = ["1k", "3k"]                     # or of values of `{labelled}`,
    [axes.size]                                 # or points that bind macros
    small = {STUDENT = "%G2P_STUDENT"}
    [axes.method]
    SFT = {gin_file = "methods/sft.gin"}
    SeqKD = {gin_file = "methods/seqkd.gin", env = {G2P_TEACHER_OUTPUTS = "{outputs}/outputs.jsonl"}}
    [stages.sft]                                # a cell for each size and seed
    axes = ["size", "labelled"]
    gin_file = "methods/sft.gin"
    [stages.outputs]                            # a cell for all sizes and seeds
    command = "infer"
    axes = ["labelled"]
    seeds = false
    gin_file = ["models/g2p.gin", "runs/infer.gin"]
    [stages.outputs.macros]
    OUTPUT_PATH = "{dir}/outputs.jsonl"
    [stages.methods]
    axes = ["method", "size=small", "labelled"] # an axis whole, or points of it
    [stages.methods.macros]
    INITIAL_CHECKPOINT_PATH = "{sft}"

A value is gin source; any other text becomes a string. In it `{dir}` stands for
the cell's folder, `{output}` for the sweep's, `{seed}` and `{AXIS}` for the cell's
own, and `{STAGE}` for the folder of that stage's cell at the same points and seed,
which then runs first; `{STAGE:axis=point}` takes another point. Gin files are read
in the order axes, stage, every stage: the files of an axis choose the method, those
of every stage the task.
"""

import ast
import dataclasses
import difflib
import itertools
import os
import re
import tomllib
from collections.abc import Mapping, Sequence
from typing import Any

from gkd_jax import files

# The macros that a command's cells always bind, and the file that says that a
# cell is finished.
_COMMANDS = {
  "train": ({"MODEL_DIR": "{dir}"}, "final.json"),
  "eval": ({"EVAL_OUTPUT_DIR": "{dir}"}, "metrics.json"),
  "infer": ({}, None),
}
_TOP_KEYS = ("seeds", "gin_file", "macros", "env", "axes", "stages", "report")
_STAGE_KEYS = ("command", "axes", "seeds", "gin_file", "macros", "env", "done")
_POINT_KEYS = ("gin_file", "env")
_REFERENCE = re.compile(r"\{([A-Za-z_]\w*)(?::([^{}]*))?\}")


@dataclasses.dataclass(frozen=True)
class Cell:
  """One run of a grid.

  Attributes:
    name: its folder within the sweep's, `STAGE/point_point_seed`.
    stage: of the sweep.
    command: of `gkd`: train, eval or infer.
    axes: axis to the name of its point.
    seed: None if one cell serves all seeds.
    gin_files: in order.
    settings: gin binding to value; `{output}` stands for the sweep's folder.
    env: environment variables, likewise.
    done: file in its folder that says that it is finished; None if the exit
      status does.
    needs: names of the cells that must finish first.
  """

  name: str
  stage: str
  command: str
  axes: Mapping[str, str]
  seed: int | None
  gin_files: tuple[str, ...]
  settings: Mapping[str, str]
  env: Mapping[str, str]
  done: str | None
  needs: tuple[str, ...]

  def arguments(self, output: str) -> list[str]:
    """Returns the arguments of `gkd` for a sweep's folder."""
    values = [f"--gin.{k}={v}" for k, v in self.bindings(output).items()]
    return [self.command, *(f"--gin_file={f}" for f in self.gin_files), *values]

  def bindings(self, output: str) -> dict[str, str]:
    """Returns the values of its gin bindings for a sweep's folder."""
    return {k: v.replace("{output}", output) for k, v in self.settings.items()}

  def environment(self, output: str) -> dict[str, str]:
    """Returns the environment variables for a sweep's folder."""
    return {k: v.replace("{output}", output) for k, v in self.env.items()}


def from_flags(
  gin_files: Sequence[str], axes: Sequence[str], seeds: int
) -> dict[str, Any]:
  """Returns the definition of a grid with a single stage.

  Args:
    gin_files: of every cell.
    axes: `NAME=value,value` each: values of a macro, or gin files if NAME is
      `gin_file`.
    seeds: how many, from 0.

  Returns:
    What `read` returns for an equivalent sweep file.

  Raises:
    ValueError: an axis is not of the form `NAME=value,value`.
  """
  table: dict[str, Any] = {}
  for text in axes:
    name, equals, values = text.partition("=")
    if not equals or not name or not values:
      raise ValueError(
        f"expected an axis NAME=value,value, got {text!r}; set --axis"
      )
    table[name] = _split(values)
  return {
    "seeds": seeds,
    "gin_file": list(gin_files),
    "axes": table,
    "stages": {"train": {}},
  }


def read(path: str, search_paths: Sequence[str] = ()) -> dict[str, Any]:
  """Reads a definition from a TOML file, which is looked up like gin files.

  Raises:
    ValueError: there is no such file, or it is not TOML.
  """
  folders = ["", *map(files.expanded, search_paths)]
  places = [os.path.join(folder, files.expanded(path)) for folder in folders]
  found = next((p for p in places if os.path.isfile(p)), None)
  if found is None:
    raise ValueError(
      f"expected a sweep file, got {path!r}, which is not in"
      f" {', '.join(f or os.getcwd() for f in folders)};"
      " set --sweep_file"
    )
  with open(found, "rb") as f:
    try:
      return tomllib.load(f)
    except tomllib.TOMLDecodeError as error:
      raise ValueError(
        f"expected TOML, got {found}: {error}; set --sweep_file"
      ) from error


def cells(
  definition: Mapping[str, Any], bindings: Sequence[str] = ()
) -> list[Cell]:
  """Returns all cells of a grid, seed by seed, each after those it needs.

  Args:
    definition: from `read` or `from_flags`.
    bindings: further gin bindings of every training cell.

  Raises:
    ValueError: an unknown key, axis, point or stage, or two cells with one name.
  """
  _check_keys(definition, _TOP_KEYS, "the sweep file")
  axes = {
    name: _points(name, points)
    for name, points in definition.get("axes", {}).items()
  }
  made: dict[tuple, Cell] = {}
  stages = definition.get("stages", {})
  for number, (stage, table) in enumerate(stages.items()):
    _check_keys(table, _STAGE_KEYS, f"stage {stage}")
    if table.get("command", "train") not in _COMMANDS:
      raise ValueError(
        f"expected a command of {', '.join(_COMMANDS)}, got"
        f" {table['command']!r}; set command of stage {stage}"
      )
    chosen = _chosen_axes(table.get("axes", list(axes)), axes, stage)
    seeds = _seeds(table.get("seeds", definition.get("seeds", 1)))
    for position, (seed, *labels) in enumerate(
      itertools.product(seeds, *chosen.values())
    ):
      point = dict(zip(chosen, labels, strict=True))
      cell = _cell(definition, stage, table, axes, point, seed, made, bindings)
      made[number, position] = cell
  if not made:
    raise ValueError(
      "expected at least one stage and point, got none; set stages and axes"
    )
  _check_different(made.values())
  # Seed by seed, so that an interrupted sweep has comparable cells.
  of_seed = lambda cell: -1 if cell.seed is None else cell.seed
  order = sorted(made, key=lambda k: (of_seed(made[k]), k))
  return [made[k] for k in order]


def gin_value(value: Any) -> str:
  """Returns a TOML value, or text, as gin source.

  >>> gin_value(0.5), gin_value("%BASE"), gin_value("runs/a"), gin_value("[1]")
  ('0.5', '%BASE', "'runs/a'", '[1]')
  """
  if not isinstance(value, str):
    return repr(value)
  is_dict = value.startswith("{") and not _REFERENCE.match(value)
  if is_dict or value[:1] in tuple("@%([\"'"):
    return value
  try:
    ast.literal_eval(value)
  except (ValueError, SyntaxError):
    return repr(value)
  return value


def _cell(definition, stage, table, axes, point, seed, made, bindings):
  """Returns the cell of a stage at a point; cells that it needs are in `made`."""
  command = table.get("command", "train")
  settings, done = _COMMANDS[command]
  settings = dict(settings)
  if seed is not None:
    settings["SEED"] = seed
  layers = [axes[name][label] for name, label in point.items()]
  layers.append(table)
  if command == "train":
    layers.append(definition)
  gin_files, env = [], {}
  for layer in reversed(layers):
    settings |= layer.get("macros", {})
    env |= layer.get("env", {})
  for layer in layers:
    gin_files += _as_list(layer.get("gin_file", []))
  if command == "train":
    pairs = (b.partition("=") for b in bindings)
    settings |= {k.strip(): v.strip() for k, _, v in pairs}
  parts = [_folder_part(axis, label) for axis, label in point.items()]
  parts += [] if seed is None else [f"seed{seed}"]
  name = f"{stage}/{'_'.join(parts) or 'all'}"
  needs: dict[str, None] = {}

  def fill(text):
    return _REFERENCE.sub(
      lambda m: _refer(m, name, stage, point, seed, made.values(), needs), text
    )

  return Cell(
    name=name,
    stage=stage,
    command=command,
    axes=point,
    seed=seed,
    gin_files=tuple(fill(f) for f in gin_files),
    settings={
      k: fill(gin_value(v)) if isinstance(v, str) else gin_value(v)
      for k, v in settings.items()
    },
    env={k: fill(str(v)) for k, v in env.items()},
    done=table.get("done", done),
    needs=tuple(needs),
  )


def _refer(match, name, stage, point, seed, made, needs):
  """Returns what a reference stands for, and adds the cell to `needs`."""
  what, changes = match.groups()
  fixed = {
    "dir": "{output}/" + name,
    "output": "{output}",
    "seed": str(seed),
    **point,
  }
  if what in fixed and changes is None:
    return fixed[what]
  known = [cell for cell in made if cell.stage == what != stage]
  wanted = {**point, "seed": str(seed)}
  for pair in filter(None, (changes or "").split(",")):
    axis, _, label = pair.partition("=")
    wanted[axis.strip()] = label.strip()
  for cell in known:
    own = dict(cell.axes)
    if cell.seed is not None:
      own["seed"] = str(cell.seed)
    if all(wanted.get(k) == v for k, v in own.items()):
      needs[cell.name] = None
      return "{output}/" + cell.name
  earlier = {c.stage for c in made} - {stage}
  raise ValueError(
    f"expected {match.group()} of {name} to name one cell of an earlier stage"
    f" ({', '.join(sorted(earlier)) or 'none'}), or one of"
    f" {', '.join(sorted(fixed))}; set the value, or axes and seeds of the"
    " stages"
  )


def _points(name, points) -> dict[str, dict[str, Any]]:
  """Returns the macros, gin files and variables of each point of an axis."""
  if isinstance(points, Mapping):
    table = {}
    for label, values in points.items():
      macros = {k: v for k, v in values.items() if k not in _POINT_KEYS}
      rest = {k: v for k, v in values.items() if k in _POINT_KEYS}
      table[label] = {"macros": macros, **rest}
  elif name == "gin_file":
    label = lambda file: os.path.splitext(os.path.basename(file))[0]
    table = {label(file): {"gin_file": file} for file in points}
  else:
    # The points of an axis that is not a macro are the values of `{AXIS}`.
    bound = name[:1].isupper() or "." in name
    table = {
      str(v).strip("'\""): {"macros": {name: v} if bound else {}}
      for v in points
    }
  if len(table) != len(points) or not table:
    raise ValueError(
      f"expected different values of the axis {name}, got {list(points)};"
      " set the axis"
    )
  return table


def _chosen_axes(items, axes, stage) -> dict[str, list[str]]:
  """Returns a stage's points by axis, from `axis` or `axis=point,point`."""
  chosen = {}
  for item in items:
    name, equals, labels = item.partition("=")
    _check_known(name, axes, f"an axis of stage {stage}")
    chosen[name] = list(axes[name])
    if equals:
      chosen[name] = [label.strip() for label in labels.split(",")]
      for label in chosen[name]:
        _check_known(label, axes[name], f"a point of {name} of stage {stage}")
  return chosen


def _seeds(value) -> list[int | None]:
  if value is False:
    return [None]
  if isinstance(value, list):
    return list(value)
  if isinstance(value, bool) or not isinstance(value, int) or value < 1:
    raise ValueError(
      f"expected a number of seeds, a list or false, got {value!r}; set seeds"
    )
  return list(range(value))


def _split(text: str) -> list[str]:
  """Splits at commas outside of brackets and quotes."""
  parts, depth, quote = [""], 0, ""
  for char in text:
    if quote:
      quote = "" if char == quote else quote
    elif char in "'\"":
      quote = char
    else:
      depth += (char in "([{") - (char in ")]}")
    if char == "," and not depth and not quote:
      parts.append("")
    else:
      parts[-1] += char
  return [part.strip() for part in parts]


def _folder_part(axis: str, label: str) -> str:
  """Returns a point as part of a folder's name, a number with its axis."""
  text = label if label[:1].isalpha() else f"{axis}-{label}"
  return re.sub(r"[^A-Za-z0-9.+-]+", "-", text).strip("-")


def _as_list(value):
  return [value] if isinstance(value, str) else list(value)


def _check_keys(table, keys, where):
  for key in table:
    _check_known(key, keys, f"a key of {where}")


def _check_known(name, known, what):
  if name not in known:
    near = difflib.get_close_matches(str(name), list(known)) or list(known)
    raise ValueError(
      f"expected {what}, such as {', '.join(near) or 'none'}, got {name!r};"
      " set the right name"
    )


def _check_different(found):
  """Raises if two cells have the same folder or would run the same."""
  names: dict[str, Cell] = {}
  runs: dict[str, Cell] = {}
  for cell in found:
    other = names.setdefault(cell.name, cell)
    if other is not cell:
      raise ValueError(
        f"expected a folder for each cell, got {cell.name!r} for both"
        f" {dict(other.axes)} and {dict(cell.axes)}; set other names of points"
      )
    what = cell.gin_files, dict(cell.settings), dict(cell.env)
    run = f"{cell.command} {what}".replace(cell.name, "")
    other = runs.setdefault(run, cell)
    if other is not cell:
      raise ValueError(
        f"expected cells that differ, got the same run {other.name} and"
        f" {cell.name}; set macros of their points, or use {{AXIS}} in a value"
      )
