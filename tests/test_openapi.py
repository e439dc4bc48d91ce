"""The server's description: all routes, all statuses, and the same verdict on a body as the server's decoder."""

from __future__ import annotations

import ast
import asyncio
import json
import math
import random
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpcases
import httpfuzz
import jsonschema_rs
import msgspec
import pytest
from fake_engine import fake_server

from minidisagg.server import app, protocol
from minidisagg.server.openapi import ErrorBody, describe
from minidisagg.server.protocol import UNSUPPORTED, ApiError, ChatRequest, CompletionRequest, decode, decode_plain

METHODS = {"GET", "POST"}
SENT_ANYWHERE = {"404", "405"}  # unknown paths and wrong methods: of no documented operation


def _operations() -> Iterator[tuple[str, str, dict[str, Any]]]:
    for path, methods in describe()["paths"].items():
        for method in METHODS & {name.upper() for name in methods}:
            yield method, path, methods[method.lower()]


def _refs(node: Any) -> Iterator[str]:
    if isinstance(node, dict):
        yield from ([node["$ref"]] if isinstance(node.get("$ref"), str) else [])
        for value in node.values():
            yield from _refs(value)
    elif isinstance(node, list):
        for value in node:
            yield from _refs(value)


def _schema(name: str) -> dict[str, Any]:
    return {"$ref": f"#/components/schemas/{name}", "components": describe()["components"]}


def test_it_has_every_route_but_admin() -> None:
    async def routes() -> set[tuple[str, str]]:
        async with fake_server() as (server, _, _):
            resources = [(route.method, route.resource) for route in server.app.router.routes()]
            return {
                (method, resource.canonical) for method, resource in resources
                if method in METHODS and resource is not None and not resource.canonical.startswith("/admin")
            }  # fmt: skip

    assert {(method, path) for method, path, _ in _operations()} == asyncio.run(routes())


def test_it_is_complete_in_itself() -> None:
    document = json.loads(msgspec.json.encode(describe()))
    schemas = document["components"]["schemas"]
    refs = set(_refs(document))
    assert refs == {f"#/components/schemas/{name}" for name in schemas}  # all are there, and none in vain
    for name in schemas:
        jsonschema_rs.Draft202012Validator(_schema(name))  # raises where it is no schema
    assert [path for _, path, operation in _operations() if operation.get("security") == []] == ["/health"]


def test_its_errors_are_those_the_code_sends() -> None:
    """Read from the sources: a status that is raised somewhere is described, and none is described in vain."""
    directory = Path(app.__file__).parent
    raised = {400, 500}  # what is no HTTP, and bugs
    for name in ("app", "completions", "connections", "generation", "protocol"):
        for node in ast.walk(ast.parse((directory / f"{name}.py").read_text())):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "ApiError":
                status = node.args[0]
                if isinstance(status, ast.Constant) and isinstance(status.value, int):
                    raised.add(status.value)
    raised.add(413)  # by aiohttp, from `client_max_size`
    described = {int(status) for _, _, op in _operations() for status in op["responses"]} - {200}
    assert described == raised
    for _, path, operation in _operations():
        statuses = set(operation["responses"])
        assert ("401" in statuses) == (path != "/health")
        assert ("413" in statuses) == ("408" in statuses) == ("requestBody" in operation)
        assert ("429" in statuses) == path.endswith("completions")


@pytest.mark.parametrize("status", [400, 401, 404, 405, 408, 413, 429, 500, 503, 504])
def test_every_error_body_fits(status: int) -> None:
    body = ApiError(status, "why", "param" if status == 400 else None).body()
    msgspec.json.decode(body, type=ErrorBody)
    assert jsonschema_rs.is_valid(_schema("ErrorBody"), json.loads(body))
    assert set(json.loads(body)["error"]) == {"message", "type", "param", "code"}


JSON_VALUES = [value for value in httpcases.VALUES if len(value) < 20_000]


@pytest.mark.parametrize("kind", [CompletionRequest, ChatRequest, protocol.TokenizeRequest, protocol.DetokenizeRequest])
def test_schema_and_decoder_agree(kind: type[msgspec.Struct]) -> None:
    """Each field with each of the fuzzer's values: valid by the schema exactly if the decoder takes it."""
    validator = jsonschema_rs.Draft202012Validator(_schema(kind.__name__))
    path = next(path for path, struct in httpcases.STRUCTS.items() if struct is kind)
    decoder: msgspec.json.Decoder[Any] = msgspec.json.Decoder(kind)
    names = [field.encode_name for field in msgspec.structs.fields(kind)]
    refused = list(UNSUPPORTED) if issubclass(kind, protocol.GenerationRequest) else []
    differ: list[tuple[str, bytes, str]] = []
    verdicts = {True: 0, False: 0}
    for name in [*names, *refused]:
        for value in JSON_VALUES:
            body = httpcases.as_body(httpcases.base_fields(path) | {name: value})
            try:
                instance = json.loads(body, parse_constant=_refuse)
                json.dumps(instance, ensure_ascii=False).encode()
            except (ValueError, RecursionError):
                continue  # no JSON at all, by the standard
            if not _plain(instance):
                continue
            try:
                decode(body, decoder) if refused else decode_plain(body, kind)
                taken = True
            except ApiError as error:
                taken = False
                assert error.param is None or re.split(r"\W", error.param)[0] == name
            verdicts[taken] += 1
            if validator.is_valid(instance) != taken:
                differ.append((name, value[:80], "taken" if taken else "refused"))
    assert not differ
    assert min(verdicts.values()) > 10


def _refuse(name: str) -> None:
    raise ValueError(name)


def _plain(value: Any) -> bool:
    """No infinity, and no 1.0, which JSON Schema calls an integer and the decoder does not."""
    if isinstance(value, dict):
        return all(map(_plain, value.values()))
    if isinstance(value, list):
        return all(map(_plain, value))
    return not isinstance(value, float) or (math.isfinite(value) and not value.is_integer())


def test_real_answers_fit() -> None:
    """Whole and streamed answers of both endpoints, with all that can be asked of them."""
    rng = random.Random(1)

    async def run() -> None:
        async with fake_server() as (_, _, port):
            for path, whole, chunk in (
                ("/v1/completions", "Completion", "Completion"),
                ("/v1/chat/completions", "ChatCompletion", "ChatCompletionChunk"),
            ):
                for stream in (False, True):
                    chat = path.endswith("chat/completions")
                    options: dict[str, Any] = {"logprobs": True, "top_logprobs": 2}
                    options = options if chat else {"logprobs": 2, "echo": True}
                    usage = {"include_usage": True, "continuous_usage_stats": rng.random() < 0.5}
                    options |= {"stream_options": usage} if stream else {}
                    data = httpcases.good(path, stream=stream, n=2, **options)
                    reader, writer = await asyncio.open_connection("127.0.0.1", port)
                    writer.write(data)
                    answer = await httpfuzz.read_answer(reader)
                    writer.close()
                    assert answer is not None and answer.status == 200
                    bodies = [answer.body] if not stream else answer.body.split(b"\n\n")[:-2]
                    validator = jsonschema_rs.Draft202012Validator(_schema(chunk if stream else whole))
                    for body in bodies:
                        validator.validate(json.loads(body.removeprefix(b"data: ")))

    asyncio.run(run())
