"""Where a row has its prompt and its answer."""

import pytest

from gkd_jax.data import row_texts

USER = {"role": "user", "content": "q"}
ASSISTANT = {"role": "assistant", "content": "a"}
TOOL = {"role": "tool", "content": "42"}
CALLS = {
  "role": "assistant",
  "tool_calls": [
    {"type": "function", "function": {"name": "f", "arguments": "{}"}}
  ],
}
FORM = row_texts.RowForm()
GOOD = [
  (FORM, {"inputs": "q", "targets": "a"}, ("q", "a")),
  (FORM, {"inputs": 3, "targets": 4.5}, ("3", "4.5")),
  (FORM, {"inputs": "q", "targets": None}, ("q", None)),
  (FORM, {"inputs": "q"}, ("q", None)),
  # As TRL's users have them.
  (FORM, {"prompt": "q", "completion": "a"}, ("q", "a")),
  (FORM, {"messages": [USER, ASSISTANT]}, ([USER], "a")),
  (FORM, {"messages": [USER]}, ([USER], None)),
  # A table of rows has the field in every message.
  (
    FORM,
    {"messages": [USER, ASSISTANT | {"tool_calls": None}]},
    ([USER], "a"),
  ),
  (
    FORM,
    {"messages": [USER, ASSISTANT, TOOL]},
    ([USER, ASSISTANT, TOOL], None),
  ),
  (
    FORM,
    {"messages": [USER, ASSISTANT, USER, ASSISTANT]},
    ([USER, ASSISTANT, USER], "a"),
  ),
  (FORM, {"prompt": [USER], "completion": [ASSISTANT]}, ([USER], "a")),
  (FORM, {"prompt": [USER], "completion": "a"}, ([USER], "a")),
  (FORM, {"prompt": [USER]}, ([USER], None)),
  (
    row_texts.RowForm("question", "answer"),
    {"question": "q", "answer": "a", "inputs": "x"},
    ("q", "a"),
  ),
  (
    row_texts.RowForm("question", None),
    {"question": "q", "targets": "a", "completion": "b"},
    ("q", None),
  ),
  (
    row_texts.RowForm(target_field=None),
    {"messages": [USER, ASSISTANT]},
    ([USER], None),
  ),
  (
    row_texts.RowForm(prompt_template="{a} {x}{}\n{b}"),
    {"a": "{b}", "b": 2, "x": "y", "targets": "a"},
    ("{b} y{}\n2", "a"),
  ),
  (row_texts.RowForm(chat=True), {"inputs": "q"}, ([USER], None)),
  (
    row_texts.RowForm(chat=True, prompt_template="{x}"),
    {"x": "q", "targets": "a"},
    ([USER], "a"),
  ),
  (row_texts.RowForm(chat=True), {"messages": [USER]}, ([USER], None)),
  # As OpenAI and TRL have calls of tools: as an answer, before one, beside a text.
  (FORM, {"messages": [USER, CALLS | {"content": None}]}, ([USER], CALLS)),
  (
    FORM,
    {"messages": [USER, CALLS, TOOL, ASSISTANT]},
    ([USER, CALLS, TOOL], "a"),
  ),
  (
    FORM,
    {"prompt": [USER], "completion": [CALLS | {"content": "a"}]},
    ([USER], CALLS | {"content": "a"}),
  ),
]
BAD = [
  (
    FORM,
    {"input": "q", "a": 1},
    "no field 'inputs' or 'messages' or 'prompt' among 'input', 'a'$",
  ),
  (FORM, {"inputs": ""}, "an empty 'inputs'"),
  (FORM, {"inputs": "q", "targets": ""}, "an empty 'targets'"),
  (FORM, {"inputs": {"a": 1}}, "dict and no text in 'inputs'"),
  (FORM, {"inputs": True}, "bool and no text in 'inputs'"),
  (FORM, {"inputs": "q", "targets": {"a": 1}}, "dict and no text in 'targets'"),
  (FORM, {"messages": []}, "no messages with 'role' and 'content'"),
  (FORM, {"messages": "hello"}, "no messages with 'role' and 'content'"),
  (FORM, {"messages": [{"from": "user", "value": "q"}]}, "no messages with"),
  (
    FORM,
    {"messages": [{"role": "user", "content": None}]},
    "of 'user' with nei",
  ),
  (
    FORM,
    {"messages": [USER, ASSISTANT | {"function_call": {"name": "f"}}]},
    "function_call in 'messages', whose form now is tool_calls",
  ),
  (
    FORM,
    {"messages": [USER, {"role": "assistant", "content": None}]},
    "'assistant' with neither 'content' nor 'tool_calls' in 'messages'",
  ),
  (FORM, {"inputs": None, "a": 1}, "null in 'inputs'"),
  (FORM, {"messages": [ASSISTANT]}, "no message before the answer"),
  (FORM, {"prompt": [USER], "completion": [USER]}, "not one message of the as"),
  (
    FORM,
    {"prompt": [USER], "completion": [ASSISTANT, USER]},
    "not one message of the assistant",
  ),
  (
    row_texts.RowForm(prompt_template="{q}"),
    {"inputs": "q"},
    "no field 'q' of PROMPT_TEMPLATE",
  ),
]


@pytest.mark.parametrize(("form", "fields", "expected"), GOOD)
def test_prompt_and_answer_of_a_row(form, fields, expected):
  assert row_texts.prompt_and_answer(fields, form) == expected


@pytest.mark.parametrize(("form", "fields", "said"), BAD)
def test_what_is_wrong_with_a_row(form, fields, said):
  with pytest.raises(row_texts.BadRow, match=said):
    row_texts.prompt_and_answer(fields, form)


def test_tools_are_a_list_or_a_list_as_json():
  tool = {"function": {"name": "f"}}
  for given in ([tool | {"strict": None}], '[{"function": {"name": "f"}}]'):
    assert row_texts.tools({"tools": given}) == [tool]
  assert row_texts.tools({"tools": []}) is row_texts.tools({}) is None
  for bad, said in (("[", "not JSON in 'tools'"), ("{}", "dict and no list")):
    with pytest.raises(row_texts.BadRow, match=said):
      row_texts.tools({"tools": bad})
