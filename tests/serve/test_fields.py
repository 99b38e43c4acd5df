"""Tests of request fields: absent and neutral values, numbers, unions, and places of a schema.

Most tests validate request models without a server.
"""

import itertools
import json
import operator
import random
from typing import Annotated, Union, get_args, get_origin

import openai.types.chat.completion_create_params
import pytest
from pydantic import Discriminator, ValidationError

from lamoe.serve import neutral, wire
from lamoe.serve.errors import from_validation
from lamoe.serve.fields import MAX_STOP, MAX_TOKENS, Wire, names
from tiny_server import Running

EMPTY = (None, "", [], {})
MESSAGES = [{"role": "user", "content": "hi"}]
ROUTES = {
    wire.CompletionRequest: {"prompt": "the cat"},
    wire.ChatRequest: {"messages": MESSAGES},
    wire.EmbeddingRequest: {"input": "the cat"},
    wire.TokenizeRequest: {"prompt": "the cat"},
    wire.DetokenizeRequest: {"tokens": [5]},
}
TOOL = {"type": "function", "function": {"name": "f"}}
# a minimal valid object of every model
MINIMAL = {
    **ROUTES,
    wire.StreamOptions: {},
    wire.UsageOptions: {},
    wire.JsonSchema: {"schema": {}},
    wire.ResponseFormat: {"type": "text"},
    wire.StructuredOutputs: {},
    wire.Part: {"type": "text", "text": "a"},
    wire.FunctionCall: {"name": "f"},
    wire.ToolCall: {"id": "1", "function": {"name": "f"}},
    wire.Message: {"role": "user", "content": "a"},
    wire.Function: {"name": "f"},
    wire.Tool: TOOL,
    wire.FunctionName: {"name": "f"},
    wire.NamedTool: TOOL,
    wire.AllowedTools: {"mode": "auto", "tools": [TOOL]},
    wire.ChosenTool: TOOL,
}


@pytest.fixture(scope="module")
def server():
    with Running() as s:
        yield s.wait_ready()


def models(base=Wire):
    for model in base.__subclasses__():
        yield model
        yield from models(model)


def refusal(model, body):
    """Return the error of a body that the model must refuse."""
    with pytest.raises(ValidationError) as e:
        model.model_validate(body)
    return from_validation(e.value.errors())


def chat(**fields):
    return wire.ChatRequest.model_validate({"messages": MESSAGES, **fields})


def complete(**fields):
    return wire.CompletionRequest.model_validate({"prompt": "a", **fields})


# ---- absent --------------------------------------------------------------------------------------
def test_minimal_covers_every_model():
    assert set(models()) - {wire.Sampling} == set(MINIMAL)


@pytest.mark.parametrize("model", MINIMAL, ids=lambda m: m.__name__)
def test_empty_values_of_every_field_mean_absent(model):
    body = MINIMAL[model]
    want = model.model_validate(body)
    optional, _ = names(model)
    for name in (optional | set(model.others) | {"field_of_the_future"}) - set(body):
        for value in EMPTY[:1] if name in model.kept else EMPTY:
            assert model.model_validate({**body, name: value}) == want, (name, value)
    for name in set(model.others) - set(body):
        for value in model.others[name][1:]:
            if not isinstance(value, type):
                assert model.model_validate({**body, name: value}) == want, (name, value)


@pytest.mark.parametrize("model", MINIMAL, ids=lambda m: m.__name__)
def test_other_values_of_unimplemented_fields_are_refused_by_name(model):
    odd = {"asks": ["for", "something"]}
    for name, (advice, *values) in model.others.items():
        if object not in values and dict not in values and name not in MINIMAL[model]:
            error = refusal(model, {**MINIMAL[model], name: odd})
            assert error.code == "unsupported" and error.param == name
            assert advice in error.detail
    for value in (False, 0, "a"):  # a name that no API has
        assert refusal(model, {**MINIMAL[model], "promtp": value}).code == "unknown_field"


# classes of the openai package that describe requests, and their models
CLIENT_TYPES = [
    ("chat.completion_create_params.CompletionCreateParamsBase", wire.ChatRequest),
    ("completion_create_params.CompletionCreateParamsBase", wire.CompletionRequest),
    ("embedding_create_params.EmbeddingCreateParams", wire.EmbeddingRequest),
    ("chat.ChatCompletionStreamOptionsParam", wire.StreamOptions),
    ("chat.ChatCompletionFunctionToolParam", wire.Tool),
    ("shared_params.FunctionDefinition", wire.Function),
    ("shared_params.response_format_json_schema.JSONSchema", wire.JsonSchema),
    ("chat.ChatCompletionAssistantMessageParam", wire.Message),
    ("chat.ChatCompletionToolMessageParam", wire.Message),
    ("chat.ChatCompletionUserMessageParam", wire.Message),
    ("chat.ChatCompletionContentPartTextParam", wire.Part),
    # what comes back, in whole or from a stream, and goes into the history
    ("chat.ChatCompletionMessage", wire.Message),
    ("chat.ParsedChatCompletionMessage", wire.Message),
    ("chat.ParsedFunctionToolCall", wire.ToolCall),
    ("chat.parsed_function_tool_call.ParsedFunction", wire.FunctionCall),
    ("chat.chat_completion_chunk.ChoiceDeltaToolCall", wire.ToolCall),
]


@pytest.mark.parametrize("name, model", CLIENT_TYPES, ids=lambda v: str(v).split(".")[-1])
def test_null_in_every_field_of_the_client_means_absent(name, model):
    kind = operator.attrgetter(name)(openai.types)
    fields = {field for base in kind.__mro__ for field in getattr(base, "__annotations__", {})}
    body = MINIMAL[model]
    nulls = dict.fromkeys(f for f in fields - set(body) if not f.startswith(("_", "model_")))
    assert fields
    assert model.model_validate(body | nulls) == model.model_validate(body)


def test_requests_with_neutral_values_are_answered(server):
    pools = {}
    for model, body in ROUTES.items():
        pools[model] = [
            {name: value}
            for name, (_, *values) in model.others.items()
            for value in (*EMPTY, *(v for v in values if not isinstance(v, type)))
        ] + [{name: v} for name in names(model)[0] - model.kept - set(body) for v in EMPTY]
    rng = random.Random(0)
    for model, path in itertools.islice(itertools.cycle(wire.REQUESTS.items()), 60):
        body = {k: v for d in rng.sample(pools[model], 30) for k, v in d.items()}
        if "max_tokens" in model.model_fields:
            body["max_tokens"] = 1
        r = server.post(path, **body, **ROUTES[model])
        assert r.status_code == 200, (r.text, body)


def test_what_clients_send_with_every_request(server):
    extra = dict(
        store=False,
        metadata={"user": "u1"},
        service_tier="auto",
        modalities=["text"],
        prediction=None,
        audio=None,
        reasoning_effort="none",
        verbosity="medium",
        web_search_options=None,
        prompt_cache_key="k",
        prompt_cache_retention="24h",
        safety_identifier="u1",
        parallel_tool_calls=True,
        tool_choice="auto",
        logit_bias={},
        logprobs=False,
        top_logprobs=0,
        functions=[],
        function_call="auto",
        cache_prompt=True,
        repetition_penalty=1.0,
        top_k=-1,
        min_p=0,
        n_predict=-1,
        samplers=[],
        chat_template_kwargs={},
        add_generation_prompt=True,
        skip_special_tokens=True,
        include_reasoning=True,
        usage={"include": True},
        keep_alive="5m",
        best_of=1,
        echo=False,
    )
    history = [
        {"role": "user", "content": "x", "id": 5},
        {
            "role": "assistant",
            "content": "a",
            "reasoning_content": "b",
            "reasoning": None,
            "annotations": [],
            "refusal": None,
            "audio": None,
            "function_call": None,
            "tool_calls": [],
            "parsed": None,
        },
        {"role": "assistant", "content": None, "refusal": "no"},
        {"role": "developer", "content": [{"type": "text", "text": "c", "cache_control": None}]},
        {"role": "user", "content": [{"type": "refusal", "refusal": "d"}], "name": ""},
    ]
    plain = [
        {"role": "user", "content": "x"},
        {"role": "assistant", "content": "a"},
        {"role": "assistant", "content": "no"},
        {"role": "system", "content": "c"},
        {"role": "user", "content": "d"},
    ]
    options = dict(max_tokens=4, temperature=0)
    got, want = server.chat(history, **options, **extra), server.chat(plain, **options)
    assert got["choices"] == want["choices"]
    events = server.events("/v1/chat/completions", messages=history, **options, **extra)
    assert events[-1]["usage"]["completion_tokens"] == got["usage"]["completion_tokens"]
    obfuscation = {"include_usage": True, "include_obfuscation": False}
    more = {**obfuscation, "continuous_usage_stats": False}
    server.events("/v1/chat/completions", messages=plain, stream_options=more, max_tokens=1)


def test_arguments_of_earlier_calls():
    for arguments in (None, "", " ", {}, "{}"):
        call = wire.FunctionCall.model_validate({"name": "f", "arguments": arguments})
        assert call == wire.FunctionCall.model_validate({"name": "f"})
        assert call.arguments == "{}"
    parsed = {"name": "f", "arguments": {"a": "é"}, "parsed_arguments": {"a": "é"}}
    assert json.loads(wire.FunctionCall.model_validate(parsed).arguments) == {"a": "é"}
    merged = {"index": 0, "id": "c", "type": "function", "function": {"name": "f"}}
    assert wire.ToolCall.model_validate(merged).function.arguments == "{}"


# ---- numbers -------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "field", "n seed top_k min_tokens max_tokens logprobs best_of".split() + ["top_logprobs"]
)
def test_whole_numbers(field):
    make = chat if field == "top_logprobs" else complete
    model = type(make())
    assert getattr(make(**{field: 5.0}), field) == 5
    body = ROUTES[model]
    for value in (5.5, True, "5", 1e400):
        assert refusal(model, {**body, field: value}).param == field


def test_numbers_at_the_edge(server):
    assert complete(max_tokens=-1).max_tokens == MAX_TOKENS
    assert chat(max_tokens=2**63 - 1).max_tokens == MAX_TOKENS
    assert complete(prompt=[5.0, 6]).prompt == [5, 6]
    assert complete(prompt=[[5.0], [6]]).prompt == [[5], [6]]
    assert complete(logprobs=False).logprobs is None
    assert chat(logprobs=0).logprobs is False
    assert chat(seed=2**80).seed == 2**80
    options = dict(max_tokens=8, ignore_eos=True)
    greedy = server.complete(temperature=0, **options)["choices"]
    assert server.complete(top_p=0, temperature=1.5, **options)["choices"] == greedy
    assert server.complete(seed=2**70 + 5, **options) | {"id": 0, "created": 0} == server.complete(
        seed=5, **options
    ) | {"id": 0, "created": 0}
    whole = server.chat(temperature=0, max_tokens=-1, max_completion_tokens=3)
    assert whole["usage"]["completion_tokens"] == 3
    random_seeds = {
        server.complete(seed=-1, temperature=2, **options)["choices"][0]["text"] for _ in range(4)
    }
    assert len(random_seeds) > 1
    error = server.error(400, "/v1/chat/completions", messages=MESSAGES, max_tokens=0)
    assert error["param"] == "max_tokens" and "-1" in error["message"]


def test_no_limit_fills_the_context(server):
    ids = [5] * 4090  # 6 less than the context
    answer = server.complete(ids, max_tokens=-1, ignore_eos=True)
    assert answer["usage"]["completion_tokens"] == 6


def test_stop():
    assert complete(stop="a").stop == ["a"]
    assert complete(stop=["", "a", None]).stop == ["a"]
    assert not complete(stop=[""]).stop and not complete(stop="").stop
    assert len(complete(stop=[str(i) for i in range(20)]).stop) == 20
    error = refusal(wire.ChatRequest, {"messages": MESSAGES, "stop": ["a"] * (MAX_STOP + 1)})
    assert error.param == "stop" and f"at most {MAX_STOP}" in error.detail


# ---- unions --------------------------------------------------------------------------------------
def unions(annotation, metadata=()):
    """Yield (union, metadata) of all unions of several types, besides None, in an annotation."""
    if get_origin(annotation) is Annotated:
        inner, *more = get_args(annotation)
        yield from unions(inner, (*metadata, *more))
        return
    arms = [a for a in get_args(annotation) if a is not type(None)]
    if get_origin(annotation) is Union or type(annotation).__name__ == "UnionType":
        if len(arms) > 1:
            yield annotation, metadata
        metadata = () if len(arms) > 1 else metadata
    else:
        metadata = ()
    for arm in arms:
        if get_origin(annotation) is not type:
            yield from unions(arm, metadata)


def test_every_union_selects_a_branch_by_type():
    """Without a discriminator, errors would be about the first branch."""
    found = 0
    for model in models():
        for field in model.model_fields.values():
            for union, metadata in unions(field.annotation, tuple(field.metadata)):
                found += 1
                assert any(isinstance(m, Discriminator) for m in metadata), (model, union)
    assert found >= 5


CHAT = {"messages": MESSAGES}


def part(**fields):
    return {"messages": [{"role": "user", "content": [{"type": "text", "text": "x"}, fields]}]}


IMAGE = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}
UNION_ERRORS = [
    ("prompt", {"prompt": []}, "prompt is empty"),
    ("prompt", {"prompt": None}, "list of token ids"),
    ("prompt", {"prompt": {"a": 1}}, "list of token ids"),
    ("prompt[0]", {"prompt": [[]]}, "empty"),
    ("prompt[1]", {"prompt": [1, "a"]}, "whole number"),
    ("prompt[1]", {"prompt": ["a", 1]}, "text"),
    ("prompt[1]", {"prompt": [[1], "a"]}, "list"),
    ("prompt[1][0]", {"prompt": [[1], [1.5]]}, "whole number"),
    ("prompt[0]", {"prompt": [None]}, "whole number"),
    ("input", {"input": []}, "input is empty"),
    ("messages", {"messages": []}, "messages is empty"),
    ("messages", {"messages": {"role": "user"}}, "list"),
    ("messages[0]", {"messages": ["hi"]}, "object"),
    ("messages[0].role", {"messages": [{"role": "robot", "content": "x"}]}, "'assistant'"),
    ("messages[0].role", {"messages": [{"role": "function", "content": "x"}]}, "use tools"),
    ("messages[0].content", {"messages": [{"role": "user", "content": 5}]}, "list of parts"),
    ("messages[0].content[1].image_url", part(**IMAGE), "text only"),
    ("messages[0].content[1].input_audio", part(type="input_audio", input_audio={}), "text only"),
    ("messages[0].content[1].file", part(type="file", file={"file_id": "1"}), "text only"),
    ("messages[0].content[1].type", part(type="hologram"), "'text'"),
    ("messages[0].content[1].text", part(type="text"), "required"),
    ("messages[0].content[1].text", part(content="x"), "required"),
    (
        "messages[0].content[1].cache_control",
        part(type="text", text="x", cache_control={"type": "ephemeral"}),
        "prefixes",
    ),
    ("stop", {**CHAT, "stop": {"a": 1}}, "list of texts"),
    ("stop[0]", {**CHAT, "stop": [5]}, "text"),
    ("tools", {**CHAT, "tools": {"f": 1}}, "list"),
    ("tools[0].type", {**CHAT, "tools": [{"type": "web_search"}]}, "'function'"),
    ("tools[0].name", {**CHAT, "tools": [{"type": "function", "name": "f"}]}, "into function"),
    ("logit_bias.-1", {**CHAT, "logit_bias": {"-1": 1}}, "must match"),
    ("tool_choice", {**CHAT, "tool_choice": 5}, "required"),
    ("tool_choice", {**CHAT, "tool_choice": "f"}, "'required'"),
    ("tool_choice", {**CHAT, "tool_choice": {"type": "function"}}, "function"),
    ("response_format", {**CHAT, "response_format": "json_object"}, "object"),
    ("response_format.type", {**CHAT, "response_format": {"type": "xml"}}, "json_schema"),
    ("format", {**CHAT, "format": "xml"}, "json"),
    ("logprobs", {"prompt": "a", "logprobs": True}, "whole number"),
    ("logprobs", {**CHAT, "logprobs": 5}, "top_logprobs"),
    ("stream", {"prompt": "a", "stream": "true"}, "true or false"),
]


@pytest.mark.parametrize("param, body, says", UNION_ERRORS, ids=lambda v: str(v)[:60])
def test_errors_name_the_field_of_the_api(param, body, says):
    model = next(m for m, valid in ROUTES.items() if set(valid) & set(body))
    error = refusal(model, body)
    assert error.param == param and says in error.detail
    assert "constrained" not in error.detail and "branch:" not in error.detail


def test_a_message_without_content(server):
    call = {"id": "1", "function": {"name": "f"}}
    for message, param in (
        ({"role": "user", "content": None}, "messages[1].content"),
        ({"role": "assistant"}, "messages[1].content"),
        ({"role": "user", "content": "a", "tool_calls": [call]}, "messages[1].tool_calls"),
    ):
        error = server.error(400, "/v1/chat/completions", messages=[*MESSAGES, message])
        assert error["param"] == param and param in error["message"]


def test_a_field_of_another_route_names_the_route():
    error = refusal(wire.ChatRequest, {"messages": MESSAGES, "prompt": "a"})
    assert error.param == "prompt" and "/v1/completions" in error.detail
    error = refusal(wire.CompletionRequest, {"prompt": "a", "messages": MESSAGES})
    assert "/v1/chat/completions" in error.detail


# ---- places of a schema --------------------------------------------------------------------------
BOOL = {"type": "boolean"}
FORMAT = {"type": "json_schema"}
PLACES = [
    {"response_format": {"type": "json_object", "schema": BOOL}},
    {"response_format": {"type": "json_schema", "schema": BOOL, "name": "n", "strict": True}},
    {"response_format": {"type": "json_schema", "json_schema": {"schema": BOOL}}},
    {"response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema_": BOOL}}},
    {"json_schema": BOOL},
    {"guided_json": BOOL},
    {"guided_json": json.dumps(BOOL)},
    {"guided_regex": "true|false"},
    {"guided_choice": ["true", "false"]},
    {"guided_grammar": 'start: "true" | "false"'},
    {"structured_outputs": {"json": BOOL, "disable_any_whitespace": False}},
    {"structured_outputs": {"regex": "true|false"}},
    {"structured_outputs": {"choice": ["true", "false"]}},
    {"structured_outputs": {"grammar": 'start: "true" | "false"'}},
    {"format": BOOL},
]


def test_a_schema_is_enforced_wherever_servers_take_it(server):
    for place in PLACES:
        text = server.chat(**place, max_tokens=9)["choices"][0]["message"]["content"]
        assert text in ("true", "false"), place
    for place in ({"format": "json"}, {"structured_outputs": {"json_object": True}}):
        text = server.complete(**place, max_tokens=4)["choices"][0]["text"]
        assert text.lstrip().startswith("{")


@pytest.mark.parametrize(
    "body, param, says",
    [
        ({"response_format": FORMAT}, "response_format", "json_schema.schema"),
        (
            {"response_format": FORMAT | {"json_schema": BOOL}},
            "response_format.json_schema.schema",
            "required",
        ),
        (
            {"response_format": {"type": "text", "schema": BOOL}},
            "response_format",
            "belongs to type json_schema",
        ),
        (
            {"response_format": FORMAT | {"schema": BOOL, "json_schema": {"schema": BOOL}}},
            "response_format",
            "two schemas",
        ),
        ({"schema": BOOL}, "schema", "response_format.json_schema.schema"),
        ({"text": {"format": FORMAT | {"schema": BOOL}}}, "text", "response_format"),
        ({"guided_json": BOOL, "regex": "a"}, "guided_json", "only one"),
        ({"grammar": 'root ::= "a" | "b"'}, "grammar", "Lark"),
        ({"guided_json": "{"}, "guided_json", "JSON"),
        ({"guided_json": "[" + "[1]," * 100_000 + "1]"}, "guided_json", "65536"),
        ({"guided_json": "[" * 50_000}, "guided_json", "JSON"),
        (
            {"structured_outputs": {"structural_tag": "x"}},
            "structured_outputs.structural_tag",
            "json",
        ),
    ],
)
def test_refused_places_say_what_to_do(server, body, param, says):
    error = server.error(400, "/v1/chat/completions", messages=MESSAGES, **body)
    assert error["param"] == param and says in error["message"]


def test_tables_have_advice_and_json_values():
    for table in (neutral.REQUEST, neutral.MESSAGE, neutral.PART, neutral.TOOL_CALL, neutral.TOOL):
        for name, (advice, *values) in table.items():
            assert advice and name.isidentifier()
            json.dumps([v for v in values if not isinstance(v, type)])
