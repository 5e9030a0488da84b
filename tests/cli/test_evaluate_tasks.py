"""``parscale evaluate --tasks``: the harness on local tasks, in both engines and beside its own."""

import json
import os
import subprocess
import sys

from parscale_mlx.engine import open_engine
from parscale_mlx.load import open_models

import mlx.core as mx
import pytest
from helpers.onnx_adapters import split
from helpers.tiny_models import error_line, write_tokenizer
from parscale_core.engine import Request, Sampling
from parscale_export import export_onnx
from parscale_export import open_engine as open_onnx

pytest.importorskip("lm_eval", reason="tasks need lm-evaluation-harness")
from lm_eval.api.instance import Instance
from parscale_core.evaluation.harness import ModelInHarness

CHOICES = [
    {"question": f"question {n}", "choices": ["one", "two", "abc", "zzz"], "answer": n % 4}
    for n in range(8)
]
TASKS = {
    "tiny_choice": """
task: tiny_choice
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}} "
doc_to_target: answer
doc_to_choice: choices
target_delimiter: ""
metric_list:
  - metric: acc
""",
    "tiny_answer": """
task: tiny_answer
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
output_type: generate_until
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{expected}}}}"
generation_kwargs:
  until: ["\\n\\n"]
  max_gen_toks: 5
metric_list:
  - metric: exact_match
""",
    "tiny_text": """
task: tiny_text
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{question}}}}"
metric_list:
  - metric: bits_per_byte
""",
}
KINDS = ("mlx", "onnx", "all logits", "heads")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A plain backbone that transformers reads, and an adapter of four streams over it."""
    backbone, adapter = split("p4", tmp_path_factory.mktemp("harness"))
    write_tokenizer(backbone, size=319)
    return backbone, adapter


@pytest.fixture(scope="module")
def exports(made, tmp_path_factory):
    backbone, adapter = made
    options = {"all logits": {"all_logits": True}, "heads": {"kv_layout": "heads"}}
    return {
        kind: export_onnx(
            backbone,
            tmp_path_factory.mktemp("exports") / "onnx",
            adapters=[adapter],
            **options.get(kind, {}),
        )
        for kind in KINDS[1:]
    }


@pytest.fixture(scope="module", params=KINDS)
def engine(request, made, exports):
    backbone, adapter = made
    if request.param == "mlx":
        engine = open_engine(backbone, adapters=[adapter], streams="all", prompt_cache_size=0)
    else:
        engine = open_onnx(exports[request.param], slots=3)
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def own(made):
    """What the harness's own class over transformers makes of the requests below."""
    pytest.importorskip("torch", reason="the harness's own models need torch")
    pytest.importorskip("accelerate", reason="the harness's own models need accelerate")
    import transformers
    from lm_eval.models.huggingface import HFLM

    model = transformers.AutoModelForCausalLM.from_pretrained(made[0], dtype="float32")
    tokenizer = transformers.AutoTokenizer.from_pretrained(made[0])
    own = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=4, device="cpu")
    return {kind: getattr(own, kind)(asked(kind, *given)) for kind, given in ASKED.items()}


def asked(kind: str, *arguments) -> list[Instance]:
    return [Instance(kind, {}, given, 0) for given in arguments]


# Empty contexts, contexts that end in spaces, and those longer than the model's.
PAIRS = [("", "abc"), ("ab  ", "cd"), ("x" * 900, "abc"), ("x" * 40, "y" * 300), ("x" * 40, "y")]
PAIRS += [("question", f" {word}") for word in ("one", "three", "seventeen")] * 2
TEXTS = [("abcd",), ("some text " * 55,), ("x",)]
GREEDY = {"until": ["never said"], "max_gen_toks": 6}


ASKED = {
    "loglikelihood": PAIRS,
    "loglikelihood_rolling": TEXTS,
    "generate_until": [
        ("abc", GREEDY),
        ("x" * 900, GREEDY),
        ("question", GREEDY | {"until": ["word", "e"]}),
    ],
}


def test_answers_are_those_of_the_harness_over_transformers(engine, own):
    ours = ModelInHarness(engine, 1, max_tokens=None, use_chat_template=False)
    found = {kind: getattr(ours, kind)(asked(kind, *given)) for kind, given in ASKED.items()}
    for (score, greedy), (expected, is_greedy) in zip(
        found["loglikelihood"], own["loglikelihood"], strict=True
    ):
        assert score == pytest.approx(expected, abs=2e-3) and greedy == is_greedy
    rolling = pytest.approx(own["loglikelihood_rolling"], abs=2e-2)
    assert found["loglikelihood_rolling"] == rolling
    assert found["generate_until"] == own["generate_until"]
    likely = found["generate_until"][0]
    ((_, is_greedy),) = ours.loglikelihood(asked("loglikelihood", ("abc", likely)))
    assert is_greedy
    assert ours.generate_until(asked("generate_until", ("", GREEDY)))[0]


def test_scores_of_several_streams(engine, made):
    models, tokenizer = open_models(made[0], [made[1]])

    def sums(ids: list[int], count: int) -> float:
        """Of the last tokens of a text, each predicted from all before it."""
        logits = models[4](mx.array(ids)[None, :-1])[0]
        logprobs = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
        return mx.take_along_axis(logprobs, mx.array(ids[1:])[:, None], -1)[-count:].sum().item()

    harness = ModelInHarness(engine, 4, max_tokens=None, use_chat_template=False)
    encode, first = tokenizer.encode, harness.prefix_token_id
    scored = harness.loglikelihood(asked("loglikelihood", *PAIRS))
    whole = [[first, *encode("abc")], encode("ab  cd")]
    whole += [encode(context + continuation) for context, continuation in PAIRS[2:]]
    counts = [3, 4, *(len(continuation) for _, continuation in PAIRS[2:])]
    limit = engine.context_length + 1
    expected = [sums(ids[-limit:], count) for ids, count in zip(whole, counts, strict=True)]
    assert [score for score, _ in scored] == pytest.approx(expected, abs=2e-3)
    (rolling,) = harness.loglikelihood_rolling(asked("loglikelihood_rolling", ("abcd",)))
    assert rolling == pytest.approx(sums([first, *encode("abcd")], 4), abs=1e-3)


def test_what_tasks_say_of_sampling(engine):
    ours = ModelInHarness(engine, 4, max_tokens=None, use_chat_template=False, seed=3)

    def answers(**options) -> list[str]:
        return ours.generate_until(asked("generate_until", *[("abc", GREEDY | options)] * 2))

    greedy = answers()
    assert greedy[0] == greedy[1]
    assert answers(temperature=0.7, do_sample=False) == answers(num_beams=1) == greedy
    sampled = answers(do_sample=True, top_p=0.9)
    assert sampled == answers(do_sample=True, top_p=0.9, temperature=1.0) != greedy
    assert sampled[0] != sampled[1]
    for wrong in ({"num_beams": 4}, {"typical_p": 0.5}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            answers(**wrong)


def test_tasks_on_local_data(parscale, made, exports, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    backbone, adapter = made
    models, tokenizer = open_models(backbone, [adapter])
    rows = []
    with open_engine(backbone, adapters=[adapter]) as engine:
        for n, value in enumerate(CHOICES):
            ids = engine.tokenizer.encode(value["question"])
            pieces = engine.submit(Request(ids, sampling=Sampling(max_tokens=5)))
            answer = "".join(piece.text for piece in pieces)
            rows.append(value | {"expected": answer if n % 2 else "something else"})
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, text in TASKS.items():
        (tmp_path / f"{name}.yaml").write_text(text.format(data=data))
    options = ("--include-path", tmp_path, "--no-chat-template", "--json")
    run = ("evaluate", "--model", backbone, "--adapter", adapter, *options)
    result = parscale(*run, "--tasks", "tiny_*")
    assert result.exit_code == 0, result.output
    figures = {
        (f["task"], f["metric"], f["streams"]): f for f in json.loads(result.stdout)["figures"]
    }
    assert len(figures) == 6
    for streams, model in models.items():
        hits = 0
        for value in CHOICES:
            # A context's last spaces belong to the continuation.
            choices = [" " + choice for choice in value["choices"]]
            scored = scores(model, tokenizer, value["question"], choices)
            hits += scored.index(max(scored)) == value["answer"]
        figure = figures["tiny_choice", "acc", streams]
        assert figure["value"] == pytest.approx(hits / 8) and figure["error"] > 0
    assert figures["tiny_answer", "exact_match", 4]["value"] == 0.5
    assert figures["tiny_answer", "exact_match", 1]["value"] < 0.5
    for kind in ("onnx", "all logits"):
        exported = parscale("evaluate", "--model", exports[kind], *options, "--tasks", "tiny_*")
        assert exported.exit_code == 0, exported.output
        for figure in json.loads(exported.stdout)["figures"]:
            expected = figures[figure["task"], figure["metric"], figure["streams"]]
            assert figure["value"] == pytest.approx(expected["value"], abs=1e-4)
            assert figure["error"] == pytest.approx(expected["error"], abs=1e-4)
    # A limit on answers does not cut what is asked.
    for figure in json.loads(parscale(*run, "--tasks", "tiny_choice", "-n", 2).stdout)["figures"]:
        assert figure == figures[figure["task"], figure["metric"], figure["streams"]]
    # In a folder that is no repository, without a terminal.
    command = [
        sys.executable,
        "-c",
        "from parscale_cli.main import cli; cli()",
        *map(str, run[:-1]),
        "--limit",
        "4",
    ]
    command += ["--tasks", "tiny_choice", "--streams", "4"]
    where = {"cwd": tmp_path, "env": {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}}
    table = subprocess.run(command, capture_output=True, text=True, check=True, **where)
    assert table.stdout.splitlines()[0].split() == ["task", "metric", "P=4"]
    assert "fatal" not in table.stderr and "%|" not in table.stderr


def scores(model, tokenizer, prompt: str, choices: list[str]) -> list[float]:
    """Log probabilities of continuations, each in one forward pass."""
    totals, start = [], len(tokenizer.encode(prompt))
    for choice in choices:
        ids = mx.array(tokenizer.encode(prompt + choice))
        logits = model(ids[None, :-1])[0]
        logprobs = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
        chosen = mx.take_along_axis(logprobs, ids[1:, None], axis=-1)[:, 0]
        totals.append(chosen[start - 1 :].sum().item())
    return totals


@pytest.mark.slow
def test_a_task_that_nobody_has(parscale, backbone):
    result = parscale("evaluate", "--model", backbone, "--tasks", "gsm8k,no_such_task")
    assert result.exit_code == 1 and "'no_such_task'" in error_line(result)
