"""RL + GKD: a reward and a divergence on the student's own outputs.

Equation 5 of the GKD paper (arXiv 2306.13649) maximises
(1-α) E[r(y)] - α E[D(p ‖ q)(y)] over the student's outputs y. An update is two
programs with the reward between them, which may be any code on the host: `roll_out`
samples N outputs for each prompt, `training.RolloutBatches` calls the reward, and
`train_loss` reads outputs and advantages from the batch like any other feature.
There is one update per sample, so no ratio to an older policy and no clipping.
"""

from typing import Any

import jax
import jax.numpy as jnp

from gkd_jax import checks, decoding, losses, types
from gkd_jax.losses import policy_gradient
from gkd_jax.models import base_model, gkd, outputs


class RLGKDModel(gkd.GKDModel):
  """A student, a teacher, their divergence, and a reward of the outputs.

  With α = 1 and one sample per prompt no reward is asked for, and the step is
  that of on-policy GKD. The policy gradient is exact at dropout 0; outputs are
  drawn without dropout.

  Args:
    student: the model that is trained.
    teacher: the frozen model: a larger one, or the student's own start (RLEF*).
    reward: judges decoded outputs, see `types.Reward`.
    alpha: α in [0, 1], the divergence's share; 0 is plain REINFORCE.
    samples_per_prompt: N, outputs for each row of the data; a step trains on
      B N rows.
    baseline: "leave_one_out", "running_mean" or "none".
    credit: "sequence" or "token", see `losses.advantages`.
    discount: γ of "token".
    whiten_rewards: give the batch's rewards mean 0 and standard deviation 1
      before the baseline. Their scale then means nothing to α.
    baseline_decay: of "running_mean", per step.
    max_missing_rewards: largest share of a batch's outputs for which the reward
      may return None, NaN or an infinite number. These get no credit.
    cut_outputs: what is trained on of an output that was cut, so that it has no
      EOS: "keep" for all of it, or "leave_out" for nothing. Its reward counts
      in the baseline of others.
    cut_penalty: taken off the reward of an output that was cut.
    **gkd_settings: of `GKDModel`; λ is 1, which cannot be set to anything else.

  Raises:
    ValueError: a setting is out of range, or settings do not go together.
  """

  def __init__(
    self,
    student: types.TransformerModel,
    teacher: types.TransformerModel,
    *,
    reward: types.Reward | None = None,
    alpha: float = 0.1,
    samples_per_prompt: int = 4,
    baseline: str = "leave_one_out",
    credit: str = "sequence",
    discount: float = 1.0,
    whiten_rewards: bool = False,
    baseline_decay: float = 0.9,
    max_missing_rewards: float = 0.5,
    cut_outputs: str = "keep",
    cut_penalty: float = 0.0,
    **gkd_settings: Any,
  ):
    super().__init__(student, teacher, **gkd_settings)
    check_on_policy(self)
    self.reward = reward
    self.alpha = alpha
    self.samples_per_prompt = samples_per_prompt
    self.baseline = baseline
    self.credit = credit
    self.discount = discount
    self.whiten_rewards = whiten_rewards
    self.baseline_decay = baseline_decay
    self.max_missing_rewards = max_missing_rewards
    self.cut_outputs = cut_outputs
    self.cut_penalty = cut_penalty
    checks.number(max_missing_rewards, "MAX_MISSING_REWARDS", least=0, most=1)
    checks.one_of(cut_outputs, "CUT_OUTPUTS", ("keep", "leave_out"))
    checks.number(cut_penalty, "CUT_PENALTY", least=0)
    checks.number(alpha, "ALPHA", least=0, most=1, what="α")
    checks.whole(samples_per_prompt, "SAMPLES_PER_PROMPT")
    checks.number(baseline_decay, "BASELINE_DECAY", least=0, below=1)
    checks.boolean(whiten_rewards, "WHITEN_REWARDS")
    if self.needs_rewards:
      policy_gradient.check_settings(
        baseline, credit, discount, samples_per_prompt
      )
      if not callable(reward):
        raise ValueError(
          f"expected a reward, a function of texts, got {reward!r}; set REWARD"
        )
      if self.loss_chunk_size:
        checks.refuse(
          "None or 0, as a policy gradient needs whole logits",
          self.loss_chunk_size,
          "LOSS_CHUNK_SIZE",
        )

  @property
  def needs_rewards(self) -> bool:
    """Whether outputs are sampled and judged before the step."""
    return self.alpha != 1 or self.samples_per_prompt != 1

  def roll_out(
    self,
    params: Any,
    batch: types.Batch,
    key: jax.Array,
    step: int | jax.Array = 0,
  ) -> dict[str, jax.Array]:
    """Samples N outputs of the student for each prompt, which is encoded once.

    Args:
      params: the student's.
      batch: features `[B, ...]`; outputs in them are not read.
      key: of this step, the one that `train_loss` gets.
      step: `[]`, for schedules.

    Returns:
      Features `[B N, ...]`: rows b N to b N + N - 1 are prompt b's.
    """
    n = self.samples_per_prompt
    encoded = decoding.repeat_rows(self.student.encode(params, batch), n)
    prompts = decoding.repeat_rows(dict(batch), n)
    rows = jnp.arange(prompts["decoder_target_tokens"].shape[0])
    step = jnp.asarray(step, jnp.int32)
    inputs = types.StepInputs(base_model.STUDENT, step, key, rows)
    return self.with_samples(params, encoded, prompts, inputs)[0]

  def train_loss(
    self,
    params: Any,
    teacher_params: Any,
    batch: types.Batch,
    inputs: types.StepInputs,
  ) -> tuple[jax.Array, types.Metrics]:
    """Returns the loss of equation 5 and its metrics; see `DistillationModel`.

    Args:
      params: the student's.
      teacher_params: the teacher's.
      batch: features of `roll_out`, `rewards` `[B N]` and `advantages`
        `[B N, T]`; T5X's features where no rewards are needed.
      inputs: source "student", step, key and row ids.

    Raises:
      ValueError: a batch without rewards where they are needed.
    """
    if self.needs_rewards:
      if types.ADVANTAGES not in batch:
        raise ValueError(
          "expected judged outputs, got a batch without advantages; use"
          " training.RolloutBatches"
        )
      # `roll_out` has put the samples into the batch.
      inputs = inputs._replace(source=base_model.DATA)
    return super().train_loss(params, teacher_params, batch, inputs)

  def outputs_loss(
    self,
    student: types.Encoded,
    teacher: types.Encoded,
    batch: types.Batch,
    step: jax.Array,
    dropout_key: jax.Array | None = None,
  ) -> tuple[jax.Array, types.Metrics]:
    """Returns the mix of policy gradient and divergence, and its metrics."""
    if not self.needs_rewards:
      return super().outputs_loss(student, teacher, batch, step, dropout_key)
    targets = batch["decoder_target_tokens"]
    sampled = self.student.loss_weights(batch)
    eos_id = self.student.special_tokens.eos_id
    weights = sampled
    if self.cut_outputs == "leave_out":
      ended = outputs.has_eos(targets, sampled, eos_id)
      weights = sampled * ended[:, None]
      batch = {**batch, "decoder_loss_weights": weights}
    logits = self.both_logits(student, teacher, batch, dropout_key)
    divergence, metrics = self.divergence_loss(*logits, batch, step)
    weight = metrics["loss"][1]
    log_probs = decoding.sampling_log_probs(
      logits[1],
      weights,
      num_real_tokens=self.student.num_real_tokens,
      keep=targets,
      **self.sampling_at(step),
    )
    gradient, _, more = losses.policy_gradient_loss(
      losses.target_log_probs(log_probs, targets, weights),
      batch[types.ADVANTAGES],
      weights,
      length_normalization=self.length_normalization,
    )
    loss = losses.rl_gkd_loss(gradient, divergence, self.alpha)
    metrics |= outputs.output_metrics(targets, sampled, eos_id) | more
    metrics |= _reward_metrics(batch[types.REWARDS], sampled) | {
      "divergence": jax.lax.stop_gradient((divergence, weight)),
      "loss": (loss, weight),
    }
    return loss, metrics


def _reward_metrics(rewards, weights):
  """Returns the mean reward of the outputs that have one, and the share without."""
  present = jnp.any(weights > 0, axis=1)
  judged = present & jnp.isfinite(rewards)
  count = lambda rows: jnp.sum(rows.astype(jnp.float32))
  return {
    "reward": (jnp.sum(jnp.where(judged, rewards, 0.0)), count(judged)),
    "missing_rewards": (count(present & ~judged), count(present)),
  }


def check_on_policy(model: gkd.GKDModel):
  """Raises a ValueError unless a model's outputs are all drawn by the student."""
  if model.student_data_fraction != 1:
    raise ValueError(
      "expected λ = 1, as a policy gradient is of the student's own outputs,"
      f" got {model.student_data_fraction}; set STUDENT_DATA_FRACTION = 1.0"
    )
  if model.sampling["temperature"] == 0:
    raise ValueError(
      "expected outputs that are drawn, got a sampling temperature of 0;"
      " set SAMPLING_TEMPERATURE"
    )
  model.check_number(
    model.sampling["temperature"],
    "SAMPLING_TEMPERATURE",
    above=0,
    what="a temperature",
  )
