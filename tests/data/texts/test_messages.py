"""Conversations: which turns are the same, what of them reaches the tokens, and those kept as text."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from made_tokenizers import made_tokenizer

from offpolicy.data.replay import Replay
from offpolicy.data.texts.messages import read_prompt, same, turn_key
from offpolicy.data.texts.opening import open_texts
from offpolicy.data.texts.sequences import token_ids
from offpolicy.errors import DataError

Rows = list[dict[str, Any]]
TEMPLATE = (  # writes all that a turn may hold
    "{% if tools %}{{ tools | tojson + '\n' }}{% endif %}{% for m in messages %}{{ '<|im_start|>' + m.role }}"
    "{% if m.name %}{{ ' ' + m.name }}{% endif %}{% if m.tool_call_id %}{{ ' for ' + m.tool_call_id }}{% endif %}"
    "{{ '\n' }}{% if m.reasoning_content %}{{ '(' + m.reasoning_content + ')' }}{% endif %}{{ m.content }}"
    "{% if m.tool_calls %}{{ m.tool_calls | tojson }}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
CALLS = (  # as templates of DeepSeek's kind have it: arguments are text
    "{% for m in messages %}{{ m.role + '\n' + m.content }}{% for c in m.tool_calls %}"
    "{{ c.function.name + ARGUMENTS }}{% endfor %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant\n' }}{% endif %}"
)


@pytest.fixture
def tokenizer() -> Any:
    """A tokenizer of its own, with a template that writes everything."""
    return with_template(TEMPLATE)


def with_template(template: str) -> Any:
    import copy

    made = copy.deepcopy(made_tokenizer("no_bos", chat=True))
    made.chat_template = template
    return made


def write(path: Path, rows: Rows) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def decoded(replay: Replay, tokenizer: Any) -> list[list[str]]:
    table = replay.tables["pairs" if "pairs" in replay.tables else "singles"]
    return [[tokenizer.decode(token_ids(replay, text)) for text in row] for row in table.tolist()]


def user(content: Any = "how?", **keys: Any) -> dict[str, Any]:
    return {"role": "user", "content": content, **keys}


def answer(content: Any = "so", **keys: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **keys}


def call(arguments: Any, name: str = "add", **keys: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "arguments": arguments}, **keys}


def dialogue(arguments: Any, last: str, id: str = "c1", **keys: Any) -> Rows:
    """A question, a call with its result, and the answer."""
    result = {"role": "tool", "content": "5", "tool_call_id": id, **keys}
    return [user(), answer(None, tool_calls=[call(arguments, id=id)]), result, answer(last)]


# -- what is the same --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("chosen", "rejected", "shared", "first", "second"),
    [
        (dialogue({"x": 1}, "good"), dialogue({"x": 2}, "bad"), 1, '{"x": 1}', '{"x": 2}'),
        (dialogue({"x": 1}, "good"), dialogue('{"x":1}', "bad"), 3, "good", "bad"),
        (dialogue({"x": 1, "y": 2}, "good"), dialogue({"y": 2, "x": 1}, "bad"), 3, "good", "bad"),
        (dialogue({"x": 1}, "good"), dialogue({"x": 1}, "bad", id="c2"), 1, "c1", "c2"),
        (dialogue({"x": 1}, "good", name="add"), dialogue({"x": 1}, "bad", name="sub"), 2, "tool add", "tool sub"),
        ([user(), answer("a", reasoning_content="why"), user(), answer("good")],
         [user(), answer("a", reasoning_content="why"), user(), answer("bad")], 3, "good", "bad"),
        ([user(), answer("a", reasoning_content="one")], [user(), answer("a", reasoning_content="two")],
         1, "(one)a", "(two)a"),
        ([user(id="1", timestamp=5), answer("good")], [user(id="2", timestamp=6), answer("bad")], 1, "good", "bad"),
        ([user(name=None), answer("good", tool_calls=[])], [user(name=""), answer("bad")], 1, "good", "bad"),
    ],
)  # fmt: skip
def test_the_prompt_is_what_both_sides_share_to_the_last_key(
    tmp_path: Path, tokenizer: Any, chosen: Rows, rejected: Rows, shared: int, first: str, second: str
) -> None:
    path = write(tmp_path / "a.jsonl", [{"chosen": chosen, "rejected": rejected}])
    prompt, good, again, bad = decoded(open_texts(path, tokenizer=tokenizer), tokenizer)[0]
    assert prompt == again and prompt.count("<|im_end|>") == shared
    assert first in good and first not in prompt + bad and second in bad and second not in prompt + good


def test_answers_that_differ_in_a_call_alone_differ(tmp_path: Path, tokenizer: Any) -> None:
    def pair(one: Any, other: Any) -> Rows:
        both = [[answer("", tool_calls=[call(arguments)])] for arguments in (one, other)]
        return [{"prompt": [user()], "chosen": both[0], "rejected": both[1]}]

    path = write(tmp_path / "a.jsonl", pair({"x": 1}, {"x": 2}))
    _, good, _, bad = decoded(open_texts(path, tokenizer=tokenizer), tokenizer)[0]
    assert '{"x": 1}' in good and '{"x": 2}' in bad
    for other in ({"x": 1}, '{"x": 1}', '{ "x":1 }'):
        write(path, pair({"x": 1}, other))
        with pytest.raises(DataError, match="`rejected` has two equal answers"):
            open_texts(path, tokenizer=tokenizer)


def test_a_question_that_differs_in_another_key_is_no_prompt(tmp_path: Path, tokenizer: Any) -> None:
    rows = [{"chosen": [user(name="ann"), answer("good")], "rejected": [user(name="bob"), answer("bad")]}]
    with pytest.raises(DataError, match=r"differs between the sides, and not in what is said.*\['ann', 'bob'\]"):
        open_texts(write(tmp_path / "a.jsonl", rows), tokenizer=tokenizer)


def test_turn_keys() -> None:
    """Content without white space at its ends; keys without a value and those of bookkeeping do not count."""
    assert turn_key(user(" how? ", weight=1, name="")) == turn_key(user()) != turn_key(user(name="ann"))
    assert same([answer(channel="final")], [answer(channel="final ")]) and not same(
        [answer(channel="final")], [answer()]
    )
    assert same("a ", " a") and not same("a", [answer("a")])


# -- calls as templates want them --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments", ["c.function.arguments", "'' ~ c.function.arguments", "c.function.arguments | tojson"]
)
def test_arguments_are_given_as_the_template_writes_them(tmp_path: Path, arguments: str) -> None:
    """Text, text too (an object would come out in Python's notation), and an object."""
    tokenizer = with_template(CALLS.replace("ARGUMENTS", f"({arguments})"))
    rows = [
        {"prompt": [user()], "chosen": [answer("", tool_calls=[call(one)])], "rejected": [answer("no")]}
        for one in ({"x": "ü"}, '{"x": "ü"}')
    ]
    first, second = decoded(open_texts(write(tmp_path / "a.jsonl", rows), tokenizer=tokenizer), tokenizer)
    assert first == second and first[1].removesuffix("<|im_end|>\n") == 'add{"x": "ü"}'


def test_what_the_template_leaves_out_is_said(tmp_path: Path) -> None:
    plain = "{% for m in messages %}{{ m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    row = {
        "prompt": [user()],
        "chosen": [answer("yes", reasoning_content="why", tool_calls=[call({"x": 1})])],
        "rejected": [answer("no")],
        "tools": [{"name": "add"}],
    }
    path = write(tmp_path / "a.jsonl", [row])
    (warning,) = [w for w in open_texts(path, tokenizer=with_template(plain)).meta["warnings"] if "does not write" in w]
    assert "does not write reasoning_content, tool_calls, tools, which some rows have" in warning
    whole = open_texts(path, tokenizer=with_template(TEMPLATE))
    assert not any("does not write" in w for w in whole.meta["warnings"])
    assert "(why)yes" in decoded(whole, with_template(TEMPLATE))[0][1]


# -- the same rows from every kind of file -----------------------------------------------------------------------------


def tool(name: str, **properties: Any) -> dict[str, Any]:
    parameters = {"type": "object", "properties": properties, "required": list(properties)}
    return {"type": "function", "function": {"name": name, "parameters": parameters}}


TEXT, NUMBER = {"type": "string"}, {"type": "integer", "enum": [1, 2]}
MIXED: list[Rows] = [
    [
        {"prompt": [user()], "chosen": [answer("", tool_calls=[call({"a": 1})])],
         "rejected": [answer("", tool_calls=[call({"z": 1})])],
         "tools": [tool("add", a=TEXT), tool("sub", b=NUMBER, c=TEXT)]},
        {"prompt": [user(name="ann")], "chosen": [answer("x", reasoning_content="why", tool_calls=[call({"b": [1]})])],
         "rejected": [answer("", tool_calls=[call({}, "now", id="c2")])], "tools": [tool("add", a=TEXT)]},
        {"prompt": [user()], "chosen": [answer("yes")], "rejected": [answer("no")], "tools": None},
    ],
    [{"prompt": [user([{"type": "text", "text": "one "}, {"type": "text", "text": "two", "cache": {"kind": "x"}}])],
      "chosen": [answer([{"type": "text", "text": "yes"}])], "rejected": [answer("no")],
      "tools": [json.dumps(tool("f"))]}],
    [{"messages": [user(), answer(None, tool_calls=[call({"a": 1})], refusal=None), {"role": "tool", "content": "5"},
                   answer("five")], "chat_template_kwargs": {"one": True}},
     {"messages": [user(), answer("x")], "chat_template_kwargs": {"two": True}}],
    [{"prompt": [user()], "completions": [[answer("a")], [answer("", tool_calls=[call({"a": 1})])]],
      "scores": [1.0, 2.0], "tools": json.dumps([tool("add", a=TEXT | {"default": None})])}],
]  # fmt: skip


@pytest.mark.parametrize("rows", MIXED, ids=["pairs", "parts", "messages", "lists"])
def test_nulls_that_pad_nested_fields_are_left_out(tmp_path: Path, tokenizer: Any, rows: Rows) -> None:
    import datasets
    import pyarrow
    import pyarrow.parquet

    table = pyarrow.Table.from_pylist(rows)
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    with pyarrow.ipc.new_file(str(tmp_path / "a.arrow"), table.schema) as file:
        file.write_table(table)
    datasets.Dataset.from_list(rows).save_to_disk(tmp_path / "folder")
    expected = open_texts(write(tmp_path / "a.jsonl", rows), tokenizer=tokenizer)
    texts = decoded(expected, tokenizer)
    assert "null" not in str(texts).replace('"default": null', "")
    for name in ("a.parquet", "a.arrow", "folder"):
        assert decoded(open_texts(tmp_path / name, tokenizer=tokenizer), tokenizer) == texts, name
    if "tools" in rows[0] and len(rows) > 1:
        assert '"properties": {"b": {"type": "integer", "enum": [1, 2]}, "c": {"type": "string"}}' in texts[0][0]
        assert '"arguments": {"b": [1]}' in texts[1][1] and '"arguments": {}' in texts[1][3]


def test_a_null_in_json_is_kept_and_counted(tmp_path: Path, tokenizer: Any) -> None:
    """It may be meant; Arrow's cannot be told from padding."""
    import pyarrow
    import pyarrow.parquet

    row = {
        "prompt": [user()],
        "chosen": [answer("", tool_calls=[call({"a": None, "b": 1})])],
        "rejected": [answer("no")],
    }
    replay = open_texts(write(tmp_path / "a.jsonl", [row]), tokenizer=tokenizer)
    assert '{"a": null, "b": 1}' in decoded(replay, tokenizer)[0][1]
    assert "rows with null in tools or arguments of calls, kept as it is written: 1" in replay.meta["notes"]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([row]), tmp_path / "a.parquet")
    assert '{"b": 1}' in decoded(open_texts(tmp_path / "a.parquet", tokenizer=tokenizer), tokenizer)[0][1]


def test_maps_and_json_of_arrow_are_objects(tmp_path: Path, tokenizer: Any) -> None:
    import pyarrow as pa
    import pyarrow.parquet

    tokenizer.chat_template = "{{ mood }}" + TEMPLATE
    mood = pa.array([[("mood", "kind")]], type=pa.map_(pa.string(), pa.string()))
    tools = pa.array([json.dumps([tool("add", a=TEXT)])], pa.json_())
    sides = {"prompt": [[user()]], "chosen": [[answer("yes")]], "rejected": [[answer("no")]]}
    pyarrow.parquet.write_table(
        pa.table(sides | {"chat_template_kwargs": mood, "tools": tools}), tmp_path / "a.parquet"
    )
    prompt = decoded(open_texts(tmp_path / "a.parquet", tokenizer=tokenizer), tokenizer)[0][0]
    assert prompt.startswith('kind[{"type": "function"') and "null" not in prompt


# -- conversations kept as text ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kept", [json.dumps, repr], ids=["json", "python"])
@pytest.mark.parametrize("kind", ["mixed", "implicit", "answers", "messages", "sharegpt"])
def test_conversations_kept_as_text_are_read_and_said(tmp_path: Path, tokenizer: Any, kept: Any, kind: str) -> None:
    def row(i: int) -> dict[str, Any]:
        good, bad = answer(f"yes, it's {i}"), answer(f"no {i}")
        if kind == "messages":
            return {"messages": kept([user(), good])}
        if kind == "sharegpt":
            return {"messages": kept([{"from": "human", "value": "how?"}, {"from": "gpt", "value": good["content"]}])}
        if kind == "answers":
            return {"prompt": kept([user()]), "chosen": kept(good), "rejected": kept(bad)}
        start = {"prompt": "how?"} if kind == "mixed" else {}
        return {**start, "chosen": kept([user(), good]), "rejected": kept([user(), bad])}

    replay = open_texts(write(tmp_path / "a.jsonl", [row(i) for i in range(3)]), tokenizer=tokenizer)
    texts = decoded(replay, tokenizer)[2]
    assert texts[0] == "<|im_start|>user\nhow?<|im_end|>\n<|im_start|>assistant\n"
    assert texts[1] == "yes, it's 2<|im_end|>\n" and texts[-1].endswith("2<|im_end|>\n")
    column = "`messages`" if len(texts) == 2 else "`chosen`"
    notes = [note for note in replay.meta["notes"] if note.startswith(column)]
    assert notes == [f"{column} holds conversations written as text (JSON); they were read as messages: 3"]


def test_text_that_only_looks_like_a_conversation_stays_text(tmp_path: Path) -> None:
    rows = [
        {"prompt": "from where?", "chosen": '{"from": "a", "to": "b"}', "rejected": '{"from": "b", "to": "a"}'},
        {"prompt": "a list", "chosen": "[1, 2]", "rejected": "[{}]"},
    ]
    replay = open_texts(write(tmp_path / "a.jsonl", rows), tokenizer=made_tokenizer())
    assert '{"from": "a", "to": "b"}' in decoded(replay, made_tokenizer())[0][1] and not replay.meta["warnings"]
    turns = json.dumps([user(), answer()])
    mostly_text = [{"prompt": f"{i}?", "chosen": f" {i}", "rejected": " no"} for i in range(3)]
    replay = open_texts(
        write(tmp_path / "b.jsonl", [*mostly_text, {"prompt": "x", "chosen": turns, "rejected": "no"}]),
        tokenizer=made_tokenizer(),
    )
    assert (
        "rows whose `chosen` is a conversation written as text, taken as plain text since most rows are: 1"
        in (replay.meta["warnings"])
    )


def test_conversations_that_cannot_be_read_back_are_refused(tmp_path: Path, tokenizer: Any) -> None:
    sides = [{"chosen": [user(), answer(f"yes {i}")], "rejected": [user(), answer(f"no {i}")]} for i in range(3)]
    rows = [{k: str(np.array(v)) for k, v in side.items()} for side in sides]
    with pytest.raises(
        DataError, match=r"a.jsonl: `chosen` holds conversations as Python or NumPy prints them \(row 0"
    ):
        open_texts(write(tmp_path / "a.jsonl", rows), tokenizer=tokenizer)
    rows = [{k: json.dumps(v) for k, v in side.items()} for side in sides]
    rows[2]["chosen"] = rows[2]["chosen"][:-4]
    with pytest.raises(DataError, match="`chosen` holds text in row 2 and messages in row 0"):
        open_texts(write(tmp_path / "a.jsonl", rows), tokenizer=tokenizer)


# -- characters and shapes ---------------------------------------------------------------------------------------------

HALF = "\ud83d"


@pytest.mark.parametrize(
    ("row", "column", "chat"),
    [
        ({"prompt": "how" + HALF, "chosen": "a", "rejected": "b"}, "prompt", False),
        ({"prompt": "how", "chosen": "a", "rejected": HALF}, "rejected", False),
        ({"prompt": "how", "completion": "a" + HALF, "label": True}, "completion", False),
        ({"prompt": "how", "completions": ["a" + HALF, "b"], "scores": [1, 2]}, "completions", False),
        ({"chosen": "how is it" + HALF, "rejected": "how was it"}, "chosen", False),
        ({"messages": [user("how" + HALF), answer()]}, "messages", True),
        ({"prompt": [user()], "chosen": [answer(HALF)], "rejected": [answer("no")]}, "chosen", True),
        ({"prompt": [user()], "chosen": [answer()], "rejected": [answer("no")], "tools": [{"name": HALF}]},
         "prompt", True),
        ({"prompt": [user()], "chosen": [answer("", tool_calls=[call({"x": HALF})])], "rejected": [answer("no")]},
         "answers", True),
    ],
)  # fmt: skip
def test_half_of_a_surrogate_pair_is_a_fault_of_its_row(
    tmp_path: Path, tokenizer: Any, row: dict, column: str, chat: bool
) -> None:
    good = json.loads(json.dumps(row).replace("\\ud83d", "!"))
    rows = [good] * 12 + [row] + [good] * 7
    path, made = write(tmp_path / "a.jsonl", rows), tokenizer if chat else made_tokenizer()
    with pytest.raises(DataError) as error:
        open_texts(path, tokenizer=made)
    assert f"`{column}` has half of a surrogate pair" in str(error.value) and "row 12: " in str(error.value)
    str(error.value).encode()  # can be printed
    replay = open_texts(path, tokenizer=made, on_bad="drop")
    assert replay.meta["warnings"][0].startswith("1 of 20 rows were dropped")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"tools": 5}, "row 0: `tools` is 5; expected a list of objects"),
        ({"tools": ["{"]}, "`tools` of row 0 is '{'; expected JSON"),
        ({"chat_template_kwargs": [1]}, r"row 0: `chat_template_kwargs` is \[1\]; expected an object"),
        ({"chosen": [answer("", tool_calls=[1])]}, r"row 0: `chosen` has the tool calls \[1\]; expected a list of obj"),
        ({"chosen": [answer({"a": 1})]}, "row 0: `chosen` has a message with {'a': 1} as content; expected text"),
        ({"chosen": [answer(None)]}, r"`chosen` has nothing \(None\) in 1 row"),
    ],
)
def test_wrong_shapes_name_their_row(tmp_path: Path, tokenizer: Any, change: dict, words: str) -> None:
    row = {"prompt": [user()], "chosen": [answer()], "rejected": [answer("no")]} | change
    with pytest.raises(DataError, match=words):
        open_texts(write(tmp_path / "a.jsonl", [row]), tokenizer=tokenizer)


def test_turns_of_other_tools(tmp_path: Path, tokenizer: Any) -> None:
    """ShareGPT's turns of calls and results."""
    said = [
        ("human", "how?"),
        ("function_call", '{"name": "add", "arguments": {"x": 1}}'),
        ("observation", "5"),
        ("gpt", "so"),
    ]
    rows = [{"messages": [{"from": role, "value": text} for role, text in said]}]
    prompt, last = decoded(open_texts(write(tmp_path / "a.jsonl", rows), tokenizer=tokenizer), tokenizer)[0]
    assert '"function": {"name": "add", "arguments": {"x": 1}}' in prompt and "<|im_start|>tool\n5" in prompt
    assert last == "so<|im_end|>\n"


def test_prompts_read_alone() -> None:
    assert read_prompt("how?", "prompt", chat=False) == "how?"
    assert read_prompt("how?", "prompt", chat=True, system="be kind") == [
        {"role": "system", "content": "be kind"},
        user(),
    ]
    assert read_prompt({"from": "human", "value": "how?"}, "prompt", chat=True) == [user()]
