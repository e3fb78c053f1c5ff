"""TODO."""

from etils import epy

with epy.lazy_api_imports(globals()):
  from gkd_jax.decoding.beams import (
    beam_search,
  )
  from gkd_jax.decoding.loops import (
    PAD_ID,
  )
  from gkd_jax.decoding.rows import (
    decode,
    repeat_rows,
    row_axes,
  )
  from gkd_jax.decoding.sampling import (
    SampleResult,
    sample,
    sampling_log_probs,
    sampling_logits,
  )
