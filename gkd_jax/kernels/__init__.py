"""TODO."""

from etils import epy

with epy.lazy_api_imports(globals()):
  from gkd_jax.kernels.products import (
    attend,
    project,
  )
