"""Loops over a decode step, `types.TokensToLogits`; they do not know the model.

sampling: `sample`, with a random stream per row.
distributions: temperature, top-k, top-p; log-probs of what was sampled.
beams: `beam_search`, with T5X's scores and tie rules.
loops: the loops of sampling: all rows at once, or continuous batching in slots.
rows: the batch axes of a cache, repeated rows, calls of a decode function.
"""

from etils import epy

with epy.lazy_api_imports(globals()):
  from gkd_jax.decoding.beams import (
    beam_search,
  )
  from gkd_jax.decoding.distributions import (
    sampling_log_probs,
    sampling_logits,
  )
  from gkd_jax.decoding.loops import (
    is_eos,
  )
  from gkd_jax.decoding.rows import (
    check_options,
    decode,
    repeat_rows,
    row_axes,
  )
  from gkd_jax.decoding.sampling import (
    SampleResult,
    sample,
  )
