"""Which files and tensors make up a model, in both engines, against transformers."""

import json
import shutil
import warnings

import parscale_mlx

import mlx.core as mx
import mlx_lm
import numpy as np
import pytest
from helpers.made_folders import expected, make, tokens
from parscale_core.checkpoint.tensors import Checkpoint
from parscale_export import OnnxModel, export_onnx
from safetensors.numpy import load_file, save_file

torch = pytest.importorskip("torch", reason="these folders are made with PyTorch")

IDS = tokens(12)


@pytest.fixture(scope="session")
def made(tmp_path_factory):
    """Folders by family, seed and fields, each made once."""
    known = {}

    def folder(family="llama", **fields):
        key = json.dumps([family, fields])
        if key not in known:
            known[key] = make(tmp_path_factory.mktemp("made") / "m", family, **fields)
        return known[key]

    return folder


@pytest.fixture
def copy(made, tmp_path):
    """A copy of such a folder that may be changed."""

    def folder(family="llama", **fields):
        return shutil.copytree(made(family, **fields), tmp_path / "model")

    return folder


def mlx_logits(folder):
    return np.array(parscale_mlx.load_model(folder, dtype=mx.float32)[0](mx.array([IDS]))[0])


def check(folder, tmp_path, *, onnx=True, tolerance=2e-4):
    """Compare both engines with transformers."""
    reference = expected(folder, IDS)
    assert np.abs(mlx_logits(folder) - reference).max() < tolerance
    for ops in ("fused", "standard") if onnx else ():
        exported = export_onnx(folder, tmp_path / ops, ops=ops, all_logits=True)
        assert np.abs(OnnxModel(exported).logits(IDS) - reference).max() < tolerance


def split(folder, *, keep=False):
    """Make a folder's weights two shards with an index."""
    file = folder / "model.safetensors"
    tensors = load_file(file)
    names = sorted(tensors)
    places = {}
    for number, part in enumerate((names[: len(names) // 2], names[len(names) // 2 :]), 1):
        shard = f"model-{number:05d}-of-00002.safetensors"
        save_file({name: tensors[name] for name in part}, folder / shard, {"format": "pt"})
        places |= dict.fromkeys(part, shard)
    index = {"metadata": {}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    if not keep:
        file.unlink()


def change(folder, **fields):
    file = folder / "config.json"
    config = json.loads(file.read_text()) | fields
    file.write_text(json.dumps({k: v for k, v in config.items() if v is not ...}))


def tensors(folder, edit):
    file = folder / "model.safetensors"
    held = load_file(file)
    edit(held)
    save_file(held, file, {"format": "pt"})


# What lies beside a whole model and is not looked at; each is called with a folder.


def stale_index(folder):
    index = {"weight_map": {"model.norm.weight": "model-00001-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def other_precision(folder):
    held = {name: value.astype(np.float16) * 2 for name, value in load_file(
        folder / "model.safetensors").items()}  # fmt: skip
    save_file(held, folder / "model.fp16.safetensors")
    save_file(held, folder / "model_ema.safetensors")


def leftover_shards(folder):
    held = load_file(folder / "model.safetensors")
    split(folder)
    for number in (1, 2, 3):
        save_file({name: value * 2 for name, value in held.items()},
                  folder / f"model-{number:05d}-of-00003.safetensors")  # fmt: skip


def more_in_a_shard(folder):
    held = load_file(folder / "model.safetensors")
    split(folder)
    shard = folder / "model-00002-of-00002.safetensors"
    first = sorted(held)[0]
    save_file(load_file(shard) | {first: held[first] * 2, "odd": np.zeros(3)}, shard)


def pickle_beside(folder):
    held = load_file(folder / "model.safetensors")
    torch.save({name: torch.from_numpy(value) * 2 for name, value in held.items()},
               folder / "pytorch_model.bin")  # fmt: skip


def index_of_pickles(folder):
    index = {"weight_map": {"model.norm.weight": "pytorch_model-00001-of-00009.bin"}}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))


def other_frameworks(folder):
    for name in ("flax_model.msgpack.index.json", "tf_model.h5.index.json", "x.index.json"):
        (folder / name).write_text("{")
    (folder / "consolidated.safetensors").write_bytes(b"no")
    (folder / "model.onnx").write_bytes(b"no")


def pickle(folder):
    held = load_file(folder / "model.safetensors")
    pickle_beside(folder)
    (folder / "model.safetensors").unlink()
    torch.save({name: torch.from_numpy(value) for name, value in held.items()},
               folder / "pytorch_model.bin")  # fmt: skip


def old_inverse_frequencies(folder):
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    tensors(folder, lambda held: held.update({name: np.ones(8, np.float32)}))


BESIDE = (stale_index, other_precision, leftover_shards, more_in_a_shard, pickle_beside,
          index_of_pickles, other_frameworks, pickle, split, old_inverse_frequencies)  # fmt: skip


@pytest.mark.parametrize("beside", BESIDE, ids=lambda f: f.__name__)
def test_the_files_that_make_up_a_model(copy, made, tmp_path, beside):
    folder = copy()
    beside(folder)
    reference = expected(made(), IDS)
    if beside is not more_in_a_shard:  # which transformers takes from the last shard
        assert np.abs(expected(folder, IDS) - reference).max() == 0
    assert np.abs(mlx_logits(folder) - reference).max() < 2e-4
    for name in (checkpoint := Checkpoint(folder)).names():
        assert np.array_equal(checkpoint.tensor(name), Checkpoint(made()).tensor(name)), name


KINDS = {
    "tied": dict(tie_word_embeddings=True),
    "biases": dict(attention_bias=True, mlp_bias=True),
    "head_dim": dict(head_dim=32),
    "one key-value head": dict(num_key_value_heads=1),
    "epsilon": dict(rms_norm_eps=0.01),
    "null rope_scaling": dict(rope_scaling=None),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", ["llama", "qwen2"])
@pytest.mark.slow
def test_kinds_of_models(made, tmp_path, family, kind):
    check(made(family, **KINDS[kind]), tmp_path)


def test_qwen2_keeps_its_biases_whatever_attention_bias_says(copy, tmp_path):
    folder = copy("qwen2")
    change(folder, attention_bias=False)
    check(folder, tmp_path, onnx=False)
    assert "model.layers.0.self_attn.q_proj.bias" in Checkpoint(folder)


@pytest.mark.parametrize("head", ["other", "same", "alone"])
def test_a_head_beside_tied_embeddings(copy, tmp_path, head):
    folder = copy(tie_word_embeddings=True)

    def edit(held):
        embedding = held["model.embed_tokens.weight"]
        held["lm_head.weight"] = embedding[::-1].copy() if head == "other" else embedding.copy()
        if head == "alone":
            del held["model.embed_tokens.weight"]

    tensors(folder, edit)
    check(folder, tmp_path, onnx=head == "other")
    assert Checkpoint(folder).config.tie_word_embeddings == (head != "other")


def test_a_head_of_its_own_survives_conversion(copy, tmp_path):
    from parscale_mlx.convert import convert

    folder = copy(tie_word_embeddings=True)
    tensors(folder, lambda held: held.update(
        {"lm_head.weight": held["model.embed_tokens.weight"][::-1].copy()}))  # fmt: skip
    convert(folder, tmp_path / "out")
    assert np.array_equal(mlx_logits(tmp_path / "out"), mlx_logits(folder))


def test_null_rope_scaling_is_silent(made):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        parscale_mlx.load_model(made(rope_scaling=None), lazy=True)


def blocks_of_float8(held):
    for name in list(held):
        if name.endswith("_proj.weight"):
            weight = torch.from_numpy(held[name])
            rows, columns = (-(-size // 16) for size in weight.shape)
            scales = torch.rand(rows, columns) + 0.5
            factors = scales.repeat_interleave(16, 0).repeat_interleave(16, 1)
            stored = (weight / factors[: weight.shape[0], : weight.shape[1]]).to(
                torch.float8_e4m3fn
            )
            held[name], held[f"{name}_scale_inv"] = stored, scales
        else:
            held[name] = torch.from_numpy(held[name])


FP8 = {"quant_method": "fp8", "weight_block_size": [16, 16], "activation_scheme": "dynamic"}


def test_float8_in_blocks(copy, made, tmp_path):
    from safetensors.torch import save_file as save_torch

    folder = copy()
    held = load_file(folder / "model.safetensors")
    blocks_of_float8(held)
    plain = {}
    for name, value in held.items():
        if name.endswith("_scale_inv"):
            continue
        plain[name] = value.float()
        if f"{name}_scale_inv" in held:
            factors = held[f"{name}_scale_inv"].repeat_interleave(16, 0).repeat_interleave(16, 1)
            plain[name] *= factors[: value.shape[0], : value.shape[1]]
    save_torch(held, folder / "model.safetensors", {"format": "pt"})
    change(folder, quantization_config=FP8)
    dequantised = shutil.copytree(made(), tmp_path / "plain")
    save_torch(plain, dequantised / "model.safetensors", {"format": "pt"})
    reference = expected(dequantised, IDS)
    # MLX holds them as bfloat16, as transformers does.
    assert np.abs(mlx_logits(folder) - reference).max() < 0.03 * np.abs(reference).max()
    exported = export_onnx(folder, tmp_path / "out", all_logits=True)
    assert np.abs(OnnxModel(exported).logits(IDS) - reference).max() < 2e-4


def packed(held, method, bits=4, group_size=16, shuffled=False):
    """Pack a model's layers as AWQ's or GPTQ's tools do; the numbers that they then stand for."""
    random, plain = np.random.default_rng(0), dict(held)
    for name in [name for name in held if name.endswith("_proj.weight")]:
        rows, columns = held[name].shape
        module, groups = name.removesuffix(".weight"), columns // group_size
        codes = random.integers(0, 2**bits, (rows, columns))
        zeros = random.integers(1, 2**bits, (rows, groups))
        scales = (0.03 * random.random((rows, groups)) + 0.01).astype(np.float16)
        index = np.arange(columns) // group_size
        if shuffled:
            random.shuffle(index)
        del held[name]
        plain[name] = ((codes - zeros[:, index]) * scales.astype(np.float32)[:, index]).astype("f4")
        if method == "awq":
            held[f"{module}.qweight"], held[f"{module}.qzeros"] = awq_words(codes), awq_words(zeros)
        else:
            held[f"{module}.qweight"] = words(codes, bits).T
            held[f"{module}.qzeros"] = words(zeros.T - 1, bits)
            held[f"{module}.g_idx"] = index.astype(np.int32)
            held.setdefault(f"{module}.bias", np.zeros(rows, np.float16))
        held[f"{module}.scales"] = scales.T
    return plain


def words(codes, bits, order=None):
    """int32 words along the last axis, the first code in the lowest bits."""
    many = 32 // bits
    order = order or range(many)
    out = np.zeros((*codes.shape[:-1], codes.shape[-1] // many), np.uint32)
    for place, n in enumerate(order):
        out |= codes[..., n::many].astype(np.uint32) << np.uint32(bits * place)
    return out.view(np.int32)


def awq_words(codes):
    return words(codes.T, 4, order=[0, 2, 4, 6, 1, 3, 5, 7])


def save_packed(folder, held):
    save_file({k: np.ascontiguousarray(v) for k, v in held.items()}, folder / "model.safetensors",
              metadata={"format": "pt"})  # fmt: skip


PACKINGS = {
    "awq": ("awq", 4, False), "gptq of 4 bits": ("gptq", 4, False),
    "gptq of 8 bits": ("gptq", 8, False), "gptq in another order": ("gptq", 4, True),
}  # fmt: skip


@pytest.mark.parametrize("kind", PACKINGS)
def test_packed_codes(copy, made, tmp_path, kind):
    method, bits, shuffled = PACKINGS[kind]
    folder, held = copy("qwen2"), load_file(made("qwen2") / "model.safetensors")
    plain = packed(held, method, bits, shuffled=shuffled)
    save_packed(folder, held)
    change(folder, quantization_config={"quant_method": method, "bits": bits, "group_size": 16})
    unpacked = shutil.copytree(made("qwen2"), tmp_path / "plain")
    save_file(plain, unpacked / "model.safetensors", metadata={"format": "pt"})
    reference = expected(unpacked, IDS)
    # Held as float16, as the scales are.
    assert np.abs(mlx_logits(folder) - reference).max() < 0.004 * np.abs(reference).max()
    exported = export_onnx(folder, tmp_path / "out", all_logits=True)
    assert np.abs(OnnxModel(exported).logits(IDS) - reference).max() < 2e-4


def test_awq_is_read_as_mlx_lm_reads_it(copy, made):
    folder, held = copy(), load_file(made() / "model.safetensors")
    packed(held, "awq", group_size=32)
    save_packed(folder, held)
    change(folder, quantization_config={"quant_method": "awq", "bits": 4, "group_size": 32})
    theirs, _ = mlx_lm.utils.load_model(folder)
    reference = np.array(theirs(mx.array([IDS])).astype(mx.float32)[0])
    assert np.abs(mlx_logits(folder) - reference).max() < 0.01 * np.abs(reference).max()


def pack_folder(method, spoil):
    def edit(folder):
        held = load_file(folder / "model.safetensors")
        packed(held, method)
        change(folder, quantization_config={"quant_method": method, "bits": 4, "group_size": 16})
        spoil(held, "model.layers.0.mlp.gate_proj")
        save_packed(folder, held)

    return edit


awq_without_zeros = pack_folder("awq", lambda held, name: held.pop(f"{name}.qzeros"))
awq_of_other_groups = pack_folder(
    "awq", lambda held, name: held.update({f"{name}.qzeros": held[f"{name}.qzeros"][:2]})
)
gptq_in_no_group = pack_folder(
    "gptq", lambda held, name: held.update({f"{name}.g_idx": held[f"{name}.g_idx"] + 1})
)


def quantised(method, **more):
    return lambda folder: change(folder, quantization_config={"quant_method": method, **more})


def integers(folder):
    tensors(folder, lambda held: held.update(
        {"model.layers.0.mlp.up_proj.weight": np.ones((96, 64), np.int8)}))  # fmt: skip


def float8(folder):
    from safetensors.torch import save_file as save_torch

    held = load_file(folder / "model.safetensors")
    blocks_of_float8(held)
    held = {name: value for name, value in held.items() if "scale_inv" not in name}
    save_torch(held, folder / "model.safetensors")


def cut(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-9])


def another(name):
    def edit(folder):
        tensors(folder, lambda held: held.update({name: np.zeros(3, np.float32)}))

    return edit


def outside(name):
    def edit(folder):
        (folder / name).rename(folder.parent / "elsewhere")
        (folder / name).symlink_to(folder.parent / "elsewhere")

    return edit


def fields(**values):
    return lambda folder: change(folder, **values)


REFUSED = {
    "gptq of three bits": (quantised("gptq", bits=3, group_size=16), "gptq with bits 3"),
    "gptq by marlin": (
        quantised("gptq", bits=4, group_size=16, checkpoint_format="marlin"),
        "gptq with checkpoint_format 'marlin'",
    ),
    "gptq of no group": (quantised("gptq", bits=4), "gptq: group_size None is not"),
    "awq by gemv": (quantised("awq", bits=4, group_size=16, version="gemv"), "awq with version"),
    "awq without zeros": (awq_without_zeros, "gate_proj is packed, and lacks its qzeros"),
    "awq of other groups": (awq_of_other_groups, "gate_proj.qzeros is int32 [2, 12], where awq"),
    "gptq in no group": (gptq_in_no_group, "gate_proj.weight: g_idx names groups outside the 4"),
    "bitsandbytes": (quantised("bitsandbytes", load_in_4bit=True), "quantised with 'bitsandbytes'"),
    "fp8 of whole tensors": (quantised("fp8"), "quantised with 'fp8'"),
    "quantization of a kind": (fields(quantization=[4]), "quantization is [4]"),
    "int8": (integers, "up_proj.weight is int8, and config.json names no quantization"),
    "float8": (float8, "is float8_e4m3fn, and config.json names no quantization"),
    "a tensor too many": (another("model.extra"), "no place for model.extra"),
    "a bias too many": (another("model.layers.0.mlp.up_proj.bias"), "no place for model.layers.0"),
    "a layer too many": (fields(num_hidden_layers=1), "no place for model.layers.1"),
    "a q_norm": (another("model.layers.0.self_attn.q_norm.weight"), "no place for model.layers.0"),
    "scales alone": (another("lm_head.scales"), "no quantization, but lm_head is quantised"),
    "biases alone": (another("lm_head.biases"), "no place for lm_head.biases"),
    "a vocabulary of 10^9": (fields(vocab_size=10**9), "embed_tokens.weight has shape [96, 64]"),
    "10^9 layers": (fields(num_hidden_layers=10**9), "num_hidden_layers 1000000000 is more than"),
    "10^4 layers": (fields(num_hidden_layers=10**4), "lack model.layers.2"),
    "heads of 10^9": (fields(head_dim=10**9), "head_dim 1000000000 is more than"),
    "10^30": (fields(hidden_size=10**30, head_dim=16), "embed_tokens.weight has shape [96, 64]"),
    "10^9 intermediate": (fields(intermediate_size=10**9), "gate_proj.weight has shape [96, 64]"),
    "a size of text": (fields(vocab_size="96"), "vocab_size is '96'"),
    "a flag of text": (fields(tie_word_embeddings="no"), "tie_word_embeddings is 'no'"),
    "an epsilon of 0": (fields(rms_norm_eps=0.0), "rms_norm_eps is 0.0, where a number above 0"),
    "types of one layer": (fields(layer_types=["full_attention"]), "layer_types are 1, and num_"),
    "sliding": (fields(layer_types=["sliding_attention"] * 2), "layer_types"),
    "cut short": (cut, "model.safetensors: not a whole safetensors file"),
    "config elsewhere": (outside("config.json"), "config.json: a link out of the model's folder"),
    "weights elsewhere": (outside("model.safetensors"), "model.safetensors: a link out of"),
}  # fmt: skip


@pytest.mark.parametrize("kind", REFUSED)
def test_both_engines_refuse_in_the_same_words(copy, tmp_path, kind):
    edit, words = REFUSED[kind]
    folder = copy()
    edit(folder)
    said = set()
    for run in (parscale_mlx.load_model, lambda folder: export_onnx(folder, tmp_path / "out")):
        with pytest.raises(ValueError) as error:
            run(folder)
        said.add(str(error.value))
    assert len(said) == 1
    assert words in said.pop()


def test_the_hub_caches_layout(made, tmp_path):
    """Files there are links from snapshots/REVISION to blobs."""
    from parscale_mlx.convert import convert

    def cached(folder, name):
        blobs, snapshot = tmp_path / name / "blobs", tmp_path / name / "snapshots" / "abc"
        blobs.mkdir(parents=True)
        for n, file in enumerate(sorted(f for f in folder.rglob("*") if f.is_file())):
            shutil.copy(file, blobs / f"{n}")
            link = snapshot / file.relative_to(folder)
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(blobs / f"{n}")
        return snapshot

    model = cached(made(), "model")
    assert np.array_equal(mlx_logits(model), mlx_logits(made()))
    convert(model, tmp_path / "out")
    exported = export_onnx(made(), tmp_path / "plain", all_logits=True)
    opened = OnnxModel(cached(exported, "export"))
    assert np.array_equal(opened.logits(IDS), OnnxModel(exported).logits(IDS))


def test_no_link_is_copied(copy, tmp_path):
    from parscale_mlx.convert import convert

    secret = tmp_path / "secret"
    secret.write_text("{}")
    folder = copy()
    (folder / "tokenizer_config.json").symlink_to(secret)
    with pytest.raises(ValueError, match=r"tokenizer_config\.json: a link out of"):
        convert(folder, tmp_path / "out")
    with pytest.raises(ValueError, match=r"tokenizer_config\.json: a link out of"):
        export_onnx(folder, tmp_path / "out")
