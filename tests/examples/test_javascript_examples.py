"""The examples in JavaScript; their packages are the lock file's."""

import json

import pytest
from running import CASES, EXAMPLES, prompt_and_answer, run, tokens_option, words


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
