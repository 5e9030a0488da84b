"""Exports on CUDA; and what CUDA asks of a graph, as far as it can be seen without a GPU."""

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from cases import GOLDEN, LAYOUTS, batches
from parscale_export import OnnxModel, export_onnx
from parscale_export.runtime.provider import CUDA, count_devices

# Inputs that CUDA kernels take from the host's memory, by position.
HOST_INPUTS = {
    "Reshape": {1}, "Expand": {1}, "Tile": {1}, "Slice": {1, 2, 3, 4}, "Range": {0, 1, 2},
    "Squeeze": {1}, "Unsqueeze": {1}, "ReduceSum": {1}, "CumSum": {1},
    "GroupQueryAttention": {6},
}  # fmt: skip
# Operators of the fused graphs that have a CUDA kernel for the types they are used with.
CUDA_KERNELS = {
    "Add", "Cast", "Concat", "CumSum", "Equal", "Expand", "Gather", "GatherElements", "GatherND",
    "Gemm", "GroupQueryAttention", "MatMul", "MatMulNBits", "Min", "Mod", "Mul", "RMSNormalization",
    "Range", "ReduceSum", "Reshape", "Sigmoid", "SkipSimplifiedLayerNormalization", "Slice",
    "Softmax", "Split", "Squeeze", "Sub", "Tile", "Unsqueeze", "Where",
}  # fmt: skip


@pytest.mark.parametrize("case", ["p1", "p2-tied-sharded", "p4"])
@pytest.mark.parametrize("kv_layout", LAYOUTS)
@pytest.mark.parametrize("precision", ["fp16", "int4"])
@pytest.mark.parametrize("all_logits", [False, True])
def test_nothing_crosses_between_host_and_device(tmp_path, case, kv_layout, precision, all_logits):
    """onnxruntime records a CUDA graph only where no tensor has to be copied on the way."""
    folder = export_onnx(
        GOLDEN / case, tmp_path / "out", kv_layout=kv_layout, precision=precision,
        activations="fp16", all_logits=all_logits, aggregation_weights=True,
    )  # fmt: skip
    graph = onnx.load(folder / "model.onnx", load_external_data=False).graph
    constants, host = {tensor.name for tensor in graph.initializer}, set()
    for node in graph.node:
        taken = HOST_INPUTS.get(node.op_type, set())
        inputs = {i: name for i, name in enumerate(node.input) if name and name not in constants}
        from_host = {i for i, name in inputs.items() if name in host}
        # As onnxruntime places nodes: what depends on sizes alone is computed by the CPU.
        if node.op_type == "Shape" or (set(inputs) == from_host and not from_host & taken):
            host.update(node.output)
            continue
        assert node.op_type in CUDA_KERNELS
        assert from_host <= taken, f"{node.op_type} takes {inputs} from the host"
    assert not host & {value.name for value in graph.output}


@pytest.mark.parametrize("kv_layout", LAYOUTS)
@pytest.mark.parametrize("case", ["p1", "p4"])
@pytest.mark.parametrize("all_logits", [False, True])
def test_steps_of_fixed_shapes(tmp_path, case, kv_layout, all_logits):
    """The steps that CUDA records, on the CPU, which has nothing to record."""
    folder = export_onnx(
        GOLDEN / case, tmp_path / "out", kv_layout=kv_layout, all_logits=all_logits
    )
    model = OnnxModel(folder, "cpu")
    model.cuda_graph = True
    for _ in range(2):
        for batch in batches(case):
            assert model.generate(batch.prompts, max_tokens=12) == batch.tokens.tolist()
    plain = OnnxModel(folder, "cpu")
    prompts = batches(case)[1].prompts
    assert model.generate(prompts, max_tokens=300) == plain.generate(prompts, max_tokens=300)


def test_fused_float32_has_no_kernel_on_cuda(tmp_path, monkeypatch):
    folder = export_onnx(GOLDEN / "p4", tmp_path / "out")
    monkeypatch.setattr(
        "parscale_export.runtime.session.choose_provider", lambda asked: (CUDA, None)
    )
    with pytest.raises(
        ValueError, match=r"model\.onnx: GroupQueryAttention on CUDA has no float32"
    ):
        OnnxModel(folder, "cuda")
    assert OnnxModel(folder).provider == "CPUExecutionProvider"


@pytest.fixture
def cuda():
    if CUDA not in ort.get_available_providers():
        pytest.skip("this onnxruntime is built without CUDA")
    if not count_devices():
        pytest.skip("no CUDA device here")


KINDS = [
    ("fused", "fp16"), ("fused", "bf16"),
    ("standard", "fp32"), ("standard", "fp16"), ("standard", "bf16"),
]  # fmt: skip
TOLERANCE = {"fp32": 1e-3, "fp16": 0.1, "bf16": 1.0}


@pytest.mark.cuda
@pytest.mark.parametrize("case", ["p1", "p2-tied-sharded", "p4", "p8-short-prefix"])
@pytest.mark.parametrize("kv_layout", LAYOUTS)
@pytest.mark.parametrize(("ops", "precision"), KINDS)
def test_golden_cases(cuda, tmp_path, case, kv_layout, ops, precision):
    folder = export_onnx(
        GOLDEN / case, tmp_path / "out", kv_layout=kv_layout, ops=ops, precision=precision,
        all_logits=True,
    )  # fmt: skip
    model = OnnxModel(folder, "cuda")
    assert model.device == ("cuda", 0)
    for batch in batches(case):
        for i, prompt in enumerate(batch.prompts):
            error = np.abs(model.logits(prompt) - batch.logits[i, -len(prompt) :]).max()
            assert error < TOLERANCE[precision]
        if precision != "bf16":
            assert model.generate(batch.prompts, 12) == batch.tokens.tolist()


@pytest.mark.cuda
@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_quantised_weights(cuda, tmp_path, precision):
    folder = export_onnx(
        GOLDEN / "p4", tmp_path / "out", target="cuda", precision=precision, all_logits=True
    )
    cpu_folder = export_onnx(GOLDEN / "p4", tmp_path / "cpu", precision=precision, all_logits=True)
    tokens = list(range(3, 60))
    actual, expected = (
        OnnxModel(path, provider).logits(tokens)
        for path, provider in ((folder, "cuda"), (cpu_folder, "cpu"))
    )
    assert np.abs(actual - expected).max() < 0.3


@pytest.mark.cuda
@pytest.mark.parametrize("kv_layout", LAYOUTS)
@pytest.mark.parametrize("case", ["p1", "p4"])
def test_cuda_graphs_give_the_same_tokens(cuda, tmp_path, case, kv_layout):
    folder = export_onnx(GOLDEN / case, tmp_path / "out", kv_layout=kv_layout, precision="fp16")
    plain, recorded = OnnxModel(folder, "cuda"), OnnxModel(folder, "cuda", cuda_graph=True)
    for tokens in (12, 40, 300, 20):
        for batch in batches(case):
            expected = plain.generate(batch.prompts, tokens)
            assert recorded.generate(batch.prompts, tokens) == expected
