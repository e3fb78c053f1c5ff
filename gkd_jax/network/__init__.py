"""Networks in flax.linen, with T5X's parameter names and calls.

t5            encoder-decoder T5
decoder_only  T5's decoder alone
causal        decoder-only transformers with rotary positions
t5gemma       an encoder-decoder of the same layers
rotary        their configuration and attention
rotary_stacks their layers, encoder and decoder
blocks        what both share: configuration, layers, the decoder
layers        norm, attention, MLP, relative positions
projections   weight matrices in several types, embeddings
layer_loops   layers unrolled or scanned
"""

from etils import epy

with epy.lazy_api_imports(globals()):
  from gkd_jax.network.causal import CausalTransformer
  from gkd_jax.network.decoder_only import (
    DecoderWrapper,
    TransformerConfig,
  )
  from gkd_jax.network.rotary import RotaryConfig
  from gkd_jax.network.t5 import (
    T5Config,
    Transformer,
  )
  from gkd_jax.network.t5gemma import T5Gemma, T5GemmaConfig
