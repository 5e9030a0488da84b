"""Products of 8-bit integers: exact sums, the same function once smoothed, files of their size."""

import json

import numpy as np
import onnx
import pytest
from helpers.onnx_cases import GOLDEN, OPERATORS, batches, variant
from parscale_core.checkpoint.tensors import Checkpoint
from parscale_export import OnnxModel, export_onnx
from parscale_export.calibrate import calibration_tokens, observe
from parscale_export.smooth import plan
from parscale_export.w8a8 import hadamard, rotate_blocks, round_channels
from safetensors.numpy import load_file
from tokenizers import Tokenizer, models, pre_tokenizers


def divergence(expected: np.ndarray, actual: np.ndarray) -> float:
    """Mean KL divergence of rows of logits, in nats."""
    p, q = (x - np.log(np.exp(x).sum(-1, keepdims=True)) for x in (expected, actual))
    return float((np.exp(p) * (p - q)).sum(-1).mean())


def operators(folder) -> list[str]:
    graph = onnx.load(folder / "model.onnx", load_external_data=False).graph
    return [node.op_type for node in graph.node]


@pytest.fixture(autouse=True)
def a_short_calibration(monkeypatch):
    """These models are tiny, and so is what is to be learnt of them."""
    monkeypatch.setattr("parscale_export.calibrate.ROWS", 512)


@pytest.mark.parametrize(
    ("case", "kv_layout"),
    [("p1", "batch"), ("p8-short-prefix", "batch"), ("p8-short-prefix", "heads")],
)
@pytest.mark.parametrize("ops", OPERATORS)
def test_golden_cases(tmp_path, case, kv_layout, ops):
    folder = export_onnx(GOLDEN / case, tmp_path / "out", precision="w8a8", kv_layout=kv_layout,
                         ops=ops, all_logits=True)  # fmt: skip
    model = OnnxModel(folder, "cpu")
    for batch in batches(case):
        for n, prompt in enumerate(batch.prompts):
            expected = batch.logits[n][batch.mask[n] == 1]
            assert divergence(expected, model.logits(prompt)) < 6e-3
    # Queries, keys and values share one rounding; so do gates and ups.
    assert operators(folder).count("QuantizeLinear") == 3 * 4 + (case != "p1")
    products = 3 * (4 if ops == "fused" else 7) + (case != "p1")
    product = "MatMulIntegerToFloat" if ops == "fused" else "MatMulInteger"
    assert operators(folder).count(product) == products


@pytest.mark.parametrize("head", ["int8", "w8a8"])
@pytest.mark.parametrize("ops", OPERATORS)
@pytest.mark.parametrize("case", ["p2-tied-sharded", pytest.param("p4", marks=pytest.mark.slow)])
def test_heads_and_embeddings(tmp_path, case, ops, head):
    """An embedding of 8 bits unless the head is a float; a tied head reads the same bytes."""
    folder = export_onnx(GOLDEN / case, tmp_path / "out", precision="w8a8", head_precision=head,
                         ops=ops, all_logits=True)  # fmt: skip
    batch = batches(case)[0]
    logits = OnnxModel(folder, "cpu").logits(batch.prompts[0])
    assert divergence(batch.logits[0][batch.mask[0] == 1], logits) < 6e-3
    graph = onnx.load(folder / "model.onnx", load_external_data=False).graph
    matrices = [tensor for tensor in graph.initializer if np.prod(tensor.dims) == 320 * 64]
    tied = Checkpoint(GOLDEN / case).config.tie_word_embeddings
    own = [tensor for tensor in matrices if "layers" not in tensor.name]
    assert len(own) == (1 if tied else 2)
    floats = [tensor for tensor in own if tensor.data_type == onnx.TensorProto.FLOAT]
    assert len(floats) == (len(own) if head == "fp32" else 0)


def biased_model(folder):
    """A model with every bias, and channels of activations that are far larger than the rest."""
    random, tensors = np.random.default_rng(0), load_file(GOLDEN / "p4" / "model.safetensors")
    for n in range(3):
        layer = f"model.layers.{n}"
        for module, rows in {
            "self_attn.o_proj": 64, "mlp.gate_proj": 160, "mlp.up_proj": 160, "mlp.down_proj": 64,
        }.items():  # fmt: skip
            bias = random.normal(size=rows, scale=0.1).astype(np.float32)
            tensors[f"{layer}.{module}.bias"] = bias
        for norm, readers in {
            "input_layernorm": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
            "post_attention_layernorm": ("mlp.gate_proj", "mlp.up_proj"),
        }.items():
            tensors[f"{layer}.{norm}.weight"][5] *= 200
            for reader in readers:
                tensors[f"{layer}.{reader}.weight"][:, 5] /= 200
    biases = {"attention_bias": True, "mlp_bias": True}
    return variant(folder, tensors=tensors, model_type="llama_parscale", **biases)


def test_smoothing_keeps_the_function_and_helps(tmp_path):
    """Against MLX: the scaled checkpoint is the same model, and outliers do it no harm."""
    parscale_mlx = pytest.importorskip("parscale_mlx")
    import mlx.core as mx

    folder, ids = biased_model(tmp_path / "model"), list(range(3, 60))
    expected = np.array(parscale_mlx.load_model(folder)[0](mx.array([ids]))[0])
    checkpoint = Checkpoint(folder)
    how = plan(checkpoint, observe(checkpoint, calibration_tokens(checkpoint, None), tmp_path))
    assert how.smoothing.factors and not how.kept
    # Some products are both: smoothing for one large channel, a rotation for the rest.
    assert {f"{module}.weight" for module in how.rotated} & set(how.smoothing.factors)
    scaled = {
        name: how.smoothing.apply(name, checkpoint.tensor(name)) for name in checkpoint.names()
    }
    assert any(np.abs(scaled[name] - checkpoint.tensor(name)).max() > 1 for name in scaled)
    d = 64  # published columns of the aggregator run (hidden, stream)
    first = scaled.pop("model.aggregator.fc1.weight").reshape(d, -1, d).swapaxes(1, 2)
    scaled["model.aggregate_layer.0.weight"] = first.reshape(d, -1)
    for part in ("fc1.bias", "fc2.weight", "fc2.bias"):
        layer = "0" if part.startswith("fc1") else "2"
        tensor = scaled.pop(f"model.aggregator.{part}")
        scaled[f"model.aggregate_layer.{layer}.{part.partition('.')[2]}"] = tensor
    scaled = {name: np.ascontiguousarray(tensor) for name, tensor in scaled.items()}
    same = variant(tmp_path / "scaled", tensors=scaled, **checkpoint.config.raw)
    assert (
        np.abs(np.array(parscale_mlx.load_model(same)[0](mx.array([ids]))[0]) - expected).max()
        < 1e-4
    )
    out = export_onnx(folder, tmp_path / "out", precision="w8a8", all_logits=True)
    assert divergence(expected, OnnxModel(out, "cpu").logits(ids)) < 6e-3


@pytest.mark.parametrize("ops", OPERATORS)
def test_products_that_are_too_far_off_stay_int8(tmp_path, monkeypatch, ops):
    monkeypatch.setattr("parscale_export.smooth.LARGEST_ERROR", 0)
    folder = export_onnx(GOLDEN / "p4", tmp_path / "out", precision="w8a8", ops=ops,
                         aggregator_precision="int8", all_logits=True)  # fmt: skip
    assert not any(operator.startswith("MatMulInteger") for operator in operators(folder))
    batch = batches("p4")[0]
    logits = OnnxModel(folder, "cpu").logits(batch.prompts[0])
    assert divergence(batch.logits[0][batch.mask[0] == 1], logits) < 6e-3


def test_what_has_no_bfloat16_and_what_transformers_js_calls_q8(tmp_path):
    with pytest.raises(ValueError, match="w8a8 is for CPUs, which have no bfloat16"):
        export_onnx(GOLDEN / "p4", tmp_path / "out", precision="w8a8", activations="bf16")
    folder = export_onnx(GOLDEN / "p4", tmp_path / "out", precision="w8a8", target="web")
    assert (folder / "onnx" / "model_quantized.onnx").is_file()
    about = json.loads((folder / "config.json").read_text())["transformers.js_config"]
    assert about["dtype"] == "q8"


def test_rounding():
    weight = np.random.default_rng(0).normal(size=(7, 64)).astype(np.float32)
    weight[2] = 0
    codes, scales = round_channels(weight)
    assert np.abs(codes * scales[:, None] - weight).max() <= scales.max() / 2 * 1.001
    assert np.abs(codes).max() == 127 and not codes[2].any()
    assert np.abs(hadamard() @ hadamard().T - np.eye(16)).max() < 1e-6
    x = np.random.default_rng(1).normal(size=(3, 64)).astype(np.float32)
    assert np.abs(rotate_blocks(x) @ rotate_blocks(weight).T - x @ weight.T).max() < 1e-5


@pytest.mark.parametrize("ops", OPERATORS)
def test_rows_of_zeros(tmp_path, ops):
    """A token whose embedding is zeros, as that of padding may be: each product of it is zero."""
    tensors = load_file(GOLDEN / "p4" / "model.safetensors")
    tensors["model.embed_tokens.weight"][7] = 0
    folder = variant(tmp_path / "model", tensors=tensors)
    exact, rounded = (
        OnnxModel(export_onnx(folder, tmp_path / precision, precision=precision, ops=ops,
                              all_logits=True), "cpu").logits([7, 7, 3])
        for precision in ("fp32", "w8a8")
    )  # fmt: skip
    assert np.isfinite(rounded).all()
    assert divergence(exact, rounded) < 6e-3


def test_sums_do_not_saturate(tmp_path):
    """Processors without VNNI add two products in 16 bits, unless the session says otherwise."""
    tensors = load_file(GOLDEN / "p4" / "model.safetensors")
    tensors["model.norm.weight"] = np.ones(64, np.float32)
    tensors["lm_head.weight"] = np.repeat(np.linspace(-1, 1, 320, dtype=np.float32)[:, None], 64, 1)
    # The last layer's output is large and of one sign in all channels, so all codes are too.
    for n in range(3):
        tensors[f"model.layers.{n}.mlp.down_proj.weight"] *= 0
        tensors[f"model.layers.{n}.self_attn.o_proj.weight"] *= 0
    tensors["model.embed_tokens.weight"] = np.ones((320, 64), np.float32)
    folder = variant(tmp_path / "model", tensors=tensors)
    exact, rounded = (
        OnnxModel(
            export_onnx(folder, tmp_path / f"{precision}", precision=precision,
                        head_precision=head, all_logits=True), "cpu"
        ).logits([3, 4, 5])
        for precision, head in (("fp32", None), ("w8a8", "w8a8"))
    )  # fmt: skip
    assert np.abs(exact).max() > 50
    assert np.abs(exact - rounded).max() < 0.5


def test_a_short_context_and_a_tokenizer_of_more_tokens(tmp_path):
    folder = variant(tmp_path / "model", max_position_embeddings=40)
    tokenizer = Tokenizer(models.WordLevel({"[UNK]": 900, "the": 5}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(folder / "tokenizer.json"))
    chunks = calibration_tokens(Checkpoint(folder), None)
    assert all(len(chunk) == 40 and max(chunk) < 320 for chunk in chunks)
    out = export_onnx(folder, tmp_path / "out", precision="w8a8")
    assert len(OnnxModel(out, "cpu").generate([[5, 6]], 30)[0]) == 30
    (tmp_path / "text.txt").write_text("the other " * 40)
    with pytest.raises(ValueError, match="token 900 is not in the model's vocabulary of 320"):
        export_onnx(folder, tmp_path / "own", precision="w8a8", calibrate=tmp_path / "text.txt")


def test_a_text_of_ones_own(tmp_path):
    folder = variant(tmp_path / "model")
    words = {f"w{n}": n for n in range(320)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(folder / "tokenizer.json"))
    text = tmp_path / "text.txt"
    text.write_text(" ".join(f"w{7 * n % 320}" for n in range(700)))
    chunks = calibration_tokens(Checkpoint(folder), text)
    assert [len(chunk) for chunk in chunks] == [256, 256]
    assert chunks[0][:3] == [0, 7, 14]
    out = export_onnx(folder, tmp_path / "out", precision="w8a8", calibrate=text)
    assert json.loads((out / "config.json").read_text())["parscale_n"] == 4
    text.write_text("w1 w2")
    with pytest.raises(ValueError, match="2 tokens are too few"):
        export_onnx(folder, tmp_path / "short", precision="w8a8", calibrate=text)
    with pytest.raises(FileNotFoundError, match="no such file to calibrate with"):
        export_onnx(folder, tmp_path / "none", precision="w8a8", calibrate=tmp_path / "none.txt")
    text.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="not UTF-8"):
        export_onnx(folder, tmp_path / "bytes", precision="w8a8", calibrate=text)
