"""GET /openapi.json: the server's description, made from the very structs that decode requests and encode answers."""

from __future__ import annotations

import functools
from http import HTTPStatus
from typing import Any, Literal

import msgspec
from msgspec import NODEFAULT, Struct

from minidisagg import __version__
from minidisagg.server.protocol import (
    UNSUPPORTED,
    ChatChoice,
    ChatChunkChoice,
    ChatRequest,
    CompletionChoice,
    CompletionRequest,
    DetokenizeRequest,
    Response,
    TokenizeRequest,
)

REF = "#/components/schemas/{name}"
JSON, SSE, TEXT = "application/json", "text/event-stream", "text/plain"

# 400 also answers what is no HTTP, and 500 a bug, so that every route may send them.
ANY = (400, 401, 500)
BODY = (*ANY, 408, 413, 415)
GENERATES = (*BODY, 404, 429, 503, 504)


class ErrorInfo(Struct, frozen=True):
    """What went wrong; `param` names the field."""

    message: str
    type: Literal[
        "invalid_request_error", "authentication_error", "not_found_error", "rate_limit_error", "server_error"
    ]
    param: str | None
    code: str | None


class ErrorBody(Struct, frozen=True):
    """The body of every answer of 400 and above."""

    error: ErrorInfo


def _answer(name: str, choice: type[Struct], doc: str) -> type[Struct]:
    """`Response` with one kind of choices."""
    fields: list[Any] = []
    for field in msgspec.structs.fields(Response):
        kind = list[choice] if field.name == "choices" else field.type  # type: ignore[valid-type]
        fields.append((field.name, kind) if field.default is NODEFAULT else (field.name, kind, field.default))
    return msgspec.defstruct(name, fields, namespace={"__doc__": doc}, omit_defaults=True)


STRUCTS: dict[str, type[Struct]] = {
    kind.__name__: kind
    for kind in (
        CompletionRequest,
        ChatRequest,
        TokenizeRequest,
        DetokenizeRequest,
        ErrorBody,
        _answer("Completion", CompletionChoice, "A whole completion, or the data of one event of its stream."),
        _answer("ChatCompletion", ChatChoice, "A whole answer."),
        _answer("ChatCompletionChunk", ChatChunkChoice, "The data of one event of a streamed answer."),
    )
}


@functools.cache
def describe() -> dict[str, Any]:
    """The OpenAPI 3.1 document, without /admin. Not to be changed by the caller."""
    _, schemas = msgspec.json.schema_components(STRUCTS.values(), ref_template=REF)
    for name in ("CompletionRequest", "ChatRequest"):
        schemas[name]["properties"] |= {field: _refused(harmless) for field, harmless in UNSUPPORTED.items()}
        # `stream_options` only with a stream
        schemas[name]["if"] = {"properties": {"stream_options": {"type": "object"}}, "required": ["stream_options"]}
        schemas[name]["then"] = {"properties": {"stream": {"const": True}}, "required": ["stream"]}
    model = {"name": "model", "in": "path", "required": True, "schema": {"type": "string", "minLength": 1}}
    one_object = {JSON: {"schema": {"type": "object"}}}
    card = _operation("get", "A served model", one_object, (*ANY, 404))
    paths: dict[str, Any] = {
        "/health": _operation("get", "Whether the engine makes progress", one_object, (400, 500, 503)),
        "/version": _operation("get", "The version of this server", one_object, ANY),
        "/metrics": _operation("get", "Prometheus metrics", {TEXT: {"schema": {"type": "string"}}}, ANY),
        "/v1/models": _operation("get", "The served models", one_object, ANY),
        "/v1/models/{model}": {**card, "parameters": [model]},
        "/openapi.json": _operation("get", "This document", one_object, ANY),
        "/v1/completions": _operation(
            "post", "Complete prompts", _streamable("Completion", "Completion"), GENERATES, "CompletionRequest"
        ),
        "/v1/chat/completions": _operation(
            "post",
            "Answer a conversation",
            _streamable("ChatCompletion", "ChatCompletionChunk"),
            GENERATES,
            "ChatRequest",
        ),
        "/tokenize": _operation("post", "Text to token ids", one_object, BODY, "TokenizeRequest"),
        "/detokenize": _operation("post", "Token ids to text", one_object, BODY, "DetokenizeRequest"),
        "/tokenizer_info": _operation("get", "What the tokenizer is", one_object, ANY),
    }
    paths["/health"]["get"]["security"] = []  # it needs no key
    for path in ("/models", "/completions", "/chat/completions"):  # for clients whose base URL has no /v1
        paths[path] = paths["/v1" + path]
    return {
        "openapi": "3.1.0",
        "info": {"title": "minidisagg", "version": __version__},
        "security": [{"bearerAuth": []}],
        "paths": paths,
        "components": {
            "schemas": schemas,
            "securitySchemes": {
                "bearerAuth": {"type": "http", "scheme": "bearer", "description": "Where the server has --api-key."}
            },
        },
    }


def _operation(
    method: str, summary: str, content: dict[str, Any], errors: tuple[int, ...], body: str = ""
) -> dict[str, Any]:
    failed = {JSON: {"schema": _ref("ErrorBody")}}
    answers: dict[str, Any] = {"200": {"description": "OK", "content": content}}
    for status in sorted(errors):
        answers[str(status)] = {"description": HTTPStatus(status).phrase, "content": failed}
    operation: dict[str, Any] = {"summary": summary, "responses": answers}
    if body:
        operation["requestBody"] = {"required": True, "content": {JSON: {"schema": _ref(body)}}}
    return {method: operation}


def _streamable(whole: str, chunk: str) -> dict[str, Any]:
    """One JSON body, or with `stream` server-sent events; what describes a stream describes each of its events."""
    data = {"type": "string", "contentMediaType": JSON, "contentSchema": {"anyOf": [_ref(chunk), _ref("ErrorBody")]}}
    event = {"type": "object", "properties": {"data": {"anyOf": [{"const": "[DONE]"}, data]}}, "required": ["data"]}
    return {JSON: {"schema": _ref(whole)}, SSE: {"schema": event}}


def _refused(harmless: tuple[object, ...]) -> dict[str, Any]:
    values = [value for n, value in enumerate(harmless) if value not in harmless[:n]]  # 1 and 1.0 are one in JSON
    return {"enum": [*values, None], "description": "Not supported, so that it can only say what happens anyway."}


def _ref(name: str) -> dict[str, str]:
    return {"$ref": REF.format(name=name)}
