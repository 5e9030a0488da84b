"""Rotary embeddings, biases and quantised weights, against MLX, numpy and a dequantised export."""

import numpy as np
import onnx
import pytest
from helpers.onnx_cases import GOLDEN, LAYOUTS, OPERATORS, batches, variant
from parscale_core.checkpoint.tensors import Checkpoint
from parscale_export import OnnxModel, export_onnx
from parscale_export.quantize import dequantize, quantize
from safetensors.numpy import load_file

TOKENS = list(range(3, 90))
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip
LONGROPE = {
    "rope_type": "longrope", "original_max_position_embeddings": 64,
    "short_factor": [1.0] * 8, "long_factor": [1.0, 1.1, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0],
}  # fmt: skip
ROPES = {
    "linear": {"rope_scaling": {"type": "linear", "factor": 3.0}},
    "llama3": {"rope_scaling": LLAMA3},
    "yarn": {"rope_scaling": YARN},
    "longrope": {"rope_scaling": LONGROPE},
    "transformers-5": {"rope_parameters": YARN | {"rope_theta": 500.0}},
    "interleaved": {"rope_traditional": True},
}


def with_llama_biases() -> dict[str, np.ndarray]:
    random = np.random.default_rng(0)
    tensors = load_file(GOLDEN / "p4" / "model.safetensors")
    for n in range(3):
        for module, rows in {
            "self_attn.o_proj": 64, "mlp.gate_proj": 160, "mlp.up_proj": 160, "mlp.down_proj": 64,
        }.items():  # fmt: skip
            bias = random.normal(size=rows, scale=0.1).astype(np.float32)
            tensors[f"model.layers.{n}.{module}.bias"] = bias
    return tensors


VARIANTS = {
    **{name: (config, None) for name, config in ROPES.items()},
    "llama-biases": (
        {"model_type": "llama_parscale", "attention_bias": True, "mlp_bias": True},
        with_llama_biases,
    ),
}


@pytest.fixture(scope="module", params=VARIANTS)
def against_mlx(request, tmp_path_factory):
    """A variant of a golden checkpoint, and its logits in MLX."""
    parscale_mlx = pytest.importorskip("parscale_mlx")
    import mlx.core as mx

    config, tensors = VARIANTS[request.param]
    folder = variant(
        tmp_path_factory.mktemp("variants") / request.param,
        tensors=tensors() if tensors else None,
        **config,
    )
    model, _ = parscale_mlx.load_model(folder)
    return folder, np.array(model(mx.array([TOKENS]))[0])


@pytest.mark.parametrize("kv_layout", LAYOUTS)
@pytest.mark.parametrize("ops", OPERATORS)
def test_variants_agree_with_mlx(against_mlx, tmp_path, kv_layout, ops):
    folder, expected = against_mlx
    model = OnnxModel(
        export_onnx(folder, tmp_path / "out", kv_layout=kv_layout, ops=ops, all_logits=True)
    )
    assert np.abs(model.logits(TOKENS) - expected).max() < 1e-4


@pytest.mark.parametrize("ops", OPERATORS)
def test_a_head_size_that_only_the_standard_operators_take(tmp_path, ops):
    random = np.random.default_rng(0)
    tensors = load_file(GOLDEN / "p4" / "model.safetensors")
    for name, tensor in tensors.items():
        if "prefix" in name:
            tensors[name] = np.ascontiguousarray(tensor[..., :8])
        elif "self_attn.o_proj" in name:
            tensors[name] = np.ascontiguousarray(tensor[:, :32])
        elif "self_attn" in name:
            tensors[name] = np.ascontiguousarray(tensor[: len(tensor) // 2])
    tensors["lm_head.weight"] = random.normal(size=(320, 64)).astype(np.float32)
    folder = variant(tmp_path / "model", tensors=tensors, head_dim=8)
    if ops == "fused":
        with pytest.raises(ValueError, match=r"config\.json: head_dim 8 .*`ops=standard`"):
            export_onnx(folder, tmp_path / "out", ops=ops)
        assert not (tmp_path / "out").exists()
        return
    outputs = [
        OnnxModel(
            export_onnx(folder, tmp_path / layout, ops=ops, kv_layout=layout, all_logits=True)
        ).logits(TOKENS)
        for layout in LAYOUTS
    ]
    assert np.abs(outputs[0] - outputs[1]).max() < 1e-4


@pytest.mark.parametrize(("bits", "symmetric"), [(4, False), (4, True), (8, False)])
@pytest.mark.parametrize("columns", [64, 160, 100, 896])
def test_quantisation_rounds_to_the_nearest_code(bits, symmetric, columns):
    weight = np.random.default_rng(0).normal(size=(7, columns)).astype(np.float32)
    weight[2] = 0
    blocks = quantize(weight, bits=bits, block_size=32, symmetric=symmetric)
    steps = np.abs(np.repeat(blocks.scales, 32, axis=1))[:, :columns]
    # Half a step, and half of another for a zero point that is a whole code.
    assert (np.abs(dequantize(blocks, columns, bits) - weight) <= steps + 1e-6).all()
    assert blocks.codes.max() < 2**bits
    assert not dequantize(blocks, columns, bits)[2].any()


@pytest.mark.parametrize("kv_layout", LAYOUTS)
@pytest.mark.parametrize("ops", OPERATORS)
@pytest.mark.parametrize(("precision", "bits"), [("int8", 8), ("int4", 4)])
@pytest.mark.parametrize("case", ["p4", "p2-tied-sharded"])
def test_quantised_exports_compute_what_their_codes_say(
    tmp_path, kv_layout, ops, precision, bits, case
):
    source = Checkpoint(GOLDEN / case)
    tensors = {}
    for name in source.names():
        tensor = source.tensor(name)
        if name.endswith("proj.weight") or name == "lm_head.weight":
            blocks = quantize(tensor, bits=bits, block_size=32)
            tensor = dequantize(blocks, tensor.shape[1], bits)
        tensors[name] = np.ascontiguousarray(tensor)
    rounded = variant(tmp_path / "rounded", "p4", tensors, **source.config.raw)
    exact, quantised = (
        OnnxModel(
            export_onnx(
                folder, tmp_path / name, kv_layout=kv_layout, ops=ops, precision=chosen,
                head_precision=head, embedding_precision="fp32", all_logits=True,
                accuracy_level=0,
            )
        )
        for name, folder, chosen, head in (
            ("fp32", rounded, "fp32", None),
            ("int", GOLDEN / case, precision, "fp32" if case != "p4" else precision),
        )
    )  # fmt: skip
    assert np.abs(exact.logits(TOKENS) - quantised.logits(TOKENS)).max() < 1e-3


@pytest.mark.parametrize("target", ["cuda", "genai-cuda"])
def test_symmetric_int4_for_cuda(tmp_path, target):
    """A scale a block and nothing besides, and the numbers that the codes stand for."""
    tensors = load_file(GOLDEN / "p4" / "model.safetensors")
    for name, tensor in tensors.items():
        if name.endswith("proj.weight"):
            blocks = quantize(tensor, bits=4, block_size=32, symmetric=True)
            tensors[name] = np.ascontiguousarray(dequantize(blocks, tensor.shape[1], 4))
    exact = export_onnx(variant(tmp_path / "rounded", "p4", tensors), tmp_path / "fp32",
                        all_logits=True)  # fmt: skip
    folder = export_onnx(GOLDEN / "p4", tmp_path / "int4", target=target, precision="int4",
                         head_precision="fp16", all_logits=True, accuracy_level=0)  # fmt: skip
    logits = OnnxModel(folder, "cpu").logits(TOKENS)
    assert np.abs(OnnxModel(exact).logits(TOKENS) - logits).max() < 0.05
    graph = onnx.load(folder / "model.onnx", load_external_data=False).graph
    products = [node for node in graph.node if node.op_type == "MatMulNBits"]
    assert products and all(len(node.input) == 3 for node in products)


@pytest.mark.parametrize("embedding", ["int8", "int4"])
def test_quantised_embedding_head_and_aggregator_stay_close(tmp_path, embedding):
    folder = export_onnx(
        GOLDEN / "p4", tmp_path / "out", precision="int8", embedding_precision=embedding,
        aggregator_precision="int8", all_logits=True,
    )  # fmt: skip
    batch = batches("p4")[0]
    error = np.abs(OnnxModel(folder).logits(batch.prompts[0]) - batch.logits[0]).max()
    assert error < (0.3 if embedding == "int8" else 1.5)


MODES = [("affine", 64, bits) for bits in (2, 3, 4, 5, 6, 8)] + [("affine", 32, 4)]
MODES += [("mxfp4", 32, 4), ("mxfp8", 32, 8), ("nvfp4", 16, 4)]


@pytest.mark.parametrize(("mode", "group_size", "bits"), MODES)
def test_weights_that_mlx_quantised(tmp_path, mode, group_size, bits):
    pytest.importorskip("parscale_mlx")
    import mlx.core as mx

    tensors, dequantised = {}, {}
    for name, tensor in load_file(GOLDEN / "p4" / "model.safetensors").items():
        name = name.replace("aggregate_layer.0", "aggregator.fc1")
        name = name.replace("aggregate_layer.2", "aggregator.fc2")
        tensors[name] = dequantised[name] = tensor
        module = name.removesuffix(".weight")
        if not name.endswith(("proj.weight", "embed_tokens.weight", "lm_head.weight")):
            continue
        if tensor.shape[1] % group_size or "layers.1" in name:
            continue
        kind = {"group_size": group_size, "bits": bits, "mode": mode}
        parts = mx.quantize(mx.array(tensor), **kind)
        dequantised[name] = np.array(mx.dequantize(*parts, **kind).astype(mx.float32))
        for suffix, part in zip(("weight", "scales", "biases"), parts, strict=False):
            tensors[f"{module}.{suffix}"] = np.array(part)
    config = {"quantization": {"group_size": group_size, "bits": bits, "mode": mode}}
    quantised = variant(tmp_path / "quantised", tensors=tensors, **config)
    plain = variant(tmp_path / "plain", tensors=dequantised)
    opened = Checkpoint(quantised)
    for name in ("model.layers.0.self_attn.q_proj.weight", "model.embed_tokens.weight"):
        assert np.abs(opened.tensor(name) - dequantised[name]).max() < 1e-6
    results = [
        OnnxModel(export_onnx(folder, tmp_path / f"out-{n}", all_logits=True)).logits(TOKENS)
        for n, folder in enumerate((quantised, plain))
    ]
    assert np.abs(results[0] - results[1]).max() < 1e-4
