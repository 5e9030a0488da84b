"""The examples in Python, each with the runtime it shows and nothing else."""

import json
import sys
from importlib.util import find_spec

import pytest
from helpers.examples import CASES, EXAMPLES, prompt_and_answer, run, tokens_option, words
from helpers.onnx_cases import batches
from parscale_export import OnnxModel


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("kv_layout", ["batch", "heads"])
def test_onnxruntime(export, case, kv_layout):
    folder = export(case, kv_layout=kv_layout)
    prompt, answer = prompt_and_answer(case)
    script = EXAMPLES / "python" / "generate.py"
    assert json.loads(run(sys.executable, script, folder, *tokens_option(prompt))) == answer
    text = run(sys.executable, script, folder, words(prompt), "--max-tokens", 12)
    assert text == words(answer)


def test_onnxruntime_with_a_cache_in_float16(export):
    prompt, answer = prompt_and_answer("p4")
    script, folder = EXAMPLES / "python" / "generate.py", export("p4", precision="fp16")
    assert json.loads(run(sys.executable, script, folder, *tokens_option(prompt))) == answer


def test_onnxruntime_with_8_bit_activations(export):
    prompt, _ = prompt_and_answer("p4")
    script, folder = EXAMPLES / "python" / "generate.py", export("p4", precision="w8a8")
    answer = json.loads(run(sys.executable, script, folder, *tokens_option(prompt)))
    assert answer == OnnxModel(folder, "cpu").generate([prompt], len(answer))[0]


def test_onnxruntime_stops_at_the_end_of_text(export):
    prompt, answer = prompt_and_answer("p4")
    script, folder = EXAMPLES / "python" / "generate.py", export("p4", end=answer[4])
    assert json.loads(run(sys.executable, script, folder, *tokens_option(prompt))) == answer[:5]


@pytest.mark.skipif(not find_spec("onnxruntime_genai"), reason="needs onnxruntime-genai")
@pytest.mark.parametrize("case", CASES)
def test_onnxruntime_genai(export, case):
    folder = export(case, target="genai", precision="fp32")
    prompt, answer = prompt_and_answer(case)
    script = EXAMPLES / "genai" / "generate.py"
    assert json.loads(run(sys.executable, script, folder, *tokens_option(prompt))) == answer
    ragged = batches(case)[-1]
    lines = run(sys.executable, script, folder, *tokens_option(*ragged.prompts)).splitlines()
    assert [json.loads(line) for line in lines] == ragged.tokens.tolist()
    text = run(sys.executable, script, folder, words(prompt), "--max-tokens", 12)
    assert text == words(answer)


@pytest.mark.skipif(not find_spec("onnxruntime_genai"), reason="needs onnxruntime-genai")
def test_onnxruntime_genai_stops_each_prompt_at_its_end_of_text(export):
    ragged = batches("p4")[-1]
    first, *others = ragged.tokens.tolist()
    assert all(first[4] not in other for other in others)
    folder = export("p4", end=first[4], target="genai", precision="fp32")
    script = EXAMPLES / "genai" / "generate.py"
    lines = run(sys.executable, script, folder, *tokens_option(*ragged.prompts)).splitlines()
    assert [json.loads(line) for line in lines] == [first[:5], *others]


@pytest.mark.skipif(not find_spec("openvino"), reason="needs openvino")
@pytest.mark.parametrize("precision", ["int8", "w8a8"])
def test_openvino_with_integers(export, precision, case="p2-tied-sharded"):
    folder = export(case, kv_layout="heads", ops="standard", precision=precision)
    prompt, _ = prompt_and_answer(case)
    script = EXAMPLES / "openvino" / "generate.py"
    answer = json.loads(run(sys.executable, script, folder, *tokens_option(prompt)))
    # OpenVINO rounds in its own way, and the weights are arbitrary.
    expected = OnnxModel(folder, "cpu").generate([prompt], len(answer))[0]
    assert answer[:4] == expected[:4]


@pytest.mark.skipif(not find_spec("openvino"), reason="needs openvino")
@pytest.mark.parametrize("case", CASES)
def test_openvino(export, case):
    folder = export(case, kv_layout="heads", ops="standard")
    prompt, answer = prompt_and_answer(case)
    script = EXAMPLES / "openvino" / "generate.py"
    assert json.loads(run(sys.executable, script, folder, *tokens_option(prompt))) == answer
    text = run(sys.executable, script, folder, words(prompt), "--max-tokens", 12)
    assert text == words(answer)
