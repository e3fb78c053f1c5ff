"""Models that can be trained: networks, teachers and losses put together.

base_model           T5X's model protocol, given logits and a cache
encoder_decoder      EncoderDecoderModel: a T5
decoder_only         DecoderOnlyModel: causal or prefix LM
distillation_model   what distilled students share
gkd                  GKDModel: whose outputs, both models' scores, the divergence
rl_gkd               RLGKDModel: a reward and a divergence
minillm              MiniLLMModel: the reverse KL of sequences
stored_teacher       StoredTeacherModel: a teacher's stored top-k log-probs
outputs              outputs that are sampled: drawing, where they end, metrics
random_keys          of a step: dropout, samples, coins
length_buckets       a loss at the shortest length that a batch needs
"""

from etils import epy

with epy.lazy_api_imports(globals()):
  from gkd_jax.models.base_model import DATA, MIXED, STUDENT
  from gkd_jax.models.decoder_only import DecoderOnlyModel
  from gkd_jax.models.distillation_model import DistillationModel
  from gkd_jax.models.encoder_decoder import EncoderDecoderModel
  from gkd_jax.models.gkd import GKDModel
  from gkd_jax.models.minillm import MiniLLMModel
  from gkd_jax.models.outputs import has_eos
  from gkd_jax.models.rl_gkd import RLGKDModel
  from gkd_jax.models.stored_teacher import StoredTeacherModel
