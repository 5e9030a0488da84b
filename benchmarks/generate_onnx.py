"""Prefill and decode speed of exported graphs: P streams beside P=1, and both beside others.

    python benchmarks/generate_onnx.py [--streams 1,4,8] [--precision fp32,w8a8] [--prompt 256]

All sides have the same random weights in the shape of SmolLM2-135M (or of --config), and take turns
in one run, so that what else the machine does touches all of them. Each is a process of its own,
since where one's weights lie in memory depends on what was loaded before; and since even then the
same graph runs up to a tenth faster or slower from one start to the next, --restarts starts all of
them several times. Times are medians over all; ratios are to the first side. Where other programs
want the same cores, --threads 1 --cpu-time measures the processor's time instead. Beside our fused
graphs run:

- heads: the same graphs with the streams as heads;
- naive: the standard operators, the P streams as a batch, past and present as separate arrays that
  go through the host on every step;
- genai: the graph that onnxruntime-genai's own builder makes for P=1 in float32, or those in 8 and
  4 bits where a precision is quantised, run by onnxruntime-genai (where it, PyTorch and
  transformers are installed);
- pytorch: the structure of the published code, streams as rows of a batch, caches grown by
  concatenation, in float32 (where PyTorch and transformers are installed);
- llama: llama.cpp for P=1, in Q8_0 and Q4_0 (where xllamacpp is installed).

With --provider cuda: our exports for CUDA, genai's graph (where onnxruntime-genai-cuda is), and the
same weights in MLX where its CUDA build is (mlx[cuda13]). --device names the card, for the share of
its bandwidth that decoding reads weights with: of what is read once a token, over the time.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from llama_side import llama_side, write_gguf
from parscale_core.analysis.devices import DEVICES
from parscale_core.checkpoint.config import read_config, tensor_shapes
from parscale_export import OnnxModel, export_onnx
from parscale_export.weights import BITS
from safetensors.numpy import save_file
from turns import Run, take_turns

PREFIX = 48
GENAI = ("onnxruntime_genai", "torch", "transformers")  # what its graph is built and run with
PYTORCH = ("torch", "transformers")
SMOLLM2 = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_act": "silu",
    "hidden_size": 576,
    "num_hidden_layers": 30,
    "intermediate_size": 1536,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "head_dim": 64,
    "rms_norm_eps": 1e-5,
    "vocab_size": 49152,
    "rope_theta": 100000.0,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
# A side starts a prompt and yields once for each token; the first yield ends the prefill.
Side = Callable[[list[int], int], Iterator[object]]


def write_checkpoint(folder: Path, config: dict, streams: int) -> Path:
    """A random checkpoint; what does not depend on P is the same for every P."""
    if folder.exists():
        return folder
    folder.mkdir()
    fields = {"parscale_n": streams, "parscale_n_tokens": PREFIX}
    (folder / "config.json").write_text(json.dumps(config | fields))
    shapes = tensor_shapes(read_config(folder))
    shared, own = np.random.default_rng(0), np.random.default_rng(streams)
    tensors = {}
    for name, shape in shapes.items():
        if name.endswith("norm.weight"):
            tensors[name] = np.ones(shape, np.float32)
            continue
        random = own if "prefix" in name or "aggregator" in name else shared
        tensors[name] = random.standard_normal(shape, np.float32) * np.float32(0.02)
    save_file(tensors, folder / "model.safetensors")
    return folder


def runner_side(folder: Path, threads: int, provider: str = "cpu") -> Side:
    model = OnnxModel(folder, provider, threads=threads)
    return lambda ids, tokens: model.stream([ids], tokens)


def naive_side(folder: Path, streams: int, threads: int) -> Side:
    session = OnnxModel(folder, "cpu", threads=threads).session
    inputs = [value for value in session.get_inputs() if value.name.startswith("past")]
    names = [output.name for output in session.get_outputs()]

    def run(ids: list[int], tokens: int) -> Iterator[object]:
        past = {
            value.name: np.zeros((streams, value.shape[1], 0, value.shape[3]), np.float32)
            for value in inputs
        }
        newest, length = np.array([ids]), 0
        for _ in range(tokens):
            length += newest.shape[1]
            feed = {"input_ids": newest, "attention_mask": np.ones((1, length), np.int64)}
            results = dict(zip(names, session.run(None, feed | past), strict=True))
            past = {name: results[name.replace("past_key_values", "present")] for name in past}
            newest = results["logits"][:, -1].argmax(-1)[:, None]
            yield newest

    return run


def mlx_side(folder: Path, precision: str) -> Side:
    import parscale_mlx  # before mlx: it loads a fast BLAS

    import mlx.core as mx
    import mlx.nn as nn
    from mlx_lm.generate import generate_step

    model, _ = parscale_mlx.load_model(folder)
    model.set_dtype(mx.bfloat16 if precision == "bf16" else mx.float16)
    if precision in BITS:
        nn.quantize(model, group_size=32, bits=BITS[precision])
    mx.eval(model.parameters())
    return lambda ids, tokens: generate_step(mx.array(ids), model, max_tokens=tokens)


def genai_has_cuda() -> bool:
    import onnxruntime_genai as genai

    if not genai.is_cuda_available():
        print("genai is left out: this is not onnxruntime-genai-cuda", file=sys.stderr)
    return genai.is_cuda_available()


def mlx_has_cuda() -> bool:
    import mlx.core as mx

    if not mx.cuda.is_available():
        print("MLX is left out: its CUDA build is not here (mlx[cuda13])", file=sys.stderr)
    return mx.cuda.is_available()


def build_genai(
    checkpoint: Path, threads: int, output: Path, provider: str = "cpu", precision: str = "fp32"
) -> None:
    """The graph of onnxruntime-genai's own builder.

    Raises:
        RuntimeError: the builder failed.
    """
    from transformers import GPT2TokenizerFast

    # The builder copies a tokenizer; any will do.
    for name, content in (("vocab.json", '{"a": 0}'), ("merges.txt", "#version: 0.2\n")):
        (checkpoint / name).write_text(content)
    GPT2TokenizerFast.from_pretrained(checkpoint).save_pretrained(checkpoint)
    command = [sys.executable, "-m", "onnxruntime_genai.models.builder"]
    command += ["-p", precision, "-e", provider]
    command += ["-i", str(checkpoint), "-o", str(output), "-c", str(output.with_name("cache"))]
    built = subprocess.run(command, capture_output=True, text=True)
    if built.returncode:
        raise RuntimeError(f"its builder failed: {built.stderr.strip().splitlines()[-1]}")
    file = output / "genai_config.json"
    settings = json.loads(file.read_text())
    settings["model"]["decoder"]["session_options"]["intra_op_num_threads"] = threads
    file.write_text(json.dumps(settings))


def genai_side(folder: Path) -> Side:
    import onnxruntime_genai as genai

    model = genai.Model(str(folder))

    def run(ids: list[int], tokens: int) -> Iterator[object]:
        parameters = genai.GeneratorParams(model)
        parameters.set_search_options(
            do_sample=False, min_length=len(ids) + tokens, max_length=len(ids) + tokens
        )
        generator = genai.Generator(model, parameters)
        generator.append_tokens(ids)
        for _ in range(tokens):
            generator.generate_next_token()
            yield generator.get_next_tokens()

    return run


def torch_side(config: dict, streams: int, threads: int) -> Side:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

    torch.set_num_threads(threads)
    fields = {k: v for k, v in config.items() if k not in ("model_type", "architectures")}
    shape = AutoConfig.for_model(config["model_type"], **fields)
    model = AutoModelForCausalLM.from_config(shape, dtype=torch.float32).eval()
    d, kv_heads = config["hidden_size"], config["num_key_value_heads"]
    aggregate = torch.nn.Sequential(
        torch.nn.Linear(streams * d, d), torch.nn.SiLU(), torch.nn.Linear(d, streams)
    )

    @torch.inference_mode()
    def step(tokens, cache):
        rows = tokens.expand(streams, -1)
        h = model.model(rows, past_key_values=cache, use_cache=True).last_hidden_state[:, -1]
        if streams > 1:
            h = torch.softmax(aggregate(h.reshape(1, -1)), dim=-1) @ h
        return model.lm_head(h).argmax(dim=-1)[:1, None]

    def run(ids: list[int], tokens: int) -> Iterator[object]:
        cache = DynamicCache()
        if streams > 1:
            prefix = torch.zeros(streams, kv_heads, PREFIX, config["head_dim"])
            for layer in range(config["num_hidden_layers"]):
                cache.update(prefix, prefix, layer)
        newest = torch.tensor([ids])
        for _ in range(tokens):
            newest = step(newest, cache)
            yield newest

    return run


def export(checkpoint: Path, output: Path, **options) -> Path:
    return output if output.exists() else export_onnx(checkpoint, output, **options)


def build_sides(
    config: dict, counts: list[int], precisions: list[str], kinds: list[str], threads: int,
    work: Path, room: int,
) -> dict[str, Callable[[], Side]]:  # fmt: skip
    """Write what the sides load; each is then a function that its own process calls."""
    checkpoints = {n: write_checkpoint(work / f"p{n}", config, n) for n in counts}
    sides: dict[str, Callable[[], Side]] = {}
    for precision in precisions:
        for streams, folder in checkpoints.items():
            layouts = ("batch", "heads") if streams > 1 and "heads" in kinds else ("batch",)
            for kv_layout in layouts:
                output = work / f"{precision}-{kv_layout}-{streams}"
                export(folder, output, kv_layout=kv_layout, precision=precision)
                name = f"{precision} {kv_layout} P={streams}"
                sides[name] = partial(runner_side, output, threads)
            if "naive" in kinds:
                output = work / f"{precision}-naive-{streams}"
                export(folder, output, ops="standard", precision=precision)
                name = f"{precision} naive P={streams}"
                sides[name] = partial(naive_side, output, streams, threads)
    quantised = any(precision in ("int8", "int4", "w8a8") for precision in precisions)
    plain = write_checkpoint(work / "plain", config, 1)
    if "genai" in kinds and installed("genai", GENAI):
        for precision in ("int8", "int4") if quantised else ("fp32",):
            try:
                if not (work / f"genai-{precision}").exists():
                    build_genai(plain, threads, work / f"genai-{precision}", precision=precision)
                name = f"genai {precision} P=1"
                sides[name] = partial(genai_side, work / f"genai-{precision}")
            except RuntimeError as error:
                print(f"genai {precision} is left out: {error}", file=sys.stderr)
    if "pytorch" in kinds and installed("PyTorch", PYTORCH):
        for streams in counts:
            sides[f"PyTorch P={streams}"] = partial(torch_side, config, streams, threads)
    if "llama" in kinds and installed("llama.cpp", ("xllamacpp",)):
        for precision, name in (("int8", "llama.cpp Q8_0"), ("int4", "llama.cpp Q4_0")):
            file = work / f"{precision}.gguf"
            if not file.exists():
                write_gguf(plain, file, precision)
            sides[f"{name} P=1"] = partial(llama_side, file, threads, room)
    return sides


def build_cuda_sides(
    config: dict, counts: list[int], precision: str, kinds: list[str], threads: int, work: Path
) -> dict[str, Callable[[], Side]]:
    """As ``build_sides``, on CUDA."""
    sides: dict[str, Callable[[], Side]] = {}
    checkpoints = {n: write_checkpoint(work / f"p{n}", config, n) for n in counts}
    for streams, folder in checkpoints.items():
        for kv_layout in ("batch", "heads") if streams > 1 else ("batch",):
            output = work / f"{kv_layout}-{streams}"
            export_onnx(folder, output, target="cuda", kv_layout=kv_layout, precision=precision)
            sides[f"fused {kv_layout} P={streams}"] = partial(runner_side, output, threads, "cuda")
    with_genai = "genai" in kinds and precision in ("fp16", "int4")
    if with_genai and installed("genai", GENAI) and genai_has_cuda():
        plain = write_checkpoint(work / "plain", config, 1)
        try:
            build_genai(plain, threads, work / "genai", "cuda", precision)
            sides["genai P=1"] = partial(genai_side, work / "genai")
        except RuntimeError as error:
            print(f"genai is left out: {error}", file=sys.stderr)
    if "mlx" in kinds and installed("MLX", ("mlx", "mlx_lm")) and mlx_has_cuda():
        for streams, folder in checkpoints.items():
            sides[f"MLX P={streams}"] = partial(mlx_side, folder, precision)
    return sides


def weights_read(export: Path, config: dict) -> int:
    """Bytes of weights that one token needs: all but an embedding that is not the head, too."""
    size = (export / "model.onnx.data").stat().st_size
    if not config["tie_word_embeddings"]:
        size -= 2 * config["vocab_size"] * config["hidden_size"]
    return size


def installed(side: str, packages: tuple[str, ...]) -> bool:
    missing = [name for name in packages if find_spec(name) is None]
    if missing:
        print(f"{side} is left out: no {', '.join(missing)} here", file=sys.stderr)
    return not missing


def timed(make: Callable[[], Side], cpu_time: bool) -> Run:
    """A run that takes (ids, tokens) and returns the seconds of each step."""
    clock = time.process_time if cpu_time else time.perf_counter
    side = make()

    def run(asked: tuple[list[int], int]) -> list[float]:
        ids, tokens = asked
        steps, seconds = side(ids, tokens), []
        for _ in range(tokens):
            start = clock()
            next(steps)
            seconds.append(clock() - start)
        return seconds

    return run


def medians(turns: list[list[float]]) -> dict[str, float]:
    """Seconds of a prefill and of one decoded token, from the steps of each turn."""
    return {
        "prefill": statistics.median(steps[0] for steps in turns),
        "decode": statistics.median(step for steps in turns for step in steps[1:]),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--provider", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--device", choices=list(DEVICES), help="the card, for its bandwidth")
    parser.add_argument("--config", type=Path, help="a config.json to take the shape from")
    parser.add_argument("--streams", default="1,4,8", help="numbers of streams (default 1,4,8)")
    parser.add_argument(
        "--precision",
        help="one or more (on CUDA, one) of fp32, fp16, int8, int4, w8a8 (default fp32; on CUDA, "
        "fp16)",
    )
    parser.add_argument("--prompt", type=int, default=256, help="prompt tokens (default 256)")
    parser.add_argument("--tokens", type=int, default=48, help="tokens to decode (default 48)")
    parser.add_argument("--repeats", type=int, default=6, help="measured turns (default 6)")
    parser.add_argument("--restarts", type=int, default=1, help="start all anew so often")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="default: all cores")
    parser.add_argument(
        "--cpu-time", action="store_true", help="measure the processor's time, not the clock's"
    )
    parser.add_argument(
        "--beside",
        default="heads,naive,genai,pytorch,llama,mlx",
        help="what to run besides (default: whatever there is; mlx on CUDA alone)",
    )
    parser.add_argument(
        "--work", type=Path, help="a folder to keep what the sides load, for other runs of a shape"
    )
    parser.add_argument(
        "--prepare", action="store_true", help="write what the sides load to --work, and stop"
    )
    parser.add_argument(
        "--only", help="measure only sides whose names have one of these in them, such as P=1,P=8"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    args = parser.parse_args()
    if args.prepare and not args.work:
        parser.error("--prepare needs --work")
    config = json.loads(args.config.read_text()) if args.config else SMOLLM2
    counts = [int(n) for n in args.streams.split(",")]
    on_cuda = args.provider == "cuda"
    precisions = (args.precision or ("fp16" if on_cuda else "fp32")).split(",")
    if on_cuda and len(precisions) > 1:
        parser.error("--precision takes one precision with --provider cuda")
    with nullcontext(args.work) if args.work else tempfile.TemporaryDirectory() as folder:
        work, kinds = Path(folder), args.beside.split(",")
        work.mkdir(parents=True, exist_ok=True)
        if on_cuda:
            sides = build_cuda_sides(config, counts, precisions[0], kinds, args.threads, work)
            size = weights_read(work / f"batch-{counts[0]}", config)
        else:
            room = args.prompt + args.tokens + 1
            sides = build_sides(config, counts, precisions, kinds, args.threads, work, room)
            size = weights_read(work / f"{precisions[0]}-batch-{counts[0]}", config)
        if args.prepare:
            return
        if args.only:
            parts = args.only.split(",")
            sides = {name: side for name, side in sides.items() if any(p in name for p in parts)}
        ids = [n % 1000 for n in range(args.prompt)]
        measured = take_turns(
            {name: partial(timed, side, args.cpu_time) for name, side in sides.items()},
            (ids, args.tokens + 1),
            repeats=args.repeats,
            restarts=args.restarts,
        )
    results = {name: medians(turns) for name, turns in measured.items()}
    if args.json:
        print(json.dumps(results))
        return
    base = next(iter(results.values()))
    bandwidth = DEVICES[args.device].bandwidth if args.device else 0
    kind = "processor time" if args.cpu_time else "time"
    where = f"{args.threads} threads" if not on_cuda else f"CUDA, {args.device or 'some card'}"
    print(f"\n{', '.join(precisions)}, {kind}, {where}, {args.prompt} prompt tokens\n")
    share = f"{'bandwidth':>11}" if args.device else ""
    print(f"{'':20}{'prefill':>14}{'':>8}{'decode':>14}{'':>8}{share}")
    for name, result in results.items():
        print(
            f"{name:20}{args.prompt / result['prefill']:>8.1f} tok/s"
            f"{result['prefill'] / base['prefill']:>7.2f}x"
            f"{result['decode'] * 1e3:>9.2f} ms/t{result['decode'] / base['decode']:>8.2f}x"
            + (f"{size / result['decode'] / bandwidth:>11.0%}" if args.device else "")
        )


if __name__ == "__main__":
    main()
