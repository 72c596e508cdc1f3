"""One place where texts become tokens: BOS, EOS, the boundary between prompt and answer, truncation."""

import copy

import numpy as np
import pytest
from made_tokenizers import KINDS, made_tokenizer

from offpolicy.data.texts.rendering import Row
from offpolicy.data.texts.tokens import CHUNK, Encoded, Limits, encode, fingerprint, load_tokenizer, prompt_ids
from offpolicy.errors import DataError, UsageError


def one(prompt, *answers, kind="byte_level", chat=False, **limits) -> Encoded:
    return next(encode([Row(prompt, answers)], made_tokenizer(kind, chat), Limits(**limits)))


def say(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


TEXTS = [
    ("What is 2 + 2?", " It is 4", " It is 8"),
    ("What is 2 + 2? ", "It is 4", "It is 8"),  # the space at the end merges with the answer
    ("What is 2 + 2?", "It is 4", "yes"),  # nothing between them
    ("yes Hel", "lo there", "p"),  # the boundary inside a word, merged on one side only
    ("why is the sky blue?\n\nAssistant:", " because", " no"),
    ("42", "4", "2"),
]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("texts", TEXTS)
def test_the_tokens_are_those_of_the_whole_text(kind: str, texts: tuple[str, str, str]) -> None:
    """Prompt and answer together are the tokens of the joint text, with one BOS if there is one and one EOS; both
    answers have the same prompt."""
    tokenizer, (prompt, *answers) = made_tokenizer(kind), texts
    row = one(prompt, *answers, kind=kind)
    bos = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    assert not row.fault
    for answer, ids in zip(answers, row.answers):
        joint = tokenizer(prompt + answer, add_special_tokens=False)["input_ids"]
        assert [*row.prompt, *ids] == [*bos, *joint, tokenizer.eos_token_id]
    if bos:
        assert sum(int((part == bos[0]).sum()) for part in (row.prompt, row.answers[0])) == 1
    alone = [*bos, *tokenizer(prompt, add_special_tokens=False)["input_ids"]]
    assert list(row.prompt) == alone[: len(row.prompt)]  # what generation would begin with, or its beginning
    assert row.moved == len(alone) - len(row.prompt)


def test_a_merged_boundary_moves_the_token_to_both_answers() -> None:
    """With a space at the end, byte-level tokens " It" span the boundary; the prompt gives up its space."""
    row, tokenizer = one("What is 2 + 2? ", "It is 4", "It is 8"), made_tokenizer()
    assert row.moved == 1 and row.tail == " "
    assert tokenizer.decode(row.prompt) == "<s>What is 2 + 2?"
    assert [tokenizer.decode(ids) for ids in row.answers] == [" It is 4</s>", " It is 8</s>"]


@pytest.mark.parametrize("kind", KINDS)
def test_bos_and_eos_written_in_the_text_are_not_doubled(kind: str) -> None:
    tokenizer = made_tokenizer(kind)
    bos, eos = tokenizer.bos_token or "", tokenizer.eos_token
    plain = one("Hello there,", " how are you", kind=kind)
    for row in (
        one(f"{bos}Hello there,", f" how are you{eos}", kind=kind),
        one(f"{bos}{bos}Hello there,", f" how are you{eos}{eos}", kind=kind),
    ):
        assert plain.answers[0][-1] == tokenizer.eos_token_id and plain.answers[0][-2] != tokenizer.eos_token_id
        if kind != "metaspace":  # which puts "▁" in front of a text, and elsewhere after a special token
            np.testing.assert_array_equal(row.prompt, plain.prompt)
        np.testing.assert_array_equal(row.answers[0], plain.answers[0])


def test_a_tokenizer_whose_bos_is_its_eos() -> None:
    """As GPT-2's: one at the beginning, one at the end."""
    tokenizer = copy.deepcopy(made_tokenizer())
    tokenizer.bos_token = tokenizer.eos_token
    row, plain = next(encode([Row("What is 2 + 2?", (" It is 4",))], tokenizer)), one("What is 2 + 2?", " It is 4")
    assert [tokenizer.eos_token_id, *plain.prompt[1:]] == row.prompt.tolist()
    assert plain.answers[0].tolist() == row.answers[0].tolist()


@pytest.mark.parametrize("kind", KINDS)
def test_messages_are_what_the_template_writes_and_nothing_more(kind: str) -> None:
    tokenizer = made_tokenizer(kind, chat=True)
    prompt, answer = [say("user", "Hello there")], [say("assistant", "I am fine")]
    row = one(prompt, answer, [say("assistant", "no<|im_end|>")], kind=kind, chat=True)
    whole = tokenizer.apply_chat_template(prompt + answer, tokenize=False)
    assert [*row.prompt, *row.answers[0]] == tokenizer(whole, add_special_tokens=False)["input_ids"]
    start = tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
    assert list(row.prompt) == tokenizer(start, add_special_tokens=False)["input_ids"] and not row.moved
    for ids in row.answers:
        assert (ids == tokenizer.eos_token_id).sum() == 1  # also where the text has it already
    np.testing.assert_array_equal(prompt_ids(prompt, tokenizer), row.prompt)


def test_a_template_that_renders_prompts_differently_is_reported() -> None:
    """Reasoning templates open a block for thoughts that is missing where the answer is known."""
    tokenizer = made_tokenizer("bpe", chat=True)
    usual = tokenizer.chat_template
    try:
        tokenizer.chat_template = usual.replace("assistant\n' }}", "assistant\n' + 'think' }}")
        row = next(
            encode([Row([say("user", "yes")], ([say("assistant", "no")], [say("assistant", "maybe")]))], tokenizer)
        )
    finally:
        tokenizer.chat_template = usual
    assert row.moved and row.tail.strip() == "think"
    assert tokenizer.decode(row.answers[0]).strip().startswith("no")


def test_messages_need_a_template() -> None:
    with pytest.raises(DataError, match="has no chat template; expected one that says how turns are written"):
        one([say("user", "yes")], [say("assistant", "no")])


def test_what_a_template_refuses_is_a_fault_of_the_row() -> None:
    row = one([say("wizard", "yes")], [say("assistant", "no")], chat=True)
    assert row.fault == "template" and row.found == "unknown role wizard"


def test_many_rows_come_in_order_whatever_the_size_of_a_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [Row(f"What is {i} + 2?", (f" It is {i}",)) for i in range(40)]
    tokenizer = made_tokenizer()
    together = list(encode(rows, tokenizer))
    assert CHUNK > 40
    monkeypatch.setattr("offpolicy.data.texts.tokens.CHUNK", 7)
    for a, b in zip(together, encode(rows, tokenizer)):
        np.testing.assert_array_equal(a.prompt, b.prompt)
        np.testing.assert_array_equal(a.answers[0], b.answers[0])


# -- truncation --------------------------------------------------------------------------------------------------------

PROMPT, LONG, SHORT = "What is 2 + 2? " * 6, " It is 4," * 8, " It is 8"


def sizes(row: Encoded) -> tuple[int, ...]:
    return len(row.prompt), *(len(ids) for ids in row.answers)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("truncation", ["prompt_first", "keep_start", "keep_end"])
@pytest.mark.parametrize("max_length", [60, 70, 80, 10_000])
def test_both_sides_keep_the_same_prompt_inside_the_limit(kind: str, truncation: str, max_length: int) -> None:
    """The pieces that remain are pieces of the whole, and the side that decides is the longer one."""
    whole = one(PROMPT, LONG, SHORT, kind=kind, max_length=100_000)
    row = one(PROMPT, LONG, SHORT, kind=kind, max_length=max_length, max_prompt_length=20, truncation=truncation)
    if row.fault:
        assert row.fault == "truncated" and truncation != "prompt_first"
        return
    assert max(sizes(row)[1:]) + len(row.prompt) <= max(max_length, 0)
    for ours, theirs in zip(row.answers, whole.answers):
        np.testing.assert_array_equal(ours, theirs[: len(ours)])
    if kind != "no_bos":
        assert row.prompt[0] == whole.prompt[0]  # BOS stays
    cut = len(row.prompt) < len(whole.prompt)
    assert row.cut_prompt == cut and row.cut_answer == (len(row.answers[0]) < len(whole.answers[0]))
    if truncation == "keep_start":
        assert not cut
    elif cut:
        np.testing.assert_array_equal(row.prompt[1:], whole.prompt[-(len(row.prompt) - 1) :])  # its end
    if truncation == "keep_end":
        assert sizes(row)[1:] == sizes(whole)[1:] and (not cut or len(row.prompt) + len(row.answers[0]) == max_length)
    if truncation == "prompt_first" and cut:
        assert len(row.prompt) == 20


def test_truncation_by_hand() -> None:
    """Prompt <s> + 6 tokens, answers of 5 and 3 with their end; one token per word in this tokenizer's corpus."""
    tokenizer = made_tokenizer()
    prompt, chosen, rejected = " no maybe good bad better rude", " worse helpful kind rude", " kind rude"
    assert sizes(one(prompt, chosen, rejected)) == (7, 5, 3)
    first = one(prompt, chosen, rejected, max_length=8, max_prompt_length=4)
    assert sizes(first) == (4, 4, 3) and tokenizer.decode(first.prompt) == "<s> bad better rude"
    assert tokenizer.eos_token_id not in first.answers[0] and first.answers[1][-1] == tokenizer.eos_token_id
    start = one(prompt, chosen, rejected, max_length=8, truncation="keep_start")
    assert sizes(start) == (7, 1, 1) and not start.cut_prompt and start.cut_answer
    end = one(prompt, chosen, rejected, max_length=8, truncation="keep_end")
    assert sizes(end) == (3, 5, 3) and tokenizer.decode(end.prompt) == "<s> better rude"
    fits = one(prompt, chosen, rejected, max_length=12, max_prompt_length=4)
    assert sizes(fits) == (7, 5, 3)  # nothing is cut from what fits, however long the prompt


@pytest.mark.parametrize(
    ("truncation", "max_length", "fault"),
    [
        ("keep_start", 6, "truncated"),  # the prompt alone fills it
        ("keep_start", 7, "truncated"),
        ("keep_end", 5, "truncated"),  # no prompt would be left
        ("keep_end", 3, "truncated"),
        ("prompt_first", 3, "identical_cut"),  # the answers part later
    ],
)
def test_what_truncation_destroys_is_a_fault(truncation: str, max_length: int, fault: str) -> None:
    answers = " worse helpful kind rude", " worse helpful kind better"
    row = one(
        " no maybe good bad better rude", *answers, max_length=max_length, max_prompt_length=2, truncation=truncation
    )
    assert row.fault == fault and row.found


def test_other_faults_that_only_tokens_show() -> None:
    assert one("Hello", "</s>", " yes").fault == "empty"
    assert one("Hello", " yes", " yes</s>").fault == "identical"
    assert one("", " yes", " no").fault == ""  # BOS stands for the prompt
    assert one("", " yes", " no", kind="no_bos").fault == "no_prompt_token"
    assert one("Hel", "lo there", "p", kind="no_bos").fault == "no_prompt_token"  # all of it merges with an answer


def test_prompts_may_take_half_unless_told() -> None:
    assert Limits(max_length=100).max_prompt_length == 50


@pytest.mark.parametrize(
    ("limits", "words"),
    [
        ({"truncation": "middle"}, "`truncation` is 'middle'; expected one of prompt_first, keep_start, keep_end"),
        ({"max_length": 1}, "`data.max_length` is 1"),
        ({"max_length": 10, "max_prompt_length": 10}, "expected a value in [1, max_length)"),
    ],
)
def test_impossible_limits(limits: dict, words: str) -> None:
    with pytest.raises(UsageError) as error:
        Limits(**limits)
    assert words in str(error.value)


# -- tokenizers --------------------------------------------------------------------------------------------------------


def test_a_saved_tokenizer_has_the_same_fingerprint_and_others_do_not(tmp_path) -> None:
    made_tokenizer().save_pretrained(tmp_path)
    loaded = load_tokenizer(str(tmp_path))
    assert fingerprint(loaded) == fingerprint(made_tokenizer())
    loaded(["a", "b c"], padding=True, truncation=True, max_length=2)  # leaves traces in the state
    assert fingerprint(loaded) == fingerprint(made_tokenizer())
    prints = {fingerprint(made_tokenizer(kind, chat)) for kind in KINDS for chat in (False, True)}
    assert len(prints) == 2 * len(KINDS)


def test_no_tokenizer_there(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(DataError, match=r"no tokenizer could be loaded from .*Pass `--data.tokenizer DIR`"):
        load_tokenizer(str(tmp_path))
