"""Losses of token sequences: distillation, cross-entropy, policy gradients.

distillation     losses from whole logits; normalisation by length
fused            the distillation loss from hidden states, in chunks of tokens
stored           the distillation loss from a teacher's stored top-k log-probs
policy_gradient  rewards, baselines, REINFORCE and MiniLLM
vocabulary       log-probs; padding of the vocabulary
"""

from etils import epy

with epy.lazy_api_imports(globals()):
  from gkd_jax.losses.distillation import (
    AGREEMENT,
    HARD_LABELS,
    TOKEN_METRICS,
    HardLabels,
    cross_entropy_loss,
    distillation_loss,
    summed_metrics,
    token_losses,
    token_weights,
  )
  from gkd_jax.losses.fused import (
    DEFAULT_CHUNK_SIZE,
    fused_distillation_loss,
    num_chunks,
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
    check_num_real_tokens,
    check_sizes,
    check_temperatures,
    log_probs,
    mask_vocab_padding,
    of_one_size,
    soft_cap,
    target_log_probs,
  )
