"""TODO."""

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
    reverse_kl,
    skew_forward_kl,
    skew_reverse_kl,
    sums_over_vocabulary,
    total_variation,
  )
