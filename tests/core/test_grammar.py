"""Grammars: whatever they allow is walked at random, and judged by json, re and by hand."""

import json
import random
import re

import numpy as np
import pytest
from helpers.byte_tokenizers import BYTES, END
from parscale_core.engine import grammar
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

SIZE = END + 8  # As in many models, the logits have more columns than the vocabulary has tokens.
TOKENIZER = grammar.grammar_tokenizer(BYTES, SIZE, {END})


def walk(serialised: str, seed: int, longest: int = 4000) -> str:
    """A random text that the grammar allows, token by token."""
    matcher = grammar.GrammarMatcher(TOKENIZER, serialised, SIZE)
    choose, answer = random.Random(seed), []
    while len(answer) < longest:
        allowed = np.flatnonzero(matcher.allowed(answer))
        assert allowed.size and allowed.max() <= END
        # The end, and the end of strings and lists, often enough.
        ends = [n for n in allowed if n == END or BYTES.decode([n]) in '"]}']
        token = int(choose.choice(ends if ends and choose.random() < 0.5 else allowed))
        if token == END:
            return BYTES.decode(answer)
        answer.append(token)
    raise AssertionError("no end")


@pytest.mark.parametrize("seed", range(5))
def test_answers_validate_against_their_schema(seed):
    schema = {
        "type": "object",
        "properties": {
            "name": {"type": "string", "maxLength": 5},
            "kind": {"enum": ["a", "b"]},
            "ages": {"type": "array", "items": {"type": "integer"}, "maxItems": 3},
        },
        "required": ["name", "kind"],
        "additionalProperties": False,
    }
    value = json.loads(walk(grammar.from_json_schema(schema), seed))
    assert isinstance(value["name"], str) and len(value["name"]) <= 5 and value["kind"] in "ab"
    assert all(type(age) is int for age in value.get("ages", []))


def test_a_regular_expression_matches_the_whole_answer():
    for seed in range(5):
        assert re.fullmatch(r"[a-c]{2,4}é+\d", walk(grammar.from_text("[a-c]{2,4}é+\\d\n"), seed))


def test_a_lark_grammar():
    lark = 'start: sum\nsum: NUMBER ("+" NUMBER)*\nNUMBER: /[0-9]+/\n'
    for seed in range(5):
        assert re.fullmatch(r"\d+(\+\d+)*", walk(grammar.from_text(lark), seed))


def test_drafts_are_taken_back_and_wrong_ones_told():
    matcher = grammar.GrammarMatcher(TOKENIZER, grammar.from_regex("ab|cd"), SIZE)
    a, b, c, d = BYTES.encode("abcd")

    def allowed(*answer):
        found = matcher.allowed(answer)
        return None if found is None else set(np.flatnonzero(found))

    assert allowed() == {a, c}
    assert allowed(a) == {b}
    assert allowed(a, d) is None
    assert allowed(c) == {d}
    assert allowed(c, d) == {END}
    assert allowed() == {a, c}


def test_what_a_vocabulary_cannot_write_is_an_error():
    tokenizer = Tokenizer(models.BPE({"a": 0, "b": 1, "<end>": 2}, []))
    tokenizer.add_special_tokens(["<end>"])
    with pytest.raises(ValueError, match="grammar: this tokenizer"):
        plain = PreTrainedTokenizerFast(tokenizer_object=tokenizer)
        grammar.grammar_tokenizer(plain, 3, {2})
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>")
    own = grammar.grammar_tokenizer(tokenizer, 3, {2})
    matcher = grammar.GrammarMatcher(own, grammar.from_regex("abc"), 3)
    assert matcher.allowed([0]).tolist() == [False, True, False]
    with pytest.raises(ValueError, match="no token"):
        matcher.allowed([0, 1])


@pytest.mark.parametrize(
    ("make", "bad"),
    [
        (grammar.from_json_schema, "{"),
        (grammar.from_json_schema, "[1]"),
        (grammar.from_json_schema, {"type": "nonsense"}),
        (grammar.from_json_schema, {"not": {"type": "string"}}),
        (grammar.from_json_schema, {"x-guidance": {"whitespace_pattern": ".*"}}),
        (grammar.from_text, "(unclosed"),
        (grammar.from_text, "start: missing_rule\n"),
    ],
)
def test_what_cannot_be_followed_is_refused_in_one_line(make, bad):
    with pytest.raises(ValueError) as error:
        make(bad)
    assert "\n" not in str(error.value)
