"""Peak host memory of reading a checkpoint of N bytes, against 1.3 N.

Writes a synthetic checkpoint of a T5 1.1 in each format that others write, then
reads it in a process of its own: `load_params` (all parameters stay in memory)
and `gkd import` (they go to another file). The process's peak, less that of one
that does the same with a tiny checkpoint, is divided by N.

Run: python tests/benchmarks/import_memory.py [--size=base] [--folder=/tmp/x]
It prints one line per case and fails if one is above 1.3.
"""

import argparse
import json
import pathlib
import subprocess
import sys
import tempfile

LIMIT = 1.3
# D, heads, layers on each side, F, V: T5 1.1's; `small` is 0.31 GB in float32.
SIZES = {
  "tiny": (16, 2, 1, 32, 64),
  "small": (512, 6, 8, 1024, 32128),
  "base": (768, 12, 12, 2048, 32128),
}
CASES = ("hf", "legacy", "gkd", "t5x")
OPERATIONS = ("load", "import")


def write(size: str, folder: str) -> None:
  """Writes random parameters of a size in all formats."""
  import numpy as np

  from gkd_jax import checkpoints, network
  from gkd_jax.checkpoints import export, parameters, stored_arrays, t5x

  emb, heads, depth, mlp, vocab = SIZES[size]
  config = network.T5Config(
    vocab_size=vocab,
    emb_dim=emb,
    num_heads=heads,
    num_encoder_layers=depth,
    num_decoder_layers=depth,
    head_dim=64,
    mlp_dim=mlp,
    mlp_activations=("gelu", "linear"),
  )
  root = pathlib.Path(folder)
  rng = np.random.default_rng(0)
  flat = {
    name: stored_arrays.from_array(rng.standard_normal(shape, np.float32))
    for name, shape in parameters.shapes(config).items()
  }
  checkpoints.save_safetensors(
    root / "gkd", stored_arrays.unflatten(flat), export.config_fields(config)
  )
  export.export_checkpoint(root / "gkd", root / "hf", format="hf")
  t5x.save_orbax(root / "t5x", flat, config, step=1)
  _write_legacy(root / "legacy" / "checkpoint_1", flat)
  print(json.dumps({"bytes": sum(x.nbytes for x in flat.values())}))


def _write_legacy(folder, flat):
  """T5X's checkpoint of before Orbax."""
  import msgpack
  import tensorstore

  folder.mkdir(parents=True)
  target = {}
  for name, array in flat.items():
    place = "target." + name.replace("/", ".")
    spec = {
      "driver": "zarr",
      "dtype": "float32",
      "kvstore": {"driver": "file", "path": f"{folder / place}/"},
      "metadata": {
        "shape": list(array.shape),
        "chunks": list(array.shape),
        "compressor": {"id": "gzip", "level": 1},
      },
    }
    tensorstore.open(spec, create=True).result().write(array.read()).result()
    spec["kvstore"] = {"driver": "file", "path": place + "/"}
    node = target
    *parents, leaf = name.split("/")
    for parent in parents:
      node = node.setdefault(parent, {})
    node[leaf] = spec
  tree = {"version": 3, "optimizer": {"target": target, "state": {}}}
  (folder / "checkpoint").write_bytes(msgpack.packb(tree))


def read(path: str, operation: str) -> None:
  """Reads a checkpoint and prints this process's peak."""
  import resource

  from gkd_jax import checkpoints
  from gkd_jax.checkpoints import export

  if operation == "load":
    kept = checkpoints.load_params(path)
    assert kept
  else:
    with tempfile.TemporaryDirectory(dir=pathlib.Path(path).parent) as out:
      export.import_checkpoint(path, pathlib.Path(out) / "ours")
  # Linux counts in KiB.
  peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
  print(json.dumps({"peak": peak}))


def call(*arguments: str) -> dict:
  """Runs this file in a new process; the last line of its output."""
  # This process stays small: a child's peak begins with that of its parent.
  done = subprocess.run(
    [sys.executable, __file__, *arguments],
    check=True,
    stdout=subprocess.PIPE,
    text=True,
  )
  return json.loads(done.stdout.splitlines()[-1])


def measure(size: str, folder: str) -> float:
  """Prints all cases; returns the largest peak over N."""
  worst = 0.0
  count = {
    name: call("--write", f"--size={name}", f"--folder={folder}/{name}")[
      "bytes"
    ]
    for name in ("tiny", size)
  }[size]
  print(f"N = {count:,} bytes")
  for case in CASES:
    for operation in OPERATIONS:
      peaks = [
        call(f"--read={folder}/{name}/{case}", f"--operation={operation}")[
          "peak"
        ]
        for name in ("tiny", size)
      ]
      ratio = (peaks[1] - peaks[0]) / count
      worst = max(worst, ratio)
      print(
        f"{case:8s} {operation:8s} peak {peaks[1]:,} bytes, constant"
        f" {peaks[0]:,}, above it {ratio:.3f} N",
        flush=True,
      )
  return worst


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--size", choices=SIZES, default="small")
  parser.add_argument("--folder", default=None)
  parser.add_argument("--write", action="store_true")
  parser.add_argument("--read", default=None)
  parser.add_argument("--operation", choices=OPERATIONS, default="load")
  options = parser.parse_args()
  if options.write:
    write(options.size, options.folder)
  elif options.read:
    read(options.read, options.operation)
  else:
    with tempfile.TemporaryDirectory() as temporary:
      worst = measure(options.size, options.folder or temporary)
    if worst > LIMIT:
      sys.exit(f"expected at most {LIMIT} N, got {worst:.3f} N")


if __name__ == "__main__":
  main()
