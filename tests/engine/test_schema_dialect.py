"""A table of schemas as clients and schema generators write them, with texts of both kinds.

Right is what JSON Schema (draft 2020-12) says. What cannot be enforced is refused by name.
"""

import json

import pytest
import torch

from lamoe.engine.grammar import Grammar
from tiny_server import tok

TEXT, INT = {"type": "string"}, {"type": "integer"}
UNTIL = {"additionalProperties": False}


def closed(required=(), **properties):
    return {"type": "object", "properties": properties, "required": [*required], **UNTIL}


KEYS = 'é "q"\n'
A, B = {"const": "a", **TEXT}, {"const": "b", **TEXT}
# schema, texts that it allows, texts that it does not allow
TABLE = {
    # patterns and lengths
    "a pattern is searched, not matched": ({**TEXT, "pattern": "b"}, ['"abc"'], ['"a"']),
    "anchors": ({**TEXT, "pattern": "^b"}, ['"bc"'], ['"ab"']),
    "anchors in alternatives": ({**TEXT, "pattern": "^a|b$"}, ['"ax"', '"xb"'], ['"xax"']),
    "pattern and length": ({**TEXT, "pattern": "^a+$", "maxLength": 2}, ['"aa"'], ['"aaa"']),
    "lengths count characters": (
        {**TEXT, "minLength": 2, "maxLength": 2},
        ['"éé"', '"👨👨"', '"\\n\\n"'],
        ['"é"', '"ééé"'],
    ),
    "lengths as 1.0": ({**TEXT, "minLength": 1.0}, ['"a"'], ['""']),
    "empty text": ({**TEXT, "maxLength": 0}, ['""'], ['"a"']),
    # formats
    "OpenAPI's int32": ({**INT, "format": "int32"}, ["1"], ["1.5"]),
    "OpenAPI's float": ({"type": "number", "format": "float"}, ["1.5"], ['"a"']),
    "formats of no standard": ({**TEXT, "format": "password"}, ['"x"'], ["1"]),
    "zod's formats": ({**TEXT, "format": "cuid"}, ['"x"'], ["1"]),
    "date-time": ({**TEXT, "format": "date-time"}, ['"2020-01-01T00:00:00Z"'], ['"x"']),
    "email": ({**TEXT, "format": "email"}, ['"a@b.c"'], ['"x"']),
    "uuid": ({**TEXT, "format": "uuid"}, ['"123e4567-e89b-12d3-a456-426614174000"'], ['"x"']),
    "uri": ({**TEXT, "format": "uri"}, ['"http://a"'], ['"x y"']),
    # values
    "enum of all types": (
        {"enum": [None, 1, "a", True, {"a": 1}, [1]]},
        ["null", "1", '"a"', "true", '{"a":1}', "[1]"],
        ["2", "false"],
    ),
    "enum with a type": ({**TEXT, "enum": ["a", 1]}, ['"a"'], ["1"]),
    "const with escapes": ({"const": 'a"b\n'}, [json.dumps('a"b\n')], ['"a"']),
    "const of an emoji": ({"const": "é😀"}, ['"é😀"'], ['"é"']),
    "const null": ({"const": None}, ["null"], ["1"]),
    "a const with the names of keywords": (
        {"const": {"format": "x", "nullable": True, "uniqueItems": False}},
        ['{"format":"x","nullable":true,"uniqueItems":false}'],
        ["{}"],
    ),
    "list of types": ({"type": ["string", "null"]}, ['"a"', "null"], ["1"]),
    "OpenAPI's nullable": ({**TEXT, "nullable": True}, ['"a"', "null"], ["1"]),
    "nullable enum": ({**TEXT, "nullable": True, "enum": ["a"]}, ['"a"', "null"], ['"b"']),
    "nullable false": ({**TEXT, "nullable": False}, ['"a"'], ["null"]),
    "title only": ({"title": "X"}, ['"a"', "1", '{"a":[]}'], ["x"]),
    # numbers
    "integers between": ({**INT, "minimum": -5, "maximum": 5}, ["-5", "0"], ["6", "-6", "1.0"]),
    "draft 4 exclusive": (
        {"type": "number", "minimum": 0, "exclusiveMinimum": True},
        ["1"],
        ["0", "-1"],
    ),
    "draft 6 exclusive": ({"type": "number", "exclusiveMinimum": 0}, ["0.5"], ["0"]),
    "cents": ({"type": "number", "multipleOf": 0.01}, ["1.25"], ["1.255"]),
    # combinations
    "anyOf": ({"anyOf": [TEXT, INT]}, ['"a"', "3"], ["null"]),
    "anyOf beside properties": (
        {
            "type": "object",
            "properties": {"a": INT},
            "required": ["a"],
            "anyOf": [{"required": ["b"]}, {"required": ["c"]}],
        },
        ['{"a":1,"b":2}'],
        ['{"a":1}'],
    ),
    "allOf": (
        {"allOf": [{"type": "object", "required": ["a"]}, {"properties": {"a": INT}}]},
        ['{"a":1}'],
        ["{}", '{"a":"x"}'],
    ),
    "pydantic's field with a default": (
        closed(k={"allOf": [{"$ref": "#/$defs/K"}], "default": "a"})
        | {"$defs": {"K": {"enum": ["a", "b"]}}},
        ['{"k":"a"}', "{}"],
        ['{"k":"c"}'],
    ),
    "pydantic's discriminated union": (
        {
            "discriminator": {"propertyName": "t", "mapping": {"a": "#/$defs/A"}},
            "oneOf": [{"$ref": "#/$defs/A"}, {"$ref": "#/$defs/B"}],
            "$defs": {"A": closed(["t"], t=A), "B": closed(["t", "n"], t=B, n=INT)},
        },
        ['{"t":"a"}', '{"t":"b","n":1}'],
        ['{"t":"b"}', '{"t":"c"}'],
    ),
    "zod's optional and never": (
        closed(a={"anyOf": [{"not": {}}, TEXT]}, never={"not": {}}),
        ['{"a":"x"}', "{}"],
        ['{"never":1}'],
    ),
    "zod 4's record": (
        {"type": "object", "propertyNames": TEXT, "additionalProperties": INT},
        ['{"a":1}'],
        ['{"a":"x"}'],
    ),
    # references
    "recursive": (
        {"$defs": {"N": closed(["c"], c={"type": "array", "items": {"$ref": "#/$defs/N"}})}}
        | {"$ref": "#/$defs/N"},
        ['{"c":[{"c":[]}]}'],
        ['{"c":[{}]}'],
    ),
    "reference to the whole": (
        closed(["n"], n={"anyOf": [{"$ref": "#"}, {"type": "null"}]}),
        ['{"n":{"n":null}}'],
        ["{}"],
    ),
    "draft 7 definitions": (
        {"$schema": "http://json-schema.org/draft-07/schema#", "definitions": {"K": INT}}
        | {"$ref": "#/definitions/K"},
        ["1"],
        ['"a"'],
    ),
    "an escaped name": ({"$defs": {"a/b c": INT}, "$ref": "#/$defs/a~1b%20c"}, ["1"], ['"a"']),
    "an anchor": ({"$defs": {"K": {"$anchor": "k", **INT}}, "$ref": "#k"}, ["1"], ['"a"']),
    "keywords beside $ref": (
        {"$defs": {"K": INT}, "$ref": "#/$defs/K", "maximum": 3},
        ["1"],
        ["5"],
    ),
    # lists and objects
    "list bounds": (
        {"type": "array", "items": INT, "minItems": 1, "maxItems": 2},
        ["[1]", "[1,2]"],
        ["[]", "[1,2,3]"],
    ),
    "tuple": (
        {"type": "array", "prefixItems": [TEXT, INT], "items": False, "minItems": 2},
        ['["a",1]'],
        ['["a",1,2]', '["a"]'],
    ),
    "draft 7 tuple": (
        {"type": "array", "items": [TEXT, INT], "additionalItems": False},
        ['["a",1]'],
        ['["a",1,2]'],
    ),
    "uniqueItems false": ({"type": "array", "items": INT, "uniqueItems": False}, ["[1]"], ["1"]),
    "keys by pattern": (
        {"type": "object", "patternProperties": {"^x": INT}, **UNTIL},
        ['{"xa":1}'],
        ['{"y":1}', '{"xa":"b"}'],
    ),
    "odd keys": (
        closed([KEYS, ""], **{KEYS: INT, "": {"type": "null"}}),
        [json.dumps({KEYS: 1, "": None}, ensure_ascii=False)],
        ["{}"],
    ),
    "properties with the names of keywords": (
        closed(["format"], format={**TEXT, "format": "x"}, nullable=INT, **{"not": {}}),
        ['{"format":"x","nullable":1,"not":[]}'],
        ["{}"],
    ),
    "notes": (
        closed(a={**INT, "default": 1, "examples": ["x"], "deprecated": True, "x-a": 1}),
        ['{"a":1}'],
        ['{"a":"x"}'],
    ),
    "required but not declared": ({"type": "object", "required": ["b"]}, ['{"b":1}'], ["{}"]),
}
REFUSED = {
    "look-ahead": ({**TEXT, "pattern": "^(?!x)"}, "look-around"),
    "a format of the standard": ({**TEXT, "format": "json-pointer"}, "json-pointer"),
    "overlapping oneOf": ({"oneOf": [{"type": "number"}, INT]}, "anyOf"),
    "not": ({"not": TEXT}, "not"),
    "no value": ({"not": {}}, "no value"),
    "if": ({"if": {"required": ["a"]}, "then": {"required": ["b"]}}, "if"),
    "uniqueItems": ({"type": "array", "uniqueItems": True}, "uniqueItems"),
    "contains": ({"type": "array", "contains": INT}, "contains"),
    "propertyNames": ({"type": "object", "propertyNames": {"pattern": "^a"}}, "propertyNames"),
    "a missing reference": ({"$ref": "#/$defs/K"}, "does not exist"),
    "types of other languages": ({"type": "dict"}, "dict"),
    "upper case": ({"type": "OBJECT"}, "OBJECT"),
    "an empty enum": ({"enum": []}, "Unsatisfiable"),
    "dependentRequired": ({"dependentRequired": {"a": ["b"]}}, "dependentRequired"),
    "a remote reference": ({"$ref": "https://example.org/s.json"}, "example.org"),
}


def allows(grammar: Grammar, text: str) -> bool:
    tokenizer = tok()
    matcher, width = grammar.start(tokenizer), tokenizer.vocab_size
    for token in (*tokenizer.encode(text), tokenizer.eos_id):
        if matcher.mask(torch.zeros(width))[token] == -torch.inf:
            return False
        if token != tokenizer.eos_id:
            matcher.accept(token)
    return True


@pytest.mark.parametrize("name", TABLE)
def test_what_clients_write_into_schemas(name):
    schema, valid, invalid = TABLE[name]
    grammar = Grammar.json_schema(schema)
    grammar.prepare(tok())
    assert [t for t in valid if not allows(grammar, t)] == []
    assert [t for t in invalid if allows(grammar, t)] == []


def test_arguments_of_tools_are_read_alike():
    schema, _, _ = TABLE["zod's optional and never"]
    grammar = Grammar.with_schemas("start: a", {"a": schema})
    grammar.prepare(tok())
    assert allows(grammar, '{"a": "x"}') and not allows(grammar, '{"never": 1}')


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_enforced_is_refused_by_name(name):
    schema, says = REFUSED[name]
    with pytest.raises(ValueError, match=says):
        Grammar.json_schema(schema).prepare(tok())
