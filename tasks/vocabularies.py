"""Small closed vocabularies that need no file.

One table of tokens serves characters and space-separated symbols alike; the
separator only says how a text is cut and glued. Two vocabularies over the same
tokens but with different separators give the same ids, so inputs written in
characters and targets written in symbols can share one embedding.
"""

from collections.abc import Iterable, Sequence

import seqio
import tensorflow as tf

PAD_ID = 0
EOS_ID = 1
UNK_ID = 2
_NUM_SPECIAL = 3
# As SentencePiece writes it; one character, so that it encodes to one UNK.
_UNK_TEXT = "⁇"


class TokenVocabulary(seqio.Vocabulary):
  """A closed list of tokens: PAD 0, EOS 1, UNK 2, then the tokens.

  Decoding drops PAD and EOS and writes UNK, and ids that no token has, as
  `⁇`. TensorFlow encoding uses no lookup table: a table is a resource, and
  an iterator that holds a resource cannot be saved with a checkpoint.

  Example:
    >>> characters = TokenVocabulary("ab", separator="")
    >>> characters.encode("ba?")
    [4, 3, 2]
    >>> characters.decode([4, 3, 1, 3])
    'ba'
  """

  def __init__(
    self, tokens: Iterable[str], *, separator: str = "", multiple_of: int = 8
  ):
    """Makes the vocabulary.

    Args:
      tokens: The tokens, in the order of their ids; the first gets id 3.
      separator: What stands between two tokens of a text; the empty string
        means that every character is a token.
      multiple_of: The size is rounded up to a multiple of it, so that an
        embedding table divides over devices; the ids added are never encoded.

    Raises:
      ValueError: If a token repeats, is empty or contains the separator, or
        if `multiple_of` is below 1.
    """
    super().__init__()
    self._tokens = tuple(tokens)
    self._separator = separator
    for token in self._tokens:
      if not token or (separator and separator in token):
        raise ValueError(
          f"expected tokens that are not empty and do not contain the "
          f"separator {separator!r}, got {token!r}; set tokens"
        )
    if len(set(self._tokens)) != len(self._tokens):
      raise ValueError(
        f"expected distinct tokens, got {self._tokens}; set tokens"
      )
    if multiple_of < 1:
      raise ValueError(
        f"expected multiple_of of at least 1, got {multiple_of}; "
        "set multiple_of"
      )
    used = _NUM_SPECIAL + len(self._tokens)
    self._size = -(-used // multiple_of) * multiple_of
    self._id_by_token = {
      token: _NUM_SPECIAL + i for i, token in enumerate(self._tokens)
    }

  @property
  def tokens(self) -> tuple[str, ...]:
    """The tokens without the special ones; `tokens[i]` has id `i + 3`."""
    return self._tokens

  @property
  def bos_id(self) -> int | None:
    """None: as in T5, decoding starts from PAD."""
    return None

  @property
  def eos_id(self) -> int:
    """The id that ends a sequence, 1."""
    return EOS_ID

  @property
  def unk_id(self) -> int:
    """The id of everything that no token stands for, 2."""
    return UNK_ID

  @property
  def num_used_ids(self) -> int:
    """The number of ids without those that only round the size up."""
    return _NUM_SPECIAL + len(self._tokens)

  @property
  def _base_vocab_size(self) -> int:
    return self._size

  def _encode(self, s: str) -> list[int]:
    pieces = s.split(self._separator) if self._separator else s
    return [self._id_by_token.get(p, UNK_ID) for p in pieces if p]

  def _decode(self, ids: Iterable[int]) -> str:
    texts = self._texts()
    return self._separator.join(
      texts[i] for i in ids if i not in (PAD_ID, EOS_ID)
    )

  def _encode_tf(self, s: tf.Tensor) -> tf.Tensor:
    if self._separator:
      pieces = tf.strings.split(s, self._separator)
    else:
      pieces = tf.strings.unicode_split(s, "UTF-8")
    pieces = tf.boolean_mask(pieces, tf.not_equal(pieces, ""))
    # One comparison with every token: cheap for the small tables that this
    # class is for, and free of state.
    equal = tf.equal(pieces[:, None], tf.constant(self._tokens)[None, :])
    index = tf.argmax(tf.cast(equal, tf.int32), axis=-1, output_type=tf.int32)
    known = tf.reduce_any(equal, axis=-1)
    return tf.where(known, index + _NUM_SPECIAL, UNK_ID)

  def _decode_tf(self, ids: tf.Tensor) -> tf.Tensor:
    texts = tf.gather(tf.constant(self._texts()), ids)
    keep = tf.logical_and(tf.not_equal(ids, PAD_ID), tf.not_equal(ids, EOS_ID))
    kept = tf.ragged.boolean_mask(texts, keep)
    return tf.strings.reduce_join(kept, axis=-1, separator=self._separator)

  def _texts(self) -> list[str]:
    unused = self._size - _NUM_SPECIAL - len(self._tokens)
    return ["", "", _UNK_TEXT, *self._tokens, *[_UNK_TEXT] * unused]

  def __eq__(self, other: object) -> bool:
    return (
      isinstance(other, TokenVocabulary)
      and self._tokens == other._tokens
      and self._separator == other._separator
      and self._size == other._size
    )

  def __hash__(self) -> int:
    return hash((self._tokens, self._separator, self._size))

  def __repr__(self) -> str:
    return (
      f"TokenVocabulary({len(self._tokens)} tokens, "
      f"separator={self._separator!r}, size={self._size})"
    )


def characters_and_symbols(
  characters: Sequence[str], symbols: Sequence[str], *, multiple_of: int = 8
) -> tuple[TokenVocabulary, TokenVocabulary]:
  """Two views of one table: texts of characters, texts of spaced symbols.

  Args:
    characters: Tokens of one character, for texts without separators.
    symbols: Tokens of texts whose tokens are separated by a space.
    multiple_of: As in `TokenVocabulary`.

  Returns:
    A vocabulary that cuts a text into characters, and one that cuts it at
    spaces; every token has the same id in both.

  Raises:
    ValueError: As in `TokenVocabulary`.
  """
  tokens = (*characters, *symbols)
  return (
    TokenVocabulary(tokens, separator="", multiple_of=multiple_of),
    TokenVocabulary(tokens, separator=" ", multiple_of=multiple_of),
  )


# The vocabulary of all T5 models: 32,000 pieces and 100 sentinels.
T5_SENTENCEPIECE = (
  "gs://t5-data/vocabs/cc_all.32000.100extra/sentencepiece.model"
)


def t5_vocabulary() -> seqio.SentencePieceVocabulary:
  """T5's SentencePiece vocabulary; its file is read at the first use."""
  return seqio.SentencePieceVocabulary(T5_SENTENCEPIECE)
