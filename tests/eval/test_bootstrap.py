"""Confidence intervals over documents: known values, coverage in simulation, and pairs."""

from __future__ import annotations

import math

import numpy as np
import pytest

from lrt.eval.bootstrap import BLOCKS, DocumentScores, compare_scores, interval, paired_interval


def documents(generator, count, *, rate=0.7, shift=0.0):
    """Documents of uneven length whose nats per byte vary around ``rate``;
    a second model is ``shift`` better on average."""
    sizes = 1 + generator.geometric(1 / 300, size=count)
    hardness = rate + 0.15 * generator.standard_normal(count)
    first = hardness * sizes
    second = (hardness - shift + 0.02 * generator.standard_normal(count)) * sizes
    return first, second, sizes


def test_value_is_total_nats_over_total_bytes():
    found = interval(np.array([3.0, 5.0]), np.array([4, 8]))
    assert found.value == pytest.approx(8 / (12 * math.log(2)))
    assert found.low <= found.value <= found.high
    assert found.low == pytest.approx(5 / (8 * math.log(2))) and found.high == pytest.approx(3 / (4 * math.log(2)))


def test_fewer_than_two_documents_have_no_interval():
    found = interval(np.array([3.0, 0.0]), np.array([4, 0]))  # a document of no bytes is not counted
    assert found.value == pytest.approx(3 / (4 * math.log(2))) and math.isnan(found.low) and math.isnan(found.high)
    assert math.isnan(interval(np.zeros(0), np.zeros(0)).value)


def test_intervals_hold_the_true_value_as_often_as_they_say():
    generator = np.random.default_rng(1)
    truth, difference, held, held_pairs, trials = 0.7 / math.log(2), -0.01 / math.log(2), 0, 0, 300
    for trial in range(trials):
        first, second, sizes = documents(generator, 120, shift=0.01)
        one = interval(first, sizes, draws=400, seed=trial)
        pair = paired_interval(first, second, sizes, draws=400, seed=trial)
        held += one.low <= truth <= one.high
        held_pairs += pair.low <= difference <= pair.high
    # Three standard deviations of a binomial with 300 trials are 0.038.
    assert 0.90 <= held / trials <= 0.985 and 0.90 <= held_pairs / trials <= 0.985


def test_pairs_see_a_difference_that_single_intervals_hide():
    first, second, sizes = documents(np.random.default_rng(2), 150, shift=0.01)
    one, other, pair = interval(first, sizes), interval(second, sizes), paired_interval(first, second, sizes)
    assert one.low < other.high and other.low < one.high
    assert pair.high < 0 and pair.high - pair.low < 0.3 * (one.high - one.low)


def test_blocks_change_neither_value_nor_width():
    first, _, sizes = documents(np.random.default_rng(3), 4 * BLOCKS)
    many = interval(first, sizes, draws=300)
    deviation = (first - first.sum() / sizes.sum() * sizes).std() * math.sqrt(len(sizes)) / (math.log(2) * sizes.sum())
    assert many.value == pytest.approx(first.sum() / (math.log(2) * sizes.sum()))
    assert (many.high - many.low) / (2 * 1.96 * deviation) == pytest.approx(1, abs=0.15)


def scores(data="abc", index=(0, 1, 2), sizes=(10, 20, 30), nats=(5.0, 9.0, 16.0), mode="decode"):
    return DocumentScores(data, np.array(index), np.array(sizes), {mode: np.array(nats)})


def test_two_models_compare_over_the_documents_that_both_scored_whole(tmp_path):
    other = scores(index=(1, 2, 7), sizes=(20, 25, 9), nats=(8.0, 10.0, 1.0))  # document 2 was cut, document 7 is new
    found = compare_scores(scores(), DocumentScores.load(other.save(tmp_path / "new" / "scores.npz")), mode="decode")
    assert found.value == pytest.approx((8 - 9) / (20 * math.log(2)))


@pytest.mark.parametrize(
    "other, message",
    [
        (scores(data="xyz"), "different data"),
        (scores(mode="zero"), "memory mode decode was not scored"),
        (scores(index=(7, 8, 9)), "no document alike"),
    ],
)
def test_what_cannot_be_compared_is_refused(other, message):
    with pytest.raises(ValueError, match=message):
        compare_scores(scores(), other, mode="decode")


def test_other_files_are_no_scores(tmp_path):
    for name, content in (("text.npz", b"hello"), ("empty.npz", b"")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match="holds no scores of documents"):
            DocumentScores.load(tmp_path / name)
    with pytest.raises(ValueError, match="missing.npz holds no scores"):
        DocumentScores.load(tmp_path / "missing.npz")
