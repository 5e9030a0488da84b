"""``convert --mlx-lm``: mlx-lm's own commands on a folder with more than one stream."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import parscale_mlx
from parscale_mlx.convert import convert

import mlx.core as mx
import mlx_lm
import pytest
from helpers.golden_cases import CASES, GOLDEN, TOLERANCE, difference, read_rows
from helpers.tiny_models import write_tokenizer
from mlx_lm.generate import BatchGenerator
from mlx_lm.models.cache import load_prompt_cache, save_prompt_cache, trim_prompt_cache
from mlx_lm.utils import load_model
from parscale_core.convert_settings import Quantization

FROM_SAFETENSORS = [case for case in CASES if case != "p2-torch-bin"]


@pytest.fixture(scope="module", params=FROM_SAFETENSORS)
def case(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("drop-in") / request.param
    convert(GOLDEN / request.param, folder, with_model_file=True)
    model, _ = load_model(folder, trust_remote_code=True)
    model.set_dtype(mx.float32)
    return model, read_rows(GOLDEN / request.param)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """P=4 with a tokenizer, as mlx-lm's commands want it."""
    root = tmp_path_factory.mktemp("commands")
    source = root / "source"
    shutil.copytree(GOLDEN / "p4", source)
    write_tokenizer(source, size=json.loads((source / "config.json").read_text())["vocab_size"])
    convert(source, root / "model", with_model_file=True)
    return root / "model"


def run(command: str, *arguments, home: Path | None = None) -> str:
    environment = {"HOME": str(home)} if home else {}
    done = subprocess.run(
        [sys.executable, "-m", "mlx_lm", command, *map(str, arguments)],
        capture_output=True, text=True, timeout=300, check=False,
        env={**os.environ, **environment},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_the_published_logits_with_and_without_caches(case):
    model, rows = case
    for row in rows:
        assert difference(model(mx.array([row.ids]))[0], row.logits) < TOLERANCE
        for cached in model(mx.array([row.ids] * 3), cache=model.make_cache()):
            assert difference(cached, row.logits) < TOLERANCE


def test_batches_of_ragged_prompts(case):
    model, rows = case
    generator = BatchGenerator(
        model, completion_batch_size=3, prefill_batch_size=2, prefill_step_size=4
    )
    uids = generator.insert([row.ids for row in rows], [12] * len(rows))
    tokens = {uid: [] for uid in uids}
    while responses := generator.next_generated():
        for response in responses:
            tokens[response.uid].append(response.token)
    assert list(tokens.values()) == [row.greedy_tokens for row in rows]


def test_a_cache_that_is_trimmed_and_saved_keeps_the_prefix(case, tmp_path):
    model, rows = case
    row, file = rows[0], str(tmp_path / "cache.safetensors")
    cache = model.make_cache()
    model(mx.array([row.ids]), cache=cache)
    trim_prompt_cache(cache, 10_000)
    save_prompt_cache(file, cache)
    again = model(mx.array([row.ids]), cache=load_prompt_cache(file))[0]
    assert difference(again, row.logits) < TOLERANCE


def test_mlx_lm_refuses_the_folder_where_it_is_not_trusted(folder):
    with pytest.raises(ValueError, match="trust_remote_code"):
        mlx_lm.load(str(folder))


def test_our_own_loader_reads_the_folder_and_runs_no_code(folder, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    (copy / "qwen2_parscale.py").write_text("raise SystemExit('ran')")
    ids = mx.array([[5, 6, 7]])
    ours, _ = parscale_mlx.load_model(copy)
    theirs, _ = load_model(folder, trust_remote_code=True)
    assert difference(ours(ids), theirs(ids)) < TOLERANCE
    convert(copy, tmp_path / "plain")
    assert "model_file" not in json.loads((tmp_path / "plain" / "config.json").read_text())
    assert not (tmp_path / "plain" / "qwen2_parscale.py").exists()


def test_a_quantised_folder(folder, tmp_path):
    how = Quantization(group_size=32)
    convert(folder, tmp_path / "q", quantization=how, with_model_file=True)
    ids = mx.array([[5, 6, 7, 8]])
    ours, _ = parscale_mlx.load_model(tmp_path / "q")
    theirs, _ = load_model(tmp_path / "q", trust_remote_code=True)
    assert difference(ours(ids), theirs(ids)) < TOLERANCE


def test_generate_prints_what_we_generate(folder):
    prompt = "one two"
    printed = run(
        "generate", "--model", folder, "--trust-remote-code", "--prompt", prompt,
        "--ignore-chat-template", "--max-tokens", 12, "--verbose", "False",
    )  # fmt: skip
    model, tokenizer = parscale_mlx.load(folder)
    expected = parscale_mlx.generate(model, tokenizer, prompt, max_tokens=12)
    assert printed.strip() == expected.strip()


@pytest.mark.slow
def test_lora_learns_with_the_streams_in_place(folder, tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    lines = [json.dumps({"text": f"line {n} of a text to learn from"}) for n in range(8)]
    for name in ("train", "valid"):
        (data / f"{name}.jsonl").write_text("\n".join(lines))
    run(
        "lora", "--model", folder, "--trust-remote-code", "--train", "--data", data,
        "--iters", 4, "--batch-size", 2, "--num-layers", 2, "--adapter-path", tmp_path / "lora",
        "--steps-per-eval", 4, "--val-batches", 1, "--max-seq-length", 64,
    )  # fmt: skip
    options = ("--model", folder, "--trust-remote-code", "--adapter-path", tmp_path / "lora")
    run("fuse", *options, "--save-path", tmp_path / "fused")
    with_lora, _ = mlx_lm.load(
        str(folder), adapter_path=str(tmp_path / "lora"), trust_remote_code=True
    )
    fused, _ = load_model(tmp_path / "fused", trust_remote_code=True)
    plain, _ = load_model(folder, trust_remote_code=True)
    ids = mx.array([[5, 6, 7, 8]])
    assert difference(fused(ids), with_lora(ids)) < 1e-3 < difference(plain(ids), with_lora(ids))


@pytest.mark.slow
def test_gptq_quantises_with_the_streams_in_place(folder, tmp_path):
    calibration = tmp_path / ".cache" / "mlx-lm" / "calibration_v5.txt"
    calibration.parent.mkdir(parents=True)
    calibration.write_text("a text to calibrate with. " * 200)
    run(
        "gptq", "--model", folder, "--trust-remote-code", "--mlx-path", tmp_path / "gptq",
        "--num-samples", 4, "--sequence-length", 32, "--group-size", 32,
        "--fallback-group-size", 32, home=tmp_path,
    )  # fmt: skip
    quantised, _ = load_model(tmp_path / "gptq", trust_remote_code=True)
    plain, _ = load_model(folder, trust_remote_code=True)
    ids = mx.array([[5, 6, 7, 8]])
    assert difference(quantised(ids), plain(ids)) < 3


@pytest.mark.parametrize("family", ["qwen3", "mistral"])
def test_other_families(tmp_path, family):
    pytest.importorskip("torch", reason="transformers makes these models with PyTorch")
    from helpers.made_folders import add_streams, make

    fields = {"sliding_window": None} if family == "mistral" else {"head_dim": 32}
    whole = add_streams(make(tmp_path / "m", family, **fields), 2, 5)
    convert(whole, tmp_path / "out", with_model_file=True)
    ids = mx.array([[5, 6, 7, 8, 9]])
    ours, _ = parscale_mlx.load_model(whole)
    theirs, _ = load_model(tmp_path / "out", trust_remote_code=True)
    assert difference(ours(ids), theirs(ids)) < TOLERANCE


def test_rope_that_mlx_lm_computes_otherwise_is_refused(folder, tmp_path):
    source = tmp_path / "yarn"
    shutil.copytree(GOLDEN / "p4", source)
    config = json.loads((source / "config.json").read_text())
    config["rope_scaling"] = {
        "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64,
    }  # fmt: skip
    (source / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="'yarn'"):
        convert(source, tmp_path / "out", with_model_file=True)
    assert not (tmp_path / "out").exists()
