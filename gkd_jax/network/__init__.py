"""TODO."""

from etils import epy

with epy.lazy_api_imports(globals()):
  from gkd_jax.network.decoder_only import (
    DecoderWrapper,
    TransformerConfig,
  )
  from gkd_jax.network.t5 import (
    T5Config,
    Transformer,
  )
