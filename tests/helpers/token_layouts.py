"""Vocabularies whose special tokens have other ids, and models that follow a script.

Letters have the ids from 6 on in all of them, so that a case that is worked out by
hand for one is that of the others up to the ids of the special tokens.
"""

import jax.numpy as jnp
import numpy as np
import seqio
import tensorflow as tf
import toy_models

from gkd_jax import models, types

FIRST_LETTER = 6
LETTERS = "abcdefgh"
SIZE = FIRST_LETTER + len(LETTERS)

# Ids of the special tokens; None: the vocabulary has no such token.
LAYOUTS = {
  "t5": {"pad": 0, "eos": (1,), "unk": 2, "bos": None},
  "sentencepiece": {"pad": None, "eos": (2,), "unk": 0, "bos": 1},
  "bos_first": {"pad": 1, "eos": (2,), "unk": 3, "bos": 0},
  "eos_is_pad": {"pad": 2, "eos": (2,), "unk": 0, "bos": 1},
  "eos_is_pad_is_zero": {"pad": 0, "eos": (0,), "unk": 2, "bos": 1},
  "two_eos": {"pad": 0, "eos": (1, 4), "unk": 2, "bos": 3},
}
# By hand: which ids end a sequence, whether 0 may be a token, what is not sampled.
EXPECTED = {
  "t5": ((1,), True, (0,)),
  "sentencepiece": ((2,), False, ()),
  "bos_first": ((2,), False, (1,)),
  "eos_is_pad": ((2,), False, ()),
  "eos_is_pad_is_zero": ((0,), False, ()),
  "two_eos": ((1, 4), True, (0,)),
}


class Letters(seqio.Vocabulary):
  """A vocabulary of letters with the special ids of a layout; `?` is UNK."""

  def __init__(self, layout):
    super().__init__()
    self._ids = LAYOUTS[layout]

  pad_id = property(lambda self: self._ids["pad"])
  bos_id = property(lambda self: self._ids["bos"])
  unk_id = property(lambda self: self._ids["unk"])
  eos_id = property(lambda self: self._ids["eos"][0])
  eos_ids = property(lambda self: self._ids["eos"])
  _base_vocab_size = property(lambda self: SIZE)

  def _encode(self, s):
    return [
      LETTERS.index(c) + FIRST_LETTER if c in LETTERS else self.unk_id
      for c in s
    ]

  def _encode_tf(self, s):
    characters = tf.strings.bytes_split(s)
    same = tf.equal(characters[:, None], tf.constant([*LETTERS])[None])
    letter = tf.argmax(same, axis=1, output_type=tf.int32) + FIRST_LETTER
    return tf.where(tf.reduce_any(same, axis=1), letter, self.unk_id)

  def _decode(self, ids):
    text = lambda i: "?" if i == self.unk_id else ""
    return "".join(
      LETTERS[i - FIRST_LETTER] if i >= FIRST_LETTER else text(i) for i in ids
    )

  def _decode_tf(self, ids):
    raise NotImplementedError


def task(name, layout, examples, **options):
  """Registers a task of pairs of texts, all in every split."""
  rows = [{"inputs": a, "targets": b} for a, b in examples]
  columns = {k: [row[k] for row in rows] for k in rows[0]}
  feature = seqio.Feature(Letters(layout), add_eos=True)
  return seqio.TaskRegistry.add(
    name,
    source=seqio.FunctionDataSource(
      lambda split, shuffle_files, seed=None: (
        tf.data.Dataset.from_tensor_slices(columns)
      ),
      splits=["train", "validation", "test"],
    ),
    preprocessors=[
      seqio.preprocessors.tokenize,
      seqio.preprocessors.append_eos,
    ],
    output_features={"inputs": feature, "targets": feature},
    **options,
  )


class Scripted(models.EncoderDecoderModel):
  """Says what a script has for the first letter of the input, each at p = 1/2.

  Args:
    scripts: letter to token ids, one for each position.
    special_tokens: see `models.BaseTransformerModel`.
  """

  def __init__(self, scripts, special_tokens=None, **settings):
    super().__init__(
      toy_models.model(8).module, special_tokens=special_tokens, **settings
    )
    longest = len(next(iter(scripts.values())))
    self._script = np.zeros((toy_models.VOCAB, longest), np.int32)
    for letter, tokens in scripts.items():
      self._script[FIRST_LETTER + LETTERS.index(letter)] = tokens

  def encode(self, params, batch, dropout_rng=None):
    return batch["encoder_input_tokens"]

  def start_decoding(
    self, params, encoded, batch, *, num_decodes=1, slots=None
  ):
    first = jnp.repeat(batch["encoder_input_tokens"][:, 0], num_decodes)
    rows = jnp.asarray(self._script)[first]

    def step(tokens, position):
      said = jnp.take(rows, position, axis=1)[:, None]
      is_said = said == jnp.arange(toy_models.VOCAB)[None]
      others = jnp.log(0.5 / (toy_models.VOCAB - 1))
      return jnp.where(is_said, jnp.log(0.5), others), position + 1

    return step, jnp.int32(0), {"row_axes": -1}


def special_tokens(layout, **changes):
  """A layout's, written down by hand and not read from the vocabulary."""
  eos, zero_is_padding, _ = EXPECTED[layout]
  tokens = types.SpecialTokens(eos, LAYOUTS[layout]["pad"], 0, zero_is_padding)
  return tokens._replace(**changes)
