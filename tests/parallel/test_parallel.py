"""Two and four processes over MLX's ring: one model's tokens, its memory and its traffic."""

import sys

import pytest
from helpers import rank_jobs
from helpers.golden_cases import TOLERANCE, load_golden
from helpers.rank_processes import run_ranks


@pytest.mark.parametrize(
    ("count", "case", "mode", "rows", "tokens"),
    [
        (2, "p4", "streams", 6, 12),
        (2, "p4", "tensor", 1, 12),
        (2, "p8-short-prefix", "streams", 4, 12),
        (2, "p2-tied-sharded", "streams", 3, 12),
        (2, "p2-tied-sharded", "2x1", 1, 3),
        (2, "p1", "tensor", 1, 6),
        (4, "p4", "streams", 2, 12),
        (4, "p8-short-prefix", "streams", 2, 12),
        (4, "p2-tied-sharded", "streams", 1, 4),
        (4, "p4", "2x2", 1, 4),
    ],
)
def test_golden_cases(count, case, mode, rows, tokens):
    for outcome in run_ranks(count, rank_jobs.follow_golden, case, mode, rows, tokens):
        assert outcome.exit_code == 0, outcome.err
        assert len(outcome.result) == rows
        for row in outcome.result:
            assert row["greedy"]
            assert row["difference"] < TOLERANCE


@pytest.mark.parametrize(
    ("mode", "bits", "changes"),
    [
        ("streams", 4, {}),
        ("tensor", 0, {"attention_bias": True, "mlp_bias": True}),
        ("tensor", 4, {}),
        ("tensor", 8, {"parscale_n": 1}),
    ],
)
def test_biases_and_quantised_weights(mode, bits, changes):
    for outcome in run_ranks(2, rank_jobs.share_random_model, mode, bits, changes):
        far, error = outcome.result
        assert error == ""
        assert far < 1e-5


def test_quantised_groups_that_cannot_be_shared():
    changes = {"intermediate_size": 32 * 5}
    for outcome in run_ranks(2, rank_jobs.share_random_model, "tensor", 4, changes):
        assert outcome.result[1].endswith("it is quantised in 5 groups of 32")


@pytest.fixture(scope="module", params=["streams", "tensor"])
def two_ranks_of_p4(request):
    outcomes = run_ranks(2, rank_jobs.measure, "p4", request.param)
    return request.param, [outcome.result for outcome in outcomes]


def test_caches_and_prefixes_are_shared_out(two_ranks_of_p4):
    mode, shares = two_ranks_of_p4
    alone = rank_jobs.sizes(load_golden("p4").model)
    for share in shares:
        assert share["caches"] * 2 == alone["caches"]
        assert share["prefixes"] * 2 == alone["prefixes"]
        if mode == "streams":
            assert share["layers"] == alone["layers"]
        else:  # the norms stay whole
            assert 0.5 < share["layers"] / alone["layers"] < 0.51


needs_linux = pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells bytes sent")


@needs_linux
def test_bytes_that_two_ranks_send_for_a_token(two_ranks_of_p4):
    mode, shares = two_ranks_of_p4
    hidden, layers, P = 64 * 4, 3, 4
    # A gather of half the streams; or two sums a layer over all of them, and rank 0's token.
    expected = P // 2 * hidden if mode == "streams" else layers * 2 * P * hidden + 4
    for share in shares:
        assert share["formula"] == expected and is_about(share["sent"], expected)


@needs_linux
def test_bytes_that_four_ranks_send_for_a_token():
    hidden, layers, P = 64 * 4, 3, 4
    # Each of the two ranks with the same streams gathers half a hidden state of them.
    expected = 3 * (P // 2) * hidden // 2 + layers * 2 * (2 * 3) * P * hidden // 4 + 3 * 4
    for outcome in run_ranks(4, rank_jobs.measure, "p4", "2x2", 2):
        assert outcome.result["formula"] == expected
        assert is_about(outcome.result["sent"], expected)


@needs_linux
def test_streams_exchange_nothing_in_a_prefill(two_ranks_of_p4):
    mode, shares = two_ranks_of_p4
    for share in shares:
        assert (share["prefill"] == 0) == (mode == "streams")


def is_about(sent: float, expected: int) -> bool:
    # Linux also counts the single bytes with which it tries a receiver that is behind.
    return 0 <= sent - expected < 16


UNSHAREABLE = {
    ("p4", "streams"): "4 streams cannot be shared by 3 ranks: start 1, 2, 4 or a multiple of 4",
    ("p2-tied-sharded", "streams"): "2 streams cannot be shared by 3 ranks",
    ("p4", "tensor"): "a layer cannot be shared by 3 ranks: its num_key_value_heads is 2",
    ("p4", "2x2"): "2x2 takes 4 ranks, but there are 3",
    ("p4", "3x1"): "4 streams cannot be shared out in 3 shares",
}


def test_models_that_cannot_be_shared():
    for outcome in run_ranks(3, rank_jobs.errors_of_plans, list(UNSHAREABLE)):
        for error, message in zip(outcome.result, UNSHAREABLE.values(), strict=True):
            assert message in error


def test_ranks_that_differ_are_told_apart_on_every_rank():
    facts = [{"adapter": "a", "type": "x"}, {"adapter": "a", "type": "x"}, {"adapter": "b"}]
    for outcome in run_ranks(3, rank_jobs.compare_facts, facts):
        assert outcome.result == "rank 2 differs from rank 0: its adapter is b, not a"


@pytest.mark.parametrize("differing", [False, True])
def test_every_rank_takes_the_same_tokens_and_random_numbers(differing):
    outcomes = run_ranks(2, rank_jobs.tokens_of_rank_0, differing)
    (tokens, number), (others, other_number) = (outcome.result for outcome in outcomes)
    assert tokens == [[0, 2], [0, 2]]
    assert others == (tokens if differing else [[1, 2], [1, 2]])
    assert number == other_number
