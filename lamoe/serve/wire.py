"""The shapes of requests and responses.

Requests: the part of OpenAI's API that this server supports. Unknown fields are refused, so no
field is accepted and then ignored. Extensions have the names that other servers use: top_k, min_p,
repetition_penalty, min_tokens, ignore_eos, regex, grammar, cache_salt.

Responses: these models only describe them for /openapi.json. The responses themselves are plain
dicts.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints

MAX_TOKENS = 1 << 31
Text = Annotated[str, StringConstraints(max_length=8 << 20)]
Name = Annotated[str, StringConstraints(max_length=256)]
TokenId = Annotated[int, Field(ge=0, lt=1 << 31)]
# fail_fast: report the first wrong element of a list, not each of a million
Texts = Annotated[list[Text], Field(min_length=1, fail_fast=True)]
Tokens = Annotated[list[TokenId], Field(min_length=1, fail_fast=True)]
TokenLists = Annotated[list[Tokens], Field(min_length=1, fail_fast=True)]
Stop = Annotated[str, StringConstraints(min_length=1, max_length=256)]


class Wire(BaseModel):
    """Base of all request models: exact types, no unknown fields, no NaN."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, frozen=True)


class StreamOptions(Wire):
    include_usage: bool = False


class JsonSchema(Wire):
    name: Name = "answer"
    description: Text | None = None
    json_schema: dict[str, Any] = Field(alias="schema")
    strict: bool | None = None


class ResponseFormat(Wire):
    """The form of the output. A schema is always enforced, whatever its `strict` says."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


class Sampling(Wire):
    """The fields that /v1/completions and /v1/chat/completions share."""

    model: Name | None = Field(
        None, description="name of the served model; optional, because there is only one"
    )
    n: int | None = Field(None, ge=1, le=128)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stop: Stop | Annotated[list[Stop], Field(max_length=16)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    temperature: float | None = Field(None, ge=0, le=100, description="default 1; 0 is greedy")
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=-1, le=1 << 31, description="0 or -1 switches it off")
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
    min_tokens: int | None = Field(None, ge=0, le=MAX_TOKENS)
    ignore_eos: bool | None = None
    response_format: ResponseFormat | None = None
    regex: Annotated[str, StringConstraints(max_length=1 << 16)] | None = Field(
        None, description="the output matches this regular expression"
    )
    grammar: Annotated[str, StringConstraints(max_length=1 << 18)] | None = Field(
        None, description="the output follows this Lark grammar"
    )
    cache_salt: Annotated[str, StringConstraints(min_length=1, max_length=256)] | None = Field(
        None, description="reuse cached prompt beginnings only of requests with the same salt"
    )
    user: Name | None = Field(None, description="written to the log line of the request")


class CompletionRequest(Sampling):
    prompt: Text | Texts | Tokens | TokenLists
    max_tokens: int | None = Field(
        None, ge=0, le=MAX_TOKENS, description="default 16; 0 is allowed only with echo"
    )
    suffix: Text | None = Field(
        None,
        description="generate the text between prompt and suffix; needs a tokenizer with "
        "fill-in-the-middle tokens",
    )
    echo: bool | None = None
    logprobs: int | None = Field(None, ge=0, le=20)
    best_of: int | None = Field(
        None, ge=1, le=128, description="must equal n; further samples are not supported"
    )


class Part(Wire):
    type: Literal["text"]
    text: Text


class FunctionCall(Wire):
    name: Name
    arguments: Text


class ToolCall(Wire):
    id: Name
    type: Literal["function"] = "function"
    function: FunctionCall


class Message(Wire):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Text | list[Part] | None = None
    name: Name | None = None
    tool_calls: Annotated[list[ToolCall], Field(max_length=128)] | None = None
    tool_call_id: Name | None = None
    # Clients send replies back as they got them, so the null fields of replies are accepted.
    refusal: None = None
    annotations: None = None
    audio: None = None
    function_call: None = None


class Function(Wire):
    name: Annotated[str, StringConstraints(pattern="^[a-zA-Z0-9_.-]{1,64}$")]
    description: Text | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(Wire):
    type: Literal["function"]
    function: Function


class ChatRequest(Sampling):
    messages: Annotated[list[Message], Field(min_length=1, max_length=4096)]
    max_tokens: int | None = Field(None, ge=1, le=MAX_TOKENS)
    max_completion_tokens: int | None = Field(
        None, ge=1, le=MAX_TOKENS, description="default: the rest of the context"
    )
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20)
    tools: Annotated[list[Tool], Field(min_length=1, max_length=128)] | None = None
    tool_choice: Literal["auto", "none"] | None = None
    parallel_tool_calls: bool | None = Field(
        None, description="false: return only the first call of a reply"
    )


class EmbeddingRequest(Wire):
    model: Name | None = None
    input: Text | Texts | Tokens | TokenLists
    encoding_format: Literal["float", "base64"] | None = None
    user: Name | None = None


class TokenizeRequest(Wire):
    """Either prompt or messages must be set."""

    model: Name | None = None
    prompt: Text | None = None
    messages: Annotated[list[Message], Field(min_length=1, max_length=4096)] | None = None
    tools: Annotated[list[Tool], Field(min_length=1, max_length=128)] | None = None
    add_special_tokens: bool = Field(
        True, description="put BOS before a prompt if the model uses it"
    )
    add_generation_prompt: bool = Field(
        True, description="with messages: end the prompt where the assistant's reply begins"
    )
    return_token_strs: bool = False


class DetokenizeRequest(Wire):
    model: Name | None = None
    tokens: Annotated[list[TokenId], Field(fail_fast=True)]


# ---- responses ---------------------------------------------------------------------------------
class ErrorBody(BaseModel):
    message: str
    type: str
    param: str | None
    code: str | None


class Error(BaseModel):
    error: ErrorBody


class PromptDetails(BaseModel):
    cached_tokens: int


class Usage(BaseModel):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptDetails


class CompletionLogprobs(BaseModel):
    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None] | None
    text_offset: list[int]


class CompletionChoice(BaseModel):
    index: int
    text: str
    finish_reason: Literal["stop", "length"]
    logprobs: CompletionLogprobs | None


class Completion(BaseModel):
    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage


class TopLogprob(BaseModel):
    token: str
    logprob: float
    bytes: list[int]


class TokenLogprob(TopLogprob):
    top_logprobs: list[TopLogprob]


class ChatLogprobs(BaseModel):
    content: list[TokenLogprob]
    refusal: None


class ReplyMessage(BaseModel):
    role: Literal["assistant"]
    content: str | None
    refusal: None
    tool_calls: list[ToolCall] | None = None


class ChatChoice(BaseModel):
    index: int
    message: ReplyMessage
    finish_reason: Literal["stop", "length", "tool_calls"]
    logprobs: ChatLogprobs | None


class ChatCompletion(BaseModel):
    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage


class Model(BaseModel):
    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    max_model_len: int


class Models(BaseModel):
    object: Literal["list"]
    data: list[Model]


class Embedding(BaseModel):
    object: Literal["embedding"]
    index: int
    embedding: list[float] | str


class EmbeddingUsage(BaseModel):
    prompt_tokens: int
    total_tokens: int


class Embeddings(BaseModel):
    object: Literal["list"]
    model: str
    data: list[Embedding]
    usage: EmbeddingUsage


class Tokenized(BaseModel):
    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None


class Detokenized(BaseModel):
    prompt: str


class TokenizerInfo(BaseModel):
    bos_token: str | None
    eos_token: str | None
    pad_token: str | None
    add_bos_token: bool
    chat_template: str | None


class Health(BaseModel):
    status: Literal["ok", "loading", "draining", "failed"]


class CacheStats(BaseModel):
    format: str
    used_bytes: int
    total_bytes: int
    used_tokens: int
    total_tokens: int
    bytes_per_token: float
    compare: dict[str, int]


class Stats(BaseModel):
    model: str
    dtype: str
    max_model_len: int
    cache: CacheStats
    running: int
    waiting: int
    tokens_per_s: float
    prompt_tokens: int
    cached_tokens: int
    generated_tokens: int
    drafted: int
    accepted: int


class Experts(BaseModel):
    layers: list[int]
    experts: int = 0
    load: list[list[int]] = []
