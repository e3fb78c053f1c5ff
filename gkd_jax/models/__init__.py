"""TODO."""

from etils import epy

with epy.lazy_api_imports(globals()):
  from gkd_jax.models.base_model import (
    DATA,
    EOS_ID,
    MIXED,
    STUDENT,
  )
  from gkd_jax.models.decoder_only import (
    DecoderOnlyModel,
  )
  from gkd_jax.models.encoder_decoder import (
    EncoderDecoderModel,
  )
  from gkd_jax.models.gkd import (
    GKDModel,
  )
  from gkd_jax.models.minillm import (
    MiniLLMModel,
  )
  from gkd_jax.models.rl_gkd import (
    RLGKDModel,
  )
  from gkd_jax.models.stored_teacher import (
    StoredTeacherModel,
  )
