"""Stream adapters: golden cases split into backbone and adapter, and put together again."""

import hashlib
import json
import shutil

from parscale_mlx import generate, load, load_adapter, load_model, with_streams
from parscale_mlx.adapter import Adapter, save_adapter
from parscale_mlx.convert import convert
from parscale_mlx.fuse import fuse

import mlx.core as mx
import mlx.nn as nn
import pytest
from helpers.golden_cases import GOLDEN, TOLERANCE, difference, load_golden
from parscale_core.checkpoint.adapter import find_adapters, fingerprint, pick_adapter
from parscale_core.convert_settings import Quantization
from safetensors.numpy import load_file, save_file

PUBLISHED = "ParScale/ParScale-1.8B-P8"
AUTO_MAP = {
    "AutoConfig": f"{PUBLISHED}--configuration_qwen2_parscale.Qwen2ParScaleConfig",
    "AutoModelForCausalLM": f"{PUBLISHED}--modeling_qwen2_parscale.Qwen2ParScaleForCausalLM",
}


def split(name, folder, streams_name="adapter"):
    """A golden case as a plain backbone and an adapter, written by numpy alone."""
    weights = {}
    for file in (GOLDEN / name).glob("model*.safetensors"):
        weights |= load_file(file)
    config = json.loads((GOLDEN / name / "config.json").read_text())
    streams = {k: v for k, v in weights.items() if "prefix_" in k or "aggregate_layer" in k}
    backbone = folder / "backbone"
    backbone.mkdir()
    save_file(
        {k: v for k, v in weights.items() if k not in streams}, backbone / "model.safetensors"
    )
    plain = {k: v for k, v in config.items() if not k.startswith("parscale")}
    (backbone / "config.json").write_text(json.dumps(plain | {"model_type": "qwen2"}))
    renamed = {}
    for key, value in streams.items():
        if key.endswith("aggregate_layer.0.weight"):
            # The published columns run (hidden, stream).
            columns = value.reshape(len(value), -1, config["parscale_n"])
            value = columns.transpose(0, 2, 1).reshape(len(value), -1)
        key = key.replace("aggregate_layer.0", "aggregator.fc1")
        renamed[key.replace("aggregate_layer.2", "aggregator.fc2")] = mx.array(value)
    adapter = Adapter(
        streams=config["parscale_n"],
        prefix_length=config["parscale_n_tokens"],
        smoothing=config["parscale_attn_smooth"],
        weights=renamed,
        backbone="backbone",
        backbone_sha256=fingerprint(backbone),
    )
    save_adapter(folder / streams_name, adapter)
    return backbone, folder / streams_name


@pytest.fixture(scope="module")
def p4_split(tmp_path_factory):
    return split("p4", tmp_path_factory.mktemp("p4"))


@pytest.fixture
def parts(p4_split, tmp_path):
    """A backbone and an adapter of its own for a test to spoil."""
    return tuple(shutil.copytree(folder, tmp_path / folder.name) for folder in p4_split)


@pytest.mark.parametrize("name", ["p4", "p2-tied-sharded", "p8-short-prefix"])
def test_backbone_and_adapter_are_the_golden_model(name, tmp_path):
    backbone_folder, folder = split(name, tmp_path)
    backbone, _ = load_model(backbone_folder)
    model = with_streams(backbone, load_adapter(folder, backbone=backbone_folder))
    assert model.model_type == "qwen2_parscale" and backbone.model_type == "qwen2"
    for row in load_golden(name).rows:
        ids = mx.array([row.ids])
        before = backbone(ids)
        assert difference(model(ids)[0], row.logits) < TOLERANCE
        assert difference(model(ids, cache=model.make_cache())[0], row.logits) < TOLERANCE
        assert mx.array_equal(backbone(ids), before)


def test_the_backbone_still_has_one_stream(p4_split):
    backbone, _ = load_model(p4_split[0])
    with_streams(backbone, load_adapter(p4_split[1]))
    assert backbone.args.streams == 1
    assert not any("prefix" in n or "aggregator" in n for n, _ in nn.utils.tree_flatten(backbone))
    assert backbone.aggregation_weights(mx.array([[5]])).shape == (1, 1, 1)


@pytest.mark.parametrize("quantize", [False, True])
def test_streams_add_only_their_own_memory(p4_split, quantize, tmp_path):
    folder = p4_split[0]
    if quantize:
        folder = tmp_path / "q"
        convert(p4_split[0], folder, quantization=Quantization(bits=8, group_size=32))
    backbone, _ = load_model(folder)
    adapter = load_adapter(p4_split[1])
    own = sum(a.nbytes for a in adapter.weights.values())
    size = sum(a.nbytes for _, a in nn.utils.tree_flatten(backbone.parameters()))
    mx.eval(adapter.weights)
    before = mx.get_active_memory()
    models = [with_streams(backbone, adapter) for _ in range(5)]
    mx.eval([m.parameters() for m in models])
    assert mx.get_active_memory() - before < 5 * own + size // 4
    assert difference(models[0](mx.array([[5, 6]])), models[4](mx.array([[5, 6]]))) == 0


def test_load_with_an_adapter(p4_split, tmp_path):
    from tokenizers import Tokenizer, models

    backbone = shutil.copytree(p4_split[0], tmp_path / "b")
    words = Tokenizer(models.WordLevel({f"w{n}": n for n in range(320)}, unk_token="w0"))
    words.save(str(backbone / "tokenizer.json"))
    (backbone / "tokenizer_config.json").write_text(
        '{"tokenizer_class": "PreTrainedTokenizerFast"}'
    )
    model, tokenizer = load(backbone, adapter_path=p4_split[1])
    row = load_golden("p4").rows[0]
    text = generate(model, tokenizer, row.ids, max_tokens=12)
    assert text == "".join(f"w{n}" for n in row.greedy_tokens)


def test_fingerprint_is_what_it_is_said_to_be(tmp_path):
    # Sizes below, at and above one and two samples of 4096 bytes.
    sizes = {"b": 10, "a": 1024, "d": 1500, "c": 2048, "e": 5000}
    tensors = {k: mx.random.normal((n,)) for k, n in sizes.items()}
    mx.save_safetensors(str(tmp_path / "model-1.safetensors"), {k: tensors[k] for k in "ba"})
    mx.save_safetensors(
        str(tmp_path / "model-2.safetensors"),
        {k: tensors[k] for k in "dce"} | {"model.layers.0.self_attn.prefix_k": mx.zeros((2,))},
    )
    places = dict.fromkeys("ba", "model-1.safetensors") | dict.fromkeys(
        "dce", "model-2.safetensors"
    )
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    digest = hashlib.sha256()
    for name in "abcde":
        data = bytes(memoryview(tensors[name]))
        digest.update(f"{name} F32 [{sizes[name]}]\n".encode())
        digest.update(data[:4096] + data[max(4096, len(data) - 4096) :])
    assert fingerprint(tmp_path) == digest.hexdigest()


def test_fingerprint_knows_the_backbone_only():
    assert len({fingerprint(GOLDEN / name) for name in ("p1", "p4", "p4-bf16")}) == 3
    with pytest.raises(ValueError, match="convert it first"):
        fingerprint(GOLDEN / "p2-torch-bin")


def test_another_backbone(parts, tmp_path):
    with pytest.raises(ValueError, match="belongs to another backbone"):
        load_adapter(parts[1], backbone=GOLDEN / "p1")
    weights = load_file(parts[0] / "model.safetensors")
    weights["model.norm.weight"][3] += 1e-3
    save_file(weights, parts[0] / "model.safetensors")
    with pytest.raises(ValueError, match="other weights of it"):
        load_adapter(parts[1], backbone=parts[0])


def test_a_backbone_with_streams(p4_split):
    with pytest.raises(ValueError, match="has 4 streams of its own"):
        with_streams(load_golden("p4").model, load_adapter(p4_split[1]))


def change_config(folder, **changes):
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"adapter_type": "lora"}, "not a stream adapter"),
        ({"parscale_n": 1}, "says 1 streams of 48 tokens"),
        ({"parscale_n": "4"}, "parscale_n '4' is not"),
        ({"parscale_n": 2}, "says 2 streams of 48 tokens, but model.layers"),
        ({"parscale_n_tokens": 47}, "says 4 streams of 47 tokens, but model.layers"),
        ({"parscale_n_tokens": 0}, "parscale_n_tokens 0"),
        ({"parscale_attn_smooth": 2}, "parscale_attn_smooth 2"),
        ({"backbone": "x"}, "something else in its place"),
    ],
)
def test_configurations_that_are_none(parts, changes, words):
    change_config(parts[1], **changes)
    with pytest.raises(ValueError, match=words):
        load_adapter(parts[1])


@pytest.mark.parametrize("text", ["{", "[]"])
def test_a_configuration_of_rubbish(parts, text):
    (parts[1] / "adapter_config.json").write_text(text)
    with pytest.raises(ValueError, match=r"adapter_config\.json: not "):
        load_adapter(parts[1])


def test_folders_that_are_no_adapters(parts, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere: no adapter_config\.json"):
        load_adapter(tmp_path / "nowhere")
    file = parts[1] / "adapters.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ValueError, match="not a whole safetensors file"):
        load_adapter(parts[1])
    file.unlink()
    with pytest.raises(FileNotFoundError, match=r"no adapters\.safetensors"):
        load_adapter(parts[1])


def test_weights_that_do_not_fit(parts):
    adapter, (backbone, _) = load_adapter(parts[1]), load_model(parts[0])
    prefix = "model.layers.2.self_attn.prefix_v"
    whole = dict(adapter.weights)
    mx.eval(whole)  # read before their file is written over
    adapter.weights = {k: v for k, v in whole.items() if k != prefix}
    with pytest.raises(ValueError, match=f"it holds no {prefix}"):
        with_streams(backbone, adapter)
    adapter.weights = whole | {prefix: whole[prefix][..., :8]}
    with pytest.raises(ValueError, match=r"prefix_v has shape \[4, 2, 48, 8\], not"):
        with_streams(backbone, adapter)
    adapter.weights = whole | {"model.layers.9.self_attn.prefix_v": whole[prefix]}
    with pytest.raises(ValueError, match=r"no place for model\.layers\.9"):
        with_streams(backbone, adapter)
    for weights, words in (
        ({k: v for k, v in whole.items() if "fc1.bias" not in k}, "no model.aggregator.fc1.bias"),
        (whole | {"model.norm.weight": mx.zeros(4)}, "model.norm.weight is no part"),
    ):
        mx.save_safetensors(str(parts[1] / "adapters.safetensors"), weights)
        with pytest.raises(ValueError, match=words):
            load_adapter(parts[1])


def test_saving_replaces_only_adapters_and_only_by_force(parts, tmp_path):
    adapter = load_adapter(parts[1])
    with pytest.raises(FileExistsError, match="exists already"):
        save_adapter(parts[1], adapter)
    save_adapter(parts[1], adapter, force=True)
    with pytest.raises(FileExistsError, match=r"not a folder with adapter_config\.json"):
        save_adapter(parts[0], adapter, force=True)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["adapter", "backbone"]
    again = load_adapter(parts[1])
    assert all(mx.array_equal(again.weights[k], v) for k, v in adapter.weights.items())


def test_finding_an_adapter_by_its_streams(parts, tmp_path):
    backbone, four = parts
    (tmp_path / "two").mkdir()
    _, two = split("p2-tied-sharded", tmp_path / "two")
    assert pick_adapter(find_adapters(backbone, []), None) is None
    assert pick_adapter(find_adapters(backbone, [two, four]), None) == four
    assert pick_adapter(find_adapters(backbone, [two, four]), 2) == two
    assert pick_adapter(find_adapters(backbone, [two, four]), 1) is None
    assert pick_adapter(find_adapters(GOLDEN / "p4", []), 4) is None
    with pytest.raises(ValueError, match="8 streams, only 1, 2, 4"):
        pick_adapter(find_adapters(backbone, [two, four]), 8)
    with pytest.raises(ValueError, match="8 streams, only 4"):
        pick_adapter(find_adapters(GOLDEN / "p4", []), 8)
    with pytest.raises(ValueError, match="both have 4 streams"):
        pick_adapter(find_adapters(backbone, [four, four]), None)
    own = backbone / "adapters" / "p4"
    shutil.copytree(four, own)
    assert pick_adapter(find_adapters(backbone, []), 4) == own


def test_fusing_gives_the_golden_checkpoint_back(p4_split, tmp_path):
    fuse(*p4_split, tmp_path / "fused")
    convert(tmp_path / "fused", tmp_path / "hf", to="hf")
    fuse(*p4_split, tmp_path / "at once", to="hf")
    golden = load_file(GOLDEN / "p4" / "model.safetensors")
    for folder in (tmp_path / "hf", tmp_path / "at once"):
        again = load_file(folder / "model.safetensors")
        assert golden.keys() == again.keys()
        assert all((golden[name] == again[name]).all() for name in golden)
        # The classes are in the repository that is named; no code stands beside the weights.
        published = json.loads((folder / "config.json").read_text())
        assert published["auto_map"] == AUTO_MAP
        assert published["architectures"] == ["Qwen2ParScaleForCausalLM"]
        assert not list(folder.glob("*.py"))
    config = json.loads((tmp_path / "fused" / "config.json").read_text())
    original = json.loads((GOLDEN / "p4" / "config.json").read_text())
    named = {"architectures", "model_type"} | {k for k in original if k.startswith("parscale")}
    assert {k: config[k] for k in named} == {k: original[k] for k in named}


def test_fusing_over_a_quantised_backbone(p4_split, tmp_path):
    convert(p4_split[0], tmp_path / "q", quantization=Quantization(bits=8, group_size=32))
    adapter = load_adapter(p4_split[1])
    adapter.backbone_sha256 = fingerprint(tmp_path / "q")
    save_adapter(tmp_path / "a", adapter)
    fuse(tmp_path / "q", tmp_path / "a", tmp_path / "fused")
    backbone, _ = load_model(tmp_path / "q")
    ids = mx.array([load_golden("p4").rows[0].ids])
    expected = with_streams(backbone, adapter)(ids)
    assert difference(load_model(tmp_path / "fused")[0](ids), expected) == 0
    # Quantisation is undone for the published classes, and the rest is left as it was.
    convert(tmp_path / "fused", tmp_path / "hf", to="hf")
    assert difference(load_model(tmp_path / "hf")[0](ids), expected) < 1e-3
    hf, golden = (load_file(f / "model.safetensors") for f in (tmp_path / "hf", GOLDEN / "p4"))
    assert {k: v.shape for k, v in hf.items()} == {k: v.shape for k, v in golden.items()}
    assert "quantization" not in (tmp_path / "hf" / "config.json").read_text()


def test_fusing_does_not_overwrite(parts, tmp_path):
    with pytest.raises(FileExistsError, match="exists already"):
        fuse(*parts, tmp_path)
    with pytest.raises(ValueError, match="holds the backbone"):
        fuse(*parts, parts[0], force=True)
    with pytest.raises(ValueError, match="belongs to another backbone"):
        fuse(GOLDEN / "p1", parts[1], tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["p1", "p2-tied-sharded", "p4", "p4-bf16", "p8-short-prefix"])
def test_published_to_mlx_and_back(name, tmp_path):
    convert(GOLDEN / name, tmp_path / "mlx")
    convert(tmp_path / "mlx", tmp_path / "hf", to="hf")
    golden: dict = {}
    for file in (GOLDEN / name).glob("model*.safetensors"):
        golden |= mx.load(str(file))
    again, metadata = mx.load(str(tmp_path / "hf" / "model.safetensors"), return_metadata=True)
    assert metadata["format"] == "pt"
    assert golden.keys() == again.keys()
    for key, value in golden.items():
        assert again[key].dtype == value.dtype and mx.array_equal(again[key], value), key
    original = json.loads((GOLDEN / name / "config.json").read_text())
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    # The code is in the repository that is named, not beside the weights.
    assert config.pop("auto_map", None) == (AUTO_MAP if original["parscale_n"] > 1 else None)
    original.pop("auto_map", None)
    assert config == original


def test_published_to_published_keeps_what_names_its_classes(tmp_path):
    convert(GOLDEN / "p4", tmp_path / "hf", to="hf", dtype="bfloat16")
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert config == json.loads((GOLDEN / "p4" / "config.json").read_text()) | {
        "torch_dtype": "bfloat16",
        "auto_map": AUTO_MAP,
    }


def test_what_has_no_published_form(tmp_path):
    with pytest.raises(ValueError, match="no place in a Hugging Face checkpoint"):
        convert(GOLDEN / "p4", tmp_path / "o", to="hf", quantization=Quantization())
    with pytest.raises(ValueError, match="not one of mlx, hf"):
        convert(GOLDEN / "p4", tmp_path / "o", to="onnx")
    source = shutil.copytree(GOLDEN / "p4", tmp_path / "s")
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"rope_traditional": True}))
    with pytest.raises(ValueError, match="rope_traditional"):
        convert(source, tmp_path / "o", to="hf")
