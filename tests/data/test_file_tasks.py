"""Tasks of a user's files, made from settings alone."""

import io
import json

import numpy as np
import pytest
import sentencepiece
import seqio
import tiny_tokenizers

from gkd_jax import data, evaluation, partitioning
from gkd_jax.data import file_tasks, tokenizer_folders

LENGTHS = {"inputs": 24, "targets": 8}
EOS = 2
# Ids of tiny_tokenizers.byte_level.
HELLO, HELL, SPACE, USER = 262, 261, 223, 266
PROMPT = [1, 85, 91, 85, 86, 71, 79, 201, 259, 78, 82, 2, 201, 1, USER, 201]
TURN = [2, 201, 1, 67, 85, 85, 75, 85, 86, 67, 80, 86, 201]  # to the assistant


@pytest.fixture(autouse=True)
def _registry():
  before = set(seqio.TaskRegistry.names())
  yield
  for name in set(seqio.TaskRegistry.names()) - before:
    seqio.TaskRegistry.remove(name)


@pytest.fixture(name="model", scope="module")
def _model(tmp_path_factory):
  return tiny_tokenizers.byte_level(
    tmp_path_factory.mktemp("model"), chat_template=tiny_tokenizers.TEMPLATE
  )


@pytest.fixture(name="plain", scope="module")
def _plain(tmp_path_factory):
  return tiny_tokenizers.byte_level(tmp_path_factory.mktemp("plain"))


def write(path, rows):
  path.write_text("".join(json.dumps(row) + "\n" for row in rows))
  return str(path)


def task_of(model, train=None, **settings):
  given = {"task_feature_lengths": LENGTHS, "validation_fraction": 0}
  name = data.task_of_files(
    train, student_path=str(model), **(given | settings)
  )
  return data.load_task(name)


def examples(task, split="train", lengths=None):
  found = task.get_dataset(
    sequence_length=lengths or LENGTHS, split=split, shuffle=False
  )
  return [
    {k: v if isinstance(v, bytes) else v.tolist() for k, v in e.items()}
    for e in found.as_numpy_iterator()
  ]


def test_rows_become_ids_and_keep_their_texts(model, tmp_path):
  rows = [{"inputs": "hello", "targets": " hello<|im_end|>"}]
  path = write(tmp_path / "a.jsonl", rows)
  (example,) = examples(task_of(model, path, long_lines="cut"))
  assert example == {
    "inputs": [HELLO],
    "inputs_pretokenized": b"hello",
    # A token that a text spells is text; the one that ends it is EOS.
    "targets": [263, 30, 94, 75, 79, 65, 71, 80],
    "targets_pretokenized": b" hello<|im_end|>",
  }
  short = {"inputs": 24, "targets": 16}
  (example,) = examples(
    task_of(model, path, task_feature_lengths=short),
    lengths=short,
  )
  assert example["targets"][-3:] == [94, 32, EOS]


def test_conversations_end_with_the_turn(model, tmp_path):
  user, said = {"role": "user", "content": "hello"}, "hell"
  answer = {"role": "assistant", "content": said}
  expected = [*PROMPT, HELLO, *TURN], [HELL, EOS]
  lengths = {"inputs": 64, "targets": 8}
  for name, row, settings in (
    ("messages", {"messages": [user, answer]}, {}),
    ("lists", {"prompt": [user], "completion": [answer]}, {}),
    ("texts", {"prompt": "hello", "completion": said}, {"chat": True}),
  ):
    task = task_of(
      model,
      write(tmp_path / f"{name}.jsonl", [row]),
      task_feature_lengths=lengths,
      **settings,
    )
    (example,) = examples(task, lengths=lengths)
    assert (example["inputs"], example["targets"]) == expected, name
    assert example["targets_pretokenized"] == b"hell"
  # Texts are no conversation unless CHAT says so.
  (example,) = examples(task_of(model, str(tmp_path / "texts.jsonl")))
  assert (example["inputs"], example["targets"]) == ([HELLO], [HELL, EOS])


def test_what_a_tokenizer_puts_around_a_prompt_is_kept(tmp_path):
  model = tiny_tokenizers.unigram(tmp_path / "t5")
  rows = [{"inputs": "hello", "targets": "hello"}]
  (example,) = examples(task_of(model, write(tmp_path / "a.jsonl", rows)))
  ids = data.TokenizerVocabulary(model).encode("hello")
  assert example["inputs"] == example["targets"] == [*ids, 1]


def test_a_vocabulary_of_pieces_ends_prompts_and_answers():
  encoded = file_tasks._encoded(seqio.ByteVocabulary(), "ab", "c")
  ids = [
    np.frombuffer(encoded[k], "<i4").tolist() for k in ("inputs", "targets")
  ]
  assert ids == [[100, 101, 1], [102, 1]]


def test_rows_without_answers_are_prompts(model, tmp_path):
  rows = [{"inputs": f"hello {i}"} for i in range(8)]
  task = task_of(model, write(tmp_path / "a.jsonl", rows), metrics=("exact",))
  assert {*examples(task)[0]} == {"inputs", "inputs_pretokenized"}
  batch = next(data.TrainIterator(task, LENGTHS, 8, seed=0))
  assert batch["decoder_loss_weights"].sum() == 0
  # A metric of answers has no value, and does not fail.
  evaluator = evaluation.Evaluator(
    task, LENGTHS, 8, partitioning.make_mesh(), split="train"
  )
  values = evaluator.try_metrics()
  assert not values.numbers and not values.failed
  never = lambda targets, predictions: {"a": 1 / 0}
  (function,) = task_of(
    model, str(tmp_path / "a.jsonl"), metrics=[never]
  ).metric_fns
  assert function([None, None], ["a", "b"]) == {}
  # As with answers that TARGET_FIELD = None leaves out.
  rows = [row | {"targets": "a"} for row in rows]
  path = write(tmp_path / "b.jsonl", rows)
  assert "targets" in examples(task_of(model, path))[0]
  assert "targets" not in examples(task_of(model, path, target_field=None))[0]


# As Hugging Face's templates have them.
WITH_TOOLS = (
  "{% if tools %}{% for t in tools %}[{{ t.function.name }}]{% endfor %}{% endif %}"
  "{% for m in messages %}{{ m.role }}:{{ m.content }}"
  "{% for c in m.tool_calls or [] %}"
  "{{ c.function.name }}{{ c.function.arguments | tojson }}{% endfor %}"
  "{{ '<|im_end|>' if m.role == 'assistant' }} {% endfor %}"
  "{% if add_generation_prompt %}assistant:{% endif %}"
)
BAD = [
  ('{"inputs": "a", "targets": "b"', "not JSON"),
  ('{"targets": "b"}', "no field 'inputs'"),
  ('{"inputs": "a"}', "no answer"),
  ('"a"', "str and no JSON object"),
  ('{"messages": [{"role": "tool"}]}', "a message of 'tool' with neither"),
  ('{"inputs": null}', "null in 'inputs'"),
]


@pytest.mark.parametrize(("line", "reason"), BAD)
def test_a_bad_line_is_named_and_refused_or_left_out(
  model, tmp_path, capsys, line, reason
):
  path = tmp_path / "a.jsonl"
  good = json.dumps({"inputs": "hello", "targets": "hell"})
  path.write_text(f"{good}\n{line}\n{good}\n")
  with pytest.raises(ValueError) as error:
    examples(task_of(model, str(path)))
  said = str(error.value)
  assert "got 1 of 3 that do not" in said and f"{path}:2 ({reason}" in said
  assert said.endswith("mend the files, or set BAD_LINES = 'skip'")
  assert len(examples(task_of(model, str(path), bad_lines="skip"))) == 2
  said = capsys.readouterr().out
  assert said.startswith(f"left out: 1 of 3 rows: {path}:2 ({reason}")


def test_lines_with_one_fault_name_it_once(plain, tmp_path, capsys):
  good, bad = {"inputs": "a", "targets": "b"}, {"inputs": ""}
  rows = [good, bad, good, bad, {"inputs": True}, bad]
  path = write(tmp_path / "a.jsonl", rows)
  examples(task_of(plain, path, bad_lines="skip"))
  assert capsys.readouterr().out == (
    f"left out: 4 of 6 rows: {path}, lines 2, 4, 6 (an empty 'inputs'),"
    f" {path}:5 (bool and no text in 'inputs')\n"
  )
  path = write(tmp_path / "b.jsonl", [*rows, *[bad] * 3])
  examples(task_of(plain, path, bad_lines="skip"))
  said = capsys.readouterr().out
  assert "lines 2, 4, 6, 7 (" in said and said.endswith(
    "'inputs') and 2 more\n"
  )


def test_rows_of_other_fields_say_what_to_set(plain, tmp_path, capsys):
  rows = [{"question": "a", "answer": "b"}, {"question": "c", "answer": "d"}]
  path = write(tmp_path / "a.jsonl", rows)
  with pytest.raises(
    ValueError,
    match=r"among 'question', 'answer'\).*; set INPUT_FIELD, TARGET_FIELD or",
  ):
    examples(task_of(plain, path))
  with pytest.raises(
    ValueError, match=rf"got none of 2 in {path}; set TRAIN_FILES, INPUT"
  ):
    examples(task_of(plain, path, bad_lines="skip"))
  capsys.readouterr()
  settings = {"input_field": "question"}
  assert "targets" not in examples(task_of(plain, path, **settings))[0]
  assert capsys.readouterr().out == (
    "prompts alone: none of 2 rows of 'train' has an answer in 'targets' or"
    " 'completion'; set TARGET_FIELD, or None if that is meant\n"
  )
  examples(task_of(plain, path, target_field=None, **settings))
  examples(task_of(plain, path, target_field="answer", **settings))
  assert not capsys.readouterr().out


def test_lines_that_are_all_bad_are_not_to_be_skipped(plain, tmp_path):
  path = write(tmp_path / "a.jsonl", [{"inputs": True}] * 2)
  with pytest.raises(ValueError, match="mend the files, or set INPUT_FIELD, T"):
    examples(task_of(plain, path))


def test_tool_calls_are_prompts_and_answers_as_the_template_has_them(tmp_path):
  folder = str(
    tiny_tokenizers.byte_level(tmp_path / "t", chat_template=WITH_TOOLS)
  )
  user = {"role": "user", "content": "hello"}
  call = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
  calls = {"role": "assistant", "content": None, "tool_calls": [call]}
  found = {"role": "tool", "content": "42", "tool_calls": None}
  answer = {"role": "assistant", "content": "hell"}
  tools = [{"function": {"name": "f"}}]
  rows = [
    {"messages": [user, calls], "tools": tools},
    {"messages": [user, calls, found, answer], "tools": json.dumps(tools)},
    {"prompt": [user], "completion": [calls], "tools": None},
    {"prompt": "hello", "completion": "hell", "tools": "a hammer"},
  ]
  path = write(tmp_path / "a.jsonl", rows)
  lengths = {"inputs": 64, "targets": 16}
  got = examples(
    task_of(folder, path, task_feature_lengths=lengths), lengths=lengths
  )
  vocabulary = data.TokenizerVocabulary(folder)
  text = vocabulary._decode  # beyond an EOS of the prompt
  assert [(text(x["inputs"]), text(x["targets"])) for x in got] == [
    ("[f]user:hello assistant:", 'f{"x": 1}'),
    ('[f]user:hello assistant:f{"x": 1} tool:42 assistant:', "hell"),
    ("user:hello assistant:", 'f{"x": 1}'),
    ("hello", "hell"),
  ]
  assert [x["targets_pretokenized"] for x in got] == [
    b'f{"x": 1}',
    b"hell",
    b'f{"x": 1}',
    b"hell",
  ]
  assert all(x["targets"][-1] == 2 for x in got)


def test_tool_calls_that_a_template_leaves_out_are_a_bad_row(model, tmp_path):
  calls = {"role": "assistant", "tool_calls": [{"function": {"name": "f"}}]}
  rows = [{"messages": [{"role": "user", "content": "a"}, calls]}]
  with pytest.raises(ValueError, match=r"a.jsonl:1 .*that shows tool calls"):
    examples(task_of(model, write(tmp_path / "a.jsonl", rows)))


def test_texts_that_are_not_put_in_a_chat_template_are_said_once(
  model, plain, tmp_path, capsys
):
  path = write(tmp_path / "a.jsonl", [{"prompt": "a", "completion": "b"}])
  said = (
    "prompts are used as they are; set CHAT = True to put them in the chat"
    f" template of {model}\n"
  )
  task = task_of(model, path, test_files=[path])
  examples(task)
  examples(task, "test")
  assert capsys.readouterr().out == said
  lengths = {"inputs": 64, "targets": 8}
  examples(
    task_of(model, path, chat=True, task_feature_lengths=lengths),
    lengths=lengths,
  )
  examples(task_of(plain, path))
  assert not capsys.readouterr().out


def test_long_lines_are_left_out_cut_or_refused(plain, tmp_path, capsys):
  rows = [
    {"inputs": "a" * 24, "targets": "a" * 7},  # as long as may be
    {"inputs": "a" * 25, "targets": "hell"},
    {"inputs": "hello", "targets": "a" * 8},  # and EOS
  ]
  path = write(tmp_path / "a.jsonl", rows)
  assert len(examples(task_of(plain, path))) == 1
  assert capsys.readouterr().out == (
    f"left out: 2 of 3 rows: {path}:2 (25 tokens of inputs, of 24),"
    f" {path}:3 (9 tokens of targets, of 8)\n"
  )
  cut = examples(task_of(plain, path, long_lines="cut"))
  assert [len(e["inputs"]) for e in cut] == [24, 24, 1]
  assert cut[2]["targets"] == [67] * 8  # without EOS
  with pytest.raises(
    ValueError, match="set TASK_FEATURE_LENGTHS, or LONG_LINES = 'cut'"
  ):
    examples(task_of(plain, path, long_lines="refuse"))


def test_validation_is_a_share_of_the_train_rows(model, tmp_path):
  rows = [{"inputs": f"a{i}", "targets": "b"} for i in range(40)] * 2
  path = write(tmp_path / "a.jsonl", rows)
  texts = lambda split, task: [
    e["inputs_pretokenized"] for e in examples(task, split)
  ]
  task = task_of(model, path, validation_fraction=0.1)
  train, validation = texts("train", task), texts("validation", task)
  assert len(validation) == 8 and len(train) == 72
  # Equal prompts are on one side.
  assert not {*train} & {*validation}
  more = write(tmp_path / "b.jsonl", [*rows, {"inputs": "new", "targets": "b"}])
  task = task_of(model, more, validation_fraction=0.1)
  assert {*validation} <= {*texts("validation", task)} | {b"new"}
  assert not data.has_split(task_of(model, path), "validation")
  tested = task_of(model, path, test_files=[more], validation_fraction=0.1)
  assert len(texts("test", tested)) == 81
  own = task_of(model, path, validation_files=[more], validation_fraction=0.1)
  assert len(texts("train", own)) == 80
  assert len(texts("validation", own)) == 81


def test_a_position_is_resumed_and_belongs_to_its_settings(model, tmp_path):
  rows = [{"inputs": f"a{i}", "targets": "b"} for i in range(40)]
  path = write(tmp_path / "a.jsonl", rows)
  make = lambda **settings: data.TrainIterator(
    task_of(model, path, **settings), LENGTHS, 8, seed=3
  )
  first = make()
  for _ in range(3):
    next(first)
  (tmp_path / "position").mkdir()
  first.save_state(tmp_path / "position")
  expected = [next(first) for _ in range(4)]
  again = make()
  again.restore_state(tmp_path / "position")
  for batch in expected:
    np.testing.assert_equal(next(again), batch)
  with pytest.raises(ValueError, match="MIXTURE_OR_TASK_NAME"):
    make(chat=True, long_lines="cut").restore_state(tmp_path / "position")
  write(tmp_path / "a.jsonl", rows[1:])
  with pytest.raises(ValueError, match=r"39 rows.*\(saved with 40 rows"):
    make().restore_state(tmp_path / "position")


def test_a_file_that_has_changed_is_read_again(model, tmp_path, capsys):
  path = write(tmp_path / "a.jsonl", [{"inputs": "a", "targets": "b"}] * 40)
  texts = lambda: [e["inputs_pretokenized"] for e in examples(task)]
  task = task_of(model, path)
  assert texts() == [b"a"] * 40
  columns = task.source._load("train")
  assert task.source._load("train") is columns  # not read twice
  # Of the same size.
  write(tmp_path / "a.jsonl", [{"inputs": "c", "targets": "d"}] * 40)
  assert texts() == [b"c"] * 40
  # A glob finds a new file.
  task = task_of(model, f"{tmp_path}/*.jsonl")
  assert len(texts()) == 40
  write(tmp_path / "b.jsonl", [{"inputs": "e", "targets": "f"}])
  assert texts()[40:] == [b"e"]


def test_metrics_go_by_name(model, tmp_path):
  path = write(tmp_path / "a.jsonl", [{"inputs": "a", "targets": "b"}])
  of_mine = lambda targets, predictions: {"mine": 1.0}
  task = task_of(model, path, metrics=("exact", "bleu", "chrf", of_mine))
  found = {}
  for function in task.metric_fns:
    found |= function(["a b", "c"], ["a b", "d"])
  assert {*found} == {"exact", "bleu", "chrf", "mine"}
  assert found["exact"] == 50
  with pytest.raises(ValueError, match=r"'rouge', .* got 'rogue'; set METRICS"):
    task_of(model, path, metrics=("rogue",))


def test_a_task_needs_files_and_a_tokenizer(model, tmp_path):
  with pytest.raises(ValueError, match="set TRAIN_FILES or MIXTURE_OR_TASK_N"):
    task_of(model)
  path = write(tmp_path / "a.jsonl", [{"inputs": "a"}])
  with pytest.raises(ValueError, match=f"got none in {tmp_path}; set VOCABUL"):
    task_of(tmp_path, path)
  with pytest.raises(ValueError, match="got nothing at /nowhere; set VOCABULA"):
    task_of(model, path, vocabulary_path="/nowhere")
  plain = tiny_tokenizers.byte_level(tmp_path / "plain")
  with pytest.raises(ValueError, match="with a chat template for rows of mess"):
    examples(task_of(plain, path, chat=True))


def test_student_and_teacher_have_one_tokenizer(model, tmp_path):
  path = write(tmp_path / "a.jsonl", [{"inputs": "a"}])
  same = tiny_tokenizers.byte_level(tmp_path / "same", eos_token="<|im_start|>")
  other = tiny_tokenizers.unigram(tmp_path / "other")
  assert task_of(model, path, teacher_path=str(same))
  assert task_of(model, path).name != task_of(other, path).name
  with pytest.raises(ValueError, match="one tokenizer of student and teacher"):
    task_of(model, path, teacher_path=str(other))
  # A student without one has its teacher's.
  (tmp_path / "empty").mkdir()
  task = task_of(tmp_path / "empty", path, teacher_path=str(other))
  assert data.target_vocabulary(task) == data.TokenizerVocabulary(other)


def test_equal_sentencepiece_models_are_one_tokenizer(tmp_path):
  path = write(tmp_path / "a.jsonl", [{"inputs": "ab", "targets": "ba"}])

  def pieces(name, texts):
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
      sentence_iterator=iter(texts * 8),
      model_writer=model,
      model_type="char",
      vocab_size=6,
      pad_id=0,
      eos_id=1,
      unk_id=2,
      bos_id=-1,
      minloglevel=2,
    )
    (tmp_path / name).mkdir()
    (tmp_path / name / "spiece.model").write_bytes(model.getvalue())
    return tmp_path / name

  student, teacher = pieces("student", ["ab"]), pieces("teacher", ["ab"])
  task = task_of(student, path, teacher_path=str(teacher))
  assert task.name == task_of(teacher, path).name
  (example,) = examples(task)
  assert example["inputs"][-1] == example["targets"][-1] == 1
  other = pieces("other", ["cd"])
  with pytest.raises(ValueError, match="one tokenizer of student and teacher"):
    task_of(student, path, teacher_path=str(other))
  assert task_of(other, path).name != task.name


def test_a_copied_tokenizer_gives_the_same_ids(model, tmp_path):
  source = tiny_tokenizers.byte_level(
    tmp_path / "model", chat_template=tiny_tokenizers.TEMPLATE
  )
  (source / "config.json").write_text('{"eos_token_id": [2, 7]}')
  run = tmp_path / "run"
  assert tokenizer_folders.copy(source, run)
  checkpoint = run / "checkpoint_5"
  checkpoint.mkdir()
  file = tokenizer_folders.find(checkpoint)
  assert file == run / "tokenizer.json"
  copied = data.TokenizerVocabulary(file)
  original = data.TokenizerVocabulary(source)
  assert copied == original and copied.eos_ids == (2, 7)
  # As in a folder of ours.
  (source / "config.json").write_text('{"special_tokens": {"eos": [2, 7]}}')
  assert data.TokenizerVocabulary(source).eos_ids == (2, 7)
  assert not tokenizer_folders.copy(tmp_path / "nothing", run)


def test_each_vocabulary_of_a_file_says_which(model):
  of = tokenizer_folders.path_of
  pieces = seqio.SentencePieceVocabulary("folder/spiece.model")
  assert of(pieces) == "folder/spiece.model"
  assert of(data.TokenizerVocabulary(model)) == str(model / "tokenizer.json")
  assert of(seqio.ByteVocabulary()) is None
