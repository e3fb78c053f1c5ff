"""Small closed vocabularies: one id per symbol, no file."""

from collections.abc import Iterable, Sequence

import seqio
import tensorflow as tf

PAD_ID, EOS_ID, UNK_ID = 0, 1, 2
_SPECIAL = 3


class TokenVocabulary(seqio.Vocabulary):
  """Ids of a fixed list of symbols, after PAD 0, EOS 1 and UNK 2.

  Text holds symbols one after the other (characters), or apart by spaces.

  Args:
    tokens: the symbols, in order of their ids from 3 on.
    separator: between symbols when decoding; "" for characters.
  """

  def __init__(self, tokens: Sequence[str], separator: str = " "):
    super().__init__(extra_ids=0)
    self._tokens = tuple(tokens)
    self._separator = separator
    self._ids = {t: i + _SPECIAL for i, t in enumerate(self._tokens)}

  @property
  def pad_id(self) -> int:
    """Id of padding."""
    return PAD_ID

  @property
  def eos_id(self) -> int:
    """Id that ends a sequence."""
    return EOS_ID

  @property
  def unk_id(self) -> int:
    """Id of a symbol that the vocabulary lacks."""
    return UNK_ID

  @property
  def _base_vocab_size(self) -> int:
    return len(self._tokens) + _SPECIAL

  def _encode(self, s: str) -> list[int]:
    symbols = s.split() if self._separator else list(s)
    return [self._ids.get(symbol, UNK_ID) for symbol in symbols]

  def _decode(self, ids: Iterable[int]) -> str:
    symbols = []
    for i in ids:
      if i == EOS_ID:
        break
      if i >= _SPECIAL and i - _SPECIAL < len(self._tokens):
        symbols.append(self._tokens[i - _SPECIAL])
      elif i != PAD_ID:
        symbols.append("⁇")
    return self._separator.join(symbols)

  def _encode_tf(self, s: tf.Tensor) -> tf.Tensor:
    if self._separator:
      symbols = tf.strings.split(s)
    else:
      symbols = tf.strings.unicode_split(s, "UTF-8")
    # Comparing with all symbols instead of a hash table: a table is a resource,
    # and an iterator over one cannot be saved with a checkpoint.
    matches = symbols[:, None] == tf.constant(self._tokens)[None, :]
    found = tf.reduce_any(matches, axis=1)
    place = tf.argmax(tf.cast(matches, tf.int32), axis=1, output_type=tf.int32)
    return tf.where(found, place + _SPECIAL, UNK_ID)

  def _decode_tf(self, ids: tf.Tensor) -> tf.Tensor:
    table = tf.constant(["", "", "⁇", *self._tokens])
    ended = tf.cumsum(tf.cast(ids == EOS_ID, tf.int32)) > 0
    kept = tf.boolean_mask(ids, ~ended & (ids != PAD_ID))
    return tf.strings.reduce_join(
      tf.gather(table, kept), separator=self._separator
    )

  def __eq__(self, other: object) -> bool:
    return (
      isinstance(other, TokenVocabulary)
      and self._tokens == other._tokens
      and self._separator == other._separator
    )

  def __hash__(self) -> int:
    return hash((self._tokens, self._separator))
