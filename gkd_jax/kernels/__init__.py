"""Faster forms of a few computations, for backends that are slow at the plain one.

Each function has a plain form and a form for a CPU, which agree in value and
gradient; `dispatch` chooses by the platform that a program is compiled for.

  matmul      products of a few rows with a large matrix, or its transpose
  attention   attention, one head at a time
  reductions  argmax over the vocabulary
  row_blocks  work on logits, a few rows at a time; adding a product in place
"""

from etils import epy

with epy.lazy_api_imports(globals()):
  from gkd_jax.kernels.attention import attend
  from gkd_jax.kernels.matmul import project, times_transposed
  from gkd_jax.kernels.reductions import argmax
  from gkd_jax.kernels.row_blocks import add_product, rows_gradient
