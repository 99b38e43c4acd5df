"""The base class of all requests, and the types of their fields."""

from __future__ import annotations

from functools import cache
from typing import Annotated, Any, ClassVar

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    StringConstraints,
    Tag,
    ValidationError,
    WithJsonSchema,
    WrapValidator,
    model_validator,
)
from pydantic_core import PydanticCustomError, from_json

from lamoe.serve import neutral
from lamoe.serve.errors import BRANCH

MAX_TOKENS = 1 << 31
MAX_STOP = 128  # number of stop strings
MAX_SCHEMA_CHARS = 64 << 10  # of a schema that is given as JSON text
MAX_CHOICES = 1024  # number of texts of a guided_choice


class Wire(BaseModel):
    """Base of all request models: exact types, no unknown fields, no NaN.

    A field that is null, "", [] or {} counts as absent, unless it is required. So does a field of
    `neutral` with a value that asks for nothing.

    Attributes:
        others: known fields that are not implemented.
        kept: optional fields whose empty text or list has a meaning.
    """

    others: ClassVar[neutral.Table] = {}
    kept: ClassVar[frozenset[str]] = frozenset()

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, frozen=True)

    @model_validator(mode="before")
    @classmethod
    def _drop_absent(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        return neutral.drop(data, *names(cls), cls.kept, cls.others)

    @classmethod
    def __get_pydantic_json_schema__(cls, core_schema, handler) -> dict[str, Any]:
        """Describe in /openapi.json what `_drop_absent` accepts."""
        schema = handler.resolve_ref_schema(handler(core_schema))
        required, properties = schema.get("required", ()), schema.get("properties", {})
        schema["additionalProperties"] = {"enum": [None, "", [], {}]}
        for name, property in properties.items():
            if name not in required and name not in cls.kept:
                note = {k: property.pop(k) for k in ("title", "description") if k in property}
                properties[name] = {"anyOf": [property, {"enum": [None, "", [], {}]}]} | note
        for name, (advice, *_) in cls.others.items():
            properties.setdefault(
                name, {"description": f"accepted if it asks for nothing; otherwise: {advice}"}
            )
        return schema


@cache
def names(cls: type[Wire]) -> tuple[frozenset[str], frozenset[str]]:
    """Return the names of the optional fields of a model in JSON, and those of all fields."""
    optional, fields = set(), set()
    for name, field in cls.model_fields.items():
        alias = field.validation_alias or field.alias or name
        spelt = {alias} if isinstance(alias, str) else {*alias.choices}  # type: ignore[union-attr]
        fields |= spelt
        optional |= set() if field.is_required() else spelt
    return frozenset(optional), frozenset(fields)


# ---- values --------------------------------------------------------------------------------------
def _whole(value: Any) -> Any:
    """Return 5 for 5.0, because JSON does not distinguish them."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _whole_ids(value: Any, validate) -> Any:
    """Validate token ids. Only lists that fail are searched for numbers like 5.0."""
    try:
        return validate(value)
    except ValidationError:
        if not isinstance(value, list) or not any(isinstance(v, float) for v in value):
            raise
        return validate([_whole(v) for v in value])


def _unlimited(value: int) -> int:
    return MAX_TOKENS if value == -1 else min(value, MAX_TOKENS)


def _not_zero(value: int) -> int:
    if value == 0:
        raise PydanticCustomError(
            "wrong_value", "must be at least 1; with -1 or no value, the context is the limit"
        )
    return _unlimited(value)


def _without_empty(value: Any) -> Any:
    """Return stop strings as a list, without null and empty ones, which stop nothing."""
    if isinstance(value, list):
        return [text for text in value if not neutral.is_empty(text)]
    if not isinstance(value, str):
        raise PydanticCustomError("wrong_type", "must be a text or a list of texts")
    return [value]


def _false_is_none(value: Any) -> Any:
    return None if value is False else value


def _zero_is_false(value: Any) -> Any:
    if type(value) in (int, float) and value != 0:
        raise PydanticCustomError("wrong_type", "is true or false; top_logprobs is the number")
    return bool(value) if isinstance(value, (int, float)) else value


def _from_json(value: Any) -> Any:
    """Parse a schema that is given as JSON text."""
    if isinstance(value, str):
        if len(value) > MAX_SCHEMA_CHARS:  # the text is outside the limits on the JSON of the body
            raise PydanticCustomError(
                "wrong_value",
                "is longer than the limit of {limit} characters; shorten it",
                {"limit": MAX_SCHEMA_CHARS},
            )
        try:
            return from_json(value, allow_inf_nan=False)
        except ValueError as e:
            raise PydanticCustomError("wrong_value", "is not JSON: {e}", {"e": str(e)}) from None
    return value


def _branch(value: Any) -> str:
    """Name the branch of a union by the JSON type of a value.

    So errors are about that branch. Without it, pydantic lists the errors of all branches.
    """
    if isinstance(value, list):
        first = value[0] if value else None
        kind = "lists" if isinstance(first, list) else "texts" if isinstance(first, str) else "list"
    else:
        kind = "text" if isinstance(value, str) else "object" if isinstance(value, dict) else "none"
    return BRANCH + kind


def _one_branch(value: Any) -> str:
    """Name the branch like `_branch`, for a union in which all lists are one branch."""
    return BRANCH + "list" if isinstance(value, list) else _branch(value)


def select(message: str, lists: bool = False) -> Discriminator:
    """Choose the branch of a union by JSON type.

    Args:
        message: the error for a value of another type.
        lists: whether lists of texts, numbers and lists are branches of their own.
    """
    return Discriminator(
        _branch if lists else _one_branch,
        custom_error_type="wrong_type",
        custom_error_message=message,
    )


TEXT, TEXTS, LIST = Tag(BRANCH + "text"), Tag(BRANCH + "texts"), Tag(BRANCH + "list")
LISTS, OBJECT = Tag(BRANCH + "lists"), Tag(BRANCH + "object")

Text = Annotated[str, StringConstraints(max_length=8 << 20)]
Name = Annotated[str, StringConstraints(max_length=256)]
Int = Annotated[int, BeforeValidator(_whole)]
TokenId = Annotated[int, Field(ge=0, lt=1 << 31)]
# fail_fast: report the first wrong element of a list, not each of a million
Texts = Annotated[list[Text], Field(min_length=1, fail_fast=True)]
TokenIds = Annotated[list[TokenId], Field(fail_fast=True), WrapValidator(_whole_ids)]
Tokens = Annotated[TokenIds, Field(min_length=1)]
TokenLists = Annotated[list[Tokens], Field(min_length=1, fail_fast=True)]
Prompt = Annotated[
    Annotated[Text, TEXT]
    | Annotated[Texts, TEXTS]
    | Annotated[Tokens, LIST]
    | Annotated[TokenLists, LISTS],
    select("must be a text, a list of texts, a list of token ids, or a list of such lists", True),
]
Stop = Annotated[
    list[Annotated[str, StringConstraints(max_length=256)]],
    Field(max_length=MAX_STOP),
    BeforeValidator(_without_empty),
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "string", "maxLength": 256},
                {"type": "array", "items": {"type": ["string", "null"], "maxLength": 256}},
            ]
        }
    ),
]
# -1 is no limit
MaxTokens = Annotated[Int, Field(ge=-1), AfterValidator(_not_zero)]
MaxTokensOrNone = Annotated[Int, Field(ge=-1), AfterValidator(_unlimited)]
NumLogprobs = Annotated[Int, Field(ge=0, le=20)]
LogprobsCount = Annotated[NumLogprobs | None, BeforeValidator(_false_is_none)]
LogprobsFlag = Annotated[bool, BeforeValidator(_zero_is_false)]
Regex = Annotated[str, StringConstraints(max_length=1 << 16)]
Lark = Annotated[str, StringConstraints(max_length=1 << 18)]
Schema = Annotated[
    dict[str, Any],
    BeforeValidator(_from_json),
    WithJsonSchema({"type": ["object", "string"], "description": "a schema, or its JSON text"}),
]
Choice = Annotated[
    list[Annotated[str, StringConstraints(min_length=1, max_length=1 << 14)]],
    Field(min_length=1, max_length=MAX_CHOICES, fail_fast=True),
]
