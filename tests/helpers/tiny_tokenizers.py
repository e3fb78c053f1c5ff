"""Folders of tiny tokenizers, made by the library itself."""

import json

import tokenizers
from tokenizers import (
  decoders,
  models,
  normalizers,
  pre_tokenizers,
  processors,
)

# As many models have it: a system message of its own, trimmed contents.
TEMPLATE = (
  "{% for m in messages %}{% if loop.first and m.role != 'system' %}"
  "{{ '<|im_start|>system\nhelp<|im_end|>\n' }}{% endif %}"
  "{{ '<|im_start|>' + m.role + '\n' + m.content | trim + '<|im_end|>' + '\n' }}"
  "{% endfor %}"
  "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def byte_level(folder, **config):
  """Bytes and some merges, ids as SmolLM2's: EOS 2 is PAD; 268 ids."""
  special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
  merges = "h e,l l,he ll,hell o,Ġ hello,u s,e r,us er,Ċ Ċ"
  merges = [tuple(pair.split(" ")) for pair in merges.split(",")]
  pieces = [*special, *sorted(pre_tokenizers.ByteLevel.alphabet())]
  pieces += [a + b for a, b in merges]
  made = tokenizers.Tokenizer(
    models.BPE({piece: i for i, piece in enumerate(pieces)}, merges)
  )
  made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
  made.decoder = decoders.ByteLevel()
  made.add_special_tokens(special)
  names = {
    "bos_token": "<|im_start|>",
    "eos_token": "<|im_end|>",
    "pad_token": "<|im_end|>",
    "unk_token": "<|endoftext|>",
  }
  return _save(made, folder, {**names, **config})


def unigram(folder, **config):
  """Letters as T5's SentencePiece: PAD 0, EOS 1 after a text, UNK 2; 35 ids."""
  special = ["<pad>", "</s>", "<unk>"]
  pieces = [(piece, 0.0) for piece in special]
  pieces += [("▁", -2.0), ("▁hello", -3.0), ("🙂", -5.0)]
  letters = "abcdefghijklmnopqrstuvwxyz<>/"
  pieces += [(c, -4 - i / 100) for i, c in enumerate(letters)]
  made = tokenizers.Tokenizer(models.Unigram(pieces, unk_id=2))
  made.normalizer = normalizers.NFKC()
  made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
  made.decoder = decoders.Metaspace(prepend_scheme="always")
  made.post_processor = processors.TemplateProcessing(
    "$A </s>", special_tokens=[("</s>", 1)]
  )
  made.add_special_tokens(special)
  names = {"eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
  return _save(made, folder, {**names, **config})


def letters(folder, **config):
  """ASCII's letters for models of few ids: EOS 2 is PAD, 96 ids at most."""
  special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
  ascii_letters = [chr(i) for i in (10, *range(32, 123))]
  pieces = [(piece, 0.0) for piece in special]
  pieces += [(letter, -1.0) for letter in ascii_letters]
  made = tokenizers.Tokenizer(models.Unigram(pieces, unk_id=0))
  made.decoder = decoders.Fuse()
  made.add_special_tokens(special)
  names = {
    "bos_token": "<|im_start|>",
    "eos_token": "<|im_end|>",
    "pad_token": "<|im_end|>",
  }
  return _save(made, folder, {**names, **config})


def _save(made, folder, config):
  folder.mkdir(parents=True, exist_ok=True)
  made.save(str(folder / "tokenizer.json"))
  config = {k: v for k, v in config.items() if v is not None}
  (folder / "tokenizer_config.json").write_text(json.dumps(config))
  return folder
