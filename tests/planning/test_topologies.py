"""Devices by the name of a topology."""

import importlib.metadata
import sys

import jax
import pytest
from packaging import requirements

from gkd_jax.planning import topologies


@pytest.mark.parametrize("name", ["v5e", "v9:2x2", "v5e:4by4", "cpu:8:8"])
def test_an_unknown_topology_is_a_sentence(name):
  with pytest.raises(ValueError, match=r"such as v5e:4x4.*set --topology"):
    topologies.devices(name)


def test_cpu_devices_are_counted():
  found, chip = topologies.devices("cpu:2x2")
  assert found == jax.devices()[:4] and chip is None
  with pytest.raises(ValueError, match="expected 999 CPU devices, got 8"):
    topologies.devices("cpu:999")


def pinned():
  """What jax's extra `tpu` asks of libtpu, read by pip's own library."""
  asked = map(requirements.Requirement, importlib.metadata.requires("jax"))
  (found,) = [r.specifier for r in asked if r.name == "libtpu"]
  return found


@pytest.mark.parametrize("version", ["0.0.1", "99.0.0", None])
def test_a_libtpu_that_jax_does_not_pin_is_named(
  tmp_path, monkeypatch, version
):
  if version is None:
    version = str(pinned()).removeprefix("==").replace("*", "7")
  folder = tmp_path / f"libtpu-{version}.dist-info"
  folder.mkdir()
  (folder / "METADATA").write_text(f"Name: libtpu\nVersion: {version}\n")
  monkeypatch.syspath_prepend(tmp_path)
  said = topologies.wrong_libtpu()
  assert (said is None) == pinned().contains(version)
  if said:
    assert f"jax {jax.__version__} pins, got {version}; run `pip ins" in said
    assert str(pinned()) in said


def test_without_libtpu_its_version_is_said(monkeypatch):
  monkeypatch.setitem(sys.modules, "libtpu", None)
  with pytest.raises(ValueError, match=r"pip install 'gkd_jax\[tpu\]'") as said:
    topologies.devices("v5e:2x2")
  assert f"installs libtpu{pinned()}" in str(said.value)
