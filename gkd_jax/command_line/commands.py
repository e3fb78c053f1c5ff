"""The commands, their flags, and what a flag's value may be."""

import dataclasses
from collections.abc import Callable
from typing import Any

from gkd_jax import checks


@dataclasses.dataclass(frozen=True)
class Flag:
  """A flag.

  Attributes:
    help: what it does.
    value: what its value is called in the help; "" of a switch.
    default: without it.
    convert: `(text, name) -> value`, raises a ValueError for a wrong text.
    many: may be given several times; the value is a list.
  """

  help: str
  value: str = "TEXT"
  default: Any = None
  convert: Callable[[str, str], Any] = lambda text, name: text
  many: bool = False


@dataclasses.dataclass(frozen=True)
class Command:
  """A command.

  Attributes:
    summary: what it does, in a line.
    example: command lines that work as they are, or nearly.
    flags: names in `FLAGS`.
    words: what stands after it besides flags; "" for nothing.
    run_files: gin files to start from; its help lists the macros of the first.
  """

  summary: str
  example: str
  flags: tuple[str, ...]
  words: str = ""
  run_files: tuple[str, ...] = ()


def _whole(least: int):
  def convert(text, name):
    number = int(text) if text.lstrip("-").isdecimal() else text
    checks.whole(number, name, least=least)
    return number

  return convert


def _one_of(*known: str):
  def convert(text, name):
    checks.one_of(text, name, known)
    return text

  return convert


def _list(text, name):
  del name
  return [part for part in text.split(",") if part]


def _switch(text, name):
  checks.one_of(text.lower(), name, ("true", "false"))
  return text.lower() == "true"


FLAGS = {
  "gin_file": Flag(
    "Gin file: a path, or one of the shipped folder. May be given several"
    " times; they are read in this order.",
    "FILE",
    many=True,
  ),
  "gin_bindings": Flag(
    "The same as --gin.NAME=VALUE, which sets a macro or an argument after the"
    " files are read.",
    "'NAME = VALUE'",
    many=True,
  ),
  "gin_search_paths": Flag(
    "Folders in which gin files are looked up as well.",
    "FOLDER,...",
    [],
    _list,
  ),
  "tfds_data_dir": Flag("Folder of TFDS data sets.", "FOLDER"),
  "seqio_additional_cache_dirs": Flag(
    "Folders in which cached seqio tasks are looked up as well.",
    "FOLDER,...",
    [],
    _list,
  ),
  "dry_run": Flag(
    "Checks everything, prints what is set and a table of what it found, and"
    " stops; nothing is written.",
    "",
    False,
    _switch,
  ),
  "multiprocess": Flag(
    "Lets JAX find the other processes (TPU pod, SLURM).", "", False, _switch
  ),
  "coordinator_address": Flag("Address of process 0.", "HOST:PORT"),
  "process_count": Flag("Number of processes.", "N", None, _whole(1)),
  "process_index": Flag("Index of this process, from 0.", "N", None, _whole(0)),
  "lost_after_s": Flag(
    "Seconds without a heartbeat after which a process counts as lost; 40 by"
    " default.",
    "N",
    40,
    _whole(1),
  ),
  "compilation_cache_dir": Flag(
    "Folder of the cache of compiled programs, empty for none. The default is"
    " JAX_COMPILATION_CACHE_DIR, or gkd_jax in the user's cache folder.",
    "FOLDER",
  ),
  "checkpoint_path": Flag("Checkpoint to read.", "PATH"),
  "output_path": Flag("Folder to write.", "FOLDER"),
  "markdown": Flag(
    "Markdown file to write as well, its pictures in the folder beside it.",
    "FILE",
  ),
  "format": Flag(
    "Format to write: gkd (the default), t5x or hf.",
    "FORMAT",
    "gkd",
    _one_of("gkd", "t5x", "hf"),
  ),
  "dtype": Flag(
    "Type to store the parameters in: bfloat16, float16 or float32; by default"
    " the one that they have.",
    "TYPE",
    None,
    _one_of("bfloat16", "float16", "float32"),
  ),
  "layers": Flag(
    "Layers to keep, of encoder and decoder, for a shallower student: numbers"
    " from 0, or every:N.",
    "N,N,...",
  ),
  "encoder_layers": Flag("Layers of the encoder, if others.", "N,N,..."),
  "vocabulary_path": Flag(
    "SentencePiece model of the tokenizer, or a folder with tokenizer.json, for"
    " the format hf; by default what the checkpoint's folder has.",
    "PATH",
  ),
  "extra_ids": Flag(
    "Number of sentinels after its pieces, for the format hf; 100 by default.",
    "N",
    100,
    _whole(0),
  ),
  "axis": Flag(
    "Axis of the grid: values of a macro, or gin_file=FILE,FILE. May be given"
    " several times.",
    "NAME=VALUE,...",
    many=True,
  ),
  "seeds": Flag(
    "Number of seeds, counted from 0; 1 by default.", "N", None, _whole(1)
  ),
  "sweep_file": Flag("TOML file that defines the grid instead.", "FILE"),
  "output_dir": Flag("Folder of all runs.", "FOLDER"),
  "jobs": Flag("Number of runs at the same time.", "N", 1, _whole(1)),
  "print_commands": Flag(
    "Prints each run's command, runs none.", "", False, _switch
  ),
  "topology": Flag(
    "Devices to compile for, such as v5e:4x4, 2xv5e:4x4 (two slices) or cpu:8;"
    " by default this machine's.",
    "DEVICES",
  ),
  "title": Flag("Title of the report."),
  "phases": Flag(
    "Programs to compile: some of sampling, teacher, data, student and mixed;"
    " by default all of the run.",
    "PHASE,...",
    None,
    _list,
  ),
}

_GIN = (
  "gin_file",
  "gin_bindings",
  "gin_search_paths",
  "tfds_data_dir",
  "seqio_additional_cache_dirs",
)
_PROCESSES = (
  "multiprocess",
  "coordinator_address",
  "process_count",
  "process_index",
  "lost_after_s",
  "compilation_cache_dir",
)
_TRAIN = (
  "runs/gkd.gin",
  "runs/sft.gin",
  "runs/rl_gkd.gin",
  "runs/stored_teacher.gin",
)

COMMANDS = {
  "train": Command(
    "Trains a student, or goes on with its run.",
    "gkd train --gin_file=experiments/smoke_teacher.gin"
    " --gin.MODEL_DIR='\"/tmp/teacher\"'",
    (*_GIN, "dry_run", *_PROCESSES),
    run_files=_TRAIN,
  ),
  "eval": Command(
    "Scores a checkpoint on a split, by the task's metrics.",
    "gkd eval --gin_file=models/t5_1_1.gin --gin_file=runs/eval.gin"
    " --gin.STUDENT=%T5_1_1_SMALL --gin.CHECKPOINT_PATH='\"/runs/a\"' ...",
    (*_GIN, *_PROCESSES),
    run_files=("runs/eval.gin", "runs/instruments.gin"),
  ),
  "infer": Command(
    "Decodes a split: JSON lines, or a teacher's outputs to train on.",
    "gkd infer --gin_file=models/t5_1_1.gin --gin_file=runs/infer.gin"
    " --gin.STUDENT=%T5_1_1_SMALL --gin.CHECKPOINT_PATH='\"/runs/a\"' ...",
    (*_GIN, *_PROCESSES),
    run_files=("runs/infer.gin", "runs/teacher_data.gin"),
  ),
  "compare": Command(
    "Tests the difference between two evaluations of one split.",
    "gkd compare /runs/a/eval /runs/b/eval",
    (),
    words="EVAL_OUTPUT_DIR EVAL_OUTPUT_DIR",
  ),
  "sweep": Command(
    "Trains and scores a grid of settings, and goes on with it.",
    'gkd sweep --gin_file=my_run.gin --axis=DIVERGENCE=\'"jsd","forward_kl"\''
    " --seeds=3 --output_dir=/runs/grid",
    (
      *_GIN,
      "axis",
      "seeds",
      "sweep_file",
      "output_dir",
      "jobs",
      "print_commands",
    ),
  ),
  "report": Command(
    "Writes a page with figures and tables of runs and sweeps.",
    "gkd report --output_path=/runs/report gkd=/runs/a sft=/runs/b",
    ("output_path", "markdown"),
    words="[NAME=]RUN ...",
  ),
  "watch": Command(
    "Shows runs while they train.",
    "gkd watch gkd=/runs/a sft=/runs/b",
    (),
    words="[NAME=]RUN ...",
  ),
  "import": Command(
    "Reads a checkpoint of Hugging Face or T5X into this program's format.",
    "gkd import --checkpoint_path=/models/flan_t5_small --output_path=/runs/b",
    ("checkpoint_path", "output_path", "dtype", "layers", "encoder_layers"),
  ),
  "export": Command(
    "Writes a run's parameters for this program, T5X or transformers.",
    "gkd export --checkpoint_path=/runs/a --output_path=/runs/a_hf --format=hf",
    (
      "checkpoint_path",
      "output_path",
      "dtype",
      "format",
      "vocabulary_path",
      "extra_ids",
    ),
  ),
  "precompile": Command(
    "Compiles a run for devices, attached or not: does it fit, and how fast.",
    "gkd precompile --topology=v5e:4x4"
    " --gin_file=experiments/xsum/on_policy_gkd_small.gin",
    (*_GIN, "topology", "phases", "title", "output_path"),
    run_files=_TRAIN,
  ),
  "path": Command(
    "Prints the folder of a shipped model.",
    "gkd path g2p_teacher",
    (),
    words="NAME",
  ),
}
