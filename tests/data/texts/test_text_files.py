"""Files of texts: odd ones, tables, and folders and patterns of many."""

import gzip
import json
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from made_tokenizers import made_tokenizer

from offpolicy.data.names import resolve
from offpolicy.data.replay import Replay
from offpolicy.data.sources import open_source
from offpolicy.data.texts.module import TextData
from offpolicy.data.texts.opening import open_texts, sketch
from offpolicy.data.texts.sequences import token_ids
from offpolicy.errors import DataError, UsageError

Rows = list[dict[str, Any]]


def rows_of(*prompts: str) -> Rows:
    return [{"prompt": f"what is {prompt}?", "chosen": f" {prompt}", "rejected": " no"} for prompt in prompts]


def lines(rows: Rows) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def put(path: Path, rows: Rows) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.name.endswith(".parquet"):
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    elif path.name.endswith(".gz"):
        path.write_bytes(gzip.compress(lines(rows).encode()))
    else:
        path.write_text(lines(rows))


def texts(path: Path | str, **options: Any) -> Replay:
    return open_texts(path, tokenizer=made_tokenizer(), **options)


def chosen(path: Path | str, **options: Any) -> str:
    """The chosen answers, one after the other."""
    replay, tokenizer = texts(path, **options), made_tokenizer()
    answers = [tokenizer.decode(token_ids(replay, row[1])) for row in replay.tables["pairs"]]
    return "".join(answers).replace("</s>", "").replace(" ", "")


def refusal(path: Path | str, **options: Any) -> str:
    with pytest.raises((DataError, UsageError)) as error:
        texts(path, **options)
    said = str(error.value)
    said.encode()  # can be printed
    assert "\n" not in said and len(said) < 1000
    return said


# -- one file ----------------------------------------------------------------------------------------------------------

PLAIN = lines(rows_of("a", "b"))


@pytest.mark.parametrize(
    "content",
    [
        "\ufeff" + PLAIN,
        PLAIN.replace("\n", "\r\n"),
        "\n\n" + PLAIN.replace("\n", "\n \n"),
        PLAIN.rstrip(),
        json.dumps(rows_of("a", "b")),
        json.dumps(rows_of("a", "b"), indent=1),
        "[\n" + PLAIN.replace("\n", ",", 1) + "]\n",
    ],
    ids=["mark", "crlf", "blank", "no_end", "list", "list_over_lines", "list_by_line"],
)
def test_odd_json_that_is_read(tmp_path: Path, content: str) -> None:
    (tmp_path / "a.jsonl").write_bytes(content.encode())
    assert chosen(tmp_path / "a.jsonl") == "ab"


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("", "holds no rows"),
        (" \n\n", "holds no rows"),
        ("[]", "holds no rows"),
        (PLAIN.encode("utf-16"), "it is written in UTF-16 or UTF-32; expected UTF-8. Convert it: iconv"),
        (PLAIN.encode("utf-16-le"), "it is written in UTF-16 or UTF-32"),
        (PLAIN.encode() + '{"prompt": "é"}'.encode("latin1"), "line 3 cannot be read as UTF-8: the byte 0xe9"),
        (PLAIN + '{"prompt": "a", "prompt": "b"}', "line 3: the key 'prompt' stands twice in one object"),
        (PLAIN + '{"prompt": {"a": 1, "a": 2}}', "line 3: the key 'a' stands twice"),
        (PLAIN + "[" * 100_000, "line 3 is nested too deeply"),
        (PLAIN + '{"prompt": "a",}', "line 3 is no JSON"),
        (PLAIN[:-4], "line 2 is no JSON (Unterminated string starting at column 54)"),
        (PLAIN + "\0\0\0", "line 3 is no JSON"),
        (PLAIN + '{"weight": ' + "9" * 5000 + "}", "line 3 is no JSON (Exceeds the limit"),
        ("[" + PLAIN.replace("\n", ",") + "oops]", "line 1 is no JSON"),
        (json.dumps(rows_of("a"), indent=1).replace('"prompt"', "prompt"), "line 3 is no JSON"),
        ("[1]\n[2]\n", "row 0 is [1]; expected an object"),
        (json.dumps({"data": rows_of("a")}, indent=1), "is a single JSON value over several lines; expected a list"),
        (PLAIN + '{"prompt": "a", "chosen": NaN, "rejected": "b"}', "`chosen` holds float nan in row 2"),
        (PLAIN + '{"\\ud83d": 1}', "has the column '\\ud83d' with half of a surrogate pair"),
    ],
)
def test_odd_json_that_is_refused_with_its_line(tmp_path: Path, content: str | bytes, words: str) -> None:
    (tmp_path / "a.jsonl").write_bytes(content if isinstance(content, bytes) else content.encode())
    assert words in refusal(tmp_path / "a.jsonl")


def test_numbers_that_are_none_are_faults(tmp_path: Path) -> None:
    rows = [{**row, "weight": 1.0} for row in rows_of("a", "b")]
    for weight in ("NaN", "Infinity", "1e999", "null", "1e300", "1" * 400):
        (tmp_path / "a.jsonl").write_text(lines(rows) + lines(rows[:1]).replace("1.0", weight))
        assert "`weight` has a score or weight that is not a finite number in 1 row (first: row 2" in refusal(
            tmp_path / "a.jsonl"
        )


def test_scores_that_are_no_numbers_of_float32_are_faults(tmp_path: Path) -> None:
    for score in (10**400, 1e300):
        put(tmp_path / "a.jsonl", [{"prompt": "why?", "completions": [" a", " b"], "scores": [score, 1]}])
        assert "`scores` has scores that do not fit the answers in 1 row" in refusal(tmp_path / "a.jsonl")


def test_decimals_are_numbers_and_maps_have_each_key_once(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet

    columns = {"prompt": ["why?"], "chosen": [" a"], "rejected": [" b"]}
    weight = pa.array([Decimal("1.5")], pa.decimal128(5, 2))
    pa.parquet.write_table(pa.table({**columns, "weight": weight}), tmp_path / "a.parquet")
    assert texts(tmp_path / "a.parquet").tables["pairs/weight"].tolist() == [1.5]
    turns = [[("role", "user"), ("content", "a"), ("content", "b")], [("role", "assistant"), ("content", "c")]]
    messages = pa.array([turns], pa.list_(pa.map_(pa.string(), pa.string())))
    pa.parquet.write_table(pa.table({"messages": messages}), tmp_path / "b.parquet")
    assert "the key 'content' stands twice in one object" in refusal(tmp_path / "b.parquet")


def test_a_very_long_line(tmp_path: Path) -> None:
    put(tmp_path / "a.jsonl", [{"prompt": "why? " * 4_000, "chosen": " a", "rejected": " b"}])
    assert chosen(tmp_path / "a.jsonl") == "a" and "prompts were cut: 1" in texts(tmp_path / "a.jsonl").meta["notes"]


# -- tables ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a.csv", "a.tsv", "b.csv", "c.csv.gz"])
def test_tables_of_text(tmp_path: Path, name: str) -> None:
    """Quoted cells with separators, quotes, line breaks and a line separator of Unicode; numbers are numbers."""
    between = {"a.tsv": "\t", "b.csv": ";"}.get(name, ",")
    cells = [["prompt", "chosen", "rejected", "weight"], ['"a, b; c\td"', '" one\n""two"""', '" no\u2028"', "2"]]
    content = ("\ufeff" + "".join(between.join(row) + "\r\n" for row in cells)).encode()
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith("gz") else content)
    replay, tokenizer = texts(tmp_path / name), made_tokenizer()
    row = [tokenizer.decode(token_ids(replay, one)) for one in replay.tables["pairs"][0]]
    assert row[:2] == ["<s>a, b; c\td", ' one\n"two"</s>'] and row[3] == " no\u2028</s>"
    assert replay.tables["pairs/weight"].tolist() == [2.0]


def test_tables_hold_conversations_lists_and_labels_as_text(tmp_path: Path) -> None:
    import csv

    def write(rows: Rows) -> Path:
        with (tmp_path / "a.csv").open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
        return tmp_path / "a.csv"

    turns = [{"role": "user", "content": "how?"}, {"role": "assistant", "content": "so, it's fine"}]
    tokenizer = made_tokenizer(chat=True)
    replay = open_texts(write([{"messages": json.dumps(turns)}, {"messages": turns}]), tokenizer=tokenizer)
    assert [tokenizer.decode(token_ids(replay, a)) for _, a in replay.tables["singles"]] == [
        "so, it's fine<|im_end|>\n"
    ] * 2
    replay = texts(write([{"prompt": "how?", "completions": json.dumps(["a", "b"]), "scores": "[1, 2.5]"}]))
    assert replay.tables["pairs/score_chosen"].tolist() == [2.5]
    labels = ["true", "False", "1", "0.0"]
    replay = texts(write([{"prompt": "how?", "completion": f"{i}", "label": label} for i, label in enumerate(labels)]))
    assert replay.tables["singles/label"].tolist() == [True, False, True, False]
    assert "`label` holds 'good'; expected true" in refusal(
        write([{"prompt": "how?", "completion": "a", "label": "good"}])
    )
    long = write([{"prompt": "how?", "chosen": "a" * 200_000, "rejected": "b"}])
    assert texts(long).num_episodes == 3


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("", "holds no rows"),
        ("prompt,chosen,rejected\n", "holds no rows"),
        ("prompt,chosen,rejected\na,b,c\na,b, c, d\n", "line 3 has 4 values for 3 columns"),
        ('prompt,chosen,rejected\na,"b"b,c\n', "line 2 is no row of a table"),
        ('prompt,chosen,rejected\na,"b,c\n', "line 2 is no row of a table"),
        ("prompt,prompt,rejected\na,b,c\n", "has the column 'prompt' twice"),
        (
            "x,push,reward\n-1e-3,2,.5\n",
            "has the columns x, push, reward, all of numbers; expected texts. Steps of",
        ),
        ("x,note\n1,good\n", "has the columns x, note; expected chosen and rejected (pairs)"),
        ("prompt,chosen,rejected\na,,c\n", "`chosen` has no text in 1 row (first: row 0"),
    ],
)
def test_tables_that_are_refused(tmp_path: Path, content: str, words: str) -> None:
    (tmp_path / "a.csv").write_text(content)
    assert words in refusal(tmp_path / "a.csv")


def test_tables_are_no_control_data(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("obs,action\n1,2\n")
    with pytest.raises(UsageError, match=r"is a table of text; expected control data.*numpy.savez"):
        open_source(tmp_path / "a.csv")


@pytest.mark.parametrize(("name", "words"), [("a.jsonl.zst", "Unpack it first"), ("a.xlsx", "Save the sheet as CSV"),
                                             ("a.txt", "Write texts as JSON lines")])  # fmt: skip
def test_other_types_come_with_what_to_do(tmp_path: Path, name: str, words: str) -> None:
    (tmp_path / name).write_text("")
    assert words in refusal(tmp_path / name)


# -- folders and patterns ----------------------------------------------------------------------------------------------


def test_shards_are_read_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    for number in (10, 0, 2):
        put(tmp_path / "set" / f"part-{number}.jsonl", rows_of(str(number)))
    put(tmp_path / "set" / "part-3.jsonl.gz", rows_of("3"))
    for name, expected in (("set", "02310"), ("set/", "02310"), ("set/*.jsonl", "0210"), ("set/part-?.jsonl", "02"),
                           ("**/*.jsonl.gz", "3")):  # fmt: skip
        assert chosen(f"{tmp_path}/{name}") == expected
    replay = texts(tmp_path / "set")
    assert (
        replay.meta["notes"][0]
        == "files read in the order of their names, part-0.jsonl, part-2.jsonl, … part-10.jsonl: 4"
    )
    assert replay.meta["files"] == 4 and len(replay.meta["sha256"]) == 64 and replay.meta["name"] == "set"
    assert resolve(f"{tmp_path}/set/*.jsonl").name == "set" and resolve(f"{tmp_path}/set/part-*.jsonl").name == "part"
    assert resolve(f"{tmp_path}/**/*.jsonl").name == tmp_path.name


def test_parts_by_the_names_of_files_and_folders(tmp_path: Path) -> None:
    for number in range(3):
        put(tmp_path / "hub/data" / f"train-0000{number}-of-00003.parquet", rows_of(f"{number}"))
    put(tmp_path / "hub/data/test-00000-of-00001-1a2b.parquet", rows_of("x"))
    put(tmp_path / "hub/dataset_infos.json", [{}])
    put(tmp_path / "hub/.cache/a.jsonl", rows_of("hidden"))
    put(tmp_path / "flat/train.jsonl", rows_of("a"))
    put(tmp_path / "flat/test.jsonl", rows_of("x"))
    put(tmp_path / "tree/train/0.jsonl", rows_of("a"))
    put(tmp_path / "tree/train/1.jsonl", rows_of("b"))
    put(tmp_path / "tree/test/0.jsonl", rows_of("x"))
    for name, expected in (("hub", "012"), ("hub/data", "012"), ("hub/data/*.parquet", "012"), ("flat", "a"),
                           ("tree", "ab"), ("tree/**/*.jsonl", "ab"), ("hub/data/train-*.parquet", "012")):  # fmt: skip
        replay = texts(f"{tmp_path}/{name}")
        assert chosen(f"{tmp_path}/{name}") == expected
        others = "train-*" not in name
        assert others == ("the split 'train' was read; there are also test (--data.split NAME)" in replay.meta["notes"])
        assert not others or chosen(f"{tmp_path}/{name}", split="test") == "x"
    module = TextData(str(tmp_path / "flat"), eval_data=f"{tmp_path / 'flat'}@test")
    module.bind_tokenizer(made_tokenizer())
    module.load()
    assert module.eval_replay is not None and module.eval_replay.meta["file"] == f"{tmp_path / 'flat'} (test)"
    assert refusal(tmp_path / "flat", split="tset") == (
        f"{tmp_path / 'flat'} has no part 'tset'; it has test, train. Did you mean 'test'? Pass `--data.split NAME`."
    )


def test_one_shard_of_several_and_absent_ones_are_doubted(tmp_path: Path) -> None:
    for number in (0, 2):
        put(tmp_path / f"train-0000{number}-of-00003.parquet", rows_of(f"{number}"))
    (doubt,) = texts(tmp_path / "train-00000-of-00003.parquet").meta["warnings"]
    assert (
        doubt == "train-00000-of-00003.parquet is one of 3 files of a set; 'train-*-of-00003.parquet' reads all of them"
    )
    (doubt,) = texts(tmp_path).meta["warnings"]
    assert "files that are absent" in doubt and doubt.endswith(": 1")


def test_folders_that_are_refused(tmp_path: Path) -> None:
    put(tmp_path / "kinds/a.jsonl", rows_of("a"))
    put(tmp_path / "kinds/b.parquet", rows_of("b"))
    assert "holds files of several kinds (.jsonl, .parquet: a.jsonl, b.parquet)" in refusal(tmp_path / "kinds")
    assert chosen(f"{tmp_path}/kinds/*.jsonl") == "a"
    for name in ("main", "other"):
        put(tmp_path / "sets" / name / "train-00000-of-00001.parquet", rows_of(name))
    assert "holds files in several folders (main, other); expected the files of one set" in refusal(tmp_path / "sets")
    assert chosen(tmp_path / "sets/main") == "main" and chosen(f"{tmp_path}/sets/*/*.parquet") == "mainother"
    for name in ("a_train", "b_train"):
        put(tmp_path / "two" / f"{name}.jsonl", rows_of(name[0]))
    assert "has several parts called 'train'; it has a_train, b_train" in refusal(tmp_path / "two")
    assert chosen(tmp_path / "two", split="b_train") == "b"
    assert "but no file of" in refusal(f"{tmp_path}/kinds/*.jsonl", split="train")
    assert "matches no file; expected texts" in refusal(f"{tmp_path}/kinds/*.json")
    (tmp_path / "a.npz").write_text("")
    assert "matches files of the type .npz; expected texts" in refusal(f"{tmp_path}/*.npz")
    put(tmp_path / "bad/a.jsonl", rows_of("a"))
    (tmp_path / "bad/b.jsonl").write_text("{")
    assert f"{tmp_path / 'bad/b.jsonl'}, line 1 is no JSON" in refusal(tmp_path / "bad")


def test_folders_of_models_and_runs_are_no_texts(tmp_path: Path) -> None:
    for name in ("config.json", "tokenizer.json", "generation_config.json", "model.safetensors.index.json",
                 "versions.json", "metrics.csv", "evals.csv"):  # fmt: skip
        (tmp_path / name).write_text("{}")
    assert "holds no data set" in refusal(tmp_path)


def test_empty_shards_and_names_with_brackets(tmp_path: Path) -> None:
    put(tmp_path / "set/a.jsonl", [])
    assert "holds no rows" in refusal(tmp_path / "set")
    put(tmp_path / "set/b[1].jsonl", rows_of("b"))
    assert chosen(tmp_path / "set") == chosen(tmp_path / "set/b[1].jsonl") == "b"


def test_parts_of_folders_of_datasets_are_said(tmp_path: Path) -> None:
    import datasets

    parts = {name: datasets.Dataset.from_list(rows_of(name)) for name in ("train", "test")}
    datasets.DatasetDict(parts).save_to_disk(tmp_path / "set")
    assert (
        "the split 'train' was read; there are also test (--data.split NAME)" in texts(tmp_path / "set").meta["notes"]
    )
    assert "the split 'train' was read" in sketch(resolve(tmp_path / "set"))


def test_a_damaged_column_is_a_data_fault(tmp_path: Path) -> None:
    """Bytes in an Arrow string that are no UTF-8 show only when the column is read."""
    import pyarrow as pa

    offsets = pa.array([0, 2], pa.int32()).buffers()[1]
    text = pa.Array.from_buffers(pa.string(), 1, [None, offsets, pa.py_buffer(b"q\xff")])
    table = pa.table({"prompt": text, "chosen": ["a"], "rejected": ["b"]})
    with pa.ipc.new_file(str(tmp_path / "a.arrow"), table.schema) as file:
        file.write_table(table)
    assert "a.arrow cannot be read: " in refusal(tmp_path / "a.arrow")
