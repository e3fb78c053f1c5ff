"""TODO."""

from etils import epy

with epy.lazy_api_imports(globals()):
  from gkd_jax.decoding.beams import (
    beam_search,
  )
  from gkd_jax.decoding.calls import (
    decode,
    row_axes,
    widen,
  )
  from gkd_jax.decoding.loops import (
    PAD_ID,
  )
  from gkd_jax.decoding.sampling import (
    SampleResult,
    sample,
    sampling_law,
    sampling_logits,
  )
