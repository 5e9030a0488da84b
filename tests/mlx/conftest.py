"""The golden cases as fixtures, each loaded once."""

import pytest
from helpers.golden_cases import CASES, Golden, load_golden


@pytest.fixture(scope="session", params=CASES)
def golden(request) -> Golden:
    if request.param == "p2-torch-bin":
        pytest.importorskip("torch", reason="pytorch_model.bin needs PyTorch")
    return load_golden(request.param)


@pytest.fixture(scope="session")
def p4() -> Golden:
    return load_golden("p4")
