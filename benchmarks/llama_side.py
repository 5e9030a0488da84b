"""llama.cpp as a side of ``generate_onnx.py``: the same random weights in a file of its own."""

import queue
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import gguf
import numpy as np
from gguf.quants import quantize
from parscale_core.checkpoint.tensors import Checkpoint

TYPES = {"int8": gguf.GGMLQuantizationType.Q8_0, "int4": gguf.GGMLQuantizationType.Q4_0}
LAYER = {
    "input_layernorm": "attn_norm", "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output", "mlp.up_proj": "ffn_up",
    "post_attention_layernorm": "ffn_norm", "mlp.gate_proj": "ffn_gate",
    "mlp.down_proj": "ffn_down",
}  # fmt: skip
OTHERS = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


def write_gguf(folder: Path, output: Path, precision: str) -> Path:
    """A checkpoint of one stream as a GGUF file, its matrices as Q8_0 (int8) or Q4_0 (int4)."""
    checkpoint = Checkpoint(folder)
    config = checkpoint.config
    writer = gguf.GGUFWriter(output, config.model_type)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.raw.get("rope_theta", 10000.0))
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_vocab_size(config.vocab_size)
    # Prompts come as ids, so that any vocabulary of this size will do.
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list([f"t{n}" for n in range(config.vocab_size)])
    writer.add_token_types([gguf.TokenType.NORMAL] * config.vocab_size)
    writer.add_token_merges(["t 0"])
    for name in checkpoint.names():
        _add_tensor(writer, name, checkpoint.tensor(name).astype(np.float32), precision)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return output


def _add_tensor(writer: gguf.GGUFWriter, name: str, tensor: np.ndarray, precision: str) -> None:
    module, _, kind = name.rpartition(".")
    if module in OTHERS:
        module = OTHERS[module]
    else:
        _, _, layer, part = module.split(".", 3)
        module = f"blk.{layer}.{LAYER[part]}"
    if tensor.ndim == 1:
        writer.add_tensor(f"{module}.{kind}", tensor)
        return
    # What llama.cpp's own quantize does too: the embedding, which is the head, has 8 bits or more.
    dtype = TYPES["int8" if module in ("token_embd", "output") else precision]
    writer.add_tensor(f"{module}.{kind}", quantize(tensor, dtype), raw_dtype=dtype)


def llama_side(file: Path, threads: int, room: int) -> Callable[[list[int], int], Iterator[object]]:
    """A side that runs a GGUF file in llama.cpp (PyPI ``xllamacpp``)."""
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = str(file)
    params.n_ctx, params.n_parallel, params.n_gpu_layers, params.verbosity = room, 1, 0, -1
    params.n_batch = params.n_ubatch = room
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
    server = xllamacpp.Server(params)

    def run(ids: list[int], tokens: int) -> Iterator[object]:
        request = {"prompt": ids, "n_predict": tokens, "stream": True, "cache_prompt": False,
                   "ignore_eos": True, "temperature": 0}  # fmt: skip
        pieces: queue.Queue = queue.Queue()
        thread = threading.Thread(target=server.handle_completions, args=(request, pieces.put))
        thread.start()
        for _ in range(tokens):
            yield pieces.get(timeout=600)
        thread.join()

    return run
