"""A vocabulary over the library `tokenizers`: a folder's `tokenizer.json`."""

import functools
import hashlib
import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import seqio
import tensorflow as tf
import tokenizers

from gkd_jax import files, model_folders
from gkd_jax.data import chat

TOKENIZER_FILE = model_folders.TOKENIZER_FILE
_SPECIAL = "bos_token", "eos_token", "pad_token", "unk_token"
# Unicode's noncharacters: no text has them. Special tokens are spelled between
# two of them, so that no text of a user spells one.
_MARK, _BREAK = "\ufdd0", "\ufdd1"
_MARKS = str.maketrans({_MARK: "\ufffd", _BREAK: "\ufffd"})


class TokenizerVocabulary(seqio.Vocabulary):
  """The tokenizer of a Hugging Face folder.

  A special token that a text spells out (`</s>`) is encoded as the text that it
  is. Special ids come from this class alone: from `with_special_tokens`, from a
  chat template, or appended by a task.

  `tokenizer_config.json` names BOS, EOS, PAD and UNK. `generation_config.json`,
  else `config.json`, may name more EOS.
  """

  def __init__(self, path: files.Path):
    """Makes the vocabulary; nothing is read yet.

    Args:
      path: the folder, or its `tokenizer.json`.
    """
    super().__init__()
    place = files.absolute(path)
    if place.name.endswith(".json"):
      self._file, self._folder = place, place.parent
    else:
      self._file, self._folder = place / TOKENIZER_FILE, place

  @property
  def path(self) -> str:
    """Of the file."""
    return os.fspath(self._file)

  @functools.cached_property
  def _text(self) -> str:
    if not self._file.is_file():
      raise ValueError(
        f"expected {TOKENIZER_FILE}, got nothing at {self._file}; set"
        " VOCABULARY_PATH"
      )
    return self._file.read_text()

  @functools.cached_property
  def _tokens(self) -> dict[str, int]:
    """Special tokens as they are spelled, with their ids."""
    return {
      token["content"]: token["id"]
      for token in json.loads(self._text).get("added_tokens", [])
      if token["special"]
    }

  @functools.cached_property
  def _pieces(self) -> tokenizers.Tokenizer:
    """The tokenizer, its special tokens spelled with `_MARK`."""
    try:
      made = tokenizers.Tokenizer.from_str(_marked(self._text))
    except Exception as error:  # the library raises no narrower one
      raise ValueError(
        f"expected a file of the library tokenizers, got {error} in"
        f" {self._file}; set VOCABULARY_PATH"
      ) from error
    made.no_padding()
    made.no_truncation()
    for token, number in self._tokens.items():
      if made.token_to_id(_mark(token)) != number:
        raise ValueError(
          f"expected id {number} for {token!r}, got"
          f" {made.token_to_id(_mark(token))} in {self._file}; set"
          " VOCABULARY_PATH"
        )
    return made

  @functools.cached_property
  def _config(self) -> dict[str, Any]:
    """`tokenizer_config.json`, with what older folders have beside it."""
    fields = files.read_json(self._folder / "special_tokens_map.json") or {}
    return fields | (
      files.read_json(self._folder / model_folders.TOKENIZER_CONFIG_FILE) or {}
    )

  @functools.cached_property
  def _named(self) -> dict[str, str]:
    """`bos_token` and so on, as far as the folder has them, to their text."""
    found = {name: self._config.get(name) for name in _SPECIAL}
    return {
      name: token["content"] if isinstance(token, dict) else token
      for name, token in found.items()
      if token is not None
    }

  def _id(self, name: str) -> int | None:
    token = self._named.get(name)
    if token is None:
      return None
    for spelled in (_mark(token), token):
      if (found := self._pieces.token_to_id(spelled)) is not None:
        return found
    raise ValueError(
      f"expected a token of {TOKENIZER_FILE} as {name}, got {token!r} in"
      f" {self._folder}; set VOCABULARY_PATH"
    )

  @property
  def bos_id(self) -> int | None:
    """The id before a text; None: there is none."""
    return self._id("bos_token")

  @property
  def eos_id(self) -> int | None:
    """The id that a task appends; None: there is none."""
    return self.eos_ids[0] if self.eos_ids else None

  @functools.cached_property
  def eos_ids(self) -> tuple[int, ...]:
    """All ids that end a sequence, the tokenizer's own first."""
    stated = model_folders.stated_tokens(self._folder)["eos_token_id"]
    ids = [self._id("eos_token"), *stated]
    return tuple(dict.fromkeys(i for i in ids if i is not None))

  @property
  def pad_id(self) -> int | None:  # pyright: ignore[reportIncompatibleMethodOverride]
    """The id of no token, which may be an EOS; None: there is none."""
    return self._id("pad_token")

  @property
  def unk_id(self) -> int | None:
    """The id of what has no other; None: there is none."""
    return self._id("unk_token")

  @functools.cached_property
  def _base_vocab_size(self) -> int:
    return max(self._pieces.get_vocab().values()) + 1

  @functools.cached_property
  def chat_template(self) -> chat.ChatTemplate | None:
    """How the folder's model reads conversations; None: it has no template."""
    file = self._folder / "chat_template.jinja"
    source = file.read_text() if file.exists() else None
    source = source or chat.source_of(self._config)
    return source and chat.ChatTemplate(source, self._named)

  def _encode(self, s: str) -> list[int]:
    return self._ids(s, False)

  def with_special_tokens(self, text: str) -> list[int]:
    """Returns a text's ids and what the tokenizer puts around them.

    As transformers' `tokenizer(text)`: BOS before it in Llama and Gemma, EOS after
    it in T5, nothing in Qwen.
    """
    return self._ids(text, True)

  def encode_chat(
    self, messages: Sequence[Mapping[str, Any]], *, to_answer: bool = True
  ) -> list[int]:
    """Returns the ids of a conversation, by the chat template.

    What a message spells out never becomes a special token.

    Args:
      messages: each with `role` and `content`.
      to_answer: end where the model's answer begins.

    Raises:
      ValueError: there is no template, or it refuses the messages.
    """
    return self._chat_ids(self._chat_text(messages, to_answer))

  def encode_exchange(
    self,
    messages: Sequence[Mapping[str, Any]],
    answer: str | Mapping[str, Any] | None,
    tools: Sequence[Any] | None = None,
  ) -> tuple[list[int], list[int] | None]:
    """Returns the ids of a conversation, and of the model's answer to it.

    Args:
      messages: each with `role`, and `content` or `tool_calls`.
      answer: what the model says next, or its message; None: the second result is
        None.
      tools: JSON schemas of what the model may call.

    Returns:
      The ids up to where the answer begins, and those of the answer up to the EOS
      that ends it.

    Raises:
      ValueError: as `encode_chat`, or what the template renders before an answer
        depends on the answer.
    """
    before = self._chat_text(messages, True, tools)
    prompt = self._chat_ids(before)
    if answer is None:
      return prompt, None
    if isinstance(answer, str):
      answer = {"role": "assistant", "content": answer}
    text = self._chat_text([*messages, answer], False, tools)
    ids = self._chat_ids(text)
    if ids[: len(prompt)] == prompt:
      ids = ids[len(prompt) :]
    elif text.startswith(before):
      # A token holds the end of the prompt and the beginning of the answer.
      ids = self._chat_ids(text.removeprefix(before))
    else:
      raise ValueError(
        "expected a chat template that goes on from add_generation_prompt, got"
        f" one that does not in {self._folder}; set VOCABULARY_PATH"
      )
    ends = [i for i, token in enumerate(ids) if token in self.eos_ids]
    if ends:
      return prompt, ids[: ends[0] + 1]
    return prompt, ids + list(self.eos_ids[:1])

  def _chat_text(self, messages, to_answer, tools=None):
    """Returns a conversation, what it spells of special tokens broken."""
    if self.chat_template is None:
      raise ValueError(
        f"expected a chat template, got none in {self._folder}; set"
        " VOCABULARY_PATH, or make the rows texts"
      )
    find = self._finder
    messages, tools = chat.map_strings(
      (messages, tools),
      lambda s: find.sub(
        lambda m: m[0][0] + _BREAK + m[0][1:], s.translate(_MARKS)
      ),
    )
    return self.chat_template.render(messages, tools, to_answer=to_answer)

  def _chat_ids(self, text):
    text = self._finder.sub(lambda m: _mark(m[0]), text).replace(_BREAK, "")
    return self._pieces.encode(text, add_special_tokens=False).ids

  @functools.cached_property
  def _finder(self) -> re.Pattern[str]:
    """Finds special tokens, the longest first; (?!) finds nothing."""
    tokens = sorted(self._tokens, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, tokens)) or "(?!)")

  def _ids(self, text: str, special: bool) -> list[int]:
    text = text.translate(_MARKS)
    return self._pieces.encode(text, add_special_tokens=special).ids

  def decode(self, ids: Iterable[int]) -> str:
    """Returns the text before the first EOS, without special tokens."""
    kept = []
    for token in map(int, np.asarray(ids).tolist()):
      if token in self.eos_ids:
        break
      kept.append(token)
    return self._decode(kept)

  def _decode(self, ids: Iterable[int]) -> str:
    return self._pieces.decode(list(ids), skip_special_tokens=True)

  def _encode_tf(self, s: tf.Tensor) -> tf.Tensor:
    # Stateless, so that a position in the data can be saved.
    def encode(text):
      text = tf.compat.as_text(np.asarray(text, object).item())
      return np.asarray(self._encode(text), np.int32)

    ids = tf.numpy_function(encode, [s], tf.int32, stateful=False)
    return tf.ensure_shape(ids, [None])

  def decode_tf(self, ids: tf.Tensor) -> tf.Tensor:
    """As `decode`, of one row."""
    return self._decode_tf(ids)

  def _decode_tf(self, ids: tf.Tensor) -> tf.Tensor:
    text = tf.numpy_function(
      lambda row: self.decode(row).encode(), [ids], tf.string, stateful=False
    )
    return tf.ensure_shape(text, [])

  def same_ids(self, other: "TokenizerVocabulary") -> bool:
    """Returns whether another vocabulary has the same pieces with the same ids."""
    return self._pieces.get_vocab() == other._pieces.get_vocab()

  def fingerprint(self) -> tuple[Any, ...]:
    """Returns what the ids of texts and conversations depend on."""
    digest = hashlib.sha256(self._text.encode()).hexdigest()
    template = self.chat_template and self.chat_template.source
    named = tuple(sorted(self._named.items()))
    return digest, self.eos_ids, named, template

  def __eq__(self, other: object) -> bool:
    return isinstance(other, TokenizerVocabulary) and (
      self._file == other._file or self.fingerprint() == other.fingerprint()
    )

  def __hash__(self) -> int:
    return hash(self.fingerprint())

  def __repr__(self) -> str:
    return f"TokenizerVocabulary({os.fspath(self._file)!r})"


def _mark(token: str) -> str:
  return f"{_MARK}{token}{_MARK}"


def _marked(text: str) -> str:
  """Returns a tokenizer.json whose special tokens are spelled with `_MARK`.

  A model that looks up whole pieces would find them in a text otherwise, for
  all that the library can leave out added tokens.
  """
  fields = json.loads(text)
  added = [t for t in fields.get("added_tokens", []) if t["special"]]
  marked = {token["content"]: _mark(token["content"]) for token in added}
  for token in added:
    # The text around it is the data's, not to be changed.
    token["content"] = marked[token["content"]]
  model = fields["model"]
  vocabulary = model["vocab"]
  if isinstance(vocabulary, list):  # Unigram: pieces with scores
    model["vocab"] = [[marked.get(p, p), score] for p, score in vocabulary]
  else:
    model["vocab"] = {marked.get(p, p): i for p, i in vocabulary.items()}
  if model.get("unk_token") in marked:
    model["unk_token"] = marked[model["unk_token"]]
  return json.dumps(fields)
