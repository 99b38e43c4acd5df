"""The routes. What stands before them is guard.py, what they do is completions.py and service.py."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

import numpy as np
from fastapi import APIRouter, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.openapi.utils import get_openapi
from fastapi.routing import APIRoute
from pydantic_core import from_json
from starlette.exceptions import HTTPException
from starlette.responses import FileResponse, Response

from lamoe import __version__
from lamoe.engine.async_llm import EngineDead
from lamoe.engine.score import mean_state
from lamoe.serve import completions, wire
from lamoe.serve.errors import ApiError, answer, from_validation
from lamoe.serve.guard import UNEXPECTED, Guard
from lamoe.serve.reply import Reply
from lamoe.serve.service import Service, ended

PAGE = Path(__file__).parent / "page"
TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
    ".png": "image/png",
    ".woff2": "font/woff2",
    ".txt": "text/plain; charset=utf-8",
}
PAGE_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; font-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-cache",
}
MAX_DEPTH, MAX_KEYS = 64, 4096

SAYS = {
    400: "something in the request is not valid",
    401: "no valid API key",
    403: "the Host header names another server",
    404: "not here",
    408: "it took too long",
    413: "the body is too large",
    415: "not JSON",
    429: "the queue is full; see Retry-After",
    431: "the headers are too large",
    503: "loading, shutting down, or the engine ended; see Retry-After",
}


def errors(*statuses: int) -> dict[int | str, dict[str, Any]]:
    return {
        s: {"model": wire.Error, "description": SAYS[s]} for s in (401, 403, 431, 503, *statuses)
    }


POSTED = errors(400, 404, 408, 413, 415, 429)
EVENTS = {
    "text/event-stream": {
        "schema": {
            "type": "string",
            "description": "with stream: true: objects with object *.chunk, then [DONE]",
        }
    }
}
router = APIRouter()


class _Body(Request):
    """The body as JSON, strictly: no nan, no lone surrogates, no depth or number of keys that only an attack needs."""

    async def json(self) -> Any:
        try:
            value = from_json(await self.body(), allow_inf_nan=False)
        except ValueError as e:
            raise ApiError(
                400, f"the body is not valid JSON: {str(e)[:200]}", "invalid_json"
            ) from None
        _check_shape(value)
        return value


class _Route(APIRoute):
    def get_route_handler(self):
        handler = super().get_route_handler()

        async def handle(request: Request) -> Response:
            return await handler(_Body(request.scope, request.receive))

        return handle


router.route_class = _Route


def _check_shape(value: Any) -> None:
    """400 for JSON that nests deeper than MAX_DEPTH or has an object of more than MAX_KEYS keys."""
    level, depth = [value], 0
    while level:
        depth += 1
        if depth > MAX_DEPTH:
            raise ApiError(400, f"the body nests deeper than {MAX_DEPTH} levels", "invalid_json")
        deeper = []
        for item in level:
            if isinstance(item, dict) and len(item) > MAX_KEYS:
                raise ApiError(
                    400,
                    f"an object of the body has {len(item)} keys; the limit is {MAX_KEYS}",
                    "invalid_json",
                )
            deeper += (
                [
                    v
                    for v in (item.values() if isinstance(item, dict) else item)
                    if isinstance(v, (dict, list))
                ]
                if isinstance(item, (dict, list))
                else []
            )
        level = deeper


def _service(request: Request) -> Service:
    return request.app.state.service


# ---- generating ------------------------------------------------------------------------------------------------------
@router.post(
    "/v1/completions", responses=POSTED | {200: {"model": wire.Completion, "content": EVENTS}}
)
async def create_completion(body: wire.CompletionRequest, request: Request) -> Response:
    """Continue one or several prompts."""
    return await completions.complete(_service(request), body, request.state.id, request.state.log)


@router.post(
    "/v1/chat/completions",
    responses=POSTED | {200: {"model": wire.ChatCompletion, "content": EVENTS}},
)
async def create_chat_completion(body: wire.ChatRequest, request: Request) -> Response:
    """Answer a conversation."""
    return await completions.chat(_service(request), body, request.state.id, request.state.log)


@router.post("/v1/embeddings", responses=POSTED | {200: {"model": wire.Embeddings}})
async def create_embedding(body: wire.EmbeddingRequest, request: Request) -> Response:
    """The mean over all tokens of the model's final normed states, not scaled to length 1. A language model's states are no trained embedding: expect
    less of them than of a model made for it."""
    service = _service(request)
    engine = service.ready()
    service.check_model(body.model)
    items = await completions.prompts_of(service, body.input, "input")
    service.admit(len(items))

    async def embed() -> dict[str, Any]:
        data = []
        try:
            for i, ids in enumerate(items):
                async with (
                    service.scoring
                ):  # a text, not a request, at a time: a long list must not keep the others waiting
                    vector = await mean_state(engine, ids)
                if body.encoding_format == "base64":
                    vector = base64.b64encode(np.asarray(vector, "<f4").tobytes()).decode()
                data.append({"object": "embedding", "index": i, "embedding": vector})
        except EngineDead:
            raise ended() from None
        tokens = sum(map(len, items))
        return {
            "object": "list",
            "model": service.name,
            "data": data,
            "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
        }

    return Reply(
        whole=embed,
        close=lambda: service.release(len(items)),
        left=service.metrics.left.inc,
        seconds=service.settings.request_timeout,
    )


# ---- text ------------------------------------------------------------------------------------------------------------
@router.post("/tokenize", responses=POSTED | {200: {"model": wire.Tokenized}})
async def tokenize(body: wire.TokenizeRequest, request: Request) -> Response:
    """The token ids of a prompt, or of a conversation as the chat template writes it."""
    service = _service(request)
    service.ready()
    service.check_model(body.model)
    tok = completions.need_tokenizer(service, "tokenize")
    if (body.prompt is None) == (body.messages is None):
        raise ApiError(400, "give one of prompt and messages", "invalid_value", "prompt")
    if body.messages is not None:
        ids = await completions.chat_ids(
            service, body.messages, body.tools, body.add_generation_prompt
        )
    else:
        ids = await completions.in_thread(
            "prompt", tok.encode, body.prompt, bos=tok.add_bos and body.add_special_tokens
        )
    strings = [completions.token_text(tok, t) for t in ids] if body.return_token_strs else None
    return answer(
        {
            "count": len(ids),
            "max_model_len": service.max_model_len,
            "tokens": ids,
            "token_strs": strings,
        }
    )


@router.post("/detokenize", responses=POSTED | {200: {"model": wire.Detokenized}})
async def detokenize(body: wire.DetokenizeRequest, request: Request) -> Response:
    """The text of token ids, special tokens included."""
    service = _service(request)
    service.ready()
    service.check_model(body.model)
    tok = completions.need_tokenizer(service, "detokenize")
    return answer(
        {
            "prompt": await completions.in_thread(
                "tokens", tok.decode, body.tokens, skip_special=False
            )
        }
    )


@router.get("/tokenizer_info", responses=errors(400) | {200: {"model": wire.TokenizerInfo}})
async def tokenizer_info(request: Request) -> Response:
    """What an evaluation harness wants to know of a tokenizer it only reaches through here."""
    service = _service(request)
    service.ready()
    tok = completions.need_tokenizer(service, "tokenizer_info")
    names = {
        f"{kind}_token": None if id is None else tok.inner.id_to_token(id)
        for kind, id in (("bos", tok.bos_id), ("eos", tok.eos_id), ("pad", tok.pad_id))
    }
    return answer({**names, "add_bos_token": tok.add_bos, "chat_template": tok.chat_template})


# ---- about the server ------------------------------------------------------------------------------------------------
def _model(service: Service) -> dict[str, Any]:
    service.ready()
    return {
        "id": service.name,
        "object": "model",
        "created": service.created,
        "owned_by": "lamoe",
        "max_model_len": service.max_model_len,
    }


@router.get("/v1/models", responses=errors() | {200: {"model": wire.Models}})
async def list_models(request: Request) -> Response:
    """The one model that is served."""
    return answer({"object": "list", "data": [_model(_service(request))]})


@router.get("/v1/models/{model:path}", responses=errors(404) | {200: {"model": wire.Model}})
async def retrieve_model(model: str, request: Request) -> Response:
    """The model by its name."""
    _service(request).check_model(model)
    return answer(_model(_service(request)))


@router.get(
    "/health",
    responses={
        200: {"model": wire.Health},
        503: {"model": wire.Health},
        403: {"model": wire.Error},
        431: {"model": wire.Error},
    },
)
async def health(request: Request) -> Response:
    """200 while requests are answered, 503 while the model loads and while the server shuts down. Needs no key."""
    service = _service(request)
    state = (
        "failed"
        if service.engine is not None and not service.engine.alive and service.state == "ok"
        else service.state
    )
    return answer(
        {"status": state},
        200 if state == "ok" else 503,
        None if state == "ok" else {"Retry-After": "5"},
    )


@router.get(
    "/metrics",
    responses=errors() | {200: {"content": {"text/plain": {"schema": {"type": "string"}}}}},
)
async def metrics(request: Request) -> Response:
    """Prometheus' text form."""
    service = _service(request)
    return Response(
        service.metrics.text(await service.stats()),
        media_type="text/plain; version=0.0.4; charset=utf-8",
    )


@router.get("/lamoe/stats", responses=errors() | {200: {"model": wire.Stats}})
async def stats(request: Request) -> Response:
    """The engine now: cache, sequences, speed, prefix hits, drafts."""
    return answer(await _service(request).stats())


@router.get("/lamoe/requests/{id}/experts", responses=errors(404) | {200: {"model": wire.Experts}})
async def experts(id: str, request: Request) -> Response:
    """How often each routed expert of each MoE layer has computed a token of a request so far; it runs or finished recently. id: its x-request-id."""
    return answer(await _service(request).experts(id))


# ---- the page --------------------------------------------------------------------------------------------------------
@router.get("/", include_in_schema=False)
async def index() -> Response:
    return _page_file("index.html")


@router.get("/page/{name}", include_in_schema=False)
async def page(name: str) -> Response:
    return _page_file(name)


def _page_file(name: str) -> Response:
    path = PAGE / name
    if path.name != name or name.startswith(".") or path.suffix not in TYPES or not path.is_file():
        raise ApiError(404, "there is no such file of the page", "not_found")
    return FileResponse(path, media_type=TYPES[path.suffix], headers=PAGE_HEADERS)


# ---- putting it together ---------------------------------------------------------------------------------------------
def build(service: Service) -> Guard:
    """The ASGI application of a service."""
    app = FastAPI(
        title="lamoe",
        version=__version__,
        docs_url=None,
        redoc_url=None,
        description=_about(service.settings.keys()),
    )
    app.state.service = service
    app.include_router(router)
    app.openapi = lambda: _describe(app, bool(service.settings.keys()))
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(Exception, _unexpected)
    return Guard(app, service.settings, service.metrics)


async def _invalid(request: Request, e: RequestValidationError) -> Response:
    return from_validation(e.errors()).response()


async def _http_error(request: Request, e: HTTPException) -> Response:
    if isinstance(e, ApiError):
        return e.response()
    says = {404: "there is no such route", 405: "this route does not take that method"}.get(
        e.status_code, str(e.detail)
    )
    return ApiError(
        e.status_code,
        says,
        {404: "not_found", 405: "method_not_allowed"}.get(e.status_code),
        headers=e.headers,
    ).response()


async def _unexpected(request: Request, e: Exception) -> Response:
    return UNEXPECTED.response()  # the guard hears of it too, and logs it


def _describe(app: FastAPI, locked: bool) -> dict[str, Any]:
    """FastAPI's description, with the key where there is one; invalid requests are answered with 400 here, not its 422."""
    if app.openapi_schema is None:
        found = get_openapi(
            title=app.title, version=app.version, description=app.description, routes=app.routes
        )
        for operation in (o for path in found["paths"].values() for o in path.values()):
            operation["responses"].pop("422", None)
        if locked:
            found["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
            found["security"] = [{"key": []}]
            found["paths"]["/health"]["get"]["security"] = []
        app.openapi_schema = found
    return app.openapi_schema


def _about(keys: tuple[str, ...]) -> str:
    return "DeepSeek-V2 models over the API that OpenAI defined. " + (
        "Every call but /health needs `Authorization: Bearer KEY`." if keys else "No key is needed."
    )
