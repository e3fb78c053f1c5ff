"""safetensors files: what the library writes we read, and the other way."""

import json

import ml_dtypes
import numpy as np
import pytest
import safetensors
from checkpoint_states import message
from etils import epath
from safetensors import numpy as library

from gkd_jax.checkpoints import safetensors_io, stored_arrays

ARRAYS = {
  "matrix": np.arange(15, dtype=np.float32).reshape(5, 3),
  "cube": np.arange(24, dtype=np.int16).reshape(2, 3, 4),
  "scalar": np.asarray(2.5, np.float64),
  "empty": np.zeros((0, 4), np.float16),
  "flags": np.asarray([True, False]),
}


def same(a, b):
  assert (a.dtype, a.shape) == (b.dtype, b.shape)
  assert a.tobytes() == b.tobytes()


def test_reads_what_the_library_writes(tmp_path):
  library.save_file(ARRAYS, tmp_path / "x.safetensors", {"by": "it"})
  read = safetensors_io.open_file(tmp_path / "x.safetensors", setting="X")
  assert read.keys() == ARRAYS.keys()
  for name, array in ARRAYS.items():
    assert (read[name].shape, read[name].dtype) == (array.shape, array.dtype)
    same(read[name].read(), array)


def test_the_library_reads_what_is_written(tmp_path):
  file = epath.Path(tmp_path) / "x.safetensors"
  flat = {k: stored_arrays.from_array(v) for k, v in ARRAYS.items()}
  flat["turned"] = flat["matrix"].transpose()
  safetensors_io.write_file(file, flat, {"format": "pt"})
  read = library.load_file(file)
  for name, array in {**ARRAYS, "turned": ARRAYS["matrix"].T}.items():
    same(read[name], np.ascontiguousarray(array).reshape(array.shape))
  with safetensors.safe_open(file, framework="np") as opened:
    assert opened.metadata() == {"format": "pt"}


def test_bfloat16(tmp_path):
  # 1.5 is 0x3FC0: sign, eight bits of exponent, seven of fraction.
  file = epath.Path(tmp_path) / "x.safetensors"
  value = np.asarray([1.5, -2.0], ml_dtypes.bfloat16)
  safetensors_io.write_file(file, {"w": stored_arrays.from_array(value)}, {})
  assert file.read_bytes().endswith(bytes.fromhex("c03f00c0"))
  (name, entry), *_ = safetensors.deserialize(file.read_bytes())
  assert (name, entry["dtype"]) == ("w", "BF16")
  same(safetensors_io.open_file(file, setting="X")["w"].read(), value)


def test_parts(tmp_path):
  library.save_file(ARRAYS, tmp_path / "x.safetensors")
  read = safetensors_io.open_file(tmp_path / "x.safetensors", setting="X")
  for name, index in (
    ("matrix", np.s_[1:4, 0:3]),
    ("matrix", np.s_[2:5, 1:2]),
    ("matrix", np.s_[0:5:2, :]),
    ("matrix", np.s_[5:5, :]),
    ("cube", np.s_[1:2, 2:3, 1:3]),
    ("flags", (slice(1, 2),)),
  ):
    same(read[name].read(index), np.ascontiguousarray(ARRAYS[name][index]))
  turned = read["matrix"].transpose()
  assert turned.shape == (3, 5)
  same(turned.read(np.s_[1:2, 2:4]).copy(), ARRAYS["matrix"].T[1:2, 2:4].copy())
  cast = read["matrix"].cast("bfloat16", "matrix")
  same(cast.read(np.s_[0:1, :]), ARRAYS["matrix"][:1].astype("bfloat16"))


def test_a_part_reads_no_other_bytes(tmp_path):
  file = tmp_path / "x.safetensors"
  library.save_file({"w": np.arange(40.0).reshape(10, 4)}, file)
  read = safetensors_io.open_file(file, setting="X")["w"]
  # Cut off behind row 5 after the header was read.
  file.write_bytes(file.read_bytes()[: -4 * 4 * 8])
  same(read.read(np.s_[4:6, :]), np.arange(16.0, 24).reshape(2, 4))
  with pytest.raises(ValueError) as error:
    read.read(np.s_[5:7, :])
  assert "a whole safetensors file" in message(error)


def build(header, data=b""):
  text = header if isinstance(header, str) else json.dumps(header)
  return len(text).to_bytes(8, "little") + text.encode() + data


def entry(begin, end, shape=(2,), dtype="F32"):
  return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


@pytest.mark.parametrize(
  "content, text",
  [
    (b"", "0 bytes"),
    (b"\x01\x00", "2 bytes"),
    (b"PK\x03\x04" + b"\x00" * 60, "too few for its header"),
    ((10**9).to_bytes(8, "little") + b"{}", "too few for its header"),
    (build("{"), "JSONDecodeError"),
    (build("[]"), "TypeError"),
    (build({"a": {"dtype": "F32"}}), "KeyError"),
    (build({"a": entry(0, 8, dtype="F3")}, b"0" * 8), "a of F3"),
    (
      build({"a": entry(0, 2, dtype="F8_E4M3")}, b"0" * 2),
      "expected weights of BF16, ",
    ),
    (build({"a": entry(0, 8)}, b"0" * 7), "bytes instead of"),
    (build({"a": entry(0, 8)}, b"0" * 9), "bytes instead of"),
    (
      build({"a": entry(0, 8, (3,))}, b"0" * 8),
      "bytes 0 to 8 for a, which has",
    ),
    (build({"a": entry(0, 8), "b": entry(4, 12)}, b"0" * 12), "4 to 12 for b"),
    (build({"a": entry(0, 8), "b": entry(9, 17)}, b"0" * 17), "9 to 17 for b"),
    (
      build(
        f'{{"a": {json.dumps(entry(0, 8))}, "a": {json.dumps(entry(0, 8))}}}',
        b"0" * 8,
      ),
      "a twice",
    ),
  ],
)
def test_a_file_that_is_not_whole(tmp_path, content, text):
  (tmp_path / "x.safetensors").write_bytes(content)
  with pytest.raises(ValueError) as error:
    safetensors_io.open_file(tmp_path / "x.safetensors", setting="THE_PATH")
  assert text in message(error), message(error)
  assert "THE_PATH" in message(error) and "x.safetensors" in message(error)


def test_a_dtype_without_a_name(tmp_path):
  file = epath.Path(tmp_path) / "x.safetensors"
  array = stored_arrays.from_array(np.zeros(2, np.complex64))
  with pytest.raises(ValueError) as error:
    safetensors_io.write_file(file, {"w": array}, {})
  assert "complex64 in w" in message(error)
