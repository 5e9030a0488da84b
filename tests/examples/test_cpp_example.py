"""The C++ example, built with CMake against the headers and the library of the lock file."""

import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.examples import CASES, EXAMPLES, prompt_and_answer, run

PACKAGES = EXAMPLES / "node_modules"
HEADERS = PACKAGES / "@qvac/onnx/prebuilds/include/onnxruntime"


@pytest.fixture(scope="module")
def program(tmp_path_factory) -> Path:
    if not shutil.which("cmake"):
        pytest.skip("needs CMake and a C++ compiler")
    machine = {"x86_64": "x64", "aarch64": "arm64"}.get(platform.machine(), platform.machine())
    binaries = PACKAGES / "onnxruntime-node/bin/napi-v6" / sys.platform / machine
    libraries = sorted(binaries.glob("libonnxruntime.*"))
    if not libraries or not HEADERS.is_dir():
        pytest.skip("needs npm ci in examples/, for onnxruntime's library and its headers")
    build = tmp_path_factory.mktemp("cpp")
    run(
        "cmake", "-S", EXAMPLES / "cpp", "-B", build, "-DCMAKE_CXX_FLAGS=-Wall -Wextra -Werror",
        f"-DONNXRUNTIME_INCLUDE_DIR={HEADERS}", f"-DONNXRUNTIME_LIBRARY={libraries[0]}",
    )  # fmt: skip
    run("cmake", "--build", build)
    return build / "generate"


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("kv_layout", ["batch", "heads"])
def test_cpp(export, program, case, kv_layout):
    prompt, answer = prompt_and_answer(case)
    arguments = [export(case, kv_layout=kv_layout), ",".join(map(str, prompt)), 12]
    assert run(program, *arguments) == ",".join(map(str, answer))
    stopped = answer[: answer.index(answer[3]) + 1]
    assert run(program, *arguments, answer[3]) == ",".join(map(str, stopped))


def test_cpp_with_a_cache_in_float16(export, program):
    prompt, answer = prompt_and_answer("p4")
    ids = run(program, export("p4", precision="fp16"), ",".join(map(str, prompt)), 12)
    assert ids == ",".join(map(str, answer))


def test_cpp_says_what_is_wrong(export, program):
    arguments = [program, EXAMPLES / "nothing", "1,2"]
    result = subprocess.run(arguments, capture_output=True, text=True, timeout=60)
    assert (result.returncode, result.stdout) == (1, "")
    assert result.stderr.startswith("Error: ") and "model.onnx" in result.stderr
    assert subprocess.run([program], capture_output=True, timeout=60).returncode == 2
