"""Call a running server with the Python clients that people use.

Usage: python python_clients.py URL MODEL. Prints one JSON line per use: client, use, ok, detail.
`run.py` starts the server, installs the clients and collects the lines.
"""

from __future__ import annotations

import asyncio
import importlib.metadata
import json
import sys
import traceback
import urllib.request
from collections.abc import Callable
from typing import Any, Literal

from pydantic import BaseModel, Field

URL, MODEL = sys.argv[1].rstrip("/"), sys.argv[2]
BASE = URL + "/v1"
KEY = "none"

WEATHER: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Return the weather of a city.",
        "parameters": {
            "type": "object",
            "properties": {
                "city": {"type": "string", "maxLength": 30},
                "unit": {"type": "string", "enum": ["C", "F"]},
            },
            "required": ["city", "unit"],
            "additionalProperties": False,
        },
    },
}
SHORT = [{"role": "user", "content": "Name a city in France. One word."}]
CASES: list[tuple[str, str, Callable[[], Any]]] = []


class City(BaseModel):
    """A city."""

    name: Literal["Paris", "Lyon", "Nice"]
    millions: int = Field(ge=0, le=99)


def use(package: str, what: str):
    """Register a use of a client. The function fails by raising."""

    def register(function: Callable[[], Any]):
        CASES.append((package, what, function))
        return function

    return register


# ---- openai --------------------------------------------------------------------------------------
def openai_client():
    import openai

    return openai.OpenAI(base_url=BASE, api_key=KEY, max_retries=0)


@use("openai", "models.list and models.retrieve")
def _():
    client = openai_client()
    assert client.models.list().data[0].id == MODEL
    assert client.models.retrieve(MODEL).id == MODEL


@use("openai", "chat.completions.create")
def _():
    reply = openai_client().chat.completions.create(model=MODEL, messages=SHORT, max_tokens=8)
    assert reply.choices[0].message.content and reply.usage.completion_tokens <= 8


@use("openai", "chat, streamed, include_usage")
def _():
    stream = openai_client().chat.completions.create(
        model=MODEL,
        messages=SHORT,
        max_completion_tokens=8,
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = list(stream)
    assert chunks[-1].usage.completion_tokens <= 8
    assert any(c.choices and c.choices[0].delta.content for c in chunks)


@use("openai", "chat.completions.stream helper")
def _():
    with openai_client().chat.completions.stream(
        model=MODEL, messages=SHORT, max_tokens=200, response_format=City
    ) as stream:
        for _ in stream:
            pass
        assert isinstance(stream.get_final_completion().choices[0].message.parsed, City)


@use("openai", "chat.completions.parse with a pydantic class")
def _():
    reply = openai_client().chat.completions.parse(
        model=MODEL, messages=SHORT, max_tokens=200, response_format=City
    )
    assert isinstance(reply.choices[0].message.parsed, City)


@use("openai", "tool_choice required")
def _():
    reply = openai_client().chat.completions.create(
        model=MODEL, messages=SHORT, tools=[WEATHER], tool_choice="required", max_tokens=100
    )
    call = reply.choices[0].message.tool_calls[0]
    assert call.function.name == "get_weather" and "city" in json.loads(call.function.arguments)


@use("openai", "tool_choice by name, streamed")
def _():
    stream = openai_client().chat.completions.create(
        model=MODEL,
        messages=SHORT,
        tools=[WEATHER],
        tool_choice={"type": "function", "function": {"name": "get_weather"}},
        max_tokens=100,
        stream=True,
    )
    name, arguments = "", ""
    for chunk in stream:
        for call in (chunk.choices[0].delta.tool_calls or []) if chunk.choices else []:
            name += call.function.name or ""
            arguments += call.function.arguments or ""
    assert name == "get_weather" and json.loads(arguments)["unit"] in "CF"


@use("openai", "fields of OpenAI's platform: store, metadata, user, service_tier, ...")
def _():
    openai_client().chat.completions.create(
        model=MODEL,
        messages=[{"role": "developer", "content": "Be brief."}, *SHORT],
        max_tokens=4,
        store=False,
        metadata={"run": "1"},
        user="u",
        service_tier="auto",
        parallel_tool_calls=True,
        modalities=["text"],
        safety_identifier="s",
        prompt_cache_key="k",
        logit_bias={},
        n=1,
        seed=1,
        frequency_penalty=0,
        presence_penalty=0,
        top_p=1,
        extra_body={"reasoning_effort": "none", "verbosity": "medium"},
    )


@use("openai", "logprobs, top_logprobs, n, stop, logit_bias")
def _():
    reply = openai_client().chat.completions.create(
        model=MODEL,
        messages=SHORT,
        max_tokens=4,
        logprobs=True,
        top_logprobs=3,
        n=2,
        stop=["."],
        logit_bias={"5": -100},
    )
    assert len(reply.choices) == 2
    assert len(reply.choices[0].logprobs.content[0].top_logprobs) == 3


@use("openai", "completions: echo, logprobs, suffixless")
def _():
    reply = openai_client().completions.create(
        model=MODEL, prompt=["The capital of", "One two"], max_tokens=2, echo=True, logprobs=1
    )
    assert all(c.logprobs.text_offset[0] == 0 for c in reply.choices)


@use("openai", "embeddings (base64 by default)")
def _():
    reply = openai_client().embeddings.create(model=MODEL, input=["a", "b"])
    assert len(reply.data) == 2 and len(reply.data[0].embedding) > 10


@use("openai", "async client, 4 requests at once")
def _():
    import openai

    async def go():
        async with openai.AsyncOpenAI(base_url=BASE, api_key=KEY) as client:
            calls = [
                client.chat.completions.create(model=MODEL, messages=SHORT, max_tokens=4)
                for _ in range(4)
            ]
            return await asyncio.gather(*calls)

    assert len(asyncio.run(go())) == 4


@use("openai", "a tool call and its result as history, content null")
def _():
    openai_client().chat.completions.create(
        model=MODEL,
        messages=[
            *SHORT,
            {
                "role": "assistant",
                "content": "Paris",
                "refusal": None,
                "annotations": [],
                "audio": None,
                "function_call": None,
            },
            {"role": "user", "content": [{"type": "text", "text": "Another one?"}]},
        ],
        max_tokens=4,
    )


@use("openai", "an image part is refused by name (400)")
def _():
    import openai

    part = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AA=="}}
    try:
        openai_client().chat.completions.create(
            model=MODEL, messages=[{"role": "user", "content": [part]}], max_tokens=4
        )
    except openai.BadRequestError as e:
        assert "image_url" in str(e), e
    else:
        raise AssertionError("not refused")


@use("openai", "Responses API is refused with words (404)")
def _():
    import openai

    try:
        openai_client().responses.create(model=MODEL, input="x")
    except openai.NotFoundError as e:
        assert "/v1/chat/completions" in str(e), e


# ---- LangChain -----------------------------------------------------------------------------------
def chat_openai(**options):
    from langchain_openai import ChatOpenAI

    return ChatOpenAI(base_url=BASE, api_key=KEY, model=MODEL, max_retries=0, **options)


@use("langchain-openai", "ChatOpenAI.invoke")
def _():
    assert chat_openai(max_tokens=8).invoke("Say hello").content


@use("langchain-openai", "ChatOpenAI.stream")
def _():
    assert "".join(c.content for c in chat_openai(max_tokens=8).stream("Say hello"))


@use("langchain-openai", "with_structured_output, json_schema")
def _():
    model = chat_openai(max_tokens=200).with_structured_output(City, method="json_schema")
    assert isinstance(model.invoke("A city?"), City)


@use("langchain-openai", "with_structured_output, function_calling")
def _():
    model = chat_openai(max_tokens=200).with_structured_output(City, method="function_calling")
    assert isinstance(model.invoke("A city?"), City)


@use("langchain-openai", "bind_tools, tool_choice any")
def _():
    model = chat_openai(max_tokens=200).bind_tools([WEATHER], tool_choice="any")
    assert model.invoke("Weather in Paris?").tool_calls[0]["name"] == "get_weather"


@use("langchain-openai", "tool history: AIMessage with tool_calls, ToolMessage")
def _():
    from langchain_core.messages import AIMessage, HumanMessage, ToolMessage

    call = {"name": "get_weather", "args": {"city": "Paris", "unit": "C"}, "id": "c1"}
    history = [
        HumanMessage("Weather?"),
        AIMessage("", tool_calls=[{**call, "type": "tool_call"}]),
        ToolMessage("12 C", tool_call_id="c1", name="get_weather"),
    ]
    model = chat_openai(max_tokens=8).bind_tools([WEATHER])
    model.invoke(history)


@use("langchain-openai", "OpenAIEmbeddings (token ids as input)")
def _():
    from langchain_openai import OpenAIEmbeddings

    embeddings = OpenAIEmbeddings(
        base_url=BASE, api_key=KEY, model=MODEL, check_embedding_ctx_length=False
    )
    assert len(embeddings.embed_documents(["a", "b"])) == 2


@use("langgraph", "react agent, one turn")
def _():
    from langchain_core.tools import tool
    from langgraph.prebuilt import create_react_agent

    @tool
    def get_time(zone: str) -> str:
        """Return the time."""
        return "noon"

    agent = create_react_agent(chat_openai(max_tokens=16), [get_time])
    agent.invoke({"messages": [("user", "Say hello")]}, {"recursion_limit": 6})


# ---- LiteLLM -------------------------------------------------------------------------------------
def litellm_call(**options):
    import litellm

    litellm.suppress_debug_info = True
    return litellm.completion(
        model=f"openai/{MODEL}", api_base=BASE, api_key=KEY, num_retries=0, **options
    )


@use("litellm", "completion")
def _():
    assert litellm_call(messages=SHORT, max_tokens=8).choices[0].message.content


@use("litellm", "completion, streamed")
def _():
    assert list(litellm_call(messages=SHORT, max_tokens=8, stream=True))


@use("litellm", "tools, tool_choice required")
def _():
    reply = litellm_call(messages=SHORT, tools=[WEATHER], tool_choice="required", max_tokens=200)
    assert reply.choices[0].message.tool_calls


@use("litellm", "hosted_vllm provider, structured output")
def _():
    import litellm

    reply = litellm.completion(
        model=f"hosted_vllm/{MODEL}",
        api_base=BASE,
        api_key=KEY,
        messages=SHORT,
        max_tokens=200,
        response_format=City,
    )
    City.model_validate_json(reply.choices[0].message.content)


@use("litellm", "text_completion")
def _():
    import litellm

    reply = litellm.text_completion(
        model=f"text-completion-openai/{MODEL}",
        api_base=BASE,
        api_key=KEY,
        prompt="The sea",
        max_tokens=4,
    )
    assert reply.choices[0].text


# ---- LlamaIndex ----------------------------------------------------------------------------------
def llama_index(**options):
    from llama_index.llms.openai_like import OpenAILike

    return OpenAILike(
        model=MODEL, api_base=BASE, api_key=KEY, max_retries=0, max_tokens=40, **options
    )


@use("llama-index-llms-openai-like", "complete")
def _():
    assert llama_index().complete("The sea is").text


@use("llama-index-llms-openai-like", "chat, streamed")
def _():
    from llama_index.core.llms import ChatMessage

    model = llama_index(is_chat_model=True)
    assert list(model.stream_chat([ChatMessage(role="user", content="Hello")]))


@use("llama-index-llms-openai-like", "structured_predict by a function call")
def _():
    from llama_index.core.prompts import PromptTemplate

    model = llama_index(is_chat_model=True, is_function_calling_model=True)
    assert isinstance(model.structured_predict(City, PromptTemplate("A city?")), City)


@use("llama-index-embeddings-openai-like", "get_text_embedding")
def _():
    from llama_index.embeddings.openai_like import OpenAILikeEmbedding

    embedding = OpenAILikeEmbedding(model_name=MODEL, api_base=BASE, api_key=KEY)
    assert len(embedding.get_text_embedding("a")) > 10


# ---- others --------------------------------------------------------------------------------------
@use("instructor", "from_openai, mode TOOLS")
def _():
    import instructor

    client = instructor.from_openai(openai_client(), mode=instructor.Mode.TOOLS)
    assert client.create(model=MODEL, messages=SHORT, response_model=City, max_tokens=200)


@use("instructor", "from_openai, mode JSON_SCHEMA")
def _():
    import instructor

    client = instructor.from_openai(openai_client(), mode=instructor.Mode.JSON_SCHEMA)
    assert client.create(model=MODEL, messages=SHORT, response_model=City, max_tokens=200)


@use("instructor", "from_openai, mode JSON")
def _():
    import instructor

    client = instructor.from_openai(openai_client(), mode=instructor.Mode.JSON)
    try:
        client.create(
            model=MODEL, messages=SHORT, response_model=City, max_tokens=200, max_retries=1
        )
    except Exception as e:
        # The client asks for any JSON object. A small model may miss the schema or ramble on,
        # which is no fault of the server.
        assert "validation error" in str(e) or "length limit" in str(e), e


def pydantic_agent(**options):
    from pydantic_ai import Agent
    from pydantic_ai.models.openai import OpenAIChatModel
    from pydantic_ai.providers.openai import OpenAIProvider

    return Agent(
        OpenAIChatModel(MODEL, provider=OpenAIProvider(base_url=BASE, api_key=KEY)), **options
    )


@use("pydantic-ai-slim", "Agent, output as a tool call")
def _():
    agent = pydantic_agent(output_type=City, model_settings={"max_tokens": 200})
    assert isinstance(agent.run_sync("A city?").output, City)


@use("pydantic-ai-slim", "Agent, streamed text")
def _():
    agent = pydantic_agent(system_prompt="Be brief.", model_settings={"max_tokens": 8})

    async def go():
        async with agent.run_stream("Hello") as result:
            return [t async for t in result.stream_text()]

    assert asyncio.run(go())


def run_agent(question: str, max_tokens: int, **options):
    """Return the final output of an agent of openai-agents."""
    import agents
    import openai

    agents.set_tracing_disabled(True)
    model = agents.OpenAIChatCompletionsModel(
        MODEL, openai.AsyncOpenAI(base_url=BASE, api_key=KEY, max_retries=0)
    )
    settings = agents.ModelSettings(max_tokens=max_tokens)
    agent = agents.Agent(name="a", model=model, model_settings=settings, **options)
    return agents.Runner.run_sync(agent, question).final_output


@use("openai-agents", "Runner, chat completions model")
def _():
    assert run_agent("Hello", 8, instructions="Be brief.")


@use("openai-agents", "Runner, output_type")
def _():
    assert isinstance(run_agent("A city?", 200, output_type=City), City)


# ---- the requests of web interfaces, as they send them -------------------------------------------
def raw(method: str, path: str, body: Any = None, **headers: str):
    request = urllib.request.Request(URL + path, method=method)
    for name, value in headers.items():
        request.add_header(name.replace("_", "-"), value)
    data = None
    if body is not None:
        request.add_header("Content-Type", "application/json")
        data = json.dumps(body).encode()
    with urllib.request.urlopen(request, data) as reply:
        return reply.status, dict(reply.headers), reply.read()


@use("Open WebUI (its request)", "models, then a streamed chat with its params object")
def _():
    assert raw("GET", "/v1/models", Authorization="Bearer none")[0] == 200
    body = {
        "stream": True,
        "model": MODEL,
        "messages": SHORT,
        "max_tokens": 4,
        "stream_options": {"include_usage": True},
    }
    assert b"[DONE]" in raw("POST", "/v1/chat/completions", body)[2]


@use("Open WebUI (its request)", "title generation: not streamed, max_completion_tokens")
def _():
    body = {
        "model": MODEL,
        "messages": [{"role": "user", "content": "### Task:\nGenerate a title."}],
        "stream": False,
        "max_completion_tokens": 8,
    }
    assert raw("POST", "/v1/chat/completions", body)[0] == 200


@use("monitor (HEAD)", "HEAD /health, /, /v1/models")
def _():
    for path in ("/health", "/", "/v1/models"):
        status, _, data = raw("HEAD", path)
        assert status == 200 and data == b""


@use("any client", "trailing slash: /v1/models/, /v1/chat/completions/")
def _():
    assert json.loads(raw("GET", "/v1/models/")[2])["data"]
    body = {"model": MODEL, "messages": SHORT, "max_tokens": 2}
    assert raw("POST", "/v1/chat/completions/", body)[0] == 200


def main() -> int:
    """Run all uses. Returns the number of failures."""
    failures = 0
    for package, what, function in CASES:
        try:
            name = f"{package} {importlib.metadata.version(package)}"
        except importlib.metadata.PackageNotFoundError:
            name = package
        try:
            function()
            ok, detail = True, ""
        except Exception as e:
            ok, detail = False, f"{type(e).__name__}: {e}"[:600]
            traceback.print_exc(file=sys.stderr)
        failures += not ok
        print(json.dumps({"client": name, "use": what, "ok": ok, "detail": detail}), flush=True)
    return failures


if __name__ == "__main__":
    sys.exit(1 if main() else 0)
