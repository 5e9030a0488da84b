"""The examples in Python, each with the runtime it shows and nothing else."""

import json
import sys

import pytest
from running import CASES, EXAMPLES, prompt_and_answer, run, tokens_option, words


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("kv_layout", ["batch", "heads"])
def test_onnxruntime(export, case, kv_layout):
    folder = export(case, kv_layout=kv_layout)
    prompt, answer = prompt_and_answer(case)
    script = EXAMPLES / "python" / "generate.py"
    assert json.loads(run(sys.executable, script, folder, *tokens_option(prompt))) == answer
    text = run(sys.executable, script, folder, words(prompt), "--max-tokens", 12)
    assert text == words(answer)
