"""The model of a configuration, or of the folder that its parameters are in.

Gin builds `STUDENT_MODEL` and `TEACHER_MODEL` here. A configuration says which
network it is of, and with it which kind of model, so neither has to be set.
"""

import dataclasses
from typing import Any

import gin
from gkd_jax import checkpoints, checks, models, network
from gkd_jax.checkpoints import parameters
from gkd_jax.network import blocks, layer_loops

_MODELS = {
  network.T5Config: (models.EncoderDecoderModel, network.Transformer),
  network.T5GemmaConfig: (models.EncoderDecoderModel, network.T5Gemma),
  network.TransformerConfig: (models.DecoderOnlyModel, network.DecoderWrapper),
  network.RotaryConfig: (models.DecoderOnlyModel, network.CausalTransformer),
}
# How a network is computed, not what.
_FREE = "dtype", "dropout_rate", "remat_policy", "float32_attention_logits"
# What only an export says.
_NAMES = "family", "max_positions"


def model(
  config: Any = None,
  checkpoint_path: str | None = None,
  *,
  setting: str,
  path_setting: str,
  dropout_rate: float | None = None,
  dtype: str | None = None,
  remat_policy: str | None = None,
) -> Any:
  """Builds an `EncoderDecoderModel` or a `DecoderOnlyModel`, without parameters.

  What gin binds of both and of the networks holds, in the scope of the call.

  Args:
    config: a configuration of `network`; None: that of the checkpoint, which is
      not read otherwise.
    checkpoint_path: see `checkpoints.load_params`; None, or one that says nothing
      of its configuration: `config` is needed.
    setting: what the configuration is set with.
    path_setting: what the path is set with.
    dropout_rate: of a configuration that is the checkpoint's.
    dtype: of activations; None: as the configuration says.
    remat_policy: what the backward pass computes again; None: likewise.

  Raises:
    ValueError: there is no configuration, or the checkpoint has another one.
  """
  if config is None:
    config = _stored(checkpoint_path, path_setting)
    if config is not None and dropout_rate is not None:
      config = _with(config, dropout_rate=dropout_rate)
  if type(config) not in _MODELS:
    expected = "sizes, or a checkpoint whose folder has them"
    either = f"{setting} or {path_setting}" if config is None else setting
    checks.refuse(expected, config, either)
  if dtype is not None:
    checks.one_of(dtype, "ACTIVATION_DTYPE", ("float32", "bfloat16"))
    config = _with(config, dtype=dtype)
  if remat_policy is not None:
    checks.one_of(remat_policy, "REMAT_POLICY", layer_loops.REMAT_POLICIES)
    config = _with(config, remat_policy=remat_policy)
  of_model, of_network = map(_configured, _MODELS[type(config)])
  return of_model(module=of_network(config=config))


def check_equal(
  config: Any, checkpoint_path: str, *, setting: str, path_setting: str
) -> None:
  """Checks that a model computes what a checkpoint's folder says.

  What the folder does not say (old ones hold few fields) may be anything.

  Args:
    config: of the model; of another class than those of `network`, it is its own.
    checkpoint_path: see `model`.
    setting: see `model`.
    path_setting: see `model`.

  Raises:
    ValueError: it does not, with all differences.
  """
  said = _stated(checkpoint_path, path_setting)
  if said is None or type(config) not in _MODELS:
    return
  stored = _network_config(said, checkpoint_path, path_setting)
  # What all networks but T5Gemma have says nothing of which it is.
  common = _names(blocks.Config) & _names(config)
  if type(config) is not type(stored) and not said.keys() <= common:
    kinds = [f"network.{type(c).__name__}" for c in (stored, config)]
    raise ValueError(
      f"expected {kinds[0]}, as {path_setting} has it, got {kinds[1]}; set"
      f" {setting} = None, or {path_setting}"
    )
  given = dataclasses.asdict(config)
  theirs, ours = (_fields(fields) for fields in (_over(given, said), given))
  wrong = [name for name in theirs if theirs[name] != ours[name]]
  if wrong:
    shown = lambda fields: ", ".join(f"{n} {fields[n]!r}" for n in wrong)
    raise ValueError(
      f"expected {shown(theirs)}, as {path_setting} has it, got {shown(ours)};"
      f" set {setting} = None, or {path_setting}"
    )


def _stored(path, setting):
  """Returns the configuration in a checkpoint's folder, None without one."""
  said = _stated(path, setting)
  return said and _network_config(said, path, setting)


def _stated(path, setting):
  """Returns the fields of that configuration that the folder says."""
  if path is gin.REQUIRED:  # of `gkd precompile`, which asks for no paths
    return None
  checks.path(path, setting, none=True)
  if path is None:
    return None
  return checkpoints.load_config(path, setting=setting) or None


def _network_config(said, path, setting):
  return parameters.network_config(said, setting=setting, path=path)


def _names(config):
  return {field.name for field in dataclasses.fields(config)}


def _over(fields, said):
  """Returns fields with those that are said in place of their own."""
  return fields | {
    name: _over(fields[name], value) if isinstance(value, dict) else value
    for name, value in said.items()
  }


def _configured(cls):
  """Returns a class with what gin binds of it."""
  try:
    return gin.get_configurable(cls)
  except ValueError:  # no gin file imports it: nothing is bound of it
    return cls


def _with(config, **fields):
  """Returns a configuration, of both sides if it has two, with other fields."""
  if dataclasses.is_dataclass(side := getattr(config, "encoder", None)):
    sides = {"encoder": side, "decoder": config.decoder}
    fields = {k: dataclasses.replace(v, **fields) for k, v in sides.items()}
  return dataclasses.replace(config, **fields)


def _fields(fields, prefix=""):
  """Returns what decides the numbers that a network computes, name to value."""
  result = {}
  for name, value in fields.items():
    if isinstance(value, dict):
      result |= _fields(value, f"{prefix}{name}.")
    elif name not in (*_FREE, *_NAMES):
      result[prefix + name] = tuple(value) if type(value) is list else value
  if "window_pattern" in fields:
    pattern = fields["window_pattern"] or (False,)
    windowed = [
      bool(pattern[i % len(pattern)]) for i in range(fields["num_layers"])
    ]
    result[f"{prefix}window_pattern"] = tuple(windowed)
    for name in ("window", "local_rope_theta"):
      if not any(windowed):
        result[prefix + name] = None
    if result[f"{prefix}query_pre_attn_scalar"] is None:
      result[f"{prefix}query_pre_attn_scalar"] = fields["head_dim"]
  return result
