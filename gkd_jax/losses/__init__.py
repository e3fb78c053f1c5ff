"""TODO."""

from etils import epy

with epy.lazy_api_imports(globals()):
  from gkd_jax.losses.distillation import (
    AGREEMENT,
    TOKEN_METRICS,
    cross_entropy_loss,
    distillation_loss,
    summed_metrics,
    token_losses,
    token_weights,
  )
  from gkd_jax.losses.fused import (
    DEFAULT_CHUNK_SIZE,
    Int8Head,
    fused_distillation_loss,
    num_chunks,
    quantize_head,
  )
  from gkd_jax.losses.policy_gradient import (
    RunningMean,
    advantages,
    minillm_loss,
    policy_gradient_loss,
    rl_gkd_loss,
    whiten,
  )
  from gkd_jax.losses.stored import (
    LEAST_LOG_PROB,
    stored_distillation_loss,
    top_k_log_probs,
  )
  from gkd_jax.losses.vocabulary import (
    argmax,
    check_num_real_tokens,
    check_temperatures,
    mask_vocab_padding,
    target_log_probs,
  )
