"""Tiny models with a tokenizer, and the command line run as a user would."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import parscale_mlx  # before mlx: it loads a fast BLAS

import pytest
from click.testing import CliRunner, Result
from helpers.tiny_models import GOLDEN, write_tokenizer
from safetensors.numpy import load_file, save_file


@pytest.fixture(scope="session")
def model(tmp_path_factory) -> Path:
    """Golden case p4 with a tokenizer and a chat template."""
    folder = tmp_path_factory.mktemp("models") / "p4"
    shutil.copytree(GOLDEN / "p4", folder)
    write_tokenizer(folder)
    return folder


@pytest.fixture(scope="session")
def plain_model(tmp_path_factory) -> Path:
    """Golden case p1 with a tokenizer, without a chat template."""
    folder = tmp_path_factory.mktemp("models") / "p1"
    shutil.copytree(GOLDEN / "p1", folder)
    write_tokenizer(folder, template=False)
    return folder


@pytest.fixture(scope="session")
def backbone(tmp_path_factory) -> Path:
    """Golden case p4 without its streams; they are its adapter, ``p4``."""
    folder = tmp_path_factory.mktemp("models") / "backbone"
    shutil.copytree(GOLDEN / "p4", folder)
    write_tokenizer(folder)
    weights = load_file(folder / "model.safetensors")
    for name in [k for k in weights if "prefix" in k or "aggregate" in k]:
        del weights[name]
    save_file(weights, folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"parscale_n": 1}))
    return folder


@pytest.fixture(scope="session")
def adapter(backbone, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("adapters") / "p4"
    from parscale_mlx.adapter import save_adapter, take_streams

    from parscale_core.checkpoint.adapter import fingerprint

    model, _ = parscale_mlx.load_model(GOLDEN / "p4")
    sha256 = fingerprint(backbone)
    save_adapter(folder, take_streams(model, backbone="backbone", backbone_sha256=sha256))
    return folder


@pytest.fixture(scope="session")
def adapter2(backbone, adapter, tmp_path_factory) -> Path:
    """The first two of those streams."""
    from parscale_mlx.adapter import save_adapter

    folder = tmp_path_factory.mktemp("adapters") / "p2"
    four = parscale_mlx.load_adapter(adapter)
    weights = {}
    for name, value in four.weights.items():
        if name.endswith("fc1.weight"):
            weights[name] = value[:, : value.shape[1] // 2]
        else:
            weights[name] = value if "fc1" in name else value[:2]
    save_adapter(folder, replace(four, streams=2, weights=weights))
    return folder


@pytest.fixture(scope="session")
def opened(backbone, adapter, adapter2):
    """Models of 1, 2 and 4 streams over one backbone, and their tokenizer."""
    from parscale_mlx.load import open_models

    return open_models(backbone, [adapter, adapter2])


@pytest.fixture(scope="session")
def reference(opened):
    from helpers.serving import Reference

    return Reference(*opened)


@pytest.fixture(scope="module")
def server(opened):
    from helpers.serving import serving

    with serving(opened) as server:
        yield server


@pytest.fixture(scope="module")
def client(server):
    """OpenAI's own."""
    import openai

    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


@pytest.fixture
def parscale():
    """Run ``parscale`` with arguments; ``exit_code``, ``stdout`` and ``stderr`` of what it did."""
    from parscale_cli.main import cli

    def run(*arguments, input=None) -> Result:
        return CliRunner().invoke(cli, [str(a) for a in arguments], input=input)

    return run
