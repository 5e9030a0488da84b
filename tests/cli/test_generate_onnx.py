"""``parscale generate`` and ``chat`` on onnxruntime: the same text as in MLX, and refusals."""

import json
import os
import shutil
import subprocess
import sys

import onnxruntime as ort
import pytest
from helpers.tiny_models import error_line, set_eos
from parscale_export import export_onnx
from parscale_export.runtime.provider import CUDA, count_devices, missing_libraries


@pytest.fixture(scope="session")
def export(model, tmp_path_factory):
    """The tiny model with a chat template as ONNX, with the streams' weights."""
    return export_onnx(model, tmp_path_factory.mktemp("onnx") / "p4", aggregation_weights=True)


@pytest.fixture(scope="session")
def plain_export(plain_model, tmp_path_factory):
    return export_onnx(plain_model, tmp_path_factory.mktemp("onnx") / "p1")


@pytest.fixture
def both(parscale, model, export):
    """Run one command line in MLX and on onnxruntime."""

    def run(*arguments, input=None):
        return [
            parscale(*arguments, "--model", folder, "--runtime", runtime, input=input)
            for runtime, folder in (("mlx", model), ("onnx", export))
        ]

    return run


def answers_of(result) -> list[dict]:
    assert result.exit_code == 0, result.output
    answers = [json.loads(line) for line in result.stdout.splitlines()]
    for answer in answers:
        stats = answer.pop("stats")
        assert stats["peak_memory"] > 0
        answer["stats"] = {name: stats[name] for name in ("prompt_tokens", "generation_tokens")}
    return answers


@pytest.mark.parametrize(
    "arguments",
    [
        ("-p", "Hi", "-n", 9),
        ("-p", "Hi", "-n", 9, "--system", "Be brief"),
        ("-p", "Hi", "-n", 9, "--no-chat-template"),
        ("-p", "Hi", "-p", "A longer prompt", "-p", "x", "-n", 12),
        ("-p", "Hi", "-n", 30, "--repetition-penalty", 1.5, "--presence-penalty", 0.5),
    ],
)
def test_the_same_text_as_mlx(both, arguments):
    mlx, onnx = both("generate", *arguments, "--json")
    assert answers_of(onnx) == answers_of(mlx)
    mlx, onnx = both("generate", *arguments, "--quiet")
    assert sorted(onnx.stdout.split("\n\n")) == sorted(mlx.stdout.split("\n\n"))


@pytest.mark.parametrize("more", [[], ["-p", "Hello"]])
def test_stop_strings(both, more):
    mlx, _ = both("generate", "-p", "Hi", "-n", 30, "--json")
    text = answers_of(mlx)[0]["text"]
    run = ("generate", "-p", "Hi", *more, "-n", 30, "--json", "--stop", text[8:10], "--stop", "@@")
    mlx, onnx = map(answers_of, both(*run))
    assert onnx == mlx
    assert onnx[0]["text"] == text[: text.index(text[8:10])]
    assert onnx[0]["finish_reason"] == "stop"


def test_the_end_of_text(parscale, model, export, tmp_path):
    (plain,) = answers_of(parscale("generate", "--model", model, "-p", "Hi", "-n", 12, "--json"))
    end = plain["tokens"][5]["id"]
    ending, exported = tmp_path / "ending", tmp_path / "exported"
    shutil.copytree(model, ending)
    shutil.copytree(export, exported)
    set_eos(ending, end)
    # What generation_config.json says counts, as it does in MLX.
    for folder in (ending, exported):
        (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [end, 3]}))
    run = ("generate", "-p", "Hi", "-p", "Hello", "-n", 12, "--json", "--model")
    answers = answers_of(parscale(*run, exported))
    assert answers == answers_of(parscale(*run, ending))
    assert answers[0]["finish_reason"] == "stop"
    assert answers[0]["tokens"][-1]["id"] == end


def test_seeded_sampling_repeats_itself(parscale, export):
    run = ("generate", "--model", export, "-p", "Hi", "-p", "Hello", "-n", 12, "--json")
    run += ("--temp", 1.5, "--top-p", 0.95, "--top-k", 50, "--min-p", 0.01, "--seed")
    first = answers_of(parscale(*run, 1))
    assert answers_of(parscale(*run, 1)) == first
    assert answers_of(parscale(*run, 2)) != first


def test_streams(both):
    run = ("generate", "-p", "Hi", "-n", 5, "--show-streams")
    mlx, onnx = both(*run)
    for ours, theirs in zip(onnx.stdout.splitlines()[1:], mlx.stdout.splitlines()[1:], strict=True):
        (stream, weight, token), expected = ours.split("\t"), theirs.split("\t")
        assert [stream, token] == [expected[0], expected[2]]
        assert float(weight) == pytest.approx(float(expected[1]), abs=2e-3)
    for more in ([], ["-p", "Hello there"]):
        mlx, onnx = (answers_of(result)[0] for result in both(*run, *more, "--json"))
        for ours, theirs in zip(onnx["tokens"], mlx["tokens"], strict=True):
            assert ours == pytest.approx(theirs, abs=1e-4)


def test_an_export_needs_no_runtime_option(parscale, plain_model, plain_export):
    run = ("generate", "-p", "Hi", "-n", 5, "--quiet", "--model")
    onnx = parscale(*run, plain_export, "--threads", 1)
    assert onnx.exit_code == 0
    assert onnx.stdout == parscale(*run, plain_model).stdout
    assert parscale(*run, plain_export / "model.onnx").stdout == onnx.stdout


def test_one_export_of_several_numbers_of_streams(parscale, backbone, adapter, tmp_path):
    result = parscale("export-onnx", "--model", backbone, "--adapter", adapter,
                      "-o", tmp_path / "out")  # fmt: skip
    assert "P=1, 4, batch layout" in result.stdout
    run = ("generate", "-p", "Hi", "-n", 9, "--json", "--model")
    for streams, chosen in (([], 1), (["--streams", 1], 1), (["--streams", 4], 4)):
        ours = answers_of(parscale(*run, tmp_path / "out", *streams))
        mlx = (*run, backbone, "--adapter", adapter, "--streams", chosen)
        assert ours == answers_of(parscale(*mlx))
    verify = ("verify", tmp_path / "out", "--against", backbone, "--tokens", 4)
    for more in ([], ["--adapter", adapter]):
        assert "within the tolerance" in parscale(*verify, *more).stdout


def test_chat(both):
    mlx, onnx = both("chat", "-n", 6, input="hello\n/streams\nagain\n/reset\nhello\n")
    assert onnx.exit_code == 0
    assert onnx.stdout == mlx.stdout
    assert onnx.stderr == mlx.stderr


def test_mlx_is_not_imported(export):
    code = (
        "import sys; sys.modules['mlx'] = None; from parscale_cli.main import cli;"
        f"cli(['generate', '--model', {str(export)!r}, '-p', 'Hi', '-n', '2'])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize(
    "option",
    [
        ("--kv-bits", 8), ("--kv-group-size", 64), ("--max-kv-size", 9), ("--draft-model", "x"),
        ("--prompt-cache", "x.safetensors"), ("--quantized-kv-start", 1), ("--adapter", "/"),
        ("--draft", "ngram"),
    ],
)  # fmt: skip
def test_options_of_mlx_alone(parscale, export, option):
    result = parscale("generate", "--model", export, "-p", "Hi", *option)
    assert result.exit_code == 2
    assert f"{option[0]} is an option of --runtime mlx" in error_line(result)


@pytest.mark.parametrize(
    "option", [("--provider", "cpu"), ("--device-id", 0), ("--threads", 2), ("--cuda-graph",)]
)
def test_options_of_onnxruntime_alone(parscale, model, option):
    for command in (("generate", "-p", "Hi"), ("chat",)):
        result = parscale(*command, "--model", model, *option)
        assert result.exit_code == 2
        assert f"{option[0]} is an option of --runtime onnx" in error_line(result)


DRIVER = """
int cuInit(unsigned flags) { return 0; }
int cuDeviceGetCount(int *count) { *count = 1; return 0; }
"""


@pytest.mark.skipif(not shutil.which("gcc"), reason="needs a C compiler")
@pytest.mark.skipif(CUDA not in ort.get_available_providers(), reason="onnxruntime without CUDA")
def test_a_driver_without_the_libraries_of_cuda(plain_model, tmp_path):
    """A PC with an NVIDIA card: the driver knows a device, onnxruntime's libraries are missing."""
    if not missing_libraries():
        pytest.skip("CUDA's libraries are here")
    export = export_onnx(plain_model, tmp_path / "fp16", precision="fp16")
    (tmp_path / "driver.c").write_text(DRIVER)
    library = tmp_path / "libcuda.so.1"
    subprocess.run(["gcc", "-shared", "-o", library, tmp_path / "driver.c"], check=True)

    def generate(*more):
        code = "from parscale_cli.main import cli; cli()"
        run = ("generate", "--model", export, "-p", "Hi", "-n", 3, "--quiet", "--json", *more)
        return subprocess.run(
            [sys.executable, "-c", code, *map(str, run)],
            env=os.environ | {"LD_LIBRARY_PATH": str(tmp_path)}, capture_output=True, text=True,
        )  # fmt: skip

    result = generate()
    assert result.returncode == 0
    assert len(json.loads(result.stdout)["tokens"]) == 3
    (line,) = result.stderr.splitlines()
    assert "on the CPU, not on CUDA: libcublasLt.so.13, " in line
    assert "pip install 'parscale[onnx-cuda13]'" in line
    chosen = generate("--provider", "cpu")
    assert (chosen.returncode, chosen.stdout != "", chosen.stderr) == (0, True, "")
    refused = generate("--provider", "cuda")
    assert (refused.returncode, refused.stdout) == (1, "")
    (line,) = refused.stderr.splitlines()
    assert "provider 'cuda' was asked for, but libcublasLt.so.13, " in line


def test_refusals(parscale, model, export, tmp_path):
    run = ("generate", "-p", "Hi", "--runtime", "onnx")
    assert "tpu" in error_line(parscale(*run, "--model", export, "--provider", "tpu"))
    if not (CUDA in ort.get_available_providers() and count_devices()):
        for option in (("--provider", "cuda"), ("--cuda-graph",)):
            assert "cuda" in error_line(parscale(*run, "--model", export, *option))
    assert "no graph of P=3, only of P=4" in error_line(
        parscale(*run, "--model", export, "--streams", 3)
    )
    silent = export_onnx(model, tmp_path / "silent")
    streams = error_line(parscale(*run, "--model", silent, "--show-streams"))
    assert "without --aggregation-weights" in streams
    chat = parscale("chat", "--model", silent, "-n", 1, input="/streams\n/quit\n")
    assert "without --aggregation-weights" in chat.stderr
    chat = parscale("chat", "--model", export, "-n", 1, input="/streams\n/quit\n")
    assert "streams shown" in chat.stderr
    bare = tmp_path / "bare"
    shutil.copytree(export, bare)
    (bare / "generation_config.json").write_text("[")
    assert "generation_config.json: not valid JSON" in error_line(parscale(*run, "--model", bare))
    (bare / "tokenizer.json").write_text("{")
    assert "the tokenizer cannot be read" in error_line(parscale(*run, "--model", bare))
    (bare / "tokenizer.json").unlink()
    assert "no tokenizer.json in this folder" in error_line(parscale(*run, "--model", bare))


def test_any_model_is_exported_once(parscale, model, backbone, adapter, tmp_path, monkeypatch):
    monkeypatch.setenv("PARSCALE_CACHE", str(tmp_path))
    run = ("generate", "-p", "Hi", "-n", 9, "--json", "--show-streams", "--model")
    expected = answers_of(parscale(*run, model))
    for _ in range(2):
        ours = answers_of(parscale(*run, model, "--runtime", "onnx"))
        for token, other in zip(ours[0]["tokens"], expected[0]["tokens"], strict=True):
            assert token == pytest.approx(other, abs=1e-4)
        (export,) = (tmp_path / "exports").iterdir()
    streams = (*run, backbone, "--adapter", adapter, "--runtime", "onnx")
    assert answers_of(parscale(*streams))[0]["text"] == expected[0]["text"]
    assert answers_of(parscale(*streams, "--streams", 1))[0]["text"] != expected[0]["text"]
    assert len(list((tmp_path / "exports").iterdir())) == 2
    # Other contents are another export, wherever they are.
    other = shutil.copytree(model, tmp_path / "other")
    set_eos(other, 5)
    parscale(*run, other, "--runtime", "onnx")
    shown = parscale("doctor")
    assert str(export) in shown.stdout
    cleared = parscale("doctor", "--clear-cache")
    assert cleared.exit_code == 0 and not (tmp_path / "exports").exists()
