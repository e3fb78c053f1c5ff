"""T5X's own checkpoints, and others written as T5X writes them."""

import pathlib

import msgpack
import numpy as np
import tensorstore
from flax import traverse_util

GOLDEN = pathlib.Path(__file__).parents[1] / "golden"
LEGACY = GOLDEN / "t5x_legacy"
ORBAX = GOLDEN / "t5x_orbax"


def write_legacy(folder, params, version=3, chunks=None, driver="file"):
  """A legacy checkpoint: every array in zarr, as T5X writes large ones."""
  folder.mkdir(parents=True)
  flat = traverse_util.flatten_dict(params, sep="/")
  target = {}
  for name, value in flat.items():
    place = "target." + name.replace("/", ".")
    metadata = {"shape": list(value.shape), "compressor": {"id": "gzip"}}
    metadata["chunks"] = chunks or list(value.shape)
    spec = {
      "driver": "zarr",
      "dtype": str(value.dtype),
      "kvstore": {"driver": "file", "path": f"{folder / place}/"},
      "metadata": metadata,
    }
    array = tensorstore.open(spec, create=True).result()
    array.write(value).result()
    spec["kvstore"] = {"driver": driver, "path": place + "/"}
    if driver == "gcs":
      spec["kvstore"]["bucket"] = "t5-data"
    target[name] = spec
  target = traverse_util.unflatten_dict(target, sep="/")
  tree = {"target": target, "state": {"step": 1}}
  if version:
    tree = {"version": version, "optimizer": tree}
  (folder / "checkpoint").write_bytes(msgpack.packb(tree))


def scan(params, config):
  """T5X's scalable T5: layers along axis 1, heads on an axis of their own.

  Its names and shapes were read off T5X's own network of that kind.
  """
  flat = traverse_util.flatten_dict(params, sep="/")
  heads, size = config.num_heads, config.head_dim
  depth = config.num_encoder_layers
  scanned = {}
  for name, value in flat.items():
    side, *rest = name.split("/")
    if rest[0] == "relpos_bias":
      value = np.stack([value] * depth, axis=1)
      scanned[f"{side}/{side}/relpos_bias/rel_embedding"] = value
    elif rest[0] == "layers_0":
      rest = "/".join(rest[1:])
      layers = [flat[f"{side}/layers_{i}/{rest}"] for i in range(depth)]
      if "attention/" in rest:
        wide = (
          (heads, size, -1)
          if rest.endswith("out/kernel")
          else (-1, heads, size)
        )
        layers = [x.reshape(wide) for x in layers]
      scanned[f"{side}/{side}/{rest}"] = np.stack(layers, axis=1)
    elif not rest[0].startswith("layers_"):
      scanned[name] = value
  return traverse_util.unflatten_dict(scanned, sep="/")
