"""A model that ranks can share."""

import shutil
from pathlib import Path

import pytest
from helpers.golden_cases import GOLDEN
from helpers.tiny_models import write_tokenizer


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "p4"
    write_tokenizer(shutil.copytree(GOLDEN / "p4", folder))
    return folder
