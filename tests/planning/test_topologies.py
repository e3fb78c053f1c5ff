"""Devices by the name of a topology."""

import jax
import pytest

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
