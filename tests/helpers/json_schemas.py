"""Made-up JSON schemas of all kinds that a grammar can follow, whose texts are short."""

import random
from collections.abc import Callable
from typing import Any

Schema = dict[str, Any]
# Not of times: llguidance lets any minute have a second 60, RFC 3339 those that have a leap second.
FORMATS = ("date", "duration", "ipv4", "ipv6", "uuid")
PATTERNS = ("^[A-Z]{2}[0-9]{3}$", "^(red|green|blue)$", "^a?b{1,3}c?d$", '^[^"]{3,5}$', "^é+x?$")
VALUES = (None, True, 0, -1, 3.5, "", 'a "quoted" text', "é\n\\", [], [1, "two"], {"a": {"b": 1}})
KEYS = ("name", "a b", "é", "kind", "$ref", "x-y", "0", "items", "type")
SHORT: Schema = {"type": "string", "maxLength": 4}


def make(seed: int) -> Schema:
    """A schema; each seed gives another."""
    choose = random.Random(seed)
    schema = _object(choose, 2) if seed % 3 else _value(choose, 3)
    if seed % 5 == 0:
        parts = {"one": {"$ref": "#/$defs/item"}, "list": {"$ref": "#/$defs/list"}, "rest": schema}
        following = {"anyOf": [{"$ref": "#/$defs/list"}, {"type": "null"}]}
        listed = _closed({"item": {"$ref": "#/$defs/item"}, "next": following})
        schema = {"$defs": {"item": _value(choose, 1), "list": listed}} | _closed(parts)
    return {"title": f"schema {seed}", "description": "made up", **schema}


def _value(choose: random.Random, depth: int) -> Schema:
    return choose.choice(LEAVES + NESTED * min(depth, 2))(choose, depth - 1)


def _string(choose: random.Random, depth: int) -> Schema:
    least = choose.randrange(3)
    kinds: list[Schema] = [
        {"minLength": least, "maxLength": least + choose.randrange(6)},
        {"pattern": choose.choice(PATTERNS)},
        {"format": choose.choice(FORMATS)},
    ]
    return {"type": "string"} | choose.choice(kinds)


def _number(choose: random.Random, depth: int) -> Schema:
    least = choose.randrange(-1000, 1000)
    kinds: list[Schema] = [
        {"type": "integer", "minimum": least, "maximum": least + choose.randrange(2000)},
        {"type": "integer", "exclusiveMinimum": least, "exclusiveMaximum": least + 2},
        {"type": "integer", "multipleOf": choose.randrange(1, 9), "minimum": 0, "maximum": 99},
        {"type": "number", "minimum": least / 8, "maximum": least / 8 + 2.25},
        {"type": "number", "exclusiveMinimum": 0, "exclusiveMaximum": 1},
    ]
    return choose.choice(kinds)


def _simple(choose: random.Random, depth: int) -> Schema:
    return choose.choice([{"type": "boolean"}, {"type": "null"}, {"type": ["null", "boolean"]}])


def _given(choose: random.Random, depth: int) -> Schema:
    values = choose.sample(VALUES, choose.randrange(1, 5))
    return choose.choice([{"enum": values}, {"const": values[0]}])


def _object(choose: random.Random, depth: int) -> Schema:
    keys = choose.sample(KEYS, choose.randrange(1, 5))
    schema = _closed({key: _value(choose, depth) for key in keys})
    schema["required"] = choose.sample(keys, choose.randrange(len(keys) + 1))
    kind = choose.randrange(4)
    if kind == 0:
        schema |= {"patternProperties": {"^z[0-9]$": _value(choose, 0)}}
    elif kind == 1:
        del schema["properties"], schema["required"]
        least = choose.randrange(2)
        schema |= {"minProperties": least, "maxProperties": least + 2}
        schema["patternProperties"] = {"^[a-z]{1,3}$": _value(choose, 0)}
    return schema


def _closed(properties: Schema) -> Schema:
    head = {"type": "object", "properties": properties, "required": [*properties]}
    return head | {"additionalProperties": False}


def _array(choose: random.Random, depth: int) -> Schema:
    least = choose.randrange(3)
    lengths = {"minItems": least, "maxItems": least + choose.randrange(3)}
    return {"type": "array", "items": _value(choose, depth)} | lengths


def _tuple(choose: random.Random, depth: int) -> Schema:
    first = [_value(choose, depth) for _ in range(choose.randrange(1, 4))]
    rest = choose.choice([{"items": False}, {"items": SHORT, "maxItems": len(first) + 2}])
    return {
        "type": "array",
        "prefixItems": first,
        "minItems": choose.randrange(len(first) + 1),
    } | rest


def _union(choose: random.Random, depth: int) -> Schema:
    if choose.random() < 0.3:  # of types that exclude each other
        return {"oneOf": [_string(choose, 0), _number(choose, 0), {"type": "null"}]}
    return {"anyOf": [_value(choose, depth) for _ in range(choose.randrange(2, 4))]}


def _both(choose: random.Random, depth: int) -> Schema:
    halves = [{"properties": {key: _value(choose, depth)}, "required": [key]} for key in "pq"]
    shape = {"type": "object", "properties": {"r": SHORT, "p": True, "q": True}}
    return {"allOf": [shape | {"additionalProperties": False}, *halves]}


Maker = Callable[[random.Random, int], Schema]
LEAVES: list[Maker] = [_string, _string, _number, _number, _simple, _given]
NESTED: list[Maker] = [_object, _array, _tuple, _union, _both]
