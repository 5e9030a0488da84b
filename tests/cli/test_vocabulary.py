"""Tokenizers with more tokens than the model has rows, and chat templates that fail."""

import json
import shutil

import pytest
from helpers.tiny_models import error_line, write_tokenizer
from parscale_core.checkpoint.tokenizer import end_tokens
from parscale_export import export_onnx


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory):
    """A model of 320 tokens with a tokenizer of 330."""
    folder = shutil.copytree(model, tmp_path_factory.mktemp("models") / "m")
    write_tokenizer(folder, size=330, template=False)
    return folder


@pytest.fixture(scope="module")
def export(folder, tmp_path_factory):
    return export_onnx(folder, tmp_path_factory.mktemp("exports") / "m", all_logits=True)


@pytest.mark.parametrize("kind", ["folder", "export"])
def test_a_token_without_a_row_is_refused(parscale, request, tmp_path, kind, caplog):
    model = request.getfixturevalue(kind)
    result = parscale("generate", "--model", model, "-p", "a", "-n", 2)
    assert result.exit_code == 0, result.output
    said = [r.getMessage() for r in caplog.records if r.name == "parscale"]
    assert len(said) == 1 and "tokens up to 329, but the model only 320" in said[0]
    tokens = json.loads((model / "tokenizer.json").read_text())
    tokens["added_tokens"] = [{"id": 325, "content": "word325", "single_word": False,
                               "lstrip": False, "rstrip": False, "normalized": False,
                               "special": True}]  # fmt: skip
    changed = shutil.copytree(model, tmp_path / "m")
    (changed / "tokenizer.json").write_text(json.dumps(tokens))
    (tmp_path / "text").write_text("a word325 b")
    for command in (["generate", "-p", "a word325 b"], ["perplexity", tmp_path / "text"]):
        result = parscale(*command, "--model", changed)
        line = error_line(result)
        assert result.exit_code == 1 and "token 325" in line and "320" in line


@pytest.mark.parametrize("template", ["{{ 'a' * (10**10) }}", "{{ raise_exception('no') }}"])
def test_a_chat_template_that_fails(parscale, model, tmp_path, template):
    folder = shutil.copytree(model, tmp_path / "m")
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config["chat_template"] = template
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    for path in (folder, export_onnx(folder, tmp_path / "onnx")):
        result = parscale("generate", "--model", path, "-p", "Hi", "-n", 2)
        assert result.exit_code == 1 and "the chat template" in error_line(result)
        assert result.stdout == ""


def test_ends_of_text_are_the_union(model, tmp_path):
    from parscale_mlx import load

    from parscale_export.runtime.opening import open_engine

    folder = shutil.copytree(model, tmp_path / "m")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"eos_token_id": 7}))
    (folder / "generation_config.json").write_text('{"eos_token_id": [9, 11]}')
    assert end_tokens(folder) == [7, 9, 11, 319]
    _, tokenizer = load(folder)
    assert tokenizer.eos_token_ids == {7, 9, 11, 319}
    for target in ("cpu", "web"):
        engine = open_engine(export_onnx(folder, tmp_path / target, target=target))
        assert engine.end_tokens == {7, 9, 11, 319}
        engine.close()
