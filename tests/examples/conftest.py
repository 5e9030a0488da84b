"""Golden cases exported once for each kind of runtime, with a tokenizer made for them."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers.examples import EXAMPLES, write_tokenizer
from helpers.onnx_cases import variant
from parscale_export import export_onnx


@pytest.fixture(scope="session")
def export(tmp_path_factory) -> Callable[..., Path]:
    """Export a golden case, once for each set of ``export_onnx``'s options."""
    made: dict[str, Path] = {}

    def make(case: str, end: int = 0, **options) -> Path:
        name = "-".join(map(str, [case, end, *options.values()]))
        if name not in made:
            folder = tmp_path_factory.mktemp("examples")
            # Some golden tokens are the checkpoint's end of text, where examples would stop.
            source = variant(folder / "model", case, eos_token_id=end)
            write_tokenizer(source)
            made[name] = export_onnx(source, folder / name, **options)
        return made[name]

    return make


@pytest.fixture(scope="session")
def node() -> str:
    """Node.js, where the packages of the JavaScript examples are installed."""
    program = shutil.which("node")
    if program is None:
        pytest.skip("needs Node.js")
    if not (EXAMPLES / "node_modules").is_dir():
        pytest.skip("needs npm ci in examples/")
    return program
