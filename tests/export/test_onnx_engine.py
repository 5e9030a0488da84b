"""The engine on onnxruntime: many requests at a time, each answered as by itself.

Answers are compared with the golden ones, and with one pass of plain onnxruntime over prompt and
answer, without a cache: its logits say what each token's log-probability was.
"""

import itertools
import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import onnxruntime as ort
import psutil
import pytest
from helpers.byte_tokenizers import BYTES, SCRIPTS, decoded
from helpers.onnx_adapters import split
from helpers.onnx_cases import GOLDEN, OPERATORS, batches
from helpers.tiny_models import write_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from parscale_core.engine import Request, Sampling, grammar
from parscale_export import OnnxEngine, OnnxModel, export_onnx, open_engine
from parscale_export.runtime.blocks import Block
from parscale_export.runtime.prefill import Growing
from parscale_export.runtime.sampling import choose, generator

CASES = {1: "p1", 2: "p2-tied-sharded", 4: "p4"}
KINDS = [
    (streams, layout, ops)
    for streams in CASES
    for layout in (("batch", "heads") if streams > 1 else ("batch",))
    for ops in OPERATORS
]
VOCABULARY = 256
TWELVE = Sampling(max_tokens=12)


def at_rest(engine, seconds: float = 5.0) -> bool:
    """Whether nothing runs or waits, once the engine has ended the turn of the last piece."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        now = engine.statistics()
        if now["running"] == now["waiting"] == 0:
            return True
        time.sleep(0.01)
    return False


class OnePass:
    """Log-probabilities and streams' weights of whole sequences, by onnxruntime alone."""

    def __init__(self, folder):
        self.session = ort.InferenceSession(folder / "model.onnx")
        self.empty = {
            value.name: np.zeros(
                (value.shape[0] if isinstance(value.shape[0], int) else 1, value.shape[1], 0,
                 value.shape[3]), np.float32
            )
            for value in self.session.get_inputs()
            if value.name.startswith("past")
        }  # fmt: skip

    def __call__(self, tokens) -> tuple[np.ndarray, np.ndarray]:
        ids = np.array([tokens])
        feed = {"input_ids": ids, "attention_mask": np.ones_like(ids)} | self.empty
        logits, weights = self.session.run(["logits", "aggregation_weights"], feed)
        logits = logits[0].astype(np.float64)
        highest = logits.max(axis=-1, keepdims=True)
        sums = np.exp(logits - highest).sum(axis=-1, keepdims=True)
        return logits - highest - np.log(sums), weights[0]


@pytest.fixture(scope="module")
def exports(tmp_path_factory):
    """Exports by what they are, each made once."""
    made = {}

    def export(streams, layout="batch", ops="fused", **options):
        key = (streams, layout, ops, *sorted(options.items()))
        if key not in made:
            made[key] = export_onnx(
                GOLDEN / CASES[streams],
                tmp_path_factory.mktemp("exports") / "out",
                kv_layout=layout,
                ops=ops,
                aggregation_weights=True,
                **options,
            )
        return made[key]

    return export


@pytest.fixture(scope="module")
def one_pass(exports):
    # Streams are heads here, so that a cache has one row whatever P is.
    folders = {n: exports(n, "heads" if n > 1 else "batch", all_logits=True) for n in CASES}
    return {streams: OnePass(folder) for streams, folder in folders.items()}


@pytest.fixture(scope="module", params=KINDS, ids=lambda kind: "-".join(map(str, kind)))
def engine(request, exports):
    engine = OnnxEngine(OnnxModel(exports(*request.param)), BYTES, [], slots=8)
    yield engine
    engine.close()


@pytest.fixture
def p1(exports):
    engine = OnnxEngine(OnnxModel(exports(1)), BYTES, [], slots=4)
    yield engine
    engine.close()


def tokens(handle) -> list[int]:
    return [piece.token for piece in handle]


def text(pieces) -> str:
    return "".join(piece.text for piece in pieces)


def ragged(count: int, *, longest: int = 70, seed: int = 0) -> list[Request]:
    random = np.random.default_rng(seed)
    requests = []
    for n in range(count):
        prompt = random.integers(0, VOCABULARY, random.integers(1, longest)).tolist()
        sampling = Sampling(
            max_tokens=int(random.integers(1, 24)),
            temperature=1.2 if n % 2 else 0.0,
            top_p=0.95,
            repetition_penalty=1.2 if n % 3 == 0 else 1.0,
            seed=n,
        )
        requests.append(Request(prompt, sampling=sampling, logprobs=4, stream_weights=True))
    return requests


def check_answer(request: Request, pieces, one_pass: OnePass) -> None:
    answer, end = [piece.token for piece in pieces], len(request.prompt)
    logprobs, weights = (rows[end - 1 :] for rows in one_pass([*request.prompt, *answer[:-1]]))
    assert len(answer) == request.sampling.max_tokens
    for n, piece in enumerate(pieces):
        assert piece.logprob == pytest.approx(logprobs[n, piece.token], abs=1e-4)
        top = [logprob for _, logprob in ((t.token, t.logprob) for t in piece.top_logprobs)]
        assert np.allclose(top, np.sort(logprobs[n])[::-1][:4], atol=1e-4)
        assert np.allclose(piece.stream_weights, weights[n], atol=1e-5)
        if request.sampling.temperature == 0 and request.sampling.repetition_penalty == 1:
            assert piece.token == logprobs[n].argmax()
    whole = decoded(BYTES, answer)
    # Where an answer was left, a part of a character may not have been shown.
    assert text(pieces) == whole or (
        not pieces[-1].finish_reason and whole.startswith(text(pieces))
    )


def test_golden_answers_all_at_once(engine):
    case = CASES[engine.model.streams]
    rows = [
        (prompt, batch.tokens[i], batch.logits[i, -1], batch.token_logits[i])
        for batch in batches(case)
        for i, prompt in enumerate(batch.prompts)
    ]
    handles = [engine.submit(Request(row[0], sampling=TWELVE, logprobs=0)) for row in rows]
    for handle, (_, expected, first, rest) in zip(handles, rows, strict=True):
        pieces = list(handle)
        assert [piece.token for piece in pieces] == expected.tolist()
        logits = np.concatenate([first[None], rest[:-1]]).astype(np.float64)
        logprobs = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
        told = [piece.logprob for piece in pieces]
        assert np.allclose(told, logprobs[np.arange(12), expected], atol=1e-3)


def test_forty_ragged_requests_each_as_by_itself(engine, one_pass):
    requests = ragged(40)
    with ThreadPoolExecutor(8) as pool:  # many threads ask, each takes its own pieces
        together = list(pool.map(lambda request: list(engine.submit(request)), requests))
    for request, pieces in zip(requests, together, strict=True):
        check_answer(request, pieces, one_pass[engine.model.streams])
    for n in range(0, 40, 5):
        alone = list(engine.submit(requests[n]))
        assert [p.token for p in alone] == [p.token for p in together[n]]
    assert at_rest(engine)


@st.composite
def step_of_a_schedule(draw) -> tuple[Request, int, int | None]:
    """A request, how many pieces of the one before come first, and after how many it ends."""
    # Long beginnings that are alike are kept and taken over; ends of their own are not.
    shared = list(range(draw(st.sampled_from([0, 40, 60]))))
    own = draw(st.lists(st.integers(0, VOCABULARY - 1), min_size=1, max_size=6))
    length = draw(st.integers(1, 20))
    request = Request([*shared, *own], sampling=Sampling(length), logprobs=4, stream_weights=True)
    return request, draw(st.integers(0, 4)), draw(st.none() | st.integers(0, 3))


@pytest.fixture(scope="module", params=[(4, "batch", "fused"), (4, "heads", "fused")])
def three_slots(request, exports):
    model = OnnxModel(exports(*request.param))
    kept_bytes = 3 * Block.allocate(model, 1, 80).size
    with OnnxEngine(model, BYTES, [], slots=3, kept_bytes=kept_bytes) as engine:
        yield engine


@settings(max_examples=5, deadline=None)
@given(schedule=st.lists(step_of_a_schedule(), min_size=1, max_size=7))
def test_no_schedule_of_requests_changes_an_answer(three_slots, one_pass, schedule):
    answers, came = [], []
    for request, first, _ in schedule:
        if came:
            came[-1] += itertools.islice(answers[-1][1], first)
        handle = three_slots.submit(request)
        answers.append((handle, iter(handle)))
        came.append([])
    for (handle, pieces), taken, (_, _, end) in zip(answers, came, schedule, strict=True):
        taken += itertools.islice(pieces, end)
        handle.cancel()
    for (request, _, end), taken in zip(schedule, came, strict=True):
        assert end is not None or len(taken) == request.sampling.max_tokens
        if taken:
            sampling = replace(request.sampling, max_tokens=len(taken))
            check_answer(replace(request, sampling=sampling), taken, one_pass[4])
    assert at_rest(three_slots)


def test_a_conversation_is_not_computed_again(engine, one_pass):
    random = np.random.default_rng(3)
    prompt = random.integers(0, VOCABULARY, 300).tolist()
    request = Request(prompt, sampling=TWELVE, logprobs=4, stream_weights=True)
    first = list(engine.submit(request))
    assert first[0].cached_tokens == 0
    # The last token of an answer was never fed back.
    request = replace(request, prompt=[*prompt, *(p.token for p in first), 5, 6, 7])
    # While an answer is on its way, another that begins alike takes over what there is of it.
    running = engine.submit(replace(request, sampling=Sampling(max_tokens=40)))
    assert next(iter(running)).cached_tokens == 311
    branch = replace(request, prompt=[*request.prompt[:305], *range(9)])
    for asked, cached in ((branch, 305), (request, 314)):
        pieces = list(engine.submit(asked))
        assert pieces[0].cached_tokens == cached
        check_answer(asked, pieces, one_pass[engine.model.streams])
    statistics = engine.statistics()
    assert statistics["kept_bytes"] > 0 and statistics["kept_caches"] >= 1


def test_long_prompts_come_in_while_others_go_on(engine, one_pass):
    prompts = [[5], list(range(200)) * 2, [7, 8], list(range(100, 230)), [9] * 3]
    requests = [
        Request(p, sampling=Sampling(max_tokens=30), logprobs=4, stream_weights=True)
        for p in prompts
    ]
    for request, handle in zip(requests, [engine.submit(r) for r in requests], strict=True):
        check_answer(request, list(handle), one_pass[engine.model.streams])


def test_buffers_grow_under_running_answers(engine, one_pass):
    lengths = (300, 20, 10)
    requests = [
        Request([n, 3], sampling=Sampling(max_tokens=length), logprobs=4, stream_weights=True)
        for n, length in enumerate(lengths)
    ]
    for request, handle in zip(requests, [engine.submit(r) for r in requests], strict=True):
        check_answer(request, list(handle), one_pass[engine.model.streams])


def test_kept_caches_have_a_limit_and_go_in_the_order_of_their_use(exports):
    model = OnnxModel(exports(1))
    limit = 2 * Block.allocate(model, 1, 40).size
    engine = OnnxEngine(model, BYTES, [], kept_bytes=limit)
    prompts = [[n] * 40 for n in (1, 2, 3)]

    def cached(prompt) -> int:
        request = Request(prompt, sampling=Sampling(max_tokens=1))
        return next(iter(engine.submit(request))).cached_tokens

    assert [cached(prompts[n]) for n in (0, 1, 0, 2, 0, 1)] == [0, 0, 39, 0, 39, 0]
    assert cached([4] * 81) == 0  # too large to be kept, and drives out nothing
    assert engine.statistics()["kept_caches"] == 2
    assert engine.statistics()["kept_bytes"] == limit
    engine.close()


def test_cancelled_late_and_left_answers_free_their_slots(p1, exports):
    endless = Request([5, 6], sampling=Sampling(max_tokens=10**6))
    p1.context_length = None
    handles = [p1.submit(endless) for _ in range(3)]
    late = p1.submit(replace(endless, deadline=time.monotonic() + 0.3))
    waiting = p1.submit(replace(endless, deadline=time.monotonic() + 0.3))
    for handle in (late, waiting):
        assert list(handle)[-1].finish_reason == "timeout"
    pieces = [iter(handle) for handle in handles]
    for each in pieces:
        next(each)
    pieces[0].close()  # as a loop that is left does
    handles[1].cancel()
    assert list(pieces[1])[-1].finish_reason == "cancelled"
    expected = batches("p1")[0]
    assert tokens(p1.submit(Request(expected.prompts[0], sampling=TWELVE))) == (
        expected.tokens[0].tolist()
    )
    assert p1.statistics()["running"] == 1
    p1.close()
    assert list(pieces[2])[-1].finish_reason == "cancelled"
    with pytest.raises(RuntimeError, match="closed"):
        p1.submit(endless)


@pytest.mark.parametrize("seed", [0, -1, 2**64 - 1])
def test_a_seed_is_its_request_s_own(p1, seed):
    request = Request([5, 6], sampling=Sampling(max_tokens=12, temperature=1.0, seed=seed))
    other = Request([5, 6], sampling=Sampling(max_tokens=12, temperature=1.0))
    first = tokens(p1.submit(request))
    several = [tokens(h) for h in [p1.submit(r) for r in (other, request, other)]]
    assert several[1] == first
    assert several[0] != several[2]


def test_rows_in_many_scripts_have_each_its_own_text(p1):
    prompts = [before + own for own in SCRIPTS for before in ("", " ", "x", "中", "👍🏽")][:32]
    sampling = Sampling(max_tokens=10, temperature=1.5)
    requests = [
        Request(BYTES.encode(prompt), sampling=replace(sampling, seed=seed), stop=("zz", "a"))
        for seed, prompt in enumerate(prompts)
    ]
    for handle in [p1.submit(request) for request in requests]:
        pieces = list(handle)
        whole = decoded(BYTES, [piece.token for piece in pieces])
        ends = [n for n in (whole.find("zz"), whole.find("a")) if n >= 0]
        assert text(pieces) == whole[: min(ends, default=len(whole))]
        assert pieces[-1].finish_reason == ("stop" if ends else "length")


def test_a_grammar_beside_free_requests(exports):
    engine = OnnxEngine(OnnxModel(exports(4)), BYTES, [BYTES.eos_token_id])
    schema = {"type": "object", "properties": {"a": {"type": "boolean"}}, "required": ["a"]}
    schema["additionalProperties"] = False
    follows = Request([1, 2], grammar=grammar.from_json_schema(schema), sampling=Sampling(40))
    expected = batches("p4")[0]
    free = [Request(p, sampling=TWELVE, ignore_end=True) for p in expected.prompts]
    handles = [engine.submit(r) for r in [*free, follows, follows]]
    assert [tokens(handle) for handle in handles[:-2]] == expected.tokens.tolist()
    for handle in handles[-2:]:
        assert isinstance(json.loads(text(handle))["a"], bool)
    engine.close()


def test_other_numbers_of_streams_open_when_they_are_asked_for(tmp_path):
    backbone, adapter = split("p4", tmp_path)
    write_tokenizer(backbone)
    engine = open_engine(export_onnx(backbone, tmp_path / "out", adapters=[adapter]), slots=2)
    assert engine.streams == (1, 4)
    assert not engine.gives_stream_weights
    batch = batches("p4")[0]
    plain = OnnxModel(tmp_path / "out").generate(batch.prompts, 12)
    asked = [
        Request(prompt, streams=streams, sampling=TWELVE, ignore_end=True)
        for prompt in batch.prompts
        for streams in (4, None)
    ]
    answers = [tokens(handle) for handle in [engine.submit(request) for request in asked]]
    assert answers[::2] == batch.tokens.tolist()
    assert answers[1::2] == plain
    engine.close()
    engine = open_engine(tmp_path / "out", streams=4)
    assert engine.streams == (4, 1)
    engine.close()
    engine = open_engine(tmp_path / "out" / "model_p4.onnx")
    with pytest.raises(ValueError, match="has 4"):
        engine.submit(replace(asked[1], streams=1))
    engine.close()


def test_an_export_that_cannot_be_opened_fails_its_own_requests(exports):
    def fail() -> OnnxModel:
        raise ValueError("damaged")

    model = OnnxModel(exports(1))
    with pytest.raises(ValueError, match="slots 0"):
        OnnxEngine(model, BYTES, [], slots=0)
    with OnnxEngine(model, BYTES, [], others={2: fail}) as engine:
        batch = batches("p1")[0]
        asked = [Request(batch.prompts[0], streams=n, sampling=TWELVE) for n in (2, 1, 2)]
        first, own, last = [engine.submit(request) for request in asked]
        assert tokens(own) == batch.tokens[0].tolist()
        for handle in (first, last):
            with pytest.raises(RuntimeError, match="streams 2: damaged"):
                list(handle)


def test_what_cannot_be_answered_is_refused_before_the_work(p1):
    for fields, match in (
        ({"prompt": []}, "prompt: has no tokens"),
        ({"prompt": [10**6]}, "prompt: token 1000000"),
        ({"prompt": [1] * 10**5}, "no room for an answer"),
        ({"streams": 2}, "this model has 1"),
        ({"draft": "ngram"}, "draft 'ngram': there is none"),
        ({"sampling": Sampling(top_p=0)}, "top_p"),
        ({"logprobs": 21}, "logprobs"),
    ):
        with pytest.raises(ValueError, match=match):
            p1.submit(Request(**({"prompt": [1]} | fields)))
    nearly = Request([1] * (p1.context_length - 3), sampling=TWELVE)
    pieces = list(p1.submit(nearly))
    assert len(pieces) == 3 and pieces[-1].finish_reason == "length"


def test_logits_that_are_not_numbers_end_their_own_answer(p1, monkeypatch):
    (poison,) = p1.model.continuation_logits([1, 9], [])

    def check(logits, whole=p1.model.check_numbers):
        whole(logits * np.nan if np.allclose(logits, poison) else logits)

    monkeypatch.setattr(p1.model, "check_numbers", check)
    batch = batches("p1")[0]
    handles = [p1.submit(Request(p, sampling=TWELVE)) for p in ([1, 9], *batch.prompts, [1, 9])]
    assert [tokens(handle) for handle in handles[1:-1]] == batch.tokens.tolist()
    for handle in (handles[0], handles[-1]):
        with pytest.raises(ArithmeticError, match=r"model\.onnx: the logits have NaN"):
            list(handle)


def test_a_prompt_that_cannot_be_computed_ends_alone(p1, monkeypatch):
    def extend(self, tokens, whole=Growing.extend):
        if len(tokens) > 80:
            raise RuntimeError("out of\nmemory")
        return whole(self, tokens)

    monkeypatch.setattr(Growing, "extend", extend)
    batch = batches("p1")[0]
    handles = [p1.submit(Request(p, sampling=TWELVE)) for p in (*batch.prompts, [1] * 90)]
    assert [tokens(handle) for handle in handles[:-1]] == batch.tokens.tolist()
    with pytest.raises(RuntimeError, match="the prompt cannot be computed: out of memory"):
        list(handles[-1])
    assert at_rest(p1)


def test_a_failure_ends_all_answers_with_a_line(p1, monkeypatch):
    def fail(*_):
        raise RuntimeError("out of memory")

    endless = Request([5, 6], sampling=Sampling(max_tokens=200))
    handles = [iter(p1.submit(endless)) for _ in range(3)]
    next(handles[0])
    monkeypatch.setattr(p1.model, "check_numbers", fail)
    for handle in handles:
        with pytest.raises(RuntimeError, match="generation failed: out of memory"):
            list(handle)
    with pytest.raises(RuntimeError, match="out of memory"):
        p1.submit(endless)


@pytest.mark.parametrize(
    "how",
    [
        {"top_p": 0.6},
        {"min_p": 0.3},
        {"top_k": 4},
        {"top_p": 0.9, "top_k": 5, "min_p": 0.1},
        {"xtc_probability": 1.0, "xtc_threshold": 0.1},
        {},
    ],
    ids=str,
)
def test_samplers_choose_as_mlx_lm_s(how):
    mx = pytest.importorskip("mlx.core")
    from mlx_lm.sample_utils import make_sampler

    logits = np.array([0.1, 2.0, 1.5, 2.5, -1.0, 0.7, 1.9, 0.0], np.float32)
    theirs = make_sampler(0.8, **how, **({"xtc_special_tokens": [3]} if "xtc_" in str(how) else {}))
    logprobs = mx.array(logits) - mx.logsumexp(mx.array(logits))
    random = generator(1)
    sampling = Sampling(temperature=0.8, **how)
    ours = [choose(logits, [], sampling, random, spared=[3]) for _ in range(4000)]
    counts = [
        np.bincount(np.array(each), minlength=8) / 4000
        for each in (ours, theirs(mx.repeat(logprobs[None], 4000, axis=0)))
    ]
    assert ((counts[0] > 0) == (counts[1] > 0)).all()
    assert np.abs(counts[0] - counts[1]).max() < 0.05


def test_penalties_are_mlx_lm_s():
    mx = pytest.importorskip("mlx.core")
    from mlx_lm.sample_utils import make_logits_processors

    settings = [("repetition", 1.7, 9), ("presence", 0.6, 5), ("frequency", 0.8, 12)]
    ours = Sampling(
        logit_bias={7: 1.5},
        **{f"{name}_penalty": value for name, value, _ in settings},
        **{f"{name}_context": size for name, _, size in settings},
    )
    processors = make_logits_processors(
        {7: 1.5},
        **{f"{name}_penalty": value for name, value, _ in settings},
        **{f"{name}_context_size": size for name, _, size in settings},
    )
    random = np.random.default_rng(0)
    for _ in range(50):
        logits = random.standard_normal(20).astype(np.float32)
        recent = random.integers(0, 20, 15).tolist()
        theirs = mx.array(logits)[None]
        for process in processors:
            theirs = process(mx.array(recent), theirs)
        assert choose(logits, recent, ours, random) == theirs.argmax().item()


def small_requests(engine, count: int, concurrency: int) -> list[int]:
    """Ask for so many answers, at most so many at a time; resident bytes after each tenth."""
    process, sizes = psutil.Process(), []
    requests = ragged(50, longest=48)
    expected = [tokens(engine.submit(request)) for request in requests]
    places = threading.Semaphore(concurrency)

    def ask(n: int) -> bool:
        with places:
            return tokens(engine.submit(requests[n % 50])) == expected[n % 50]

    with ThreadPoolExecutor(concurrency) as pool:
        for part in range(10):
            assert all(pool.map(ask, range(part, count // 10 + part)))
            sizes.append(process.memory_info().rss)
    return sizes


def test_memory_stays_flat_over_a_thousand_requests(exports):
    engine = OnnxEngine(OnnxModel(exports(1)), BYTES, [], slots=16, kept_bytes=1 << 22)
    sizes = small_requests(engine, 1000, 16)
    engine.close()
    assert sizes[-1] - sizes[2] < 16e6


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: "-".join(map(str, kind)))
def test_ten_thousand_requests_at_concurrency_64(exports, kind):
    descriptors = psutil.Process().num_fds()
    engine = OnnxEngine(OnnxModel(exports(*kind)), BYTES, [], slots=16, kept_bytes=1 << 22)
    sizes = small_requests(engine, 10_000, 64)
    engine.close()
    assert sizes[-1] - sizes[2] < 32e6
    assert psutil.Process().num_fds() <= descriptors + 2
