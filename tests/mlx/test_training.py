"""Training: gradients, what is frozen, resuming, batches, and what is refused."""

import hashlib
import json
import resource
import shutil

from parscale_mlx import Model, load_adapter, load_model
from parscale_mlx.fuse import fuse
from parscale_mlx.training import TrainSettings, resume, train
from parscale_mlx.training.batches import batch_indices, pack
from parscale_mlx.training.documents import Document
from parscale_mlx.training.metrics_file import Metrics, read_metrics
from parscale_mlx.training.step import summed_loss

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from helpers.training_files import CONFIG, TEXT, write_config, write_model
from mlx.utils import tree_flatten, tree_unflatten
from parscale_core.checkpoint.config import ModelConfig
from parscale_core.checkpoint.names import is_stream_tensor
from parscale_core.convert_settings import Quantization

TIMES = ("tokens_per_second", "iterations_per_second", "val_time", "peak_memory")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("models") / "base")


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    file = tmp_path_factory.mktemp("data") / "text.txt"
    file.write_text(TEXT)
    return file


@pytest.fixture
def settings(base, text, tmp_path):
    """Settings of a run with two streams over a frozen backbone, or with changes."""

    def make(**changes) -> TrainSettings:
        values = dict(
            stage="streams", data=[str(text)], output=str(tmp_path / "run"), model=str(base),
            streams=2, prefix_length=6, seq_length=32, batch_size=4, steps=12, lr=1e-2,
            report_every=2, eval_every=4, save_every=5,
        )  # fmt: skip
        if changes.get("stage") == "pretrain":
            values["streams"] = None
        return TrainSettings(**values | changes)

    return make


def curve(run) -> list[dict]:
    """A run's metrics without its times."""
    return [{k: v for k, v in r.items() if k not in TIMES} for r in read_metrics(run)]


def losses(run) -> list[float]:
    return [r.get("train_loss", r.get("val_loss")) for r in read_metrics(run)]


# Gradients


def model_with_streams() -> Model:
    fields = {"model_type": "qwen2_parscale", "parscale_n": 3, "parscale_n_tokens": 5}
    model = Model(ModelConfig.from_dict(CONFIG | fields | {"parscale_attn_smooth": 0.1}))
    mx.random.seed(2)
    weights = [(k, mx.random.normal(v.shape) * 0.3) for k, v in tree_flatten(model.parameters())]
    model.update(tree_unflatten(weights))
    return model


IDS = [[5, 17, 3, 80, 41, 9, 33, 2, 60], [7, 7, 12, 99, 0, 54, 21, 8, 1]]
COUNTS = [[1, 1, 1, 1, 1, 1, 1, 1], [0, 0, 0, 1, 1, 1, 0, 0]]


def gradients_of(model: Model) -> dict[str, mx.array]:
    value_and_grad = nn.value_and_grad(model, summed_loss)
    _, gradients = value_and_grad(model, mx.array(IDS), mx.array(COUNTS))
    return dict(tree_flatten(gradients))


def test_gradients_of_the_streams_are_finite_differences():
    model = model_with_streams()
    weights = dict(tree_flatten(model.parameters()))
    gradients = gradients_of(model)
    chosen = [name for name in weights if is_stream_tensor(name)]
    assert len(chosen) == 2 * 2 + 4
    for name in chosen:
        # Along a random direction; single weights of float32 would drown in rounding.
        direction = mx.random.normal(weights[name].shape)
        direction /= mx.linalg.norm(direction.flatten())
        values = []
        for step in (0.01, -0.01):
            model.load_weights([(name, weights[name] + step * direction)], strict=False)
            values.append(summed_loss(model, mx.array(IDS), mx.array(COUNTS))[0].item())
        model.load_weights([(name, weights[name])], strict=False)
        slope = (gradients[name] * direction).sum().item()
        assert (values[0] - values[1]) / 0.02 == pytest.approx(slope, rel=2e-2, abs=2e-3), name


def torch_loss(weights: dict, args: ModelConfig):
    """The summed loss as the paper has it, stream by stream, in PyTorch."""
    torch = pytest.importorskip("torch")
    F = torch.nn.functional
    d, heads, kv, dim = args.hidden_size, args.num_attention_heads, args.num_key_value_heads, 8
    ids, counts = torch.tensor(IDS), torch.tensor(COUNTS)
    L = ids.shape[1] - 1
    angles = torch.arange(L)[:, None] * args.rope.theta ** (-torch.arange(0, dim, 2) / dim)

    def rotate(x):
        a, b = x[..., : dim // 2], x[..., dim // 2 :]
        cos, sin = angles.cos(), angles.sin()
        return torch.cat([a * cos - b * sin, a * sin + b * cos], -1)

    def norm(x, name):
        return F.rms_norm(x, (d,), weights[name + ".weight"], args.rms_norm_eps)

    def linear(x, name):
        return F.linear(x, weights[name + ".weight"], weights.get(name + ".bias"))

    finals = []
    for p in range(args.streams):
        h = F.embedding(ids[:, :-1], weights["model.embed_tokens.weight"])
        for n in range(args.num_hidden_layers):
            layer = f"model.layers.{n}."
            x = norm(h, layer + "input_layernorm")
            q, k, v = (
                linear(x, f"{layer}self_attn.{c}_proj").view(len(ids), L, -1, dim).transpose(1, 2)
                for c in "qkv"
            )
            # Prefix keys are not rotated, and tokens count from 0.
            past_k, past_v = (
                weights[f"{layer}self_attn.prefix_{c}"][p].expand(len(ids), -1, -1, -1)
                for c in "kv"
            )
            k, v = torch.cat([past_k, rotate(k)], 2), torch.cat([past_v, v], 2)
            mask = torch.ones(L, k.shape[2]).tril(k.shape[2] - L).bool()
            k, v = (a.repeat_interleave(heads // kv, 1) for a in (k, v))
            a = F.scaled_dot_product_attention(rotate(q), k, v, attn_mask=mask)
            h = h + linear(a.transpose(1, 2).flatten(2), layer + "self_attn.o_proj")
            x = norm(h, layer + "post_attention_layernorm")
            gate, up = (linear(x, f"{layer}mlp.{c}_proj") for c in ("gate", "up"))
            h = h + linear(F.silu(gate) * up, layer + "mlp.down_proj")
        finals.append(norm(h, "model.norm"))
    x = linear(torch.cat(finals, -1), "model.aggregator.fc1")
    w = linear(F.silu(x), "model.aggregator.fc2").softmax(-1)
    w = w * (1 - args.smoothing) + args.smoothing / args.streams
    h = sum(w[..., p : p + 1] * finals[p] for p in range(args.streams))
    logits = h @ weights["model.embed_tokens.weight"].T
    per_token = F.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none")
    return (per_token * counts).sum()


def test_gradients_are_those_of_pytorch():
    torch = pytest.importorskip("torch")
    model = model_with_streams()
    weights = {
        k: torch.tensor(np.array(v), requires_grad=True)
        for k, v in tree_flatten(model.parameters())
    }
    loss = torch_loss(weights, model.args)
    loss.backward()
    mine, _ = summed_loss(model, mx.array(IDS), mx.array(COUNTS))
    assert mine.item() == pytest.approx(loss.item(), rel=1e-5)
    gradients = gradients_of(model)
    assert gradients.keys() == weights.keys()
    for name, gradient in gradients.items():
        expected = weights[name].grad.numpy()
        scale = np.abs(expected).max()
        assert np.abs(np.array(gradient) - expected).max() < 1e-3 * scale + 1e-5, name


# What is trained


def test_streams_learn_and_the_backbone_stays_bit_identical(settings, base, tmp_path):
    before = hashlib.sha256((base / "model.safetensors").read_bytes()).hexdigest()
    result = train(settings(steps=40))
    assert result.valid_loss < result.valid_loss_before - 0.05
    assert result.output == str(tmp_path / "run" / "adapter")
    assert hashlib.sha256((base / "model.safetensors").read_bytes()).hexdigest() == before
    fuse(base, result.output, tmp_path / "fused")
    fused, original = (mx.load(str(f / "model.safetensors")) for f in (tmp_path / "fused", base))
    assert set(original) < set(fused)
    assert all(mx.array_equal(fused[name], value) for name, value in original.items())
    start = train(settings(steps=1, lr=1e-30, output=str(tmp_path / "untrained"))).output
    trained, grafted = load_adapter(result.output).weights, load_adapter(start).weights
    assert all(mx.abs(trained[k] - grafted[k]).max().item() > 1e-4 for k in grafted)


def test_a_backbone_in_training_is_not_touched_in_memory(settings):
    from parscale_mlx.training.data import read_data
    from parscale_mlx.training.optimizer import make_optimizer
    from parscale_mlx.training.start import make_start, start_folder
    from parscale_mlx.training.step import make_step, micro_batches

    run = settings()
    folder = start_folder(run)
    data = read_data(run, folder)
    start = make_start(run, folder, data.train)
    model = start.model
    before = {k: np.array(v) for k, v in tree_flatten(model.parameters())}
    step = make_step(start, make_optimizer(run, start), 1.0)
    for n in range(3):
        step(micro_batches(run, data.train, n))
    for name, value in tree_flatten(model.parameters()):
        assert np.array_equal(before[name], value) != is_stream_tensor(name), name


def test_the_whole_model_with_streams(settings, base, tmp_path):
    result = train(settings(train_all=True, lr=1e-30, streams_lr=1e-2, steps=6))
    model, config = load_model(result.output)
    assert config["model_type"] == "llama_parscale" and model.args.streams == 2
    original = mx.load(str(base / "model.safetensors"))
    for name, value in tree_flatten(model.parameters()):
        if name in original:
            assert mx.abs(value - original[name]).max().item() < 1e-9
    # The streams had a learning rate of their own; the backbone's is the one reported.
    assert read_metrics(tmp_path / "run")[1]["learning_rate"] < 1e-29
    assert result.valid_loss < result.valid_loss_before
    again = train(settings(train_all=True, streams=None, model=result.output, steps=20,
                           output=str(tmp_path / "again")))  # fmt: skip
    assert again.valid_loss_before == pytest.approx(result.valid_loss, rel=1e-5)
    assert again.valid_loss < again.valid_loss_before


def test_the_aggregator_has_a_learning_rate_of_its_own(settings, tmp_path):
    def weights(name, **changes):
        run = train(settings(output=str(tmp_path / name), **changes))
        return load_adapter(run.output).weights

    start = weights("start", steps=1, lr=1e-30)
    prefixes = weights("prefixes", aggregator_lr=1e-30)
    aggregator = weights("aggregator", streams_lr=1e-30, aggregator_lr=1e-2)
    for name, value in start.items():
        still = aggregator if "prefix" in name else prefixes
        moved = prefixes if "prefix" in name else aggregator
        assert mx.abs(still[name] - value).max().item() < 1e-9
        assert mx.abs(moved[name] - value).max().item() > 1e-4


def test_an_adapter_is_trained_further(settings, tmp_path):
    first = train(settings())
    second = train(settings(streams=None, adapter=first.output, output=str(tmp_path / "second")))
    assert second.valid_loss_before == pytest.approx(first.valid_loss, rel=1e-5)
    assert second.valid_loss < first.valid_loss


def test_pretraining_from_nothing_but_a_configuration(settings, tmp_path):
    folder = write_config(tmp_path / "config")
    result = train(settings(stage="pretrain", model=None, config=str(folder), steps=60))
    assert result.valid_loss_before == pytest.approx(np.log(100), rel=0.05)
    assert result.valid_loss < 3
    assert (tmp_path / "run" / "model" / "tokenizer.json").is_file()
    again = train(settings(stage="pretrain", model=result.output, output=str(tmp_path / "again")))
    assert again.valid_loss_before == pytest.approx(result.valid_loss, rel=1e-5)


# Prefixes that an MLP makes


def torch_prefixes(file, streams: int, layers: int, hidden_size: int):
    """What a saved encoder makes, by PyTorch's own modules with PEFT's names and layout.

    Returns:
        Its weights, which are to be trained, and the prefixes by their names.
    """
    torch = pytest.importorskip("torch")
    saved = {k: torch.tensor(np.array(v)) for k, v in mx.load(str(file)).items()}
    start = saved.pop("start")
    width = saved["transform.2.weight"].shape[0]
    encoder = torch.nn.Module()
    encoder.embedding = torch.nn.Embedding(*saved["embedding.weight"].shape)
    encoder.transform = torch.nn.Sequential(
        torch.nn.Linear(32, hidden_size), torch.nn.Tanh(), torch.nn.Linear(hidden_size, width)
    )
    encoder.load_state_dict(saved, strict=True)
    made = encoder.transform(encoder.embedding.weight)
    # PEFT: [batch, tokens, 2 * layers, heads, head_dim], permuted and split in pairs.
    made = made.view(streams, -1, 2 * layers, 2, 8).permute(2, 0, 3, 1, 4)
    pairs = (start + made).split(2)
    prefixes = {}
    for n, (keys, values) in enumerate(pairs):
        name = f"model.layers.{n}.self_attn.prefix_"
        prefixes |= {f"{name}k": keys, f"{name}v": values}
    return dict(encoder.named_parameters()), prefixes


@pytest.mark.parametrize("train_all", [False, True])
def test_an_mlp_makes_the_prefixes_while_they_are_trained(settings, base, train_all, tmp_path):
    how = dict(prefix_projection=True, encoder_hidden_size=20, train_all=train_all)
    result = train(settings(steps=30, **how))
    plain = train(settings(steps=1, train_all=train_all, output=str(tmp_path / "plain")))
    # Both start from the same model; this one learns too, and what is left looks like the other's.
    assert result.valid_loss_before == plain.valid_loss_before
    assert result.valid_loss < result.valid_loss_before - 0.05
    name = "model.safetensors" if train_all else "adapters.safetensors"
    folders = [tmp_path / run / ("model" if train_all else "adapter") for run in ("run", "plain")]
    one, two = (mx.load(str(folder / name)) for folder in folders)
    assert {k: v.shape for k, v in one.items()} == {k: v.shape for k, v in two.items()}
    assert {f.name for f in folders[0].iterdir()} == {f.name for f in folders[1].iterdir()}
    # In every checkpoint the prefixes are what its encoder makes.
    for checkpoint in sorted((tmp_path / "run" / "checkpoints").iterdir()):
        _, made = torch_prefixes(checkpoint / "prefix_encoder.safetensors", 2, 2, 20)
        folded = mx.load(str(checkpoint / name))
        for key, value in made.items():
            assert np.abs(np.array(folded[key]) - value.detach().numpy()).max() < 1e-5, key
    assert all(mx.array_equal(one[key], value) for key, value in folded.items())
    # The model that was evaluated while it was trained is the one that was written.
    again = train(
        settings(
            steps=1,
            lr=1e-30,
            output=str(tmp_path / "again"),
            streams=None,
            train_all=train_all,
            **{"model": result.output} if train_all else {"adapter": result.output},
        )
    )
    assert again.valid_loss_before == pytest.approx(result.valid_loss, rel=1e-6)


def test_gradients_of_the_mlp_are_those_of_pytorch(tmp_path):
    from parscale_mlx.training.prefix_encoder import PrefixEncoder
    from parscale_mlx.training.start import Start

    torch = pytest.importorskip("torch")
    model = model_with_streams()
    encoder = PrefixEncoder(model, 20)
    last = encoder.transform[2]
    last.weight, last.bias = (mx.random.normal(a.shape) * 0.1 for a in (last.weight, last.bias))
    encoder.fold(model)
    mx.save_safetensors(str(tmp_path / "e.safetensors"), dict(tree_flatten(encoder.parameters())))
    own, prefixes = torch_prefixes(tmp_path / "e.safetensors", 3, 2, 20)
    weights = {
        k: torch.tensor(np.array(v), requires_grad=True)
        for k, v in tree_flatten(model.parameters())
    } | prefixes
    torch_loss(weights, model.args).backward()
    _, of_model = nn.value_and_grad(model, summed_loss)(model, mx.array(IDS), mx.array(COUNTS))
    start = Start(model, {}, tmp_path, encoder=encoder)
    gradients = dict(tree_flatten(start.gradients(of_model)))
    expected = {f"prefix_encoder.{name}": value.grad.numpy() for name, value in own.items()}
    expected |= {k: v.grad.numpy() for k, v in weights.items() if k not in prefixes}
    assert gradients.keys() == expected.keys() == dict(tree_flatten(start.weights())).keys()
    for name, value in expected.items():
        scale = np.abs(value).max()
        assert np.abs(np.array(gradients[name]) - value).max() < 1e-3 * scale + 1e-5, name


# Equal ways to the same curve


@pytest.mark.parametrize("projection", [False, True], ids=["prefixes", "projection"])
@pytest.mark.parametrize("changes", [{"batch_size": 2, "accumulate": 2}, {"grad_checkpoint": True}],
                         ids=["accumulated", "checkpointed"])  # fmt: skip
def test_other_ways_to_the_same_curve(settings, changes, projection, tmp_path):
    train(settings(prefix_projection=projection))
    changes = changes | {"prefix_projection": projection}
    train(settings(output=str(tmp_path / "other"), **changes))
    assert losses(tmp_path / "other") == pytest.approx(losses(tmp_path / "run"), rel=1e-4)


@pytest.mark.parametrize(
    "how",
    [{"stage": "pretrain"}, {}, {"prefix_projection": True, "init": "random"}],
    ids=["pretrain", "streams", "projection"],
)
def test_a_resumed_run_is_an_uninterrupted_one(settings, how, tmp_path, monkeypatch):
    whole = train(settings(output=str(tmp_path / "whole"), **how))
    report = Metrics.on_train_loss_report

    def stop_at(step):
        def report_until(self, info):
            report(self, info)
            if info["iteration"] == step:
                raise KeyboardInterrupt

        monkeypatch.setattr(Metrics, "on_train_loss_report", report_until)

    # Before the first checkpoint, past it, and past the next: each time some steps are lost.
    stop_at(2)
    with pytest.raises(KeyboardInterrupt):
        train(settings(**how))
    for step in (8, 12):
        stop_at(step)
        with pytest.raises(KeyboardInterrupt):
            resume(tmp_path / "run")
    monkeypatch.undo()
    (tmp_path / "run" / "checkpoints" / ".step-0000010.half").mkdir()
    assert len(read_metrics(tmp_path / "run")) == len(read_metrics(tmp_path / "whole")) - 1
    result = resume(tmp_path / "run")
    assert curve(tmp_path / "run") == curve(tmp_path / "whole")
    assert not list((tmp_path / "run").rglob(".*"))
    assert result.valid_loss == whole.valid_loss
    assert result.valid_loss_before == whole.valid_loss_before
    name = "model/model" if "stage" in how else "adapter/adapters"
    one, two = (mx.load(str(tmp_path / f"{r}/{name}.safetensors")) for r in ("run", "whole"))
    assert all(mx.array_equal(one[key], value) for key, value in two.items())
    with pytest.raises(FileExistsError, match="this run is finished"):
        resume(tmp_path / "run")


def test_the_last_checkpoints_are_kept_and_usable(settings, base, tmp_path):
    train(settings(steps=9, save_every=2, keep=2))
    kept = sorted((tmp_path / "run" / "checkpoints").iterdir())
    assert [folder.name for folder in kept] == ["step-0000008", "step-0000009"]
    last, result = (load_adapter(f, backbone=base) for f in (kept[-1], tmp_path / "run/adapter"))
    assert all(mx.array_equal(last.weights[k], v) for k, v in result.weights.items())


def test_every_report_reaches_mlx_lms_reporters(settings, tmp_path, monkeypatch):
    from mlx_lm.tuner import callbacks

    heard = []

    class Reporter(callbacks.TrainingCallback):
        def __init__(self, project_name, log_dir, config, wrapped_callback):
            assert project_name == "streams" and config["steps"] == 12

        def on_train_loss_report(self, info):
            heard.append(info)

        on_val_loss_report = on_train_loss_report

    monkeypatch.setitem(callbacks.SUPPORT_CALLBACK, "wandb", Reporter)
    train(settings(report_to="wandb", project_name="streams"))
    assert heard == read_metrics(tmp_path / "run")
    assert {"train_loss", "learning_rate", "tokens_per_second", "trained_tokens"} < heard[1].keys()


def test_learning_rate_rises_and_falls(settings, tmp_path):
    train(settings(steps=20, warmup=4, report_every=1, eval_every=100))
    rates = [r["learning_rate"] for r in read_metrics(tmp_path / "run") if "train_loss" in r]
    assert rates[:5] == pytest.approx([0, 0.0025, 0.005, 0.0075, 0.01])
    assert rates[5:] == sorted(rates[5:], reverse=True)
    assert 1e-3 < rates[-1] < 2e-3


# Data


def read(paths, folder, **options):
    from parscale_mlx.tokenizer import load_tokenizer
    from parscale_mlx.training.documents import read_documents

    from parscale_core.checkpoint.config import read_config

    tokenizer = load_tokenizer(folder, read_config(folder).raw)
    return read_documents([str(p) for p in paths], tokenizer, **options), tokenizer


def write_lines(file, *records):
    file.write_text("\n".join(json.dumps(r) for r in records) + "\n")
    return file


def test_only_answers_count(base, tmp_path):
    from parscale_mlx.training.batches import make_batch

    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    chat = write_lines(tmp_path / "chat.jsonl", {"messages": messages})
    pairs = write_lines(tmp_path / "pairs.jsonl", {"prompt": "Say", "completion": "Two words!"})
    documents, tokenizer = read([chat, pairs], base)
    tokens, counts = make_batch(documents)
    answers = [row[1:][count].tolist() for row, count in zip(tokens, counts, strict=True)]
    texts = ["".join(tokenizer.convert_ids_to_tokens(answer)) for answer in answers]
    assert texts == ["Hello~", "Two words!~"]
    assert tokens.shape[1] == 33  # padded
    plain = write_config(tmp_path / "plain", template=None)
    (document,), tokenizer = read([pairs], plain)
    answer = tokenizer.convert_ids_to_tokens(document.tokens[document.prompt :].tolist())
    assert "".join(answer) == "Two words!<end>"
    with pytest.raises(ValueError, match=r"chat\.jsonl, line 1: messages need a chat template"):
        read([chat], plain)


def test_training_on_answers(settings, tmp_path):
    pairs = [{"prompt": f"say {n}", "completion": f"{n} it is"} for n in range(40)]
    data = tmp_path / "data"
    data.mkdir()
    write_lines(data / "train.jsonl", *pairs[:32])
    write_lines(data / "valid.jsonl", *pairs[32:])
    result = train(settings(data=[str(data)], steps=30))
    assert result.valid_loss < result.valid_loss_before - 0.2
    # One prediction for each token of an answer, and for the end of it.
    tokens = [len(p["completion"]) + 1 for p in pairs[:32]]
    assert 30 * 4 * min(tokens) <= result.trained_tokens <= 30 * 4 * max(tokens)


def test_folders_of_text(base, tmp_path):
    folder = tmp_path / "folder"
    (folder / "deep").mkdir(parents=True)
    (folder / "b.py").write_text("bb")
    (folder / "deep" / "a.py").write_text("aa")
    (folder / "c.txt").write_text("cc")
    (folder / "binary").write_bytes(b"\xff\xfe\x00")
    (folder / ".hidden").write_text("hh")
    (folder / "empty").write_text("")
    documents, tokenizer = read([folder], base)
    texts = ["".join(tokenizer.convert_ids_to_tokens(d.tokens.tolist())) for d in documents]
    assert texts == ["bb<end>", "cc<end>", "aa<end>"]
    documents, _ = read([folder], base, pattern="*.py")
    assert len(documents) == 2


def test_packing_predicts_every_token_once():
    stream = np.arange(1, 24, dtype=np.int32)
    documents = [Document(part, 0, "") for part in np.split(stream, [3, 10, 11])]
    windows = pack(documents, 5)
    assert [w.tokens.tolist() for w in windows] == [list(range(n, n + 6)) for n in (1, 6, 11, 16)]


def test_every_epoch_takes_every_sequence_once():
    seen = np.concatenate([batch_indices(n, 4, 10, seed=3) for n in range(10)])
    epochs = seen.reshape(4, 10)
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs.tolist())
    assert len({tuple(epoch) for epoch in epochs.tolist()}) == 4
    assert batch_indices(7, 4, 10, seed=4).tolist() != batch_indices(7, 4, 10, seed=3).tolist()


def test_whole_documents_are_held_out(settings, base, tmp_path):
    from parscale_mlx.training.data import read_data

    lines = write_lines(tmp_path / "t.jsonl", *[{"text": c * 40} for c in "abcdefghij" * 4])
    data = read_data(settings(data=[str(lines)], hold_out=0.1, seq_length=8), base)
    letters = [{int(t) for w in part for t in w.tokens} for part in (data.train, data.valid)]
    assert len(letters[1] - {0}) == 1 and not (letters[0] & letters[1]) - {0}
    assert read_data(settings(hold_out=0), base).valid == []
    some = read_data(
        settings(data=[str(lines)], hold_out=0.1, seq_length=8, eval_sequences=3), base
    )
    assert [v.tokens.tolist() for v in some.valid] == [
        data.valid[n * len(data.valid) // 3].tokens.tolist() for n in range(3)
    ]


# What is refused


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"stage": "tune"}, "stage='tune' is not one of"),
        ({"model": None}, "either `model` to start from, or `config`"),
        ({"config": "x"}, "either `model` to start from, or `config`"),
        ({"stage": "pretrain", "streams": 2}, "`streams` needs `stage=streams`"),
        ({"stage": "pretrain", "prefix_projection": True}, "`prefix_projection` needs `stage=str"),
        ({"encoder_hidden_size": 8}, "`encoder_hidden_size` needs `prefix_projection`"),
        ({"encoder_hidden_size": 0, "prefix_projection": True}, "encoder_hidden_size=0: not at"),
        ({"streams": None}, "needs either `streams` or `adapter`"),
        ({"adapter": "x"}, "`streams` cannot go with `adapter`"),
        ({"adapter": "x", "train_all": True}, "`streams` cannot go with `adapter`"),
        ({"warmup": 12}, "warmup=12: not below steps=12"),
        ({"batch_size": 0}, "batch_size=0: not at least 1"),
        ({"data": []}, "give `data`"),
        ({"seq_length": 129}, "seq_length=129 is more than the model's max_position"),
        ({"streams": 65}, "65 streams: not a number from 1 to 64"),
        ({"prefix_length": 10**6}, "fewer than prefix_length="),
    ],
)
def test_wrong_settings(settings, changes, words, tmp_path):
    with pytest.raises(ValueError, match=words):
        train(settings(**changes))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("x.txt", b"", "no text in it to train on"),
        ("x.txt", b"short", "6 tokens are too few for one sequence of seq_length=32"),
        ("x.txt", b"\xff\xfe", "not UTF-8 text"),
        ("x.jsonl", b"\n", "no text in it to train on"),
        ("x.jsonl", b'{"text": "a"}\n{', "line 2: not JSON"),
        ("x.jsonl", b"[1]", "line 1: none of"),
        ("x.jsonl", b'{"question": 1}', "line 1: none of"),
        ("x.jsonl", b'{"text": "a"}\n{"txt": "a"}', "line 2: none of"),
        ("x.jsonl", b'{"prompt": "a", "completion": "b"}\n{"prompt": "a"}', "line 2: none of"),
        ("x.jsonl", b'{"messages": 5}', "line 1: none of"),
        ("x.jsonl", b'{"prompt": "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa", "completion": "b"}',
         "tokens are more than seq_length=32 allows"),
    ],
)  # fmt: skip
def test_data_that_is_none(settings, name, content, words, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=words) as error:
        train(settings(data=[str(tmp_path / name)], hold_out=0))
    assert name in str(error.value) and "\n" not in str(error.value)


def test_data_that_is_not_there(settings, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    with pytest.raises((FileNotFoundError, ImportError), match="nowhere"):
        train(settings(data=[str(tmp_path / "nowhere")]))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="no text in it"):
        train(settings(data=[str(tmp_path / "empty")]))


def test_longer_samples_are_cut_when_asked(settings, tmp_path):
    pairs = [{"prompt": "p", "completion": "c" * 60}] * 8
    lines = write_lines(tmp_path / "x.jsonl", *pairs)
    result = train(settings(data=[str(lines)], hold_out=0, truncate=True, steps=2))
    assert result.valid_loss is None and result.trained_tokens > 0


def test_a_tokenizer_with_too_many_tokens(settings, tmp_path):
    folder = write_model(tmp_path / "m", vocab_size=50)
    with pytest.raises(ValueError, match=r"the tokenizer gives token \d+, but .* vocab_size 50"):
        train(settings(model=str(folder)))


def test_backbones_that_cannot_be_trained(settings, base, tmp_path):
    from parscale_mlx.convert import convert

    convert(base, tmp_path / "q", quantization=Quantization(group_size=32, bits=8))
    shutil.copyfile(base / "tokenizer.json", tmp_path / "q" / "tokenizer.json")
    quantised = dict(model=str(tmp_path / "q"))
    with pytest.raises(ValueError, match="quantised weights cannot be trained"):
        train(settings(stage="pretrain", **quantised))
    result = train(settings(steps=30, **quantised))
    assert result.valid_loss < result.valid_loss_before
    with pytest.raises(ValueError, match="has no streams; say how many"):
        train(settings(train_all=True, streams=None, output=str(tmp_path / "r2")))
    with pytest.raises(ValueError, match="belongs to another backbone"):
        train(settings(streams=None, adapter=result.output, output=str(tmp_path / "r2")))


def test_a_loss_that_is_no_number(settings, tmp_path, base):
    folder = shutil.copytree(base, tmp_path / "m")
    weights = mx.load(str(base / "model.safetensors"))
    weights["model.norm.weight"] = weights["model.norm.weight"] * float("nan")
    mx.save_safetensors(str(folder / "model.safetensors"), weights)
    with pytest.raises(ValueError, match="the logits have NaN"):
        train(settings(model=str(folder)))
    with pytest.raises(RuntimeError, match=r"step \d: the loss is nan .* no checkpoint yet"):
        train(settings(output=str(tmp_path / "steep"), lr=1e38, steps=9))
    train(settings(output=str(tmp_path / "bad"), save_every=1, steps=3))
    shutil.rmtree(tmp_path / "bad" / "adapter")
    stored = json.loads((tmp_path / "bad" / "run.json").read_text())
    (tmp_path / "bad" / "run.json").write_text(json.dumps(stored | {"steps": 9, "lr": 1e38}))
    with pytest.raises(
        RuntimeError, match=r"step [45]: .* last good checkpoint is .*step-000000\d"
    ):
        resume(tmp_path / "bad")
    for folder in (tmp_path / "bad" / "checkpoints").iterdir():
        weights = load_adapter(folder).weights
        assert all(mx.all(mx.isfinite(value)).item() for value in weights.values())


def test_a_full_disk(settings, tmp_path, monkeypatch):
    train(settings(output=str(tmp_path / "whole")))
    monkeypatch.setattr(Metrics, "on_val_loss_report", stop := _stop_at(8))
    with pytest.raises(KeyboardInterrupt):
        train(settings())
    monkeypatch.undo()
    assert stop
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8000, limits[1]))
    try:
        with pytest.raises(OSError, match=r"step 10: .*cannot be written.* is .*step-0000005"):
            resume(tmp_path / "run")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    folder = tmp_path / "run" / "checkpoints"
    assert [p.name for p in folder.iterdir()] == ["step-0000005"]
    resume(tmp_path / "run")
    assert curve(tmp_path / "run") == curve(tmp_path / "whole")


def _stop_at(step):
    report = Metrics.on_val_loss_report

    def stop(self, info):
        report(self, info)
        if info["iteration"] == step:
            raise KeyboardInterrupt

    return stop


def test_runs_that_cannot_be_resumed(settings, tmp_path, base):
    with pytest.raises(FileNotFoundError, match="not a training run"):
        resume(base)
    data = tmp_path / "text.txt"
    data.write_text(TEXT)
    train(settings(data=[str(data)]))
    shutil.rmtree(tmp_path / "run" / "adapter")
    data.write_text(TEXT.replace("Line", "line"))
    with pytest.raises(ValueError, match="the training data is not what it was"):
        resume(tmp_path / "run")
    data.write_text(TEXT)
    last = max((tmp_path / "run" / "checkpoints").iterdir())
    (last / "optimizer.safetensors").write_bytes(b"rubbish")
    with pytest.raises(ValueError, match="not a checkpoint of this run"):
        resume(tmp_path / "run")
    (tmp_path / "run" / "run.json").write_text('{"stage": "streams", "colour": 1}')
    with pytest.raises(ValueError, match="not the settings of a training run"):
        resume(tmp_path / "run")


def test_a_run_does_not_replace_another_unasked(settings, tmp_path, base):
    train(settings(steps=2))
    with pytest.raises(FileExistsError, match="exists already"):
        train(settings(steps=2))
    assert train(settings(steps=3), force=True).steps == 3
    with pytest.raises(FileExistsError, match=r"not a folder with run\.json"):
        train(settings(output=str(base)), force=True)


def test_plots(settings, tmp_path):
    pytest.importorskip("matplotlib")
    from parscale_mlx.training.loss_plot import plot

    run = tmp_path / "run"
    train(settings())
    other = shutil.copytree(run, tmp_path / "other")
    plot([run, other], tmp_path / "loss.png")
    plot([run, other], tmp_path / "loss.svg")
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
    drawn = (tmp_path / "loss.svg").read_text()
    assert "<svg" in drawn
    with pytest.raises(FileExistsError, match="exists already"):
        plot([run], tmp_path / "loss.svg")
    with pytest.raises(ValueError, match=r"must end in \.png, \.svg, \.pdf"):
        plot([run], tmp_path / "loss.txt")
    (other / "metrics.jsonl").write_text("{}\n{}\n")
    with pytest.raises(ValueError, match=r"line 1: not a report"):
        plot([other], tmp_path / "o.png")
    with pytest.raises(FileNotFoundError, match="not a training run"):
        plot([tmp_path], tmp_path / "o.png")
    assert not (tmp_path / "o.png").exists()
