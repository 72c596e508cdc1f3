"""What ends an answer under the chat templates that people bring, and what is said where nothing does."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
from made_tokenizers import made_tokenizer

from offpolicy.data.texts.problems import open_problems
from offpolicy.data.texts.sequences import token_ids
from offpolicy.data.texts.stops import stop_ids, turn_end
from offpolicy.language.generation import unended

START = "{% for m in messages %}"
TURN = "{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
ALTERNATE = (
    "{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}"
)
KNOWN = {
    "chatml": (START + TURN, "<|im_end|>"),
    "gemma": (
        ALTERNATE + "{{ '<start>' + m['role'] + '\n' + m['content'] | trim + '<turn_end>\n' }}{% endfor %}",
        "<turn_end>",
    ),
    "llama": (START + "{{ m['role'] + '\n\n' + m['content'] | trim + '<turn_end>' }}{% endfor %}", "<turn_end>"),
    "phi": (
        START + "{{ m['role'] + '\n' + m['content'] + '<turn_end>\n' }}{% endfor %}"
        "{% if not add_generation_prompt %}{{ eos_token }}{% endif %}",
        "<turn_end>",
    ),
    "eos": (START + "{{ m['role'] + ': ' + m['content'] + ' ' + eos_token }}{% endfor %}", "</s>"),
    "text and eos": (START + "{{ m['content'] + ' [over]\n' + eos_token }}{% endfor %}", "</s>"),
    "parts": (START + "{% for p in m['content'] %}{{ p['text'] }}{% endfor %}<|im_end|>{% endfor %}", "<|im_end|>"),
    "system": (
        "{% if messages[0]['role'] != 'system' %}{{ raise_exception('no system') }}{% endif %}" + START + TURN,
        "<|im_end|>",
    ),
    "thoughts": (START + "{{ '<think>\n\n</think>\n\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}", "<|im_end|>"),
}
DOUBTFUL = {
    "none": (START + "{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}", "no end of turn"),
    "text": (START + "{{ m['content'] + ' ### End\n' }}{% endfor %}", "'### End', which is text of .* turn's end"),
    "several tokens": (START + "{{ m['content'] + '<|stop|>' }}{% endfor %}", "'<|stop|>', which is text of"),
    "refuses": ("{{ raise_exception('never') }}", "end of turn .* not known .*never"),
    "silent": (START + "{{ m['role'] }}{% endfor %}", "end of turn .* not known"),
}


def tokenizer(template: str, special: bool = True) -> Any:
    made = copy.deepcopy(made_tokenizer("byte_level"))
    made = type(made)(tokenizer_object=made._tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>")
    made.add_tokens(["<turn_end>"], special_tokens=special)
    made.chat_template = template
    return made


class Model:
    generation_config = type("Settings", (), {"eos_token_id": [7, 9]})


@pytest.mark.parametrize("kind", KNOWN)
@pytest.mark.parametrize("special", [True, False])
def test_the_end_of_a_turn(kind: str, special: bool) -> None:
    template, mark = KNOWN[kind]
    made = tokenizer(template, special)
    assert turn_end(made) == (made.convert_tokens_to_ids(mark), "")
    assert stop_ids(Model(), made) == sorted({2, 7, 9, made.convert_tokens_to_ids(mark)})  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", DOUBTFUL)
def test_doubts(kind: str) -> None:
    import re

    template, said = DOUBTFUL[kind]
    found = turn_end(tokenizer(template))
    assert found.token is None
    assert re.search(said.replace("|", r"\|"), found.doubt)
    assert stop_ids(Model(), tokenizer(template)) == [2, 7, 9]  # type: ignore[arg-type]


def test_without_a_template() -> None:
    assert turn_end(made_tokenizer("byte_level")) == (None, "")


def test_demonstrations_end_as_answers_do(tmp_path: Path) -> None:
    """To a conversation with the turn's end, to plain text with EOS; a doubt stands in the report."""
    rows = [
        '{"prompt": [{"role": "user", "content": "2+2"}], "answer": "4", "solution": "4"}',
        '{"prompt": [{"role": "user", "content": "3+3"}], "answer": "6", "solution": "6"}',
    ]
    file = tmp_path / "talk.jsonl"
    file.write_text("\n".join(rows))
    made = tokenizer(KNOWN["chatml"][0])
    replay = open_problems(str(file), tokenizer=made)
    ends = [token_ids(replay, row)[-1] for row in replay.tables["problems"][:, 1]]
    assert ends == [made.convert_tokens_to_ids("<|im_end|>")] * 2
    plain = tmp_path / "plain.jsonl"
    plain.write_text('{"prompt": "2+2", "answer": "4", "solution": "4"}\n')
    replay = open_problems(str(plain), tokenizer=made)
    assert token_ids(replay, replay.tables["problems"][0, 1])[-1] == 2
    doubtful = open_problems(str(file), tokenizer=tokenizer(DOUBTFUL["text"][0]))
    assert any("turn's end" in text for text in doubtful.meta["warnings"])
    assert not any("turn" in text for text in replay.meta["warnings"])


def test_the_text_of_an_answer_has_no_stop() -> None:
    import numpy as np

    assert unended(np.array([5, 6, 4]), [2, 4]).tolist() == [5, 6]
    assert unended(np.array([5, 4, 6]), [2, 4]).tolist() == [5, 4, 6]
    assert unended(np.array([], dtype=np.int64), [2]).tolist() == []
