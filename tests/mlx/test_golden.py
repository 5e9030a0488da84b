"""Every golden case through every way of running the model."""

import mlx.core as mx
import pytest
from helpers.golden_cases import TOLERANCE, difference
from mlx_lm.generate import BatchGenerator, generate_step


def follow_greedy(model, cache, last_logits, row):
    """Feed the greedy tokens one by one; each must be the argmax, each step's logits right."""
    for i, token in enumerate(row.greedy_tokens):
        assert mx.argmax(last_logits).item() == token
        last_logits = model(mx.array([[token]]), cache=cache)[0, -1]
        assert difference(last_logits, row.greedy_logits[i]) < TOLERANCE


def test_whole_forward_without_a_cache(golden):
    for row in golden.rows:
        assert difference(golden.model(mx.array([row.ids]))[0], row.logits) < TOLERANCE


@pytest.mark.parametrize("chunk", [1, 2, 3, 7, 1000])
def test_prefill_in_chunks_then_greedy_decode(golden, chunk):
    for row in golden.rows:
        cache = golden.model.make_cache()
        logits = [
            golden.model(mx.array([row.ids[i : i + chunk]]), cache=cache)[0]
            for i in range(0, len(row.ids), chunk)
        ]
        assert difference(mx.concatenate(logits), row.logits) < TOLERANCE
        follow_greedy(golden.model, cache, logits[-1][-1], row)


def test_a_batch_of_equal_lengths_on_fresh_caches(golden):
    # What mlx-lm's evaluation does: a whole batch into make_prompt_cache's caches.
    row = golden.rows[0]
    logits = golden.model(mx.array([row.ids] * 3), cache=golden.model.make_cache())
    for sequence in logits:
        assert difference(sequence, row.logits) < TOLERANCE
    for sequence in golden.model(mx.array([row.ids] * 3)):
        assert difference(sequence, row.logits) < TOLERANCE


def test_generate_step(golden):
    for row in golden.rows:
        steps = generate_step(mx.array(row.ids), golden.model, max_tokens=12, prefill_step_size=5)
        assert [token for token, _ in steps] == row.greedy_tokens


def test_continuous_batching_of_ragged_prompts(golden):
    # More prompts than places, so that sequences of other lengths join and leave midway.
    rows = golden.rows * 2
    generator = BatchGenerator(
        golden.model, completion_batch_size=3, prefill_batch_size=2, prefill_step_size=4
    )
    lengths = [12 - i % 4 for i in range(len(rows))]
    uids = generator.insert([row.ids for row in rows], lengths)
    tokens = {uid: [] for uid in uids}
    while responses := generator.next_generated():
        for r in responses:
            row = rows[uids.index(r.uid)]
            step = len(tokens[r.uid])
            if step > 0:
                logits = row.greedy_logits[step - 1]
                assert difference(r.logprobs, logits - mx.logsumexp(logits)) < TOLERANCE
            tokens[r.uid].append(r.token)
    for uid, row, length in zip(uids, rows, lengths, strict=True):
        assert tokens[uid] == row.greedy_tokens[:length]
