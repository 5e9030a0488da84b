"""The graph of single steps that target "cuda" writes, on the CPU and without this package."""

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from helpers.onnx_cases import GOLDEN, LAYOUTS, batches
from parscale_export import OnnxModel, export_onnx
from parscale_export.runtime.provider import CUDA
from parscale_export.runtime.session import find_graphs


@pytest.mark.parametrize("kv_layout", LAYOUTS)
@pytest.mark.parametrize("case", ["p1", "p4", "p2-tied-sharded"])
def test_golden_steps(tmp_path, case, kv_layout):
    folder = export_onnx(GOLDEN / case, tmp_path / "out", target="cuda", kv_layout=kv_layout)
    prompts, steps = (
        ort.InferenceSession(str(folder / name), providers=["CPUExecutionProvider"])
        for name in ("model.onnx", "model_step.onnx")
    )
    names = [output.name for output in prompts.get_outputs()]
    assert [output.name for output in steps.get_outputs()] == names
    for batch in batches(case):
        rows = len(batch.ids) * OnnxModel(folder, "cpu").cache_rows
        room = [value for value in prompts.get_inputs() if value.name.startswith("past")]
        length = batch.ids.shape[1] + batch.tokens.shape[1] + 48
        past = {v.name: np.zeros((rows, v.shape[1], length, v.shape[3]), np.float16) for v in room}
        ids, mask = batch.ids.astype(np.int64), batch.mask.astype(np.int64)
        results = prompts.run(None, {"input_ids": ids, "attention_mask": mask} | past)
        for n in range(batch.tokens.shape[1]):
            ids = batch.tokens[:, n : n + 1].astype(np.int64)
            mask = np.concatenate([mask, np.ones_like(ids)], axis=1)
            past = dict(zip(past, results[1:], strict=True))
            results = steps.run(None, {"input_ids": ids, "attention_mask": mask} | past)
            assert np.abs(results[0][:, 0] - batch.token_logits[:, n]).max() < 0.05


def test_it_is_not_opened_by_itself_or_beside_another_model(tmp_path, monkeypatch):
    folder = export_onnx(GOLDEN / "p4", tmp_path / "out", target="cuda")
    with pytest.raises(ValueError, match=r"model_step\.onnx: a graph of single steps alone; give"):
        OnnxModel(folder / "model_step.onnx", "cpu")
    with pytest.raises(ValueError, match="prefill_chunk 0: must be at least 1"):
        OnnxModel(folder, "cpu", prefill_chunk=0)
    other = export_onnx(GOLDEN / "p4-bf16", tmp_path / "other", target="cuda")
    (other / "model_step.onnx").replace(folder / "model_step.onnx")
    monkeypatch.setattr(
        "parscale_export.runtime.session.choose_provider", lambda asked: (CUDA, None)
    )
    with pytest.raises(ValueError, match=r"model_step\.onnx: not of one export with model\.onnx"):
        OnnxModel(folder, "cuda")


def test_it_shares_the_data_and_is_no_graph_of_its_own(tmp_path):
    folder = export_onnx(GOLDEN / "p4", tmp_path / "out", target="cuda", precision="int4")
    assert sorted(file.name for file in folder.glob("model*")) == [
        "model.onnx", "model.onnx.data", "model_step.onnx",
    ]  # fmt: skip
    assert list(find_graphs(folder)) == [4]
    whole, step = (
        {t.name: t for t in onnx.load(folder / name, load_external_data=False).graph.initializer}
        for name in ("model.onnx", "model_step.onnx")
    )
    for name, tensor in step.items():
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            assert tensor.external_data == whole[name].external_data
    assert not any("prefix" in name for name in step)
