"""Conversion: the golden cases come out as they went in, and what is wrong is said in one line."""

import json
import shutil
import sys

from parscale_mlx import load_model, model_folder
from parscale_mlx.convert import convert

import mlx.core as mx
import mlx.nn as nn
import pytest
from helpers.golden_cases import CASES, GOLDEN, TOLERANCE, difference, load_golden
from mlx.utils import tree_flatten
from parscale_core.convert_settings import Quantization

convert_module = sys.modules["parscale_mlx.convert"]


def listing(folder) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def check_logits(folder, name: str, tolerance: float = TOLERANCE) -> None:
    model, _ = load_model(folder, dtype=mx.float32)
    for row in load_golden(name).rows:
        assert difference(model(mx.array([row.ids]))[0], row.logits) < tolerance


@pytest.fixture
def folder(tmp_path):
    return shutil.copytree(GOLDEN / "p4", tmp_path / "source")


@pytest.mark.parametrize("name", CASES)
def test_golden_cases(name, tmp_path):
    if name == "p2-torch-bin":
        pytest.importorskip("torch")
    result = convert(GOLDEN / name, tmp_path / "out")
    check_logits(tmp_path / "out", name)
    source = json.loads((GOLDEN / name / "config.json").read_text())
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert "auto_map" not in config
    assert config["model_type"] == source["model_type"]
    assert config["torch_dtype"] == result.dtype == ("bfloat16" if "bf16" in name else "float32")
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    weights = mx.load(str(tmp_path / "out" / "model.safetensors"))
    assert index["weight_map"] == dict.fromkeys(sorted(weights), "model.safetensors")
    assert (
        index["metadata"]["total_size"] == result.bytes == sum(a.nbytes for a in weights.values())
    )
    assert result.parameters == sum(a.size for a in weights.values())
    assert result.streams == config["parscale_n"]
    # A converted folder is a source like any other.
    convert(tmp_path / "out", tmp_path / "again")
    check_logits(tmp_path / "again", name)


def test_many_shards(tmp_path, monkeypatch):
    monkeypatch.setattr(model_folder, "SHARD_GB", 0)  # mlx-lm: a file for each tensor
    convert(GOLDEN / "p2-tied-sharded", tmp_path / "out")
    files = {file.name for file in (tmp_path / "out").glob("model-*.safetensors")}
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == files and len(files) > 20
    check_logits(tmp_path / "out", "p2-tied-sharded")


def test_sharded_pickles(tmp_path):
    torch = pytest.importorskip("torch")
    folder = shutil.copytree(GOLDEN / "p2-torch-bin", tmp_path / "source")
    weights = torch.load(folder / "pytorch_model.bin", weights_only=True)
    (folder / "pytorch_model.bin").unlink()
    names, weight_map = sorted(weights), {}
    for n in range(3):
        file = f"pytorch_model-{n + 1:05d}-of-00003.bin"
        torch.save({name: weights[name] for name in names[n::3]}, folder / file)
        weight_map |= dict.fromkeys(names[n::3], file)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    planned = convert(folder, tmp_path / "dry", dry_run=True)
    result = convert(folder, tmp_path / "out")
    check_logits(tmp_path / "out", "p2-torch-bin")
    assert (planned.parameters, planned.bytes) == (result.parameters, result.bytes)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "source"]
    (folder / "pytorch_model-00002-of-00003.bin").unlink()
    assert "pytorch_model-00002-of-00003.bin" in failure(tmp_path, folder, kind=FileNotFoundError)


def test_types(tmp_path):
    result = convert(GOLDEN / "p4", tmp_path / "out", dtype="bfloat16")
    assert result.dtype == "bfloat16" and result.bits_per_weight == 16
    weights = mx.load(str(tmp_path / "out" / "model.safetensors"))
    assert {a.dtype for a in weights.values()} == {mx.bfloat16}
    check_logits(tmp_path / "out", "p4", tolerance=0.1)
    convert(GOLDEN / "p4-bf16", tmp_path / "wide", dtype="float32")
    check_logits(tmp_path / "wide", "p4-bf16")


def test_mlx_lm_reads_a_plain_model(tmp_path):
    from mlx_lm.utils import load_model as mlx_lm_load

    convert(GOLDEN / "p1", tmp_path / "out")
    config = tmp_path / "out" / "config.json"
    config.write_text(config.read_text().replace("qwen2_parscale", "qwen2"))
    model, _ = mlx_lm_load(tmp_path / "out")
    row = load_golden("p1").rows[0]
    assert difference(model(mx.array([row.ids]))[0], row.logits) < TOLERANCE


def test_what_lies_beside_the_weights(folder, tmp_path):
    copied = {
        "tokenizer.json": '{"a": 1}',
        "tokenizer_config.json": '{"chat_template": "x"}',
        "chat_template.jinja": "{{ messages }}",
        "merges.txt": "a b",
        "generation_config.json": '{"eos_token_id": [7, 8]}',
    }
    left = {"modeling_qwen2_parscale.py": "raise SystemExit", "expected.safetensors": ""}
    for name, text in (copied | left).items():
        (folder / name).write_text(text)
    (folder / "README.md").write_text("---\nlicense: apache-2.0\n---\n# Theirs\n")
    convert(folder, tmp_path / "out")
    written = {file.name: file for file in (tmp_path / "out").iterdir()}
    for name, text in copied.items():
        assert written.pop(name).read_text() == text
    assert sorted(written) == [
        "README.md",
        "config.json",
        "model.safetensors",
        "model.safetensors.index.json",
    ]
    card = written["README.md"].read_text()
    assert "license: apache-2.0" in card and "parscale generate --model out" in card
    assert "Theirs" not in card and str(tmp_path) not in card


def quantised(name: str, group_size: int, bits: int, mode: str = "affine"):
    """A golden model, quantised in memory."""
    model = load_golden(name).model

    def is_wanted(path, module):
        return hasattr(module, "to_quantized") and "aggregator" not in path

    nn.quantize(model, group_size, bits, mode=mode, class_predicate=is_wanted)
    return model


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
def test_quantised(bits, tmp_path):
    result = convert(
        GOLDEN / "p4", tmp_path / "out", quantization=Quantization(bits=bits, group_size=32)
    )
    model, config = load_model(tmp_path / "out")
    ids = mx.array([[3, 1, 4, 1, 5]])
    assert difference(model(ids), quantised("p4", 32, bits)(ids)) < 1e-4
    assert config["quantization"] == {"bits": bits, "group_size": 32, "mode": "affine"}
    assert config["quantization_config"] == config["quantization"] == result.quantization
    assert isinstance(model.model.aggregator.fc1, nn.Linear)
    weights = dict(tree_flatten(model.parameters()))
    assert result.bytes == sum(a.nbytes for a in weights.values())
    dense = dict(tree_flatten(load_golden("p4").model.parameters()))
    assert result.parameters == sum(a.size for a in dense.values())
    if bits == 8:
        check_logits(tmp_path / "out", "p4", tolerance=0.1)


@pytest.mark.parametrize(
    ("mode", "group_size", "bits"), [("mxfp4", 32, 4), ("nvfp4", 16, 4), ("mxfp8", 32, 8)]
)
def test_other_modes(mode, group_size, bits, tmp_path):
    convert(GOLDEN / "p1", tmp_path / "out", quantization=Quantization(mode=mode))
    model, config = load_model(tmp_path / "out")
    assert config["quantization"] == {"bits": bits, "group_size": group_size, "mode": mode}
    ids = mx.array([[3, 1, 4, 1, 5]])
    assert difference(model(ids), quantised("p1", group_size, bits, mode)(ids)) < 1e-4


def test_the_aggregator_too(tmp_path):
    convert(GOLDEN / "p4", tmp_path / "out", quantization=Quantization(bits=8, everything=True))
    model, _ = load_model(tmp_path / "out")
    assert isinstance(model.model.aggregator.fc1, nn.QuantizedLinear)
    assert model.layers[0].self_attn.prefix_k.dtype == mx.float32
    check_logits(tmp_path / "out", "p4", tolerance=0.2)


def test_quantisations_that_there_are_not(tmp_path):
    for options, words in [
        (dict(bits=7), "bits 7 is not supported"),
        (dict(group_size=48), "group size 48 is not supported"),
        (dict(mode="mxfp4", bits=8), "mxfp4 .* bits to be 4"),
        (dict(mode="gptq"), "mode 'gptq' is not one of affine"),
        (dict(group_size=128), "no weight has rows that groups of 128 divide"),
    ]:
        with pytest.raises(ValueError, match=words):
            convert(GOLDEN / "p1", tmp_path / "out", quantization=Quantization(**options))
    convert(GOLDEN / "p1", tmp_path / "q", quantization=Quantization())
    with pytest.raises(ValueError, match="q: quantised already"):
        convert(tmp_path / "q", tmp_path / "out", quantization=Quantization())
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "options", [{}, dict(dtype="float16"), dict(quantization=Quantization())], ids=str
)
def test_dry_run(options, tmp_path):
    planned = convert(GOLDEN / "p4", tmp_path / "out", dry_run=True, **options)
    assert listing(tmp_path) == []
    assert planned == convert(GOLDEN / "p4", tmp_path / "out", **options)


def failure(tmp_path, source, kind=ValueError, **options) -> str:
    """The message of a conversion that fails, and leaves everything as it was."""
    before = listing(tmp_path)
    lines = []
    for dry_run in (True, False):
        with pytest.raises(kind) as error:
            convert(source, tmp_path / "parent" / "out", dry_run=dry_run, **options)
        lines.append(str(error.value))
        assert "\n" not in lines[-1] and len(lines[-1]) < 500
        assert listing(tmp_path) == before
    assert ".out." not in lines[1]
    return lines[1]


def change_weights(folder, change) -> None:
    weights = mx.load(str(folder / "model.safetensors"))
    mx.eval(weights)
    change(weights)
    mx.save_safetensors(str(folder / "model.safetensors"), weights)


def change_config(folder, **changes) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


@pytest.mark.parametrize(
    ("change", "word"),
    [
        (lambda w: w.pop("model.layers.1.mlp.up_proj.weight"), "model.layers.1.mlp.up_proj.weight"),
        (lambda w: w.pop("model.layers.2.self_attn.prefix_v"), "model.layers.2.self_attn.prefix_v"),
        (lambda w: w.pop("model.aggregate_layer.2.bias"), "model.aggregator.fc2.bias"),
        (lambda w: w.update({"model.extra": mx.zeros(3)}), "model.extra"),
        (lambda w: w.update({"model.norm.weight": mx.zeros(32)}), "model.norm.weight"),
        (
            lambda w: w.update({"model.aggregate_layer.0.weight": mx.zeros((64, 128))}),
            "model.aggregator.fc1.weight",
        ),
    ],
)
def test_wrong_tensors(folder, tmp_path, change, word):
    change_weights(folder, change)
    message = failure(tmp_path, folder)
    assert word in message and str(folder) in message


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (dict(parscale_n=8), "parscale_n 8"),
        (dict(parscale_n=1), "parscale_n 1"),
        (dict(parscale_n_tokens=5), "parscale_n_tokens 5"),
        (dict(model_type="gpt_neox"), "model_type 'gpt_neox' is not one of"),
        (dict(hidden_act="gelu"), "hidden_act 'gelu'"),
    ],
)
def test_wrong_configurations(folder, tmp_path, change, words):
    change_config(folder, **change)
    assert words in failure(tmp_path, folder)


def test_files_that_are_not_whole(folder, tmp_path):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    assert str(file) in failure(tmp_path, folder)
    file.unlink()
    assert "no weights" in failure(tmp_path, folder, kind=FileNotFoundError)
    (folder / "config.json").unlink()
    assert "no config.json" in failure(tmp_path, folder, kind=FileNotFoundError)


def test_a_shard_that_cannot_be_read(tmp_path):
    folder = shutil.copytree(GOLDEN / "p2-tied-sharded", tmp_path / "source")
    shard = folder / "model-00002-of-00003.safetensors"
    shard.write_bytes(b"rubbish")
    assert str(shard) in failure(tmp_path, folder)
    shard.unlink()
    assert str(shard) in failure(tmp_path, folder, kind=FileNotFoundError)


def test_pickles_that_are_wrong(tmp_path, monkeypatch):
    torch = pytest.importorskip("torch")
    folder = shutil.copytree(GOLDEN / "p2-torch-bin", tmp_path / "source")
    file = folder / "pytorch_model.bin"
    weights = torch.load(file, weights_only=True)
    torch.save({k: v for k, v in weights.items() if "norm" not in k}, file)
    message = failure(tmp_path, folder)
    assert "input_layernorm.weight" in message and str(folder) in message
    file.write_bytes(file.read_bytes()[:5000])
    assert str(file) in failure(tmp_path, folder)
    monkeypatch.setitem(sys.modules, "torch", None)
    assert "parscale[torch]" in failure(tmp_path, folder, kind=ImportError)


def test_sources_that_are_not(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert "neither a folder here nor" in failure(
        tmp_path, tmp_path / "nowhere", kind=FileNotFoundError
    )
    (tmp_path / "model.bin").write_bytes(b"x")
    assert "is a file" in failure(tmp_path, tmp_path / "model.bin")
    with pytest.raises(ValueError, match="dtype 'int8' is not one of"):
        convert(GOLDEN / "p1", tmp_path / "out", dtype="int8")


def test_an_output_that_exists(tmp_path):
    out = tmp_path / "out"
    convert(GOLDEN / "p1", out)
    with pytest.raises(FileExistsError, match="out exists already"):
        convert(GOLDEN / "p4", out)
    check_logits(out, "p1")
    (out / "stale.txt").write_text("")
    convert(GOLDEN / "p4", out, force=True)
    check_logits(out, "p4")
    assert not (out / "stale.txt").exists()
    with pytest.raises(ValueError, match="holds the source"):
        convert(out, out, force=True)
    (tmp_path / "papers").mkdir()
    (tmp_path / "papers" / "thesis.tex").write_text("")
    with pytest.raises(FileExistsError, match="papers is not a model folder"):
        convert(GOLDEN / "p1", tmp_path / "papers", force=True)
    assert listing(tmp_path / "papers") == ["thesis.tex"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "papers"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError(28, "No space left on device")])
def test_nothing_is_left_of_a_conversion_that_stops(tmp_path, monkeypatch, error):
    out = tmp_path / "out"
    convert(GOLDEN / "p1", out)
    before = listing(tmp_path)

    def stop(*args, **kwargs):
        raise error

    monkeypatch.setattr(convert_module, "write_card", stop)
    kind = error if isinstance(error, type) else type(error)
    with pytest.raises(kind):
        convert(GOLDEN / "p4", out, force=True)
    assert listing(tmp_path) == before
    check_logits(out, "p1")


class StubApi:
    """Stands in for the hub: what was uploaded, and whether anybody is logged in."""

    calls: list
    logged_in = True

    def whoami(self):
        if not self.logged_in:
            from huggingface_hub.errors import LocalTokenNotFoundError

            raise LocalTokenNotFoundError("Token is required.\nLog in first.")
        return {"name": "someone"}

    def create_repo(self, repo, **options):
        self.calls.append(("create", repo))
        return f"https://huggingface.co/{repo}"

    def upload_folder(self, *, repo_id, folder_path, **options):
        self.calls.append(("upload", repo_id, sorted(p.name for p in folder_path.iterdir())))


@pytest.fixture
def stub_hub(monkeypatch):
    StubApi.calls, StubApi.logged_in = [], True
    monkeypatch.setattr("parscale_core.checkpoint.hub.HfApi", StubApi)
    return StubApi


def test_upload(tmp_path, stub_hub):
    result = convert(GOLDEN / "p1", tmp_path / "out", upload_repo="someone/model")
    files = ["README.md", "config.json", "model.safetensors", "model.safetensors.index.json"]
    assert stub_hub.calls == [("create", "someone/model"), ("upload", "someone/model", files)]
    assert result.uploaded_to == "https://huggingface.co/someone/model"
    assert "--model someone/model" in (tmp_path / "out" / "README.md").read_text()
    convert(GOLDEN / "p1", tmp_path / "dry", upload_repo="someone/model", dry_run=True)
    assert len(stub_hub.calls) == 2


def test_uploads_that_cannot_be(tmp_path, stub_hub, monkeypatch):
    with pytest.raises(ValueError, match="not the name of a hub repository"):
        convert(GOLDEN / "p1", tmp_path / "out", upload_repo="a/b/c")
    stub_hub.logged_in = False
    with pytest.raises(OSError, match="cannot upload to someone/model: log in"):
        convert(GOLDEN / "p1", tmp_path / "out", upload_repo="someone/model")
    assert listing(tmp_path) == [] and stub_hub.calls == []


def test_a_model_from_the_hub(tmp_path, monkeypatch):
    asked = []

    def snapshot_download(name, *, revision, **options):
        asked.append((name, revision))
        return str(GOLDEN / "p1")

    hub = "parscale_core.checkpoint.hub."
    monkeypatch.setattr(hub + "list_repo_files", lambda *_: ["model.safetensors"])
    monkeypatch.setattr(hub + "snapshot_download", snapshot_download)
    convert("someone/model", tmp_path / "out", revision="v2")
    assert asked == [("someone/model", "v2")]
    assert "base_model: someone/model" in (tmp_path / "out" / "README.md").read_text()
    check_logits(tmp_path / "out", "p1")


def test_a_published_checkpoint_there_and_back(tmp_path):
    """Its classes are named by the repository that holds their code, and its terms come along."""
    source = shutil.copytree(GOLDEN / "p4", tmp_path / "source")
    (source / "README.md").write_text(
        "---\nlicense: apache-2.0\n---\n# Model\n\n- This is for **academic use only**.\n"
    )
    convert(source, tmp_path / "mlx")
    card = (tmp_path / "mlx" / "README.md").read_text()
    assert "license: apache-2.0" in card
    assert "> This is for **academic use only**." in card
    convert(tmp_path / "mlx", tmp_path / "hf", to="hf")
    published = "ParScale/ParScale-1.8B-P8--modeling_qwen2_parscale.Qwen2ParScaleForCausalLM"
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert config["auto_map"]["AutoModelForCausalLM"] == published
    convert(tmp_path / "mlx", tmp_path / "again")
    assert "academic use only" in (tmp_path / "again" / "README.md").read_text()
