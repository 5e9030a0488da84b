"""SmolLM2-135M-Instruct as ONNX beside MLX in float32: greedy text and perplexity."""

import inspect
import pydoc_data.topics

import numpy as np
import pytest
from parscale_core.checkpoint.tensors import Checkpoint
from parscale_export import OnnxModel, export_onnx
from tokenizers import Tokenizer

pytestmark = pytest.mark.slow
PROMPTS = (
    "The capital of France is Paris, and the capital of Italy is",
    "Once upon a time there was a miller who had three sons,",
    "def fibonacci(n):\n",
    "The three states of matter are",
)
# How far the perplexity may be from MLX's in float32.
LIMITS = {"fp32": 1e-4, "int8": 0.01, "w8a8": 0.02, "int4": 0.10}


@pytest.fixture(scope="module")
def reference():
    """The model's folder, its tokenizer, and in MLX its greedy tokens and perplexity."""
    parscale_mlx = pytest.importorskip("parscale_mlx")
    import mlx.core as mx
    from parscale_core.checkpoint.packaged import smollm2_folder

    try:
        folder = smollm2_folder(progress=False)
    except FileNotFoundError as error:
        pytest.skip(str(error))
    model, _ = parscale_mlx.load_model(folder, dtype=mx.float32)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))

    def greedy(ids: list[int], tokens: int) -> list[int]:
        cache, new = model.make_cache(), list(ids)
        for _ in range(tokens):
            logits = model(mx.array([new if len(new) == len(ids) else new[-1:]]), cache=cache)
            new.append(int(mx.argmax(logits[0, -1]).item()))
        return new[len(ids) :]

    prompts = [tokenizer.encode(prompt).ids for prompt in PROMPTS]
    texts = [greedy(ids, 40) for ids in prompts]
    samples = held_out(tokenizer)
    losses = [loss(np.array(model(mx.array([ids]))[0]), ids) for ids in samples]
    return folder, prompts, texts, samples, np.exp(np.mean(losses))


def held_out(tokenizer: Tokenizer) -> list[list[int]]:
    """English that came with Python, which nobody calibrated anything on: 4 pieces of 256."""
    topics = pydoc_data.topics.topics
    texts = [topics[name] for name in ("execmodel", "types", "objects")]
    texts.append(inspect.cleandoc(inspect.__doc__ or "") + topics["import"])
    return [tokenizer.encode(text).ids[:256] for text in texts]


def loss(logits: np.ndarray, ids: list[int]) -> float:
    """Mean negative log-likelihood of each token after those before it, in nats."""
    logits = logits[:-1].astype(np.float64)
    logits -= logits.max(-1, keepdims=True)
    normalised = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    return -float(np.take_along_axis(normalised, np.array(ids)[1:, None], axis=1).mean())


@pytest.mark.parametrize("precision", LIMITS)
def test_text_and_perplexity(reference, tmp_path, precision):
    folder, prompts, texts, samples, expected = reference
    model = OnnxModel(
        export_onnx(folder, tmp_path / "out", precision=precision, all_logits=True), "cpu"
    )
    perplexity = np.exp(np.mean([loss(model.logits(ids), ids) for ids in samples]))
    print(f"\n{precision}: perplexity {perplexity:.4f}, in MLX {expected:.4f}")
    assert abs(perplexity / expected - 1) < LIMITS[precision]
    if precision == "fp32":
        assert model.generate(prompts, max_tokens=40) == texts


def test_a_byte_a_parameter(reference, tmp_path):
    """Target cpu; its embedding is the head's 8-bit blocks, and the perplexity does not suffer."""
    folder, _, _, samples, _ = reference
    kinds = {"int8": {}, "fp32": {"embedding_precision": "fp32"}}
    perplexities = {}
    for name, options in kinds.items():
        out = export_onnx(folder, tmp_path / name, target="cpu", precision="int8", all_logits=True,
                          **options)  # fmt: skip
        model = OnnxModel(out, "cpu")
        perplexities[name] = np.exp(np.mean([loss(model.logits(ids), ids) for ids in samples]))
    assert abs(perplexities["int8"] / perplexities["fp32"] - 1) < 1e-3
    checkpoint = Checkpoint(folder)
    parameters = sum(int(np.prod(checkpoint.shape(name))) for name in checkpoint.names())
    size = sum(file.stat().st_size for file in (tmp_path / "int8").glob("model.onnx*"))
    assert size < 1.1 * parameters
