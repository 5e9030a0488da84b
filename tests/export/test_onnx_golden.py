"""Every golden case through every layout, operator set and floating-point type."""

import numpy as np
import pytest
from helpers.onnx_cases import GOLDEN, LAYOUTS, OPERATORS, GenericRuntime, batches
from hypothesis import given, settings
from hypothesis import strategies as st
from parscale_export import OnnxModel, export_onnx

TOLERANCE = {"fp32": 1e-4, "fp16": 0.05}


def far(actual, expected) -> float:
    assert actual.shape == expected.shape
    return float(np.abs(actual - expected).max())


def test_logits_of_whole_sequences(exported):
    for batch in batches(exported.case):
        for i, prompt in enumerate(batch.prompts):
            tokens = prompt + batch.tokens[i].tolist()
            logits = exported.model.logits(tokens)
            assert logits.dtype == np.float32
            expected = np.concatenate([batch.logits[i, -len(prompt) :], batch.token_logits[i]])
            assert far(logits, expected) < TOLERANCE[exported.precision]


def test_greedy_tokens_one_by_one_and_in_ragged_batches(exported):
    for batch in batches(exported.case):
        assert exported.model.generate(batch.prompts, max_tokens=12) == batch.tokens.tolist()
        for prompt, tokens in zip(batch.prompts, batch.tokens.tolist(), strict=True):
            assert exported.model.generate([prompt], max_tokens=12) == [tokens]


@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_batches_in_a_generic_runtime(exported, side):
    runtime = GenericRuntime(exported.model.file)
    tolerance = TOLERANCE[exported.precision]
    for batch in batches(exported.case):
        ids, mask, expected = batch.ids, batch.mask, batch.logits
        if side == "right":
            shifts = mask.argmax(1)
            ids, mask, expected = (
                np.stack([np.roll(row, -s, axis=0) for row, s in zip(a, shifts, strict=True)])
                for a in (ids, mask, expected)
            )
        logits = runtime.start(exported.rows(len(ids))).step(ids, mask)
        assert far(logits[mask == 1], expected[mask == 1]) < tolerance
        for i in range(batch.tokens.shape[1]):
            logits = runtime.step(batch.tokens[:, i : i + 1])
            assert far(logits[:, 0], batch.token_logits[:, i]) < tolerance


def test_token_by_token(exported):
    runtime = GenericRuntime(exported.model.file)
    batch = batches(exported.case)[0]
    runtime.start(exported.rows(1))
    steps = [runtime.step([[token]])[0, 0] for token in batch.prompts[0]]
    assert far(np.stack(steps), batch.logits[0]) < TOLERANCE[exported.precision]


@pytest.mark.parametrize("chunk", [1, 3, 5])
def test_prefill_in_chunks(exported, chunk):
    if exported.kv_layout == "batch" and exported.ops == "fused" and exported.streams > 1:
        pytest.skip("GroupQueryAttention takes no chunks when streams are rows")
    model = OnnxModel(exported.folder, prefill_chunk=chunk)
    for batch in batches(exported.case):
        prompt = batch.prompts[-1]
        logits = model.logits(prompt)
        assert far(logits, batch.logits[-1, -len(prompt) :]) < TOLERANCE[exported.precision]
        assert model.generate([prompt], max_tokens=12)[0] == batch.tokens[-1].tolist()
        assert model.generate(batch.prompts, max_tokens=12) == batch.tokens.tolist()


def test_weights_of_the_streams_are_smoothed_and_sum_to_one(exported):
    batch = batches(exported.case)[0]
    tokens = list(exported.model.stream(batch.prompts[:1], max_tokens=3))
    for token in tokens:
        assert token.streams.shape == (exported.streams,)
        assert token.streams.sum() == pytest.approx(1, abs=1e-6)
        assert token.streams.min() > 0.0099 / exported.streams


@pytest.mark.parametrize("kv_layout", LAYOUTS)
@pytest.mark.parametrize("ops", OPERATORS)
@pytest.mark.parametrize("side", ["left", "right"])
def test_last_logits_alone_are_the_last_of_all(tmp_path, kv_layout, ops, side):
    folder = export_onnx(GOLDEN / "p4", tmp_path / "out", kv_layout=kv_layout, ops=ops)
    model = OnnxModel(folder)
    runtime = GenericRuntime(model.file)
    for batch in batches("p4"):
        ids, mask = batch.ids, batch.mask
        if side == "right":
            shifts = mask.argmax(1)
            ids, mask = (
                np.stack([np.roll(row, -s) for row, s in zip(a, shifts, strict=True)])
                for a in (ids, mask)
            )
        rows = len(ids) * (4 if kv_layout == "batch" else 1)
        logits = runtime.start(rows).step(ids, mask)
        assert far(logits[:, 0], batch.logits[:, -1]) < 1e-4
        assert model.generate(batch.prompts, max_tokens=12) == batch.tokens.tolist()
    with pytest.raises(ValueError, match="all_logits"):
        model.logits([1, 2])


@pytest.fixture(scope="module", params=[(k, o) for k in LAYOUTS for o in OPERATORS], ids="-".join)
def runtime(request, tmp_path_factory) -> tuple[GenericRuntime, int]:
    """P=4 in a runtime of others, and how many rows of its cache a sequence has."""
    kv_layout, ops = request.param
    folder = tmp_path_factory.mktemp("padding") / "out"
    export_onnx(GOLDEN / "p4", folder, kv_layout=kv_layout, ops=ops, all_logits=True)
    return GenericRuntime(folder / "model.onnx"), 4 if kv_layout == "batch" else 1


TOKENS = st.lists(st.integers(0, 319), min_size=1, max_size=12)


@settings(max_examples=10, deadline=None)
@given(rows=st.lists(st.tuples(TOKENS, st.integers(0, 4)), min_size=1, max_size=4), data=st.data())
def test_padding_of_any_kind_on_any_side_changes_nothing(runtime, rows, data):
    runtime, cache_rows = runtime
    length = max(len(tokens) + left for tokens, left in rows)
    padding = data.draw(st.integers(0, 319))
    ids, mask = np.full((len(rows), length), padding), np.zeros((len(rows), length), np.int64)
    for n, (tokens, left) in enumerate(rows):
        ids[n, left : left + len(tokens)] = tokens
        mask[n, left : left + len(tokens)] = 1
    following = np.array([data.draw(st.integers(0, 319)) for _ in rows])[:, None]
    runtime.start(len(rows) * cache_rows)
    logits, then = runtime.step(ids, mask), runtime.step(following)
    for n, (tokens, _) in enumerate(rows):
        alone = runtime.start(cache_rows).step([[*tokens, following[n, 0]]])[0]
        assert far(np.concatenate([logits[n][mask[n] == 1], then[n]]), alone) < 1e-4
