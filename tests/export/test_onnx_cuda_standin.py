"""What onnxruntime's CUDA part does with our graphs, on a stand-in for NVIDIA's libraries.

No kernel is computed, so that no number can be looked at; where nodes are placed, what crosses
between host and device, what a CUDA graph records, and how many kernels are launched are what they
would be on a GPU. cuDNN is not there. See ``standin/device.cpp``.
"""

import sys
from pathlib import Path

import pytest
from helpers.onnx_cases import GOLDEN, LAYOUTS, random_model
from parscale_export import export_onnx
from parscale_export.runtime.provider import CUDA

STANDIN = Path(__file__).parent / "standin"
LAYERS = 3
FUSED = {
    "fp16": {"target": "cuda"},
    "bf16": {"target": "cuda", "precision": "bf16", "activations": "bf16"},
    "int8": {"target": "cuda", "precision": "int8"},
    "int8-bf16": {"target": "cuda", "precision": "int8", "activations": "bf16"},
    "int4": {"target": "cuda", "precision": "int4"},
    "int4-bf16": {"target": "cuda", "precision": "int4", "activations": "bf16"},
    "int4-offsets": {"precision": "int4", "activations": "fp16"},
    "tables": {"target": "cuda", "embedding_precision": "int8", "aggregator_precision": "int8",
               "aggregation_weights": True, "all_logits": True},
}  # fmt: skip
STANDARD = {
    "fp32": {"precision": "fp32"},
    "fp16": {"precision": "fp16"},
    "bf16": {"precision": "bf16"},
    "int8": {"precision": "int8"},
    "int4": {"precision": "int4", "activations": "fp16"},
}


@pytest.fixture(scope="session")
def standin():
    """The module that builds the stand-in and runs exports on it."""
    sys.path.insert(0, str(STANDIN))
    import launches

    if lacking := launches.missing():
        pytest.skip(f"needs {lacking}")
    return launches


@pytest.fixture(scope="session")
def look(standin, tmp_path_factory):
    """Run exports on the stand-in: what each one's step of decoding does."""
    libraries = tmp_path_factory.mktemp("libraries")
    standin.build.build(libraries)

    def run(*folders: Path, record: bool = False) -> list[dict]:
        return standin.look(libraries, tmp_path_factory.mktemp("notes"), folders, record=record)

    return run


def check(report: dict) -> None:
    assert "stopped" not in report, report
    for operator, provider, size in report["nodes"]:
        assert not operator.startswith("Memcpy"), report["export"]
        # On the host: numbers that are sizes of inputs, such as the length of the cache.
        assert provider == CUDA or size <= 64, (report["export"], operator, size)


def exports(folder: Path, kinds: dict, **options) -> list[Path]:
    return [
        export_onnx(GOLDEN / case, folder / f"{name}-{case}-{layout}", kv_layout=layout,
                    **options, **kind)
        for name, kind in kinds.items() for layout in LAYOUTS for case in ("p4", "p1")
        if case == "p4" or layout == "batch"
    ]  # fmt: skip


def few(folder: Path) -> list[Path]:
    return [
        export_onnx(GOLDEN / "p1", folder / "p1", target="cuda"),
        export_onnx(GOLDEN / "p4", folder / "batch", target="cuda"),
        export_onnx(GOLDEN / "p4", folder / "heads", target="cuda", kv_layout="heads",
                    precision="int4"),
    ]  # fmt: skip


def test_a_step_stays_on_the_device(look, tmp_path):
    folders = few(tmp_path)
    for report, folder in zip(look(*folders), folders, strict=True):
        check(report)
        # The sessions of prompts and of steps share one copy of the weights.
        assert report["uploaded"] < 1.1 * (folder / "model.onnx.data").stat().st_size
    for report in look(*folders, record=True):
        check(report)
        assert (report["recorded_from_host"], report["replays"]) == (0, 1)
        assert report["to_host"] == 16  # two tokens, chosen on the device


def test_launches(look, tmp_path):
    """Of one stream no more than the graph of genai's builder has: 11 a layer, and 6."""
    one, four, heads = look(*few(tmp_path))
    assert one["launches"] <= 11 * LAYERS + 6
    # Streams as rows: copies of ids and lengths, streams side by side, and the aggregator.
    assert four["launches"] <= 11 * LAYERS + 22
    assert heads["launches"] <= 12 * LAYERS + 23


@pytest.mark.slow
def test_no_more_launches_than_genai(standin, look, tmp_path):
    for package in ("onnxruntime_genai", "torch", "transformers"):
        pytest.importorskip(package)
    theirs = look(*standin.build_genai(tmp_path))
    for report, precision in zip(theirs, ("fp16", "int4"), strict=True):
        ours = export_onnx(GOLDEN / "p1", tmp_path / precision, target="cuda", precision=precision)
        assert look(ours)[0]["launches"] <= report["launches"]


@pytest.mark.parametrize("offsets", [False, True])
def test_int4_never_unpacks_a_matrix(look, tmp_path, offsets):
    """Also where the columns are no multiple of 256, as in Qwen2-0.5B and SmolLM2."""
    model = random_model(tmp_path / "model", "p1", hidden_size=320, num_attention_heads=5,
                         num_key_value_heads=1, intermediate_size=576)  # fmt: skip
    kind = {"precision": "int4"} if offsets else {"precision": "int4", "target": "cuda"}
    folder = export_onnx(model, tmp_path / "out", activations="fp16", **kind)
    (report,) = look(folder)
    check(report)
    assert not [name for name in report["kernels"] if "Dequantize" in name]


@pytest.mark.slow
def test_every_kind_of_export(look, tmp_path, capsys):
    fused = exports(tmp_path, FUSED)
    standard = exports(tmp_path / "standard", STANDARD, ops="standard")
    reports = look(*fused, *standard)
    for report in reports:
        check(report)
    recorded = look(*fused, record=True)
    for report in recorded:
        check(report)
        assert (report["recorded_from_host"], report["replays"]) == (0, 1)
    with capsys.disabled():
        print()
        for report in reports:
            print(f"{report['launches']:5} launches  {Path(report['export']).name}")
