"""Which files of a hub repository are downloaded; no network is needed."""

import json
from pathlib import Path

import pytest
from huggingface_hub.errors import LocalEntryNotFoundError, OfflineModeIsEnabled
from parscale_core.checkpoint import hub
from parscale_core.checkpoint.folder import find_folder

SAFETENSORS = ["model.safetensors"]
SHARDS = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
INDEX = "model.safetensors.index.json"
PICKLES = ["pytorch_model-00001-of-00001.bin"]
PICKLE_INDEX = "pytorch_model.bin.index.json"
BESIDE = ["config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json",
          "merges.txt", "chat_template.jinja", "README.md", "adapters/p2/adapter_config.json",
          "adapters/p2/adapters.safetensors"]  # fmt: skip
NOISE = ["model.fp16.safetensors", "model_ema.safetensors", "model-00001-of-00009.safetensors",
         "flax_model.msgpack", "tf_model.h5", "model.safetensors.index.fp16.json", ".gitattributes",
         "onnx/model.onnx", "onnx/tokenizer.json", "original/consolidated.00.pth", "evil.py",
         "checkpoint-100/model.safetensors", "optimizer.pt", "model-q4.gguf"]  # fmt: skip


@pytest.mark.parametrize(
    ("weights", "expected"),
    [
        (SAFETENSORS + SHARDS + [INDEX], SAFETENSORS),
        (SHARDS + [INDEX, "pytorch_model.bin"], SHARDS + [INDEX]),
        (SAFETENSORS + ["pytorch_model.bin", *PICKLES, PICKLE_INDEX], SAFETENSORS),
        (["pytorch_model.bin", *PICKLES, PICKLE_INDEX], ["pytorch_model.bin"]),
        ([*PICKLES, PICKLE_INDEX], [*PICKLES, PICKLE_INDEX]),
    ],
)
def test_what_is_downloaded(monkeypatch, tmp_path, weights, expected):
    index = tmp_path / "index.json"
    places = PICKLES if PICKLE_INDEX in weights and INDEX not in weights else SHARDS
    index.write_text(json.dumps({"weight_map": {f"t{n}": name for n, name in enumerate(places)}}))
    asked = []

    def snapshot_download(name, *, revision, allow_patterns):
        asked.append((name, revision, sorted(allow_patterns)))
        return str(tmp_path)

    monkeypatch.setattr(hub, "list_repo_files", lambda name, revision: weights + BESIDE + NOISE)
    monkeypatch.setattr(hub, "hf_hub_download", lambda name, file, revision: str(index))
    monkeypatch.setattr(hub, "snapshot_download", snapshot_download)
    assert find_folder("someone/model", revision="v2") == tmp_path
    assert asked == [("someone/model", "v2", sorted(expected + BESIDE))]


def test_a_repository_without_weights(monkeypatch):
    monkeypatch.setattr(hub, "list_repo_files", lambda name, revision: [*BESIDE, "model-q4.gguf"])
    with pytest.raises(FileNotFoundError, match=r"someone/model: .*no model\.safetensors"):
        find_folder("someone/model")


@pytest.mark.parametrize("is_cached", [True, False])
def test_without_a_network(monkeypatch, tmp_path, is_cached):
    def list_repo_files(name, revision):
        raise OfflineModeIsEnabled("offline")

    def snapshot_download(name, *, revision, local_files_only):
        assert local_files_only
        if not is_cached:
            raise LocalEntryNotFoundError("not in the cache")
        return str(tmp_path)

    monkeypatch.setattr(hub, "list_repo_files", list_repo_files)
    monkeypatch.setattr(hub, "snapshot_download", snapshot_download)
    if is_cached:
        assert find_folder("someone/model") == Path(tmp_path)
    else:
        with pytest.raises(FileNotFoundError, match="neither a folder here nor a model on the hub"):
            find_folder("someone/model")
