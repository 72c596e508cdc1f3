"""Views of language data: batches of texts gathered from the index tables."""

import numpy as np
import pytest
import torch

from offpolicy.data.replay import Replay
from offpolicy.data.texts.sequences import Pairs, PairView, Ragged, Singles, SingleView
from offpolicy.errors import DataError

TEXTS = [[1, 2, 3], [4], [5, 6], [7, 8, 9, 10], [11, 12]]
PAIRS = np.array([[0, 1, 0, 2], [3, 2, 3, 4], [0, 4, 3, 1]])


def texts(**tables: np.ndarray) -> Replay:
    """Five texts laid out backwards, so that nothing depends on their order in the column."""
    length = np.array([len(t) for t in TEXTS])
    start = (np.cumsum(length[::-1]) - length[::-1])[::-1]
    token = np.array([i for t in reversed(TEXTS) for i in t], dtype=np.uint16)
    return Replay(
        {"token": token}, start=start, length=length, tables={k.replace("__", "/"): v for k, v in tables.items()}
    )


def lists(ragged: Ragged) -> list[list[int]]:
    return [part.tolist() for part in ragged.token.split(ragged.length.tolist())]


def named(column: int, rows: list[int], table: np.ndarray = PAIRS) -> list[list[int]]:
    return [TEXTS[episode] for episode in table[rows][:, column]]


@pytest.mark.parametrize("rows", [[0], [2, 0, 1], [1, 1, 0], []])
def test_pairs_are_gathered_in_any_order(rows: list[int]) -> None:
    score = np.array([0.5, 1.5, 2.5], dtype=np.float32)
    bound = PairView().bind(texts(pairs=PAIRS, pairs__score_chosen=score, pairs__id=np.array(["a", "b", "c"])))
    batch = bound.gather(np.array(rows, dtype=np.int64))
    assert isinstance(batch, Pairs) and len(bound) == 3
    assert [lists(part) for part in batch[:4]] == [named(column, rows) for column in range(4)]
    assert batch.row.tolist() == rows and batch.chosen.token.dtype == batch.chosen.length.dtype == torch.int64
    assert list(batch.facts) == ["score_chosen"]  # text has no tensor
    assert batch.facts["score_chosen"].tolist() == score[rows].tolist()
    np.testing.assert_array_equal(bound.lengths, [[3, 1, 3, 2], [4, 2, 4, 2], [3, 2, 4, 1]])


def test_rows_may_be_a_tensor() -> None:
    bound = PairView().bind(texts(pairs=PAIRS))
    assert lists(bound.gather(torch.tensor([1, 2])).rejected) == named(3, [1, 2])


def test_singles() -> None:
    table, label = np.array([[0, 1], [3, 2]]), np.array([True, False])
    batch = SingleView().bind(texts(singles=table, singles__label=label)).gather(np.array([1, 0]))
    assert isinstance(batch, Singles) and batch.facts["label"].tolist() == [False, True]
    assert lists(batch.prompt) == named(0, [1, 0], table) and lists(batch.answer) == named(1, [1, 0], table)


def test_singles_of_pairs() -> None:
    """Only the chosen answers, or both with a label, each under the prompt of its own side."""
    chosen = SingleView().bind(texts(pairs=PAIRS)).gather(np.arange(3))
    assert lists(chosen.prompt) == named(0, [0, 1, 2]) and lists(chosen.answer) == named(1, [0, 1, 2])
    assert chosen.facts["label"].all()
    both = SingleView(rejected=True).bind(texts(pairs=PAIRS)).gather(np.arange(6))
    assert lists(both.answer)[::2] == named(1, [0, 1, 2]) and lists(both.answer)[1::2] == named(3, [0, 1, 2])
    assert lists(both.prompt)[1::2] == named(2, [0, 1, 2]) and both.facts["label"].tolist() == [True, False] * 3


def test_views_of_what_is_not_there() -> None:
    with pytest.raises(DataError, match="the data have single answers and no pairs"):
        PairView().bind(texts(singles=np.array([[0, 1]])))
    for view in (PairView(), SingleView()):
        with pytest.raises(DataError, match="no row to train on"):
            view.bind(texts(pairs=PAIRS[:0]))
        with pytest.raises(DataError, match="no texts"):
            view.bind(texts())


def test_tables_survive_the_disk_and_count_in_the_fingerprint(tmp_path) -> None:
    first, other = texts(pairs=PAIRS), texts(pairs=PAIRS[:, [0, 3, 2, 1]])
    assert first.fingerprint() != other.fingerprint()
    again = Replay.load(first.save(tmp_path / "a"))
    np.testing.assert_array_equal(again.tables["pairs"], PAIRS)
    mapped = PairView().bind(again).gather(np.array([2, 0]))
    assert again.is_mapped and lists(mapped.chosen) == named(1, [2, 0])
