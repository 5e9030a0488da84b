"""What an export's folder holds, for us and for other runtimes."""

import hashlib
import json
import re

import numpy as np
import onnx
import pytest
from helpers.onnx_cases import GOLDEN, LAYOUTS, OPERATORS, batches, variant
from parscale_export import OnnxModel, export_onnx
from parscale_export.runtime.sampling import Sampling, choose


def read(file):
    return json.loads(file.read_text())


def test_metadata_says_what_the_graph_is_and_hashes_its_data(tmp_path):
    folder = export_onnx(GOLDEN / "p4", tmp_path / "out", kv_layout="heads", precision="int8")
    about = OnnxModel.describe(folder)
    assert (about["streams"], about["prefix_length"]) == ("4", "48")
    assert (about["kv_layout"], about["ops"], about["precision"]) == ("heads", "fused", "int8")
    assert about["source"] == "p4"
    digest = hashlib.sha256((folder / "model.onnx.data").read_bytes()).hexdigest()
    assert about["sha256.model.onnx.data"] == digest


@pytest.mark.parametrize("kv_layout", LAYOUTS)
@pytest.mark.parametrize("ops", OPERATORS)
def test_interface_and_domains(tmp_path, kv_layout, ops):
    folder = export_onnx(GOLDEN / "p4", tmp_path / "out", kv_layout=kv_layout, ops=ops)
    onnx.checker.check_model(str(folder / "model.onnx"), full_check=True)
    graph = onnx.load(folder / "model.onnx", load_external_data=False)
    domains = {node.domain for node in graph.graph.node}
    assert domains == ({"", "com.microsoft"} if ops == "fused" else {""})
    assert {entry.domain: entry.version for entry in graph.opset_import}[""] == 23
    inputs = [value.name for value in graph.graph.input]
    assert inputs[:4] == [
        "input_ids", "attention_mask", "past_key_values.0.key", "past_key_values.0.value"
    ]  # fmt: skip
    outputs = [value.name for value in graph.graph.output]
    assert outputs[:3] == ["logits", "present.0.key", "present.0.value"]
    heads = graph.graph.input[2].type.tensor_type.shape.dim[1].dim_value
    assert heads == (8 if kv_layout == "heads" else 2)


def test_tied_embeddings_are_stored_once(tmp_path):
    folder = export_onnx(GOLDEN / "p2-tied-sharded", tmp_path / "out")
    graph = onnx.load(folder / "model.onnx", load_external_data=False)
    shapes = [tuple(tensor.dims) for tensor in graph.graph.initializer]
    assert shapes.count((320, 64)) == 1
    assert shapes.count((64, 320)) == 3  # gates and ups, packed


def with_tokenizer(folder):
    model = variant(folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        (model / name).write_text("{}")
    (model / "chat_template.jinja").write_text("{{ messages }}")
    (model / "generation_config.json").write_text('{"eos_token_id": [2, 7]}')
    (model / "modeling.py").write_text("raise SystemExit")
    return model


def test_side_files(tmp_path):
    folder = export_onnx(with_tokenizer(tmp_path / "model"), tmp_path / "out")
    assert sorted(file.name for file in folder.iterdir()) == [
        "chat_template.jinja", "config.json", "generation_config.json", "model.onnx",
        "model.onnx.data", "special_tokens_map.json", "tokenizer.json", "tokenizer_config.json",
    ]  # fmt: skip
    assert "auto_map" not in read(folder / "config.json")


@pytest.mark.parametrize("target", [None, "genai", "web"])
def test_side_files_name_every_end(tmp_path, target):
    model = variant(tmp_path / "model", eos_token_id=9)
    (model / "generation_config.json").write_text('{"eos_token_id": [9, 7], "pad_token_id": 5}')
    (model / "tokenizer_config.json").write_text('{"eos_token": {"content": "<end>"}}')
    added = [{"id": 11, "content": "<end>", "special": True}]
    (model / "tokenizer.json").write_text(json.dumps({"added_tokens": added}))
    folder = export_onnx(model, tmp_path / "out", target=target)
    for name in ("config.json", "generation_config.json"):
        assert read(folder / name)["eos_token_id"] == [9, 7, 11]
    assert read(folder / "generation_config.json")["pad_token_id"] == 5
    if target == "genai":
        about = read(folder / "genai_config.json")["model"]
        assert (about["eos_token_id"], about["pad_token_id"]) == ([9, 7, 11], 5)


@pytest.mark.parametrize("template", [None, [{"name": "default", "template": "{{ messages }}"}]])
def test_chat_templates_are_one_text_or_none(tmp_path, template):
    model = variant(tmp_path / "model")
    (model / "tokenizer.json").write_text("{}")
    (model / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}))
    folder = export_onnx(model, tmp_path / "out", target="genai")
    expected = {} if template is None else {"chat_template": "{{ messages }}"}
    assert read(folder / "tokenizer_config.json") == expected


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("chat_template.jinja", b"\xff\xfe"),
        ("tokenizer_config.json", b'{"chat_template": 5}'),
        ("tokenizer_config.json", b"{"),
        ("generation_config.json", b'{"eos_token_id": true}'),
    ],
)
def test_side_files_that_are_wrong(tmp_path, name, content):
    model = variant(tmp_path / "model")
    (model / "tokenizer.json").write_text("{}")
    (model / name).write_bytes(content)
    with pytest.raises(ValueError, match=re.escape(str(model / name))):
        export_onnx(model, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize("file", ["chat_template.jinja", "chat_template.json"])
def test_transformers_js_finds_the_chat_template_where_it_looks(tmp_path, file):
    model = variant(tmp_path / "model")
    (model / "tokenizer.json").write_text("{}")
    (model / "tokenizer_config.json").write_text('{"model_max_length": 9}')
    text = "{{ messages }}" if file.endswith("jinja") else '{"chat_template": "{{ messages }}"}'
    (model / file).write_text(text)
    config = {"model_max_length": 9, "chat_template": "{{ messages }}"}
    folder = export_onnx(model, tmp_path / "out", target="web")
    assert read(folder / "tokenizer_config.json") == config


def test_a_tokenizer_without_tokenizer_json(tmp_path):
    """What sentencepiece itself says of a text is what tokenizer.json says of it."""
    sentencepiece = pytest.importorskip("sentencepiece")
    from tokenizers import Tokenizer

    model = variant(tmp_path / "model")
    lines = "the quick brown fox\njumps over the lazy dog\nand the cat naps\n" * 3
    (tmp_path / "text.txt").write_text(lines)
    sentencepiece.SentencePieceTrainer.train(
        input=str(tmp_path / "text.txt"), model_prefix=str(model / "tokenizer"), vocab_size=310,
        model_type="bpe", byte_fallback=True, normalization_rule_name="identity", minloglevel=2,
        remove_extra_whitespaces=False,
    )  # fmt: skip
    (model / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "LlamaTokenizer", "eos_token": "</s>", "legacy": False})
    )
    folder = export_onnx(model, tmp_path / "out", target="genai")
    theirs = sentencepiece.SentencePieceProcessor(model_file=str(model / "tokenizer.model"))
    ours = Tokenizer.from_file(str(folder / "tokenizer.json"))
    for line in lines.splitlines():
        assert ours.encode(line, add_special_tokens=False).ids == theirs.encode(line)
    assert read(folder / "genai_config.json")["model"]["eos_token_id"] == theirs.eos_id()
    (model / "tokenizer.model").write_bytes(b"no model")
    with pytest.raises(ValueError, match="the tokenizer cannot be read"):
        export_onnx(model, tmp_path / "bad")
    assert not (tmp_path / "bad").exists()


def test_target_genai(tmp_path):
    folder = export_onnx(with_tokenizer(tmp_path / "model"), tmp_path / "out", target="genai")
    config = read(folder / "genai_config.json")
    decoder = config["model"]["decoder"]
    assert (decoder["num_attention_heads"], decoder["num_key_value_heads"]) == (16, 8)
    assert (decoder["head_size"], decoder["num_hidden_layers"]) == (16, 3)
    assert config["model"]["eos_token_id"] == [2, 7]
    assert config["search"]["past_present_share_buffer"] is True
    assert config["search"]["max_length"] == config["model"]["context_length"] == 512 + 48
    names = [value.name for value in onnx.load(folder / decoder["filename"]).graph.input]
    assert decoder["inputs"]["past_key_names"] % 2 in names
    assert OnnxModel.describe(folder)["kv_layout"] == "heads"


def test_target_genai_on_cuda(tmp_path):
    folder = export_onnx(GOLDEN / "p4", tmp_path / "out", target="genai-cuda")
    session = read(folder / "genai_config.json")["model"]["decoder"]["session_options"]
    # Recorded graphs of genai have a mask as long as its buffers: the prefix has no room.
    assert session["provider_options"] == [{"cuda": {"enable_cuda_graph": "0", "sdpa_kernel": "3"}}]
    about = OnnxModel.describe(folder)
    assert (about["kv_layout"], about["precision"], about["activations"]) == (
        "heads",
        *["fp16"] * 2,
    )


def test_target_web(tmp_path):
    folder = export_onnx(GOLDEN / "p4", tmp_path / "out", target="web", all_logits=True)
    assert sorted(str(file.relative_to(folder)) for file in folder.rglob("*.onnx*")) == [
        "onnx/model_q4.onnx", "onnx/model_q4.onnx_data",
    ]  # fmt: skip
    config = read(folder / "config.json")
    assert (config["model_type"], config["num_key_value_heads"]) == ("qwen2", 8)
    assert config["transformers.js_config"] == {
        "dtype": "q4", "use_external_data_format": {"model_q4.onnx": 1}
    }  # fmt: skip
    batch = batches("p4")[0]
    assert OnnxModel(folder).logits(batch.prompts[0]).shape == batch.logits[0].shape


def test_genai_generates_the_golden_tokens(tmp_path):
    genai = pytest.importorskip("onnxruntime_genai")
    # It stops at the end of text, where the golden tokens go on: let another token mean that.
    source = variant(tmp_path / "model", eos_token_id=0)
    folder = export_onnx(source, tmp_path / "out", target="genai", precision="fp32")
    model = genai.Model(str(folder))
    for batch in batches("p4"):
        length = batch.ids.shape[1]
        if not batch.mask.all():
            continue
        parameters = genai.GeneratorParams(model)
        # The prefix's 48 entries take room in the buffer that max_length sizes.
        parameters.set_search_options(max_length=length + 12 + 48, batch_size=len(batch.ids))
        generator = genai.Generator(model, parameters)
        generator.append_tokens(batch.ids)
        for step in range(12):
            generator.generate_next_token()
            assert generator.get_next_tokens().tolist() == batch.tokens[:, step].tolist()


def test_an_ordinary_genai_program_reaches_the_end_of_the_context(tmp_path):
    genai = pytest.importorskip("onnxruntime_genai")
    source = variant(tmp_path / "model", eos_token_id=0, max_position_embeddings=80)
    folder = export_onnx(source, tmp_path / "out", target="genai", precision="fp32")
    model, prompt = genai.Model(str(folder)), batches("p4")[0].prompts[0]
    generator = genai.Generator(model, genai.GeneratorParams(model))
    generator.append_tokens(np.array([prompt], np.int32))
    answer: list[int] = []
    while len(prompt) + len(answer) < 80 and not generator.is_done():
        generator.generate_next_token()
        answer += generator.get_next_tokens().tolist()
    assert len(prompt) + len(answer) == 80
    ours = OnnxModel(export_onnx(source, tmp_path / "ours"))
    assert answer == ours.generate([prompt], len(answer))[0]


def test_stop_tokens_end_their_own_sequence(tmp_path):
    model = OnnxModel(export_onnx(GOLDEN / "p4", tmp_path / "out"))
    batch = batches("p4")[1]
    stop = int(batch.tokens[0, 4])
    seen = []
    answers = model.generate(batch.prompts, 12, stop_tokens=[stop], callback=seen.append)
    for answer, tokens in zip(answers, batch.tokens.tolist(), strict=True):
        end = tokens.index(stop) + 1 if stop in tokens else 12
        assert answer == tokens[:end]
    assert len(seen) == sum(map(len, answers))


def test_sampling_with_a_seed_repeats_itself(tmp_path):
    model = OnnxModel(export_onnx(GOLDEN / "p4", tmp_path / "out"))
    prompt = batches("p4")[0].prompts[0]
    first, second, other = (
        model.generate([prompt], 12, temperature=1.0, seed=seed) for seed in (1, 1, 2)
    )
    assert first == second != other
    greedy = model.generate([prompt], 12)
    assert model.generate([prompt], 12, temperature=1.0, top_k=1) == greedy
    assert model.generate([prompt], 12, temperature=1.0, top_p=1e-9) == greedy
    assert model.generate([prompt], 12, temperature=1.0, min_p=1.0) == greedy


def test_sampling_frequencies_and_penalties():
    logits = np.log(np.array([0.5, 0.3, 0.15, 0.05], np.float32))
    random = np.random.default_rng(0)

    def shares(**how):
        tokens = [choose(logits, [], Sampling(temperature=1.0, **how), random) for _ in range(4000)]
        return np.bincount(tokens, minlength=4) / 4000

    assert shares() == pytest.approx([0.5, 0.3, 0.15, 0.05], abs=0.03)
    assert shares(top_k=2) == pytest.approx([0.625, 0.375, 0, 0], abs=0.03)
    assert shares(top_p=0.9) == pytest.approx([0.526, 0.316, 0.158, 0], abs=0.03)
    assert shares(min_p=0.5) == pytest.approx([0.625, 0.375, 0, 0], abs=0.03)
    assert choose(logits, [0], Sampling(presence_penalty=1.0), random) == 1
    assert choose(logits, [0, 0, 1], Sampling(frequency_penalty=0.6), random) == 1
    assert choose(logits, [0], Sampling(repetition_penalty=2.0), random) == 1


@pytest.mark.slow
@pytest.mark.parametrize("kv_layout", LAYOUTS)
@pytest.mark.parametrize("ops", OPERATORS)
def test_two_thousand_tokens_without_drift_or_growth(tmp_path, kv_layout, ops):
    psutil = pytest.importorskip("psutil")
    options = {"kv_layout": kv_layout, "ops": ops}
    model = OnnxModel(export_onnx(GOLDEN / "p4", tmp_path / "out", **options))
    whole = OnnxModel(export_onnx(GOLDEN / "p4", tmp_path / "all", all_logits=True, **options))
    prompt = batches("p4")[0].prompts[0]
    process, sizes, tokens = psutil.Process(), [], []
    for token in model.stream([prompt], 2000):
        tokens.append(token.token)
        if len(tokens) % 200 == 0:
            sizes.append(process.memory_info().rss)
    logits = whole.logits(prompt + tokens)[len(prompt) - 1 : -1]
    chosen = np.take_along_axis(logits, np.array(tokens)[:, None], axis=1)[:, 0]
    # Greedy all along, as one pass over the finished text sees it.
    assert (logits.max(axis=1) - chosen).max() < 1e-4
    assert sizes[-1] - sizes[1] < 64e6


@pytest.mark.parametrize("case", ["p1", "p4"])
def test_target_cpu_takes_what_is_fastest(tmp_path, case):
    about = OnnxModel.describe(export_onnx(GOLDEN / case, tmp_path / "out", target="cpu"))
    assert (about["precision"], about["head_precision"], about["block_size"]) == (
        "w8a8", "int8", "64",
    )  # fmt: skip
