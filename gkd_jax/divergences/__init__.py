"""Divergences between next-token distributions, by name.

kl      the divergences as the papers print them, and their registry
stable  the terms of their sums, without cancellation
"""

from etils import epy

with epy.lazy_api_imports(globals()):
  from gkd_jax.divergences.kl import (
    entropy,
    forward_kl,
    generalized_jsd,
    get,
    jsd,
    names,
    normalized_jsd,
    parameters,
    register,
    reverse_kl,
    skew_forward_kl,
    skew_reverse_kl,
    total_variation,
  )
