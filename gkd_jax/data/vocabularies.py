"""What a task's vocabulary says of a model, and whether the two fit."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from gkd_jax import types
from gkd_jax.data import errors


def special_tokens(task: Any) -> types.SpecialTokens:
  """Returns the special tokens of a task's outputs, read from its vocabulary.

  Args:
    task: a seqio task or mixture.

  Raises:
    ValueError: its vocabulary cannot be read.
  """
  with errors.explained_vocabulary(task.name):
    of = {
      name: types.SpecialTokens.of(feature.vocabulary)
      for name, feature in task.output_features.items()
      if name in ("inputs", "targets")
    }
  zero_is_padding = all(tokens.zero_is_padding for tokens in of.values())
  return types.SpecialTokens.of(target_vocabulary(task))._replace(
    zero_is_padding=zero_is_padding
  )


def target_vocabulary(task: Any) -> Any:
  """Returns the vocabulary of outputs; that of inputs for prompts alone.

  Args:
    task: a seqio task or mixture.
  """
  features = task.output_features
  return features["targets" if "targets" in features else "inputs"].vocabulary


def text(
  vocabulary: Any, tokens: Sequence[int], special_tokens: types.SpecialTokens
) -> str:
  """Decodes an output.

  A vocabulary drops its own EOS. Another one that ends the output is no text
  either.

  Args:
    vocabulary: seqio's.
    tokens: of the output, EOS included.
    special_tokens: of the model.
  """
  tokens = [int(token) for token in tokens]
  others = {*special_tokens.eos} - {vocabulary.eos_id}
  if tokens and tokens[-1] in others:
    tokens.pop()
  return vocabulary.decode(tokens)


def prompt_text(vocabulary: Any, tokens: Sequence[int]) -> str:
  """Decodes a prompt, in which an EOS may end each turn of a conversation.

  Args:
    vocabulary: seqio's, which decodes up to an EOS.
    tokens: of the prompt.
  """
  eos = types.SpecialTokens.of(vocabulary).eos
  turns: list[list[int]] = [[]]
  for token in map(int, tokens):
    turns[-1].append(token)
    if token in eos:
      turns.append([])
  turns = [turn for turn in turns if turn]
  if len(turns) < 2:  # a vocabulary without text decodes to numbers
    return vocabulary.decode([*map(int, tokens)])
  return "".join(map(vocabulary.decode, turns))


def fitted(
  model: Any, task: Any, stated: Mapping[str, types.SpecialTokens | None]
) -> Any:
  """Returns a model with a task's special tokens, after checks that they fit.

  The vocabulary says what ends a sequence. A checkpoint may add ids that do
  too, and says what the decoder reads first: 0, as seqio has it, if none does.

  Args:
    model: see `train.train`.
    task: a seqio task or mixture.
    stated: setting of a checkpoint's path to what the checkpoint says, from
      `checkpoints.load_special_tokens`; None: nothing.

  Raises:
    ValueError: the vocabulary has ids that the model has no rows for, or a
      checkpoint says otherwise.
  """
  check_size(model, task)
  tokens = special_tokens(task)
  said = {name: theirs for name, theirs in stated.items() if theirs is not None}
  for name, theirs in said.items():
    if tokens.eos and not set(tokens.eos) <= set(theirs.eos):
      raise ValueError(
        f"expected the vocabulary of {task.name} to end sequences as the"
        f" checkpoint says, by {_ids(theirs.eos)}, got {_ids(tokens.eos)};"
        f" set {name} or MIXTURE_OR_TASK_NAME"
      )
  starts = {name: theirs.start for name, theirs in said.items()}
  if len(set(starts.values())) > 1:
    raise ValueError(
      "expected checkpoints whose decoders read one token first, got"
      f" {' and '.join(f'{i} ({name})' for name, i in starts.items())};"
      f" set {' or '.join(starts)}"
    )
  eos = [i for of in (tokens, *said.values()) for i in of.eos]
  pads = [of.pad for of in (tokens, *said.values()) if of.pad is not None]
  tokens = tokens._replace(
    eos=tuple(dict.fromkeys(eos)),
    pad=pads[0] if pads else None,
    start=next(iter(starts.values()), 0),
  )
  _check_ids(model, task, (*tokens.eos, tokens.start))
  return model.with_special_tokens(tokens)


def check_size(model: Any, task: Any) -> None:
  """Raises a ValueError unless a model has a row for each id of a vocabulary.

  Args:
    model: a model; of a pair, both have one vocabulary.
    task: a seqio task or mixture.
  """
  rows, setting = _rows(model)
  for name, feature in task.output_features.items():
    size = getattr(
      feature.vocabulary, "num_used_ids", feature.vocabulary.vocab_size
    )
    if name in ("inputs", "targets") and size > rows:
      raise ValueError(
        f"expected a vocabulary of at most {rows} ids, the {setting} of the"
        f" model, got {size} for the {name} of {task.name}; set STUDENT,"
        " NUM_REAL_TOKENS or MIXTURE_OR_TASK_NAME"
      )


def _check_ids(model, task, ids):
  rows, setting = _rows(model)
  if outside := [i for i in ids if i >= rows]:
    raise ValueError(
      f"expected special tokens below {rows}, the {setting} of the model, got"
      f" {_ids(outside)} for {task.name}; set STUDENT or MIXTURE_OR_TASK_NAME"
    )


def _rows(model):
  """Returns the number of ids that a model decodes, and what says so."""
  if model.student.num_real_tokens is not None:
    return model.student.num_real_tokens, "num_real_tokens"
  return model.config.vocab_size, "vocab_size"


def _ids(ids: Iterable[int]) -> str:
  return " or ".join(map(str, ids)) or "none"
