"""mlx-lm's own tests of its server, as clients of ours.

No package brings them. ``PARSCALE_MLX_LM_SOURCE`` names a checkout of mlx-lm, of the version that
is installed, whose ``tests/test_server.py`` is read; without it they are skipped. Its other classes
test mlx-lm's own prompt cache and handler, and ask nothing of a server.
"""

import importlib.util
import os
from pathlib import Path
from typing import Any
from unittest import TestCase, skip

from parscale_mlx.load import load_draft, open_models

import pytest
from helpers.serving import serving

SOURCE = os.environ.get("PARSCALE_MLX_LM_SOURCE")
# What else its server's classes hold, and why it is not run.
NOT_OF_A_SERVER = {
    "test_make_state_machine_empty_tool_call_end": "calls mlx-lm's ResponseGenerator by itself",
    "test_sequence_overlap": "calls a function that mlx-lm's server no longer has",
}


def their_tests(name: str) -> type[TestCase]:
    """A class of their tests, without the server that it starts."""

    @pytest.mark.skip("PARSCALE_MLX_LM_SOURCE names no checkout of mlx-lm")
    def test(self):
        pass

    if SOURCE is None:
        return type(name, (TestCase,), {"test": test})
    file = Path(SOURCE) / "tests" / "test_server.py"
    spec: Any = importlib.util.spec_from_file_location("mlx_lm_test_server", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    theirs = getattr(module, name)
    ours: dict[str, Any] = {
        test: skip(reason)(lambda self: None)
        for test, reason in NOT_OF_A_SERVER.items()
        if hasattr(theirs, test)
    }
    for step in ("setUpClass", "tearDownClass"):
        ours[step] = classmethod(lambda cls: None)
    return type(name, (theirs,), ours)


@pytest.fixture(scope="class")
def server(request, model):
    # Their requests ask for default_model and for chat_model; their draft is the model itself.
    opened = open_models(model, [])
    draft = load_draft(model, opened[1]) if request.cls.drafted else None
    with serving(opened, name="chat_model", draft=draft) as server:
        request.cls.port = server.port
        yield


@pytest.mark.usefixtures("server")
class TestServer(their_tests("TestServer")):  # type: ignore[misc]
    drafted = False


@pytest.mark.usefixtures("server")
class TestServerWithDraftModel(their_tests("TestServerWithDraftModel")):  # type: ignore[misc]
    drafted = True
