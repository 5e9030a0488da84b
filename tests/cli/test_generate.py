"""``parscale generate`` as a user runs it: what it prints where, and what it refuses."""

import json
import os
import re
import shutil
import subprocess
import sys

from parscale_mlx import generate, load, stream_generate

import mlx.core as mx
import pytest
from helpers.tiny_models import error_line, set_eos, write_tokenizer
from safetensors.numpy import load_file


def tokens_of(result) -> list[int]:
    assert result.exit_code == 0, result.output
    return [token["id"] for token in json.loads(result.stdout.splitlines()[0])["tokens"]]


@pytest.fixture(scope="session")
def reference(model):
    """Greedy tokens of ``model`` after its chat template, by the Python interface."""
    loaded, tokenizer = load(model)

    def answer(prompt: str, n: int) -> tuple[list[int], str]:
        ids = tokenizer.encode(f"<|user|>{prompt}\n<|assistant|>", add_special_tokens=False)
        text = generate(loaded, tokenizer, ids, max_tokens=n)
        tokens = []
        for _ in range(n):
            tokens.append(int(mx.argmax(loaded(mx.array([ids + tokens]))[0, -1]).item()))
        return tokens, text

    return answer


def test_the_python_interface_keeps_a_first_space(model):
    loaded, tokenizer = load(model)
    space = tokenizer.convert_tokens_to_ids("Ġ")

    def likes_spaces(tokens, logits):
        return logits.at[:, space].add(1000 if tokens.shape[0] < 6 else 0)

    options = {"max_tokens": 8, "logits_processors": [likes_spaces]}
    responses = list(stream_generate(loaded, tokenizer, [40, 41, 42, 43], **options))
    text = "".join(response.text for response in responses)
    assert text == tokenizer.decode([response.token for response in responses])
    assert text.startswith("  ") and text == generate(
        loaded, tokenizer, [40, 41, 42, 43], **options
    )


def test_text_on_stdout_and_statistics_on_stderr(parscale, model, reference):
    result = parscale("generate", "--model", model, "--prompt", "Hi", "-n", 9)
    assert result.exit_code == 0
    assert result.stdout == reference("Hi", 9)[1] + "\n"
    for part in ("Prompt: ", "Generation: 9 tokens", "tokens per second", "Time to first token",
                 "Peak memory"):  # fmt: skip
        assert part in result.stderr


def test_json_holds_text_tokens_and_statistics(parscale, model, reference):
    result = parscale("generate", "--model", model, "--prompt", "Hi", "-n", 9, "--json")
    answer = json.loads(result.stdout)
    tokens, text = reference("Hi", 9)
    assert [token["id"] for token in answer["tokens"]] == tokens
    assert answer["text"] == text
    assert answer["finish_reason"] == "length"
    assert answer["stats"]["generation_tokens"] == 9


def test_standard_input_is_a_prompt(parscale, model):
    run = ("generate", "--model", model, "-n", 4, "--quiet", "--prompt")
    assert parscale(*run, "-", input="Hi").stdout == parscale(*run, "Hi").stdout


def test_several_prompts_are_one_batch_with_the_same_text(parscale, model, reference, tmp_path):
    file = tmp_path / "prompts.jsonl"
    lines = ['"A longer prompt"', '{"prompt": "x"}',
             '{"messages": [{"role": "user", "content": "Hi"}]}']  # fmt: skip
    file.write_text("\n".join(lines))
    result = parscale("generate", "--model", model, "--prompts-file", file, "--prompt", "Hello",
                      "-n", 7, "--json")  # fmt: skip
    answers = [json.loads(line) for line in result.stdout.splitlines()]
    for answer, prompt in zip(answers, ["Hello", "A longer prompt", "x", "Hi"], strict=True):
        assert [token["id"] for token in answer["tokens"]] == reference(prompt, 7)[0]
    plain = parscale("generate", "--model", model, "-p", "Hello", "-p", "x", "-n", 7, "--quiet")
    for answer in (answers[0], answers[2]):
        assert answer["text"] in plain.stdout


def test_show_streams_prints_the_largest_weight_for_each_token(parscale, model):
    run = ("generate", "--model", model, "--prompt", "Hi", "-n", 5, "--show-streams")
    heading, *lines = parscale(*run).stdout.splitlines()
    assert heading == "stream\tweight\ttext"
    plain = [line.split("\t") for line in lines]
    (answer,) = [json.loads(line) for line in parscale(*run, "--json").stdout.splitlines()]
    loaded, tokenizer = load(model)
    ids = tokenizer.encode("<|user|>Hi\n<|assistant|>", add_special_tokens=False)
    ids += [token["id"] for token in answer["tokens"]]
    expected = loaded.aggregation_weights(mx.array([ids[:-1]]))[0, -5:].tolist()
    for line, token, weights in zip(plain, answer["tokens"], expected, strict=True):
        columns = [token[f"stream_{n}"] for n in range(1, 5)]
        assert columns == pytest.approx(weights, abs=1e-5)
        assert int(line[0]) == columns.index(max(columns)) + 1
        assert float(line[1]) == pytest.approx(max(columns), abs=1e-3)


def test_streams_of_a_batch_and_of_a_draft_are_those_of_a_single_answer(parscale, model):
    run = ("generate", "--model", model, "--prompt", "Hi", "-n", 5, "--show-streams", "--json")
    single = json.loads(parscale(*run).stdout)
    batch = json.loads(parscale(*run, "--prompt", "Hello there").stdout.splitlines()[0])
    draft = json.loads(parscale(*run, "--draft-model", model).stdout)
    for other in (batch, draft):
        for one, two in zip(single["tokens"], other["tokens"], strict=True):
            assert two == pytest.approx(one, abs=1e-4)


@pytest.mark.parametrize("many", [False, True])
def test_stop_strings_end_the_answer_before_them(parscale, model, reference, many):
    tokens, text = reference("Hi", 30)
    stop = text[8:10]
    run = ["generate", "--model", model, "-p", "Hi", "-n", 30, "--json", "--stop", stop]
    result = parscale(*run, *(["-p", "Hello"] if many else []))
    answer = json.loads(result.stdout.splitlines()[0])
    assert answer["text"] == text[: text.index(stop)]
    assert answer["finish_reason"] == "stop"
    assert len(answer["tokens"]) < len(tokens)


def test_seeded_sampling_repeats_itself(parscale, model):
    run = ("generate", "--model", model, "-p", "Hi", "-n", 12, "--json", "--temp", 1.5)
    run += ("--top-p", 0.95, "--top-k", 50, "--min-p", 0.01)
    first = tokens_of(parscale(*run, "--seed", 1))
    assert tokens_of(parscale(*run, "--seed", 1)) == first
    assert tokens_of(parscale(*run, "--seed", 2)) != first


def test_penalties_change_the_text(parscale, model):
    run = ("generate", "--model", model, "-p", "Hi", "-n", 30, "--json")
    plain = tokens_of(parscale(*run))
    assert len(set(plain)) < len(plain)
    penalties = ("--repetition-penalty", 50, "--repetition-context", 100)
    assert len(set(tokens_of(parscale(*run, *penalties)))) > len(set(plain))
    for penalty in ("--presence-penalty", "--frequency-penalty"):
        assert tokens_of(parscale(*run, penalty, 3)) != plain


def test_prompt_cache_gives_the_same_text_and_feeds_less(parscale, model, reference, tmp_path):
    file = tmp_path / "cache.safetensors"
    run = ("generate", "--model", model, "-n", 6, "--json", "--prompt-cache", file, "--prompt")
    for prompt in ("Hi there, all of you", "Hi there, all of you", "Hi there", "Something else"):
        assert tokens_of(parscale(*run, prompt)) == reference(prompt, 6)[0]
    held = load_file(file)
    assert held["0.0"].shape[:2] == (1, 8)


def test_a_prompt_cache_of_another_model_or_none(parscale, model, plain_model, tmp_path):
    file = tmp_path / "cache.safetensors"
    assert parscale("generate", "--model", model, "-p", "a", "-n", 1,
                    "--prompt-cache", file).exit_code == 0  # fmt: skip
    run = ("generate", "--model", plain_model, "-p", "a", "-n", 1, "--prompt-cache")
    assert "another model" in error_line(parscale(*run, file))
    rubbish = tmp_path / "rubbish.safetensors"
    rubbish.write_text("rubbish")
    assert "not a prompt cache" in error_line(parscale(*run, rubbish))


def test_rotating_cache(parscale, model, reference):
    run = ("generate", "--model", model, "-p", "Hi", "-n", 9, "--json", "--max-kv-size")
    assert tokens_of(parscale(*run, 500)) == reference("Hi", 9)[0]
    assert len(tokens_of(parscale(*run, 6))) == 9


def test_quantised_kv_cache_needs_fitting_heads(parscale, model):
    # Sixteen-wide heads fit no group size that MLX quantises.
    run = ("generate", "--model", model, "-p", "Hi", "--kv-bits", 8, "--quantized-kv-start", 0)
    assert "group" in error_line(parscale(*run, "--kv-group-size", 32))


def test_speculative_decoding_gives_the_same_text(parscale, model, plain_model, reference):
    for draft in (model, plain_model):
        result = parscale("generate", "--model", model, "-p", "Hi", "-n", 9, "--json",
                          "--draft-model", draft, "--num-draft-tokens", 2)  # fmt: skip
        assert tokens_of(result) == reference("Hi", 9)[0]


@pytest.mark.parametrize(
    ("option", "value", "words"),
    [
        ("--seed", 2**64, f"{2**64} is more than {2**64 - 1}"),
        ("--seed", -(2**63) - 1, f"is less than {-(2**63)}"),
        ("-n", 2**31, f"{2**31} is more than {2**31 - 1}"),
    ],
)
def test_numbers_too_large(parscale, model, option, value, words):
    failed = parscale("generate", "--model", model, "-p", "Hi", option, value)
    assert failed.exit_code == 2 and words in failed.stderr


@pytest.mark.parametrize("penalty", ["repetition", "presence", "frequency"])
def test_penalties_go_with_a_draft(parscale, model, plain_model, penalty):
    run = ("generate", "--model", model, "-n", 16, "--json", f"--{penalty}-penalty", 2,
           "-p", "word141 word183 word278 word155")  # fmt: skip
    expected = tokens_of(parscale(*run))
    for draft in (model, plain_model):
        assert tokens_of(parscale(*run, "--draft-model", draft)) == expected


def test_without_the_chat_template(parscale, model, plain_model):
    result = parscale("generate", "--model", model, "-p", "Hi", "-n", 3, "--json",
                      "--no-chat-template")  # fmt: skip
    assert json.loads(result.stdout)["stats"]["prompt_tokens"] == 2
    result = parscale("generate", "--model", plain_model, "-p", "Hi", "-n", 3, "--json")
    assert json.loads(result.stdout)["stats"]["prompt_tokens"] == 2


def test_system_prompt(parscale, model, plain_model):
    run = ("generate", "-p", "Hi", "-n", 3, "--json", "--system", "Be brief", "--model")
    answer = json.loads(parscale(*run, model).stdout)
    assert answer["stats"]["prompt_tokens"] == len("<|system|>Be brief\n<|user|>Hi\n<|assistant|>")
    assert "chat template" in error_line(parscale(*run, plain_model))


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ([], "--prompt"),
        (["-p", ""], "empty"),
        (["-p", "-", "-p", "-"], "only once"),
        (["-p", "a", "-n", "0"], "--max-tokens"),
        (["-p", "a", "--temp", "-1"], "--temp"),
        (["-p", "a", "--top-p", "1.5"], "--top-p"),
        (["-p", "a", "--top-p", "0", "--temp", "1"], "--top-p"),
        (["-p", "a", "--kv-bits", "7"], "--kv-bits"),
        (["-p", "a", "--max-kv-size", "3"], "--max-kv-size"),
        (["-p", "a", "--prompts-file", "/nowhere.jsonl"], "--prompts-file"),
        (["-p", "a", "-p", "b", "--show-streams"], "--json"),
        (["-p", "a", "--max-kv-size", "9", "--kv-bits", "8"], "--kv-bits"),
        (["-p", "a", "--prompt-cache", "/nowhere/x.safetensors"], "no such folder"),
        (["-p", "a", "--draft", "fast"], "ngram, or a number of streams"),
        (["-p", "a", "--temp", "nan"], "--temp"),
        (["-p", "a", "--presence-penalty", "inf"], "--presence-penalty"),
        (["-p", "a", "-p", "b", "--prompt-cache", "x"], "--prompt-cache"),
        (["-p", "a", "--prompt-cache", "x.cache"], "must end in .safetensors"),
        (["-p", "a", "--draft-model", "x", "--draft", "ngram"], "--draft"),
        (["-p", "a", "--draft-model", "x", "--max-kv-size", "9"], "--draft-model"),
    ],
)
def test_wrong_usage_is_exit_code_2(parscale, model, options, named):
    result = parscale("generate", "--model", model, *options)
    assert result.exit_code == 2
    assert named in error_line(result)


def test_models_that_are_none(parscale, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    result = parscale("generate", "--model", tmp_path / "nowhere", "-p", "a")
    assert result.exit_code == 1
    assert "nowhere" in error_line(result)
    assert "no config.json" in error_line(parscale("generate", "--model", tmp_path, "-p", "a"))


def test_a_bad_line_of_a_prompts_file(parscale, model, tmp_path):
    file = tmp_path / "prompts.jsonl"
    for line, named in (("{", "line 2: not JSON"), ("[1]", "line 2: neither")):
        file.write_text('"good"\n' + line)
        assert named in error_line(parscale("generate", "--model", model, "--prompts-file", file))


def test_a_draft_of_another_vocabulary(parscale, model, tmp_path):
    draft = shutil.copytree(model, tmp_path / "draft")
    write_tokenizer(draft, size=319)
    result = parscale("generate", "--model", model, "-p", "a", "--draft-model", draft)
    assert "vocabulary of 319 tokens is not the model's of 320" in error_line(result)


def test_the_end_of_text_ends_the_answer(parscale, model, reference, tmp_path):
    tokens, text = reference("Hi", 12)
    ending = shutil.copytree(model, tmp_path / "ending")
    set_eos(ending, tokens[5])
    first = tokens.index(tokens[5])
    for more in ([], ["-p", "Hello"]):
        result = parscale("generate", "--model", ending, "-p", "Hi", "-n", 12, "--json", *more)
        answer = json.loads(result.stdout.splitlines()[0])
        assert answer["finish_reason"] == "stop"
        assert [token["id"] for token in answer["tokens"]] == tokens[: first + 1]
        assert text.startswith(answer["text"])


def test_several_prompts_with_the_options_of_one(parscale, model, plain_model, reference):
    run = ("generate", "--model", model, "-p", "Hi", "-p", "Hello", "-n", 9, "--json")
    for option in (("--max-kv-size", 500), ("--draft-model", plain_model), ("--draft", "ngram")):
        result = parscale(*run, *option)
        answers = [json.loads(line)["tokens"] for line in result.stdout.splitlines()]
        for prompt, tokens in zip(("Hi", "Hello"), answers, strict=True):
            assert [token["id"] for token in tokens] == reference(prompt, 9)[0]


def test_drafts_by_fewer_streams(parscale, backbone, adapter, reference):
    run = ("generate", "--model", backbone, "--adapter", adapter, "-p", "Hi", "-n", 9, "--json")
    assert tokens_of(parscale(*run, "--draft", 1)) == reference("Hi", 9)[0]
    assert "only 1, 4" in error_line(parscale(*run, "--draft", 2))
    assert "draft 4" in error_line(parscale(*run, "--draft", 4))


def test_answers_that_follow_a_form(parscale, model, tmp_path):
    schema, regex, lark = (tmp_path / name for name in ("schema.json", "regex", "grammar"))
    schema.write_text('{"enum": ["yes", "no", 12]}')
    regex.write_text("(ab|cd){3}\n")
    lark.write_text('start: "x" NUMBER\nNUMBER: /[0-9]{4}/\n')
    run = ("generate", "--model", model, "-p", "Hi", "-p", "Hello", "--json")
    for option, form in (
        (("--json-schema", schema), r'"yes"|"no"|12'),
        (("--grammar", regex), "(ab|cd){3}"),
        (("--grammar", lark), "x[0-9]{4}"),
    ):
        result = parscale(*run, *option)
        assert result.exit_code == 0, result.output
        for line in result.stdout.splitlines():
            answer = json.loads(line)
            assert re.fullmatch(form, answer["text"]) and answer["finish_reason"] == "stop"
            assert "".join(token["text"] for token in answer["tokens"]) == answer["text"]
    schema.write_text("{")
    assert "schema.json: JSON schema: not JSON" in error_line(
        parscale(*run, "--json-schema", schema)
    )
    both = parscale(*run, "--json-schema", schema, "--grammar", lark)
    assert both.exit_code == 2 and "--json-schema cannot go with --grammar" in error_line(both)


def test_a_hint_at_the_faster_runtime(parscale, model, monkeypatch):
    run = ("generate", "--model", model, "-p", "Hi", "-n", 2)
    assert parscale(*run).stderr.count("--runtime onnx") == (mx.default_device() == mx.cpu)
    for more in (("--quiet",), ("--runtime", "mlx")):
        assert "--runtime onnx" not in parscale(*run, *more).stderr
    monkeypatch.setenv("PARSCALE_HINTS", "off")
    assert "--runtime onnx" not in parscale(*run).stderr


@pytest.mark.skipif(sys.platform == "win32", reason="a pseudo-terminal is POSIX")
def test_a_person_reads_the_prompt_before_what_continues_it(parscale, model):
    import pty

    run = ("--model", model, "-p", "ab c", "-n", 4, "--quiet")
    code = "import sys; from parscale_cli.main import cli; cli()"
    for options, beginning in ((["--no-chat-template"], "ab c"), ([], "")):
        ours, theirs = pty.openpty()
        command = [sys.executable, "-c", code, "generate", *map(str, run), *options]
        subprocess.run(command, stdout=theirs, check=True)
        shown = os.read(ours, 10_000).decode().replace("\r\n", "\n")
        os.close(ours), os.close(theirs)
        piped = parscale("generate", *run, *options).stdout
        assert shown == beginning + piped and not piped.startswith("ab c")
