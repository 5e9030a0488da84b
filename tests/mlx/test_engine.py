"""The engine against the published code's golden answers and mlx-lm's own generators."""

import json
import shutil
import time
from dataclasses import replace

from parscale_mlx.engine import CacheOptions, MlxEngine, open_engine
from parscale_mlx.engine.sampling import make_sampler as our_sampler

import mlx.core as mx
import numpy as np
import pytest
from helpers.byte_tokenizers import BYTES, SCRIPTS, decoded
from helpers.golden_cases import GOLDEN, load_golden
from helpers.tiny_models import write_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from mlx_lm import stream_generate
from mlx_lm.sample_utils import make_logits_processors, make_sampler
from mlx_lm.tokenizer_utils import TokenizerWrapper
from parscale_core.engine import Request, Sampling, grammar

TWELVE = Sampling(max_tokens=12)


@pytest.fixture(scope="module")
def p2():
    return load_golden("p2-tied-sharded")


@pytest.fixture(scope="module")
def engine(p4, p2):
    """Two models that are not over one backbone, as no user has them: so none is mistaken."""
    engine = MlxEngine({4: p4.model, 2: p2.model}, BYTES, draft_model=p2.model)
    yield engine
    engine.close()


def tokens(handle) -> list[int]:
    return [piece.token for piece in handle]


def text(pieces) -> str:
    return "".join(piece.text for piece in pieces)


def requests(case, **fields) -> list[Request]:
    fields = {"sampling": TWELVE, "ignore_end": True} | fields
    return [Request(row.ids, **fields) for row in case.rows]


def test_greedy_answers_of_a_batch_are_the_golden_ones(golden):
    engine = MlxEngine({golden.model.args.streams: golden.model}, BYTES)
    handles = [engine.submit(request) for request in requests(golden)]
    assert [tokens(h) for h in handles] == [row.greedy_tokens for row in golden.rows]
    engine.close()


def test_models_of_different_streams_side_by_side(engine, p4, p2):
    asked = [*requests(p4, streams=4), *requests(p2, streams=2)]
    expected = [row.greedy_tokens for row in (*p4.rows, *p2.rows)]
    assert [tokens(h) for h in [engine.submit(r) for r in asked]] == expected


@pytest.mark.parametrize("draft", [None, "ngram", "model", 2])
def test_logprobs_and_stream_weights(engine, p4, draft):
    sampling = replace(TWELVE, repetition_penalty=1.0, logit_bias={0: -1.0})
    options = dict(sampling=sampling, logprobs=3, stream_weights=True, draft=draft)
    for row, request in zip(p4.rows, requests(p4, **options), strict=True):
        pieces = list(engine.submit(request))
        assert [piece.token for piece in pieces] == row.greedy_tokens
        whole = mx.array([row.ids + row.greedy_tokens[:-1]])
        weights = np.array(p4.model.aggregation_weights(whole)[0, len(row.ids) - 1 :])
        assert np.allclose([p.stream_weights for p in pieces], weights, atol=1e-5)
        logits = np.array(p4.model(whole)[0, len(row.ids) - 1 :]).astype(np.float64)
        logprobs = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
        for piece, told in zip(pieces, logprobs, strict=True):
            assert piece.logprob == pytest.approx(told[piece.token], abs=1e-4)
            assert [top.token for top in piece.top_logprobs] == np.argsort(-told)[:3].tolist()
        assert any(p.drafted for p in pieces) <= (draft is not None)


@st.composite
def any_request(draw) -> Request:
    prompt = draw(st.lists(st.integers(0, 319), min_size=1, max_size=40))
    sampling = Sampling(
        max_tokens=draw(st.integers(1, 6)),
        temperature=draw(st.sampled_from([0.0, 0.0, 1.0])),
        seed=draw(st.integers(0, 9)),
    )
    streams = draw(st.sampled_from([2, 4]))
    return Request(prompt, sampling=sampling, streams=streams, logprobs=0, ignore_end=True)


@settings(max_examples=10, deadline=None)
@given(asked=st.lists(any_request(), min_size=1, max_size=5))
def test_rows_of_any_lengths_each_get_what_they_get_alone(engine, asked):
    together = [list(handle) for handle in [engine.submit(request) for request in asked]]
    for request, pieces in zip(asked, together, strict=True):
        answer = [piece.token for piece in pieces]
        assert len(answer) == request.sampling.max_tokens
        whole = mx.array([[*request.prompt, *answer[:-1]]])
        logits = engine.models[request.streams](whole)[0, len(request.prompt) - 1 :]
        logprobs = np.array(logits - mx.logsumexp(logits, axis=-1, keepdims=True))
        expected = logprobs[range(len(answer)), answer]
        assert np.allclose([piece.logprob for piece in pieces], expected, atol=1e-4)
        if request.sampling.temperature == 0:
            assert (logprobs.max(axis=-1) - expected < 1e-4).all()


def test_rows_in_many_scripts_have_each_its_own_text(engine):
    prompts = [before + own for own in SCRIPTS for before in ("", " ", "x", "中", "👍🏽")][:32]
    sampling = Sampling(max_tokens=10, temperature=1.5)
    asked = [
        Request(BYTES.encode(prompt), sampling=replace(sampling, seed=seed), stop=("zz",))
        for seed, prompt in enumerate(prompts)
    ]
    together = [list(handle) for handle in [engine.submit(request) for request in asked]]
    for request, pieces in zip(asked, together, strict=True):
        ids = [piece.token for piece in pieces if piece.token not in engine.end_tokens]
        assert text(pieces) == decoded(BYTES, ids).split("zz")[0]
        alone = list(engine.submit(request))
        assert [piece.token for piece in alone] == [piece.token for piece in pieces]
    assert any("�" in text(pieces) for pieces in together)


@pytest.mark.parametrize("seed", [0, -1, 2**64 - 1])
def test_a_seed_is_its_request_s_own(engine, seed):
    request = Request([5, 6], sampling=Sampling(max_tokens=12, temperature=1.0, seed=seed))
    other = Request([5, 6], sampling=Sampling(max_tokens=12, temperature=1.0))
    first = tokens(engine.submit(request))
    handles = [engine.submit(r) for r in (other, request, other)]
    several = [tokens(handle) for handle in handles]
    assert several[1] == first
    assert several[0] != several[2]


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ({"top_p": 0.6}, {"top_p": 0.6}),
        ({"min_p": 0.3}, {"min_p": 0.3}),
        ({"top_k": 4}, {"top_k": 4}),
        ({"top_p": 0.9, "top_k": 5, "min_p": 0.1}, {"top_p": 0.9, "top_k": 5, "min_p": 0.1}),
        (
            {"xtc_probability": 1.0, "xtc_threshold": 0.1},
            {"xtc_probability": 1.0, "xtc_threshold": 0.1, "xtc_special_tokens": [3]},
        ),
    ],
)
def test_samplers_choose_as_mlx_lm_s(ours, theirs):
    logits = mx.array([[0.1, 2.0, 1.5, 2.5, -1.0, 0.7, 1.9, 0.0]])
    logprobs = mx.repeat(logits - mx.logsumexp(logits), 4000, axis=0)
    mine = our_sampler(Sampling(temperature=0.8, seed=1, **ours), [3])
    counts = [
        np.bincount(np.array(sample(logprobs)), minlength=8) / 4000
        for sample in (mine, make_sampler(0.8, **theirs))
    ]
    assert ((counts[0] > 0) == (counts[1] > 0)).all()
    assert np.abs(counts[0] - counts[1]).max() < 0.05


@pytest.mark.parametrize("draft", [None, "ngram"])
def test_penalties_are_mlx_lm_s_and_reach_back_into_the_prompt(engine, p4, draft):
    settings = [("repetition", 1.7), ("presence", 0.6), ("frequency", 0.8)]
    ours = Sampling(
        max_tokens=12,
        logit_bias={7: 1.5},
        **{f"{name}_penalty": value for name, value in settings},
        **{f"{name}_context": 9 for name, _ in settings},
    )
    processors = make_logits_processors(
        {7: 1.5},
        **{f"{name}_penalty": value for name, value in settings},
        **{f"{name}_context_size": 9 for name, _ in settings},
    )
    wrapper = TokenizerWrapper(BYTES, eos_token_ids=[])
    for row in p4.rows:
        steps = stream_generate(
            p4.model, wrapper, row.ids, max_tokens=12, logits_processors=processors
        )
        request = Request(row.ids, sampling=ours, ignore_end=True, draft=draft)
        assert tokens(engine.submit(request)) == [step.token for step in steps]


@pytest.mark.parametrize("draft", [None, "ngram"])
def test_what_an_earlier_request_left_is_used_again(engine, p4, draft):
    row = max(p4.rows, key=lambda row: len(row.ids))
    request = Request(row.ids + row.greedy_tokens[:4], draft=draft, ignore_end=True)
    request = replace(request, sampling=Sampling(max_tokens=8))
    tokens(engine.submit(replace(request, prompt=row.ids)))
    pieces = list(engine.submit(request))
    assert [piece.token for piece in pieces] == row.greedy_tokens[4:]
    assert len(row.ids) <= pieces[0].cached_tokens < len(request.prompt)
    assert next(iter(engine.submit(request))).cached_tokens == len(request.prompt) - 1


@pytest.mark.parametrize("draft", [None, "ngram"])
def test_a_grammar_beside_free_requests(engine, p4, draft):
    schema = {"type": "object", "properties": {"a": {"type": "boolean"}}, "required": ["a"]}
    schema["additionalProperties"] = False
    follows = Request(
        [1, 2], grammar=grammar.from_json_schema(schema), draft=draft, sampling=Sampling(40)
    )
    handles = [engine.submit(r) for r in [*requests(p4), follows, follows]]
    assert [tokens(handle) for handle in handles[:-2]] == [row.greedy_tokens for row in p4.rows]
    for handle in handles[-2:]:
        assert isinstance(json.loads(text(handle))["a"], bool)


@pytest.mark.parametrize(
    "cache", [CacheOptions(bits=8, group_size=32, quantized_start=0), CacheOptions(max_size=400)]
)
def test_quantised_and_rotating_caches_several_at_a_time(p4, cache):
    if cache.bits and p4.model.args.head_dim % 32:
        with pytest.raises(ValueError, match="kv_group_size 32 does not divide"):
            MlxEngine({4: p4.model}, BYTES, cache=cache)
        return
    engine = MlxEngine({4: p4.model}, BYTES, cache=cache)
    handles = [engine.submit(request) for request in requests(p4)]
    assert [tokens(h) for h in handles] == [row.greedy_tokens for row in p4.rows]
    engine.close()


def test_incompatible_options_are_refused(p4, p2):
    for cache in (CacheOptions(bits=4, max_size=50), CacheOptions(bits=4, group_size=128)):
        with pytest.raises(ValueError, match="kv_"):
            MlxEngine({4: p4.model}, BYTES, cache=cache)
    with pytest.raises(ValueError, match="max_kv_size cannot go with a draft"):
        MlxEngine({4: p4.model}, BYTES, cache=CacheOptions(max_size=50), draft_model=p2.model)


def test_cancelled_late_and_closed(engine, p4):
    endless = Request(p4.rows[0].ids, ignore_end=True, sampling=Sampling(max_tokens=1 << 20))
    engine.context_length, context = None, engine.context_length
    handle, other = engine.submit(endless), engine.submit(endless)
    late = engine.submit(replace(endless, deadline=time.monotonic() + 0.2))
    engine.context_length = context
    pieces = iter(handle)
    next(pieces)
    handle.cancel()
    assert list(pieces)[-1].finish_reason == "cancelled"
    assert list(late)[-1].finish_reason == "timeout"
    pieces = iter(other)
    next(pieces)
    pieces.close()  # As a loop that is left does.
    assert tokens(engine.submit(requests(p4)[0])) == p4.rows[0].greedy_tokens
    assert engine.statistics()["running"] == 0


def test_after_close_nothing_is_taken(p4):
    engine = MlxEngine({4: p4.model}, BYTES)
    handle = engine.submit(Request([1], ignore_end=True, sampling=Sampling(max_tokens=10**4)))
    engine.close()
    assert list(handle)[-1].finish_reason == "cancelled"
    with pytest.raises(RuntimeError, match="closed"):
        engine.submit(Request([1]))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("draft", [None, "ngram"])
def test_logits_that_are_not_numbers_end_their_answer_with_an_error(value, draft):
    case = load_golden("p1")
    weight = case.model.model.embed_tokens.weight
    weight[9] = value
    case.model.model.embed_tokens.weight = weight
    engine = MlxEngine({1: case.model}, BYTES)
    bad = engine.submit(Request([1, 9], sampling=TWELVE, draft=draft, ignore_end=True))
    with pytest.raises(ArithmeticError, match="float16"):
        list(bad)
    assert engine.statistics()["kept_caches"] == 0
    engine.close()


def test_a_folder_s_adapters_and_end_tokens(tmp_path):
    folder = shutil.copytree(GOLDEN / "p4", tmp_path / "model")
    write_tokenizer(folder)
    engine = open_engine(folder)
    row = load_golden("p4").rows[0]
    assert engine.streams == (4,)
    answer = tokens(engine.submit(Request(row.ids, sampling=TWELVE)))
    assert answer == row.greedy_tokens[: len(answer)]
    with pytest.raises(ValueError, match="has 4"):
        engine.submit(Request([1], streams=2))
    engine.close()


def test_rows_that_come_when_others_have_gone_keep_their_own_sampler_and_processors(golden):
    if golden.name != "p1":
        pytest.skip("rows without processors are those of models without streams")
    engine = MlxEngine({1: golden.model}, BYTES)
    handles = [engine.submit(request) for request in requests(golden)]
    assert [tokens(h) for h in handles] == [row.greedy_tokens for row in golden.rows]
    forced = Request([5], sampling=Sampling(max_tokens=4, logit_bias={7: 1000.0}), ignore_end=True)
    sampled = Request([5], sampling=Sampling(max_tokens=9, temperature=50.0, seed=1))
    handles = [engine.submit(request) for request in (forced, sampled, requests(golden)[0])]
    forced_tokens, sampled_tokens, greedy = map(tokens, handles)
    assert forced_tokens == [7] * 4
    assert len(set(sampled_tokens)) > 4
    assert greedy == golden.rows[0].greedy_tokens
    engine.close()
