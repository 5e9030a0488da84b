"""Answers by JSON schemas of all kinds, in both engines: each parses and validates."""

import json
import shutil

from parscale_mlx.engine import open_engine

import jsonschema_rs
import pytest
from helpers.json_schemas import make
from parscale_core.engine import Request, Sampling
from parscale_core.engine.grammar import from_json_schema
from parscale_export import export_onnx
from parscale_export import open_engine as open_onnx
from tokenizers.pre_tokenizers import ByteLevel


@pytest.fixture(scope="module", params=["mlx", "onnx"])
def engine(request, model, tmp_path_factory):
    folder = shutil.copytree(model, tmp_path_factory.mktemp("long") / "p4")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 4096}))
    file = folder / "tokenizer.json"
    tokenizer = json.loads(file.read_text())
    words = list(tokenizer["model"]["vocab"])
    missing = sorted(set(ByteLevel.alphabet()) - set(words))  # JSON may hold any text
    words[-1 - len(missing) : -1] = missing
    tokenizer["model"]["vocab"] = {word: n for n, word in enumerate(words)}
    file.write_text(json.dumps(tokenizer))
    if request.param == "mlx":
        engine = open_engine(folder, batch_size=32)
    else:
        engine = open_onnx(export_onnx(folder, folder.parent / "onnx"), slots=32)
    yield engine
    engine.close()


@pytest.mark.parametrize("count", [30, pytest.param(200, marks=pytest.mark.slow)])
def test_answers_validate_against_their_schemas(engine, count):
    schemas = [make(seed) for seed in range(count)]
    assert len({json.dumps(schema) for schema in schemas}) == count
    prompt = engine.tokenizer.encode("Some JSON:")
    answers = [
        engine.submit(
            Request(
                prompt,
                sampling=Sampling(max_tokens=2000, temperature=1.0, seed=seed),
                grammar=from_json_schema(schema),
            )
        )
        for seed, schema in enumerate(schemas)
    ]
    for schema, answer in zip(schemas, answers, strict=True):
        pieces = list(answer)
        assert pieces[-1].finish_reason == "stop"
        value = json.loads("".join(piece.text for piece in pieces))
        jsonschema_rs.validator_for(schema, validate_formats=True).validate(value)
