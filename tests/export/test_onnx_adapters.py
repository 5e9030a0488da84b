"""Several P in one export: one backbone, a graph and a small data file for each adapter."""

import hashlib
import json
import shutil

import numpy as np
import onnx
import pytest
from helpers.onnx_adapters import joined, random_adapter, split
from helpers.onnx_cases import GOLDEN, LAYOUTS, OPERATORS, batches
from parscale_core.checkpoint.adapter import fingerprint
from parscale_export import OnnxModel, export_onnx
from safetensors.numpy import load_file, save_file

TOKENS = list(range(3, 40))


@pytest.fixture(scope="module")
def p4(tmp_path_factory):
    """Golden case p4 as backbone and adapter, and a random adapter with two streams."""
    folder = tmp_path_factory.mktemp("p4")
    backbone, four = split("p4", folder)
    return backbone, random_adapter(folder / "p2", backbone, 2, tokens=7), four


@pytest.mark.parametrize("kv_layout", LAYOUTS)
@pytest.mark.parametrize("ops", OPERATORS)
@pytest.mark.parametrize("case", ["p4", "p2-tied-sharded"])
def test_golden_cases_taken_apart(tmp_path, kv_layout, ops, case):
    backbone, adapter = split(case, tmp_path)
    options = {"kv_layout": kv_layout, "ops": ops, "all_logits": True}
    folder = export_onnx(backbone, tmp_path / "out", adapters=[adapter], **options)
    streams = int(case[1])
    model = OnnxModel(folder, streams=streams)
    assert (model.streams, model.file.name) == (streams, f"model_p{streams}.onnx")
    for batch in batches(case):
        assert model.generate(batch.prompts, max_tokens=12) == batch.tokens.tolist()
        for i, prompt in enumerate(batch.prompts):
            difference = np.abs(model.logits(prompt) - batch.logits[i, -len(prompt) :])
            assert difference.max() < 1e-4
    plain = export_onnx(backbone, tmp_path / "plain", **options)
    assert np.array_equal(OnnxModel(folder).logits(TOKENS), OnnxModel(plain).logits(TOKENS))


@pytest.mark.parametrize("ops", OPERATORS)
@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8", "int4"])
def test_each_graph_is_what_an_export_of_its_own_would_be(p4, tmp_path, ops, precision):
    backbone, *adapters = p4
    options = {"ops": ops, "precision": precision, "all_logits": True}
    folder = export_onnx(backbone, tmp_path / "out", adapters=adapters, **options)
    for streams, adapter in zip((2, 4), adapters, strict=True):
        whole = joined(tmp_path / f"whole{streams}", backbone, adapter)
        alone = OnnxModel(export_onnx(whole, tmp_path / f"alone{streams}", **options))
        model = OnnxModel(folder, streams=streams)
        assert model.prefix_length == alone.prefix_length
        assert np.array_equal(model.logits(TOKENS), alone.logits(TOKENS))


def test_adapters_that_came_with_the_model(p4, tmp_path):
    backbone, *adapters = p4
    model = shutil.copytree(backbone, tmp_path / "model")
    for adapter in adapters:
        shutil.copytree(adapter, model / "adapters" / adapter.name)
    folder = export_onnx(model, tmp_path / "out")
    assert {f.stem for f in folder.glob("*.onnx")} == {"model", "model_p2", "model_p4"}
    web = export_onnx(model, tmp_path / "web", target="web")
    assert len(list(web.rglob("*.onnx"))) == 1


def external(file) -> dict[str, str]:
    """The data file of each tensor that a graph keeps outside."""
    graph = onnx.load(file, load_external_data=False).graph
    places = {}
    for tensor in graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                places[tensor.name] = entry.value
    return places


@pytest.mark.parametrize("ops", OPERATORS)
@pytest.mark.parametrize("precision", ["fp32", "int4", "w8a8"])
def test_the_backbone_is_stored_once(p4, tmp_path, ops, precision):
    backbone, *adapters = p4
    options = {"ops": ops, "precision": precision}
    done = []
    folder = export_onnx(
        backbone, tmp_path / "out", adapters=adapters, progress=lambda *n: done.append(n), **options
    )
    # Four products a layer, of one model; and then what is written, all of it.
    stages = {"calibrating": 8, "smoothing": 4 * 3} if precision == "w8a8" else {}
    stages["writing"] = len(done) - sum(stages.values())
    assert done == [(what, n + 1, total) for what, total in stages.items() for n in range(total)]
    names = {file.name for file in folder.iterdir()}
    assert names == {
        "config.json", "model.onnx", "model.onnx.data", "model_p2.onnx", "model_p2.onnx.data",
        "model_p4.onnx", "model_p4.onnx.data",
    }  # fmt: skip
    plain = export_onnx(backbone, tmp_path / "plain", **options)
    longer_tables = 2 * 48 * 8 * 4 if ops == "fused" else 0
    sizes = [(path / "model.onnx.data").stat().st_size for path in (folder, plain)]
    assert sizes[0] == sizes[1] + longer_tables
    base = external(folder / "model.onnx")
    assert set(base.values()) == {"model.onnx.data"}
    for streams in (2, 4):
        data = f"model_p{streams}.onnx.data"
        places = external(folder / f"model_p{streams}.onnx")
        own = {name for name, place in places.items() if place == data}
        assert own == {name for name in places if "prefix" in name or "aggregator" in name}
        assert {name for name in places if name not in own} == set(base)
        about = OnnxModel.describe(folder, streams)
        assert about["adapter"] == f"p{streams}"
        for name in ("model.onnx.data", data):
            digest = hashlib.sha256((folder / name).read_bytes()).hexdigest()
            assert about[f"sha256.{name}"] == digest


def test_graphs_are_picked_by_their_streams(p4, tmp_path):
    backbone, *adapters = p4
    folder = export_onnx(backbone, tmp_path / "out", adapters=adapters)
    assert OnnxModel(folder).streams == 1
    for streams in (1, 2, 4):
        assert OnnxModel(folder, streams=streams).streams == streams
    with pytest.raises(ValueError, match="no graph of P=3, only of P=1, 2, 4"):
        OnnxModel(folder, streams=3)
    (folder / "model_p2.onnx.data").unlink()
    with pytest.raises(FileNotFoundError, match=r"model_p2\.onnx\.data: missing"):
        OnnxModel(folder, streams=2)
    assert OnnxModel(folder, streams=4).streams == 4


def test_fingerprints_are_those_of_the_backbone(tmp_path):
    for case in ("p4", "p4-bf16", "p2-tied-sharded"):
        assert fingerprint(GOLDEN / case) == fingerprint(split(case, tmp_path / case)[0])


def changed(adapter, folder, *, tensors=None, **config):
    """A copy of an adapter with other fields, or other tensors."""
    shutil.copytree(adapter, folder)
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | config))
    if tensors is not None:
        old = load_file(folder / "adapters.safetensors")
        kept = {name: value for name, value in (old | tensors).items() if value is not None}
        save_file(kept, folder / "adapters.safetensors")
    return folder


KEY = "model.layers.1.self_attn.prefix_k"
CHANGES = {
    "P": ({"parscale_n": 3}, r"prefix_k has shape \[4, .* adapter_config\.json says parscale_n 3"),
    "prefix": ({"parscale_n_tokens": 9}, r"adapter_config\.json says parscale_n_tokens 9"),
    "no number": ({"parscale_n": "4"}, r"adapter_config\.json: parscale_n '4'"),
    "smoothing": ({"parscale_attn_smooth": 2}, "parscale_attn_smooth 2 is not from 0 to 1"),
    "lora": ({"adapter_type": "lora"}, r"adapter_config\.json: not a stream adapter"),
    "no backbone": ({"backbone": None}, r"adapter_config\.json: no "),
    "hash": ({"backbone": {"name": "other", "sha256": "0"}}, r"another backbone \(other\)"),
    "heads": ({"tensors": {KEY: np.zeros((4, 1, 48, 16), np.float32)}}, r"prefix_k has shape"),
    "lacking": ({"tensors": {KEY: None}}, rf"adapters\.safetensors: the weights lack {KEY}"),
    "foreign": (
        {"tensors": {"model.norm.weight": np.zeros(64, np.float32)}},
        r"adapters\.safetensors: model\.norm\.weight is no part of a stream adapter",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CHANGES)
def test_adapters_that_do_not_fit(p4, tmp_path, name):
    change, message = CHANGES[name]
    adapter = changed(p4[2], tmp_path / "adapter", **change)
    with pytest.raises(ValueError, match=message) as caught:
        export_onnx(p4[0], tmp_path / "out", adapters=[adapter])
    assert "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


def test_other_refusals(p4, tmp_path):
    backbone, two, four = p4
    output = tmp_path / "out"
    with pytest.raises(ValueError, match=r"again and .*p4 both have P=4"):
        export_onnx(backbone, output, adapters=[four, two, changed(four, tmp_path / "again")])
    with pytest.raises(FileNotFoundError, match=r"backbone: no adapter_config"):
        export_onnx(backbone, output, adapters=[backbone])
    with pytest.raises(ValueError, match="p4: has 4 streams of its own, so it takes none from"):
        export_onnx(GOLDEN / "p4", output, adapters=[two])
    with pytest.raises(ValueError, match="convert it first"):
        pytest.importorskip("torch")
        export_onnx(GOLDEN / "p2-torch-bin", output, adapters=[two])
    for target in ("genai", "web"):
        with pytest.raises(ValueError, match=f"target {target} reads one graph"):
            export_onnx(backbone, output, adapters=[two], target=target)
    assert [path.name for path in tmp_path.iterdir()] == ["again"]


def test_two_runs_write_the_same_files(p4, tmp_path):
    backbone, *adapters = p4
    hashes = []
    for name in ("one", "two"):
        folder = export_onnx(backbone, tmp_path / name, adapters=adapters)
        hashes.append(
            {f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in folder.iterdir()}
        )
    assert hashes[0] == hashes[1]
