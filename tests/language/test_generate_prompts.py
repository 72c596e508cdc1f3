"""``generate`` with prompts that have no answers: from files, from problems, and given one by one."""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from made_tokenizers import made_tokenizer
from tiny import make_policy, write_pairs

from offpolicy import generate
from offpolicy.data.texts.problems import MARKED
from offpolicy.errors import DataError, UsageError

TEMPLATE = (  # a turn of the user is put between "a" and "z", with "tool" in front where there are tools
    "{% if tools %}{{ 'tool' }}{% endif %}{% for m in messages %}{{ m.role[0] + ' ' + m.content + ' z' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '=' }}{% endif %}"
)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Policies with a chat template and without, and a run's folder that was trained on plain text."""
    from tokenizers import decoders
    from transformers import AutoTokenizer

    folder = tmp_path_factory.mktemp("prompts")
    for name in ("plain", "chat"):
        make_policy(folder / name)
        tokenizer = AutoTokenizer.from_pretrained(folder / name)
        tokenizer.backend_tokenizer.decoder = decoders.Fuse()
        tokenizer.chat_template = TEMPLATE if name == "chat" else None
        tokenizer.save_pretrained(folder / name)
    write_pairs(folder / "pairs.jsonl")
    turns = [{"role": "user", "content": "how"}, {"role": "assistant", "content": "so"}]
    put(folder / "turns.jsonl", [{"messages": turns}])
    for name, data in (("run", "pairs.jsonl"), ("talk", "turns.jsonl"), ("lost", "nowhere.jsonl")):
        (folder / name).mkdir()
        (folder / name / "config.yaml").write_text(f"model: DPO\ndata:\n  name: {folder / data}\n")
        shutil.copytree(folder / "chat", folder / name / "hf")
    return folder


@pytest.fixture(autouse=True)
def in_home(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(home)


def put(path: Path | str, rows: list[dict[str, Any]]) -> str:
    Path(path).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def answers(*arguments: str) -> list[dict[str, Any]]:
    """The rows that a command writes."""
    common = ["--out", "out.jsonl", "--max_new_tokens", "4", "--num_samples", "2"]
    assert generate.main([*arguments, *common]) == 0
    return [json.loads(line) for line in Path("out.jsonl").read_text().splitlines()]


def asked(*arguments: str) -> list[str]:
    return [row["prompt"] for row in answers(*arguments)]


def test_given_prompts_are_answered_and_shown(capsys: pytest.CaptureFixture[str]) -> None:
    rows = answers("plain", "--prompt", "1 + 1 = ", "--prompt", "2 + 2 = ", "--prompt", "1 + 1 = ")
    assert [row["prompt"] for row in rows] == ["1 + 1 = ", "2 + 2 = "] and "scores" not in rows[0]
    shown = capsys.readouterr().out
    assert "2 prompts, 2 answers each" in shown and "prompts   plain text is put as it is\n" in shown
    for row in rows:
        assert f"  prompt    {row['prompt']}\n  answer    {row['completions'][0]}\n" in shown
    rows = answers("plain", "--prompt", "why")
    shown = capsys.readouterr().out
    assert all(f"  answer    {completion}\n" in shown for completion in rows[0]["completions"])


def test_what_is_shown_is_short_and_steers_no_terminal() -> None:
    rows = [{"prompt": "q" * 3000, "completions": ["a\n\x1b[2Jb", "c" * 3000]}]
    lines = generate.first_answers(rows).split("\n")
    assert lines[1:3] == ["  answer    a", "            \\x1b[2Jb"]
    assert lines[0] == "  prompt    …" + "q" * 1000 and lines[-1] == "  answer    " + "c" * 1000 + "…"


@pytest.mark.parametrize(
    ("run", "options", "expected", "words"),
    [
        ("plain", [], "how", "plain text is put as it is\n"),
        (
            "chat",
            [],
            "u how z=",
            "plain text is a turn of the user in the chat template (--data.chat false changes that)",
        ),
        ("chat", ["--data.chat", "false"], "how", "plain text is put as it is (--data.chat true changes that)"),
        ("run/hf", [], "how", "plain text is put as it is (--data.chat true"),
        ("run/hf", ["--data.chat", "true"], "u how z=", "plain text is a turn of the user"),
        ("talk/hf", [], "u how z=", "plain text is a turn of the user"),
        ("lost/hf", [], "u how z=", "plain text is a turn of the user"),
    ],
)
def test_plain_text_is_put_as_in_training(
    run: str, options: list[str], expected: str, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert asked(run, "--prompt", "how", *options) == [expected]
    assert words in capsys.readouterr().out
    assert asked(run, "--data", put("a.jsonl", [{"prompt": "how"}]), *options) == [expected]


def test_rows_of_prompts_alone() -> None:
    turn = {"role": "user", "content": "how"}
    rows = [
        {"prompt": [turn]},
        {"prompt": {"from": "human", "value": "why"}, "tools": [{"name": "add"}]},
        {"prompt": [{"role": "user", "content": [{"type": "text", "text": "who"}]}]},
        {"prompt": [turn]},
    ]
    assert asked("chat", "--data", put("a.jsonl", rows)) == ["u how z=", "tool" + "u why z=", "u who z="]
    assert asked("chat", "--data", put("a.jsonl", [{"messages": [turn]}])) == ["u how z="]
    assert asked("plain", "--data", put("a.jsonl", [{"q": "how"}]), "--data.columns.prompt", "q") == ["how"]
    assert asked("plain", "--data", put("a.jsonl", [{"prompt": str(i)} for i in range(3)]), "--prompts", "2") == [
        "0",
        "1",
    ]
    assert asked("plain", "--data", "a.jsonl", "--prompts", "0") == ["0", "1", "2"]
    Path("a.csv").write_text("prompt\nhow\nwhy\n")
    assert asked("plain", "--data", "a.csv") == ["how", "why"]
    system = ["--data.columns", '{"system": "s"}']
    assert asked("chat", "--data", put("a.jsonl", [{"prompt": "how", "s": "be"}]), *system) == ["s be zu how z="]
    assert asked("plain", "--data", put("a.jsonl", [{"prompt": "abcdef"}]), "--data.max_prompt_length", "4") == ["def"]


def test_rows_with_answers_are_read_as_before(capsys: pytest.CaptureFixture[str]) -> None:
    rows = answers("plain", "--data", "pairs.jsonl", "--prompts", "3")
    assert len(rows) == 3 and all(row["reference"] for row in rows)
    assert "prompts  " not in capsys.readouterr().out.split("\n")[1]
    assert answers("plain", "--data", put("b.jsonl", [{"prompt": "how", "completion": "so"}]))[0]["reference"] == "so"


def test_problems_are_asked_as_problems(capsys: pytest.CaptureFixture[str]) -> None:
    """With a demonstration as reference, in the words that ask for the number where it stands after ####."""
    rows = [{"question": f"{i} + 1", "answer": f"it is #### {i + 1}"} for i in range(4)]
    found = answers("plain", "--data", put("problems.jsonl", rows), "--prompts", "2")
    assert len(found) == 2 and found[0]["prompt"].startswith("0 + 1") and "step by step" in found[0]["prompt"]
    assert found[0]["reference"].endswith("1") and capsys.readouterr().out


def settings_of(name: str, **others: Any) -> dict[str, Any]:
    return {
        "name": name,
        "template": None,
        "chat": False,
        "max_prompt_length": 512,
        "split": None,
        "columns": None,
        **others,
    }


def texts_of(options: dict[str, Any], *, prompt: list[str] | None = None, data: str | None = None) -> list[str]:
    args = argparse.Namespace(run="nowhere", prompt=prompt, data=data, prompts=0)
    tokenizer = made_tokenizer()
    prompts, _ = generate.find_prompts(args, options, {}, tokenizer)
    return [tokenizer.decode(p.token).removeprefix("<s>") for p in prompts]


def test_prompts_are_put_into_what_the_problems_of_training_were() -> None:
    rows = [{"question": f"{i} + 1", "answer": f"it is #### {i + 1}"} for i in range(4)]
    known = settings_of(put("problems.jsonl", rows))
    assert texts_of(known, prompt=["7 + 1"]) == [MARKED.replace("{prompt}", "7 + 1")]
    assert texts_of(known, data=put("a.jsonl", [{"prompt": "7 + 1"}])) == [MARKED.replace("{prompt}", "7 + 1")]
    assert texts_of(settings_of("problems.jsonl", template="ask {prompt}!"), prompt=["7"]) == ["ask 7!"]
    assert texts_of(settings_of("gone.jsonl"), prompt=["7 + 1"]) == ["7 + 1"]
    plain = settings_of(put("plain.jsonl", [{"question": "7", "answer": "7"}]))
    assert texts_of(plain, prompt=["{prompt}"]) == ["{prompt}"]


@pytest.mark.parametrize(
    ("arguments", "kind", "words"),
    [
        (
            ["--prompt", "a", "--data", "pairs.jsonl"],
            UsageError,
            "--prompt and --data were given; expected one of them",
        ),
        (["--prompt", " "], UsageError, "--prompt has no value; expected a value"),
        (["--prompt", "a\udcff"], UsageError, "holds bytes that are no UTF-8"),
        ([], UsageError, "no prompts are known.*--prompt TEXT"),
        (["--data", "pairs.jsonl", "--data.chat", "true"], UsageError, "--data.chat is for prompts of plain text"),
        (["--data", "other.jsonl"], DataError, "has the columns text; expected chosen and rejected"),
        (["--data", "faulty.jsonl"], DataError, "1 of 3 rows.*`prompt` has no text or turn in 1 row .first: row 1"),
        (["--data", "half.jsonl"], DataError, "`prompt` has half of a surrogate pair.*row 0"),
        (["--data", "talk.jsonl"], DataError, "the data are messages and the tokenizer.*has no chat template"),
        (["--data", "ends.jsonl"], DataError, "`prompt` has a prompt that ends with a turn of the assistant"),
        (["--data", "faulty.jsonl", "--data.columns.prompt", "prmpt"], DataError, "Did you mean 'prompt'"),
    ],
)
def test_mistakes_have_an_answer(arguments: list[str], kind: type[Exception], words: str) -> None:
    put("other.jsonl", [{"text": "a"}])
    put("faulty.jsonl", [{"prompt": "a"}, {"prompt": " "}, {"prompt": "b"}])
    put("half.jsonl", [{"prompt": "a\ud83d"}])
    put("talk.jsonl", [{"prompt": [{"role": "user", "content": "a"}]}])
    put("ends.jsonl", [{"prompt": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}])
    with pytest.raises(kind, match=words) as error:
        generate.main(["plain", *arguments, "--out", "out.jsonl", "--max_new_tokens", "2"])
    assert "\n" not in str(error.value)
    str(error.value).encode()


def test_faulty_prompts_may_be_dropped() -> None:
    rows = [{"prompt": "a"}, {"prompt": None}, {"prompt": "b"}]
    drop = ["--data.on_bad", "drop", "--data.max_bad", "0.5"]
    assert asked("plain", "--data", put("a.jsonl", rows), *drop) == ["a", "b"]
