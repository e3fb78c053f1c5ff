"""T5 1.1's sizes, for our network and for transformers'."""

from typing import Any

VOCAB = 32128
# emb_dim, num_heads, layers on each side, mlp_dim; heads are 64 wide.
SIZES = {
  "small": (512, 6, 8, 1024),
  "base": (768, 12, 12, 2048),
  "large": (1024, 16, 24, 2816),
}


def ours(
  size: str,
  dtype: str = "float32",
  *,
  scan_layers: bool = False,
  remat_policy: str = "none",
  **options,
) -> Any:
  """A model of ours, without dropout."""
  from gkd_jax import models, network

  emb_dim, num_heads, layers, mlp_dim = SIZES[size]
  config = network.T5Config(
    vocab_size=VOCAB,
    dtype=dtype,
    emb_dim=emb_dim,
    num_heads=num_heads,
    num_encoder_layers=layers,
    num_decoder_layers=layers,
    head_dim=64,
    mlp_dim=mlp_dim,
    mlp_activations=("gelu", "linear"),
    dropout_rate=0.0,
    remat_policy=remat_policy,
  )
  return models.EncoderDecoderModel(
    network.Transformer(config, scan_layers), **options
  )


def our_params(model: Any, seed: int) -> Any:
  """Random parameters, drawn by the host: no program for it stays in memory."""
  import jax
  import jax.numpy as jnp
  import numpy as np

  shapes = {"encoder_input_tokens": (1, 8), "decoder_input_tokens": (1, 8)}
  abstract = jax.eval_shape(
    lambda: model.get_initial_variables(jax.random.key(0), shapes)["params"]
  )
  rng = np.random.default_rng(seed)

  def draw(path, leaf):
    name = path[-1].key
    # As in T5: norms 1, embeddings of deviation 1, kernels scaled by their input.
    if name == "scale":
      return jnp.ones(leaf.shape, leaf.dtype)
    spread = leaf.shape[-2] ** -0.5 if name == "kernel" else 1.0
    x = rng.standard_normal(leaf.shape, np.float32)
    return jnp.array((x * np.float32(spread)).astype(leaf.dtype))

  return jax.tree_util.tree_map_with_path(draw, abstract)


def theirs(size: str, dtype: str = "float32") -> Any:
  """A model of transformers', randomly initialised, without dropout."""
  import torch
  import transformers

  emb_dim, num_heads, layers, mlp_dim = SIZES[size]
  config = transformers.T5Config(
    vocab_size=VOCAB,
    d_model=emb_dim,
    d_kv=64,
    d_ff=mlp_dim,
    num_layers=layers,
    num_decoder_layers=layers,
    num_heads=num_heads,
    dropout_rate=0.0,
    feed_forward_proj="gated-gelu",
    tie_word_embeddings=False,
    decoder_start_token_id=0,
    pad_token_id=0,
    eos_token_id=1,
  )
  model = transformers.T5ForConditionalGeneration(config)
  return model.to(getattr(torch, dtype)).eval()
