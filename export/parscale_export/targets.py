"""Presets for where an export is to run, and the files that each runtime reads beside the graph."""

import json
from pathlib import Path
from typing import Any

from parscale_core.checkpoint.config import ModelConfig
from parscale_core.checkpoint.tokenizer import end_tokens, read_object, write_tokenizer

from parscale_export.builder import Options, folded_heads

CUDA = ("cuda", "genai-cuda")
GENAI = ("genai", "genai-cuda")
ONE_GRAPH = (*GENAI, "web")  # whose runtimes know nothing of streams, and read a graph a folder
# A recorded graph of genai's has a mask as long as its buffers, which leaves the prefix no room.
_GENAI_CUDA_OPTIONS = {"enable_cuda_graph": "0", "sdpa_kernel": "3"}
GENERATION = "generation_config.json"
# Of a Hugging Face config, what no longer holds once the model is a graph.
_LEFT_OUT = ("auto_map", "quantization", "quantization_config", "torch_dtype", "dtype")
_WEB_SUFFIXES = {
    ("fp32", "fp32"): "", ("fp16", "fp16"): "_fp16", ("bf16", "bf16"): "_bf16",
    ("int8", "fp32"): "_int8", ("w8a8", "fp32"): "_quantized",
    ("int4", "fp32"): "_q4", ("int4", "fp16"): "_q4f16",
}  # fmt: skip


def file_names(target: str | None, options: Options) -> tuple[str, str]:
    """The graph's path inside the export folder, and its external data's name beside it."""
    if target != "web":
        return "model.onnx", "model.onnx.data"
    # transformers.js finds the graph by its data type and the data by the graph's name.
    suffix = _WEB_SUFFIXES.get((options.precision, options.activations), f"_{options.precision}")
    return f"onnx/model{suffix}.onnx", f"model{suffix}.onnx_data"


def write_side_files(
    source: Path, folder: Path, config: ModelConfig, options: Options, target: str | None
) -> None:
    """Write ``config.json``, copy the tokenizer's files, and add what ``target`` reads."""
    write_tokenizer(source, folder, inline_template=target == "web")
    ours = {name: value for name, value in config.raw.items() if name not in _LEFT_OUT}
    ends = list(dict.fromkeys(end_tokens(source) + end_tokens(folder)))
    if ends:
        # Most runtimes read one of the files only, so each names every end.
        ours["eos_token_id"] = _one_or_all(ends)
        if generation := read_object(source / GENERATION):
            generation["eos_token_id"] = ours["eos_token_id"]
            _write_json(folder / GENERATION, generation)
    if target == "web":
        ours |= _ordinary_decoder(config, options)
        ours["transformers.js_config"] = _transformers_js(Path(file_names(target, options)[0]).name)
    _write_json(folder / "config.json", ours)
    if target in GENAI:
        providers = [{"cuda": _GENAI_CUDA_OPTIONS}] if target in CUDA else []
        about = _genai_config(source, config, options, ends, providers)
        _write_json(folder / "genai_config.json", about)


def _one_or_all(ends: list[int]) -> int | list[int]:
    return ends if len(ends) > 1 else ends[0]


def _transformers_js(graph: str) -> dict[str, Any]:
    """Which of its data types transformers.js opens by default, and that its weights are apart."""
    dtype = graph.removeprefix("model").removesuffix(".onnx").removeprefix("_") or "fp32"
    dtype = "q8" if dtype == "quantized" else dtype
    return {"dtype": dtype, "use_external_data_format": {graph: 1}}


def _ordinary_decoder(config: ModelConfig, options: Options) -> dict[str, Any]:
    """The folded model as runtimes know it: a plain decoder with P times the heads."""
    heads, kv_heads, _ = folded_heads(config, options.kv_layout)
    return {
        "model_type": config.model_type.removesuffix("_parscale"),
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": config.head_dim,
    }


def _genai_config(
    source: Path,
    config: ModelConfig,
    options: Options,
    ends: list[int],
    providers: list[dict[str, Any]],
) -> dict[str, Any]:
    heads, kv_heads, _ = folded_heads(config, options.kv_layout)
    # genai makes its buffers as long as these, and the prefix takes room there.
    length = config.max_position_embeddings + config.prefix_length
    named = config.raw | read_object(source / GENERATION)
    first = {n: named[n] for n in ("bos_token_id", "pad_token_id") if named.get(n) is not None}
    if ends:
        first = {"pad_token_id": ends[0], "eos_token_id": _one_or_all(ends)} | first
    return {
        "model": {
            **first,
            "context_length": length,
            "decoder": {
                "session_options": {"log_id": "onnxruntime-genai", "provider_options": providers},
                "filename": "model.onnx",
                "head_size": config.head_dim,
                "hidden_size": config.hidden_size,
                "num_attention_heads": heads,
                "num_hidden_layers": config.num_hidden_layers,
                "num_key_value_heads": kv_heads,
                "inputs": {
                    "input_ids": "input_ids",
                    "attention_mask": "attention_mask",
                    "past_key_names": "past_key_values.%d.key",
                    "past_value_names": "past_key_values.%d.value",
                },
                "outputs": {
                    "logits": "logits",
                    "present_key_names": "present.%d.key",
                    "present_value_names": "present.%d.value",
                },
            },
            "type": config.model_type.removesuffix("_parscale"),
            "vocab_size": config.vocab_size,
        },
        "search": {
            "do_sample": False,
            "early_stopping": True,
            "max_length": length,
            "min_length": 0,
            "num_beams": 1,
            "num_return_sequences": 1,
            "past_present_share_buffer": True,
            "repetition_penalty": 1.0,
            "temperature": 1.0,
            "top_k": 1,
            "top_p": 1.0,
        },
    }


def _write_json(file: Path, content: dict[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
