"""Rewrite what schema generators write beyond the keywords that the grammar library knows.

Only parts that restrict nothing are removed: keywords with a value that is always true, and formats
that JSON Schema does not define, which it treats as notes. OpenAPI's `nullable` becomes a type.
"""

from __future__ import annotations

from typing import Any

# Keywords whose value is a schema, a list of schemas, or an object with schemas as its values.
_SCHEMA = frozenset(
    "items additionalItems additionalProperties contains propertyNames not if then else "
    "unevaluatedItems unevaluatedProperties".split()
)
_LIST = frozenset("anyOf oneOf allOf prefixItems items".split())
_MAP = frozenset("properties patternProperties $defs definitions dependentSchemas".split())
_COUNTS = frozenset("minLength maxLength minItems maxItems minProperties maxProperties".split())
# Values that allow everything.
_ALWAYS_TRUE: dict[str, tuple] = {
    "uniqueItems": (False,),
    "unevaluatedItems": (True, {}),
    "unevaluatedProperties": (True, {}),
    "propertyNames": (True, {}, {"type": "string"}),
}
# Formats of draft 2020-12. One that the library cannot enforce is refused; all others are notes.
_FORMATS = frozenset(
    "date-time date time duration email idn-email hostname idn-hostname ipv4 ipv6 uri "
    "uri-reference iri iri-reference uuid uri-template json-pointer relative-json-pointer "
    "regex".split()
)


def simplified(schema: dict[str, Any]) -> dict[str, Any]:
    """Return an equivalent schema of the keywords that the library knows.

    The schema has passed `check_schema`, which bounds its depth.

    Raises:
        ValueError: if the schema allows no value.
    """
    result = _simplified(schema)
    if result is False:
        raise ValueError('the JSON schema allows no value ("not": {}); leave "not" out')
    return result


def _simplified(schema: Any) -> Any:
    if not isinstance(schema, dict):
        return schema
    if schema.get("not") is True or schema.get("not") == {}:
        return False  # zod writes it for values that never occur
    result: dict[str, Any] = {}
    for key, value in schema.items():
        if any(value == v and type(value) is type(v) for v in _ALWAYS_TRUE.get(key, ())):
            continue
        if key == "format" and isinstance(value, str) and value not in _FORMATS:
            continue
        if key in _COUNTS and isinstance(value, float) and value.is_integer():
            value = int(value)  # JSON does not distinguish 1.0 from 1
        elif key in _LIST and isinstance(value, list):
            value = [_simplified(v) for v in value]
        elif key in _MAP and isinstance(value, dict):
            value = {name: _simplified(v) for name, v in value.items()}
        elif key in _SCHEMA:
            value = _simplified(value)
        result[key] = value
    return _with_null(result) if result.pop("nullable", None) is True else result


def _with_null(schema: dict[str, Any]) -> dict[str, Any]:
    kind, values = schema.get("type"), schema.get("enum")
    if isinstance(kind, str) and kind != "null":
        schema["type"] = [kind, "null"]
    if isinstance(values, list) and None not in values:
        schema["enum"] = [*values, None]
    return schema
