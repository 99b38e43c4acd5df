"""The shapes of requests.

They are the part of OpenAI's API that this server supports. `neutral.py` lists further fields that
may be present if they ask for nothing. All others are refused, so no field is accepted and then
ignored. Extensions have the names that other servers use: top_k, min_p, repetition_penalty,
min_tokens, ignore_eos, regex, grammar, structured_outputs, cache_salt.
"""

from __future__ import annotations

import json
from typing import Annotated, Any, ClassVar, Literal

from pydantic import (
    AliasChoices,
    BeforeValidator,
    Field,
    StringConstraints,
    WithJsonSchema,
    model_validator,
)
from pydantic_core import PydanticCustomError

from lamoe.serve import neutral
from lamoe.serve.fields import (
    LIST,
    MAX_TOKENS,
    OBJECT,
    TEXT,
    Choice,
    Int,
    Lark,
    LogprobsCount,
    LogprobsFlag,
    MaxTokens,
    MaxTokensOrNone,
    Name,
    NumLogprobs,
    Prompt,
    Regex,
    Schema,
    Stop,
    Text,
    TokenIds,
    Wire,
    names,
    select,
)


class StreamOptions(Wire):
    others: ClassVar[neutral.Table] = neutral.STREAM_OPTIONS

    include_usage: bool | None = None


# ---- structured output ---------------------------------------------------------------------------
class JsonSchema(Wire):
    name: Name | None = None
    description: Text | None = None
    json_schema: Schema = Field(validation_alias=AliasChoices("schema", "schema_"))
    strict: bool | None = None


class ResponseFormat(Wire):
    """The form of the output. A schema is always enforced, whatever its `strict` says.

    The schema may also stand beside `type`, where llama.cpp and OpenAI's Responses API have it.
    """

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None
    beside_type: Schema | None = Field(None, alias="schema")
    name: Name | None = None
    description: Text | None = None
    strict: bool | None = None

    @model_validator(mode="after")
    def _check_place(self) -> ResponseFormat:
        given = [s for s in (self.json_schema, self.beside_type) if s is not None]
        if len(given) > 1:
            wrong = "has two schemas; give response_format.json_schema.schema only"
        elif self.type == "json_schema" and not given:
            wrong = "has type json_schema but no schema; give response_format.json_schema.schema"
        elif (self.type == "text" and given) or (self.type == "json_object" and self.json_schema):
            wrong = f"has type {self.type}, but a schema belongs to type json_schema"
        else:
            return self
        raise PydanticCustomError("wrong_value", wrong)

    @property
    def schema_object(self) -> dict[str, Any] | None:
        """The schema, or None if there is none."""
        return self.json_schema.json_schema if self.json_schema else self.beside_type


class StructuredOutputs(Wire):
    """vLLM's field for structured output. Exactly one of its fields must be set."""

    others: ClassVar[neutral.Table] = neutral.STRUCTURED

    json_: Schema | None = Field(None, alias="json")
    regex: Regex | None = None
    choice: Choice | None = None
    grammar: Lark | None = None
    json_object: bool | None = None


class UsageOptions(Wire):
    include: bool | None = None


Format = Annotated[
    Annotated[Literal["json"], TEXT] | Annotated[Schema, OBJECT],
    select('must be "json" or a JSON schema'),
]


class Sampling(Wire):
    """The fields that /v1/completions and /v1/chat/completions share."""

    model: Name | None = Field(
        None, description="name of the served model; optional, because there is only one"
    )
    n: Annotated[Int, Field(ge=1, le=128)] | None = None
    seed: Int | None = Field(None, description="taken modulo 2**63; -1 draws a seed")
    stop: Stop | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    temperature: float | None = Field(None, ge=0, le=100, description="default 1; 0 is greedy")
    top_p: float | None = Field(None, ge=0, le=1, description="0 is greedy")
    top_k: Annotated[Int, Field(ge=-1, le=1 << 31)] | None = Field(
        None, description="0 or -1 switches it off"
    )
    min_p: float | None = Field(None, ge=0, le=1)
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    repetition_penalty: float | None = Field(None, gt=0, le=10)
    logit_bias: (
        Annotated[
            dict[
                Annotated[str, StringConstraints(pattern="^[0-9]{1,9}$")],
                Annotated[float, Field(ge=-100, le=100)],
            ],
            Field(max_length=1024),
        ]
        | None
    ) = None
    min_tokens: Annotated[Int, Field(ge=0, le=MAX_TOKENS)] | None = None
    ignore_eos: bool | None = None
    response_format: ResponseFormat | None = None
    regex: Regex | None = Field(None, description="the output matches this regular expression")
    grammar: Lark | None = Field(None, description="the output follows this Lark grammar")
    structured_outputs: StructuredOutputs | None = None
    # other places where servers take a schema or grammar
    json_schema: Schema | None = Field(None, description="llama.cpp's place of a schema")
    guided_json: Schema | None = None
    guided_regex: Regex | None = None
    guided_choice: Choice | None = None
    guided_grammar: Lark | None = None
    format: Format | None = Field(None, description='Ollama\'s field: "json" or a schema')
    usage: UsageOptions | None = Field(
        None, description="OpenRouter's field; include adds the usage to a stream"
    )
    cache_salt: Annotated[str, StringConstraints(min_length=1, max_length=256)] | None = Field(
        None, description="reuse cached prompt beginnings only of requests with the same salt"
    )
    user: Name | None = Field(None, description="written to the log line of the request")


class CompletionRequest(Sampling):
    prompt: Prompt
    max_tokens: MaxTokensOrNone | None = Field(
        None, description="default 16; -1 is no limit; 0 is allowed only with echo"
    )
    suffix: Text | None = Field(
        None,
        description="generate the text between prompt and suffix; needs a tokenizer with "
        "fill-in-the-middle tokens",
    )
    echo: bool | None = None
    logprobs: LogprobsCount | None = None
    best_of: Annotated[Int, Field(ge=1, le=128)] | None = Field(
        None, description="must equal n; further samples are not supported"
    )


# ---- messages and tools --------------------------------------------------------------------------
class Part(Wire):
    """A part of a message. Only text is supported."""

    others: ClassVar[neutral.Table] = neutral.PART

    type: Literal["text", "refusal", "input_text", "output_text"] = "text"
    text: Text

    @model_validator(mode="before")
    @classmethod
    def _text_only(cls, data: Any) -> Any:
        kind = data.get("type") if isinstance(data, dict) else None
        if kind == "refusal":
            return {"text" if name == "refusal" else name: v for name, v in data.items()}
        if isinstance(kind, str) and kind in neutral.PARTS:
            raise PydanticCustomError(
                "unsupported",
                "this server reads text only; leave parts of type {field} out",
                {"field": kind},
            )
        return data


def _arguments(value: Any) -> Any:
    """Return the arguments of a tool call as JSON text. Clients also send objects."""
    if isinstance(value, dict):
        return json.dumps(value, ensure_ascii=False)
    return "{}" if isinstance(value, str) and not value.strip() else value


class FunctionCall(Wire):
    others: ClassVar[neutral.Table] = neutral.FUNCTION_CALL

    name: Name
    arguments: Annotated[
        Text, BeforeValidator(_arguments), WithJsonSchema({"type": ["string", "object"]})
    ] = "{}"


class ToolCall(Wire):
    others: ClassVar[neutral.Table] = neutral.TOOL_CALL

    id: Name = ""
    type: Literal["function"] = "function"
    function: FunctionCall


def _role(value: Any) -> Any:
    if value == "function":
        raise PydanticCustomError(
            "unsupported", "function is an old role that this server does not support: use tools"
        )
    return value


Role = Annotated[
    Literal["system", "developer", "user", "assistant", "tool"], BeforeValidator(_role)
]
Content = Annotated[
    Annotated[Text, TEXT] | Annotated[list[Part], LIST], select("must be a text or a list of parts")
]


class Message(Wire):
    others: ClassVar[neutral.Table] = neutral.MESSAGE
    kept: ClassVar[frozenset[str]] = frozenset({"content"})

    role: Role
    content: Content | None = None
    name: Name | None = None
    tool_calls: Annotated[list[ToolCall], Field(max_length=128)] | None = None
    tool_call_id: Name | None = None
    refusal: Text | None = Field(None, description="of an earlier reply; used if content is null")


class Function(Wire):
    name: Annotated[str, StringConstraints(pattern="^[a-zA-Z0-9_.-]{1,64}$")]
    description: Text | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(Wire):
    others: ClassVar[neutral.Table] = neutral.TOOL

    type: Literal["function"] = "function"
    function: Function


class FunctionName(Wire):
    name: Name


class NamedTool(Wire):
    type: Literal["function"] = "function"
    function: FunctionName


class AllowedTools(Wire):
    mode: Literal["auto", "required"]
    tools: Annotated[list[NamedTool], Field(min_length=1, max_length=128)]


class ChosenTool(Wire):
    """The forms of tool_choice that name functions."""

    type: Literal["function", "allowed_tools"]
    function: FunctionName | None = None
    allowed_tools: AllowedTools | None = None

    @model_validator(mode="before")
    @classmethod
    def _nest(cls, data: Any) -> Any:
        """Read {"type": "function", "name": ...}, as OpenAI's Responses API has it."""
        if isinstance(data, dict) and set(data) == {"type", "name"}:
            return {"type": data["type"], "function": {"name": data["name"]}}
        return data

    @model_validator(mode="after")
    def _check_form(self) -> ChosenTool:
        fields = {"function": self.function, "allowed_tools": self.allowed_tools}
        if [name for name, value in fields.items() if value is not None] != [self.type]:
            raise PydanticCustomError(
                "wrong_value",
                "must have the field {t}, and no other, for type {t}",
                {"t": self.type},
            )
        return self


ToolChoice = Annotated[
    Annotated[Literal["auto", "none", "required", "any"], TEXT] | Annotated[ChosenTool, OBJECT],
    select('must be "auto", "none", "required" or {"type": "function", "function": {"name": ...}}'),
]
TemplateOptions = Annotated[
    dict[str, Any],
    Field(max_length=64, description="further variables that the model's chat template reads"),
]
Tools = Annotated[list[Tool], Field(min_length=1, max_length=128)]
Messages = Annotated[list[Message], Field(min_length=1, max_length=4096)]


class ChatRequest(Sampling):
    messages: Messages
    max_tokens: MaxTokens | None = Field(None, description="older name of max_completion_tokens")
    max_completion_tokens: MaxTokens | None = Field(
        None, description="default, or with -1: the rest of the context"
    )
    logprobs: LogprobsFlag | None = None
    top_logprobs: NumLogprobs | None = None
    tools: Tools | None = None
    tool_choice: ToolChoice | None = None
    chat_template_kwargs: TemplateOptions | None = None
    enable_thinking: bool | None = Field(None, description="the same in chat_template_kwargs")
    continue_final_message: bool | None = Field(
        None, description="continue the last message, which is the assistant's"
    )
    add_generation_prompt: bool | None = Field(
        None, description="default: true, without continue_final_message"
    )
    parallel_tool_calls: bool | None = Field(
        None,
        description="false: return only the first call of a reply; true with a required call: "
        "there may be several",
    )

    @property
    def template_options(self) -> dict[str, Any]:
        """The variables for the chat template."""
        given = {} if self.enable_thinking is None else {"enable_thinking": self.enable_thinking}
        return given | (self.chat_template_kwargs or {})


class EmbeddingRequest(Wire):
    model: Name | None = None
    input: Prompt
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: Int | None = Field(None, description="the model's own size; others are refused")
    user: Name | None = None


class TokenizeRequest(Wire):
    """Either prompt or messages must be set."""

    kept: ClassVar[frozenset[str]] = frozenset({"prompt"})

    model: Name | None = None
    prompt: Text | None = None
    messages: Messages | None = None
    tools: Tools | None = None
    chat_template_kwargs: TemplateOptions | None = None
    add_special_tokens: bool = Field(
        True, description="put BOS before a prompt if the model uses it"
    )
    add_generation_prompt: bool = Field(
        True, description="with messages: end the prompt where the assistant's reply begins"
    )
    return_token_strs: bool = False


class DetokenizeRequest(Wire):
    model: Name | None = None
    tokens: TokenIds


REQUESTS: dict[type[Wire], str] = {
    CompletionRequest: "/v1/completions",
    ChatRequest: "/v1/chat/completions",
    EmbeddingRequest: "/v1/embeddings",
    TokenizeRequest: "/tokenize",
    DetokenizeRequest: "/detokenize",
}
# Fields of other routes, with the values that ask for what this route does anyway.
_ELSEWHERE: dict[type[Wire], neutral.Table] = {
    CompletionRequest: {"add_special_tokens": (True,), "add_generation_prompt": (True,)},
    ChatRequest: {"best_of": (1,), "add_special_tokens": ()},
    EmbeddingRequest: {"add_special_tokens": (True,), "n": (1,)},
}


def _fields_elsewhere(request: type[Wire]) -> dict[str, tuple]:
    """Return the fields of other routes, so that errors name the route."""
    values = _ELSEWHERE.get(request, {})
    return {
        name: (f"it is a field of {route}", *values.get(name, ()))
        for other, route in reversed(REQUESTS.items())
        for name in names(other)[1] - names(request)[1]
    }


for _request in REQUESTS:
    _others = {**neutral.REQUEST, **_fields_elsewhere(_request)}
    _request.others = {k: v for k, v in _others.items() if k not in names(_request)[1]}
