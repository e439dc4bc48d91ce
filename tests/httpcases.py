"""Cases for the HTTP fuzzer: broken, hostile and odd requests as bytes, and what may be answered.

`make_case(seed, index)` depends on nothing else, so that a failure's two numbers bring it back.
"""

from __future__ import annotations

import gzip
import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import msgspec

from minidisagg.server.protocol import UNSUPPORTED, ChatRequest, CompletionRequest, DetokenizeRequest, TokenizeRequest

KEY = "right-key"
CANARY = "zyx-canary-4711"  # in every prompt; it must never be logged
MAX_BODY = 256 << 10  # what the server under test is set to
READ_TIMEOUT = 0.3  # likewise
STRUCTS: dict[str, type[msgspec.Struct]] = {
    "/v1/completions": CompletionRequest, "/v1/chat/completions": ChatRequest,
    "/tokenize": TokenizeRequest, "/detokenize": DetokenizeRequest,
}  # fmt: skip
GETS = ("/health", "/version", "/metrics", "/v1/models", "/models", "/openapi.json", "/tokenizer_info")
ADMIN_BODIES = {  # with a good body each, which changes nothing of the server under test
    "/admin/policy": b'{"policy":"fcfs"}', "/admin/mode": b'{"mode":"colocated"}',
    "/admin/workers/worker-0/role": b'{"role":"both"}',
}  # fmt: skip
ADMIN_GETS = ("/admin/state", "/admin/workers", "/admin/requests", "/admin/links", "/admin/trace", "/admin/events")
ADMIN_POSTS = (  # those without a body; only to be asked without a key
    "/admin/pause", "/admin/resume", "/admin/workers/worker-0/kill", "/admin/workers/worker-0/drain",
    "/admin/workers/worker-0/restart", "/admin/requests/00000000/abort",
)  # fmt: skip


@dataclass(frozen=True)
class Case:
    """What to send, and what must come back."""

    data: bytes
    answers: int = 0  # answers that must come; 0: what comes is checked
    statuses: frozenset[int] = frozenset()  # that they may have; empty: any below 500
    head: bool = False  # answers have no body
    leave_after: int = -1  # bytes of the answer after which the client leaves
    half_close: bool = False
    pause: float = 0.0  # seconds between the two halves
    choices: int = 0  # of a 200


def request(path: str, body: bytes | None = None, method: str = "", key: str | None = KEY, extra: bytes = b"") -> bytes:
    """A well-formed request."""
    method = method or ("GET" if body is None else "POST")
    lines = [f"{method} {path} HTTP/1.1".encode(), b"Host: localhost"]
    if key is not None:
        lines.append(f"Authorization: Bearer {key}".encode())
    if body is not None:
        lines += [b"Content-Type: application/json", b"Content-Length: %d" % len(body)]
    return b"\r\n".join(lines) + b"\r\n" + extra + b"\r\n" + (body or b"")


def base_fields(path: str) -> dict[str, bytes]:
    """The smallest good body, as raw JSON by field."""
    prompt = json.dumps(f"say {CANARY}").encode()
    if path == "/v1/chat/completions":
        return {"messages": b'[{"role":"user","content":%s}]' % prompt, "max_tokens": b"3"}
    if path == "/detokenize":
        return {"tokens": b"[72, 105]"}
    return {"prompt": prompt, **({"max_tokens": b"3"} if path == "/v1/completions" else {})}


def as_body(fields: dict[str, bytes]) -> bytes:
    """A JSON object of raw values."""
    return b"{" + b",".join(b'"%s":%s' % (name.encode(), value) for name, value in fields.items()) + b"}"


def target(rng: random.Random) -> tuple[str, bytes]:
    """A path that takes a body, and a good one."""
    path = rng.choice(("/v1/completions", "/v1/chat/completions", "/tokenize", *ADMIN_BODIES))
    return path, ADMIN_BODIES.get(path) or as_body(base_fields(path))


def head(path: str, key: str | None) -> bytes:
    """A request's first lines, without an end."""
    authorization = b"" if key is None else b"Authorization: Bearer %s\r\n" % key.encode()
    return b"POST %s HTTP/1.1\r\nHost: a\r\n%s" % (path.encode(), authorization)


def good(path: str = "/v1/completions", **fields: Any) -> bytes:
    """A request that must be answered with 200."""
    return request(
        path, as_body(base_fields(path) | {name: json.dumps(value).encode() for name, value in fields.items()})
    )


VALUES = [
    b"null", b"true", b"false", b"0", b"-0", b"-1", b"1", b"2", b"17", b"1.0", b"1.5", b"-1.5", b"2.0000001", b"1e400",
    b"-1e400", b"1e-400", b"1E3", b"9223372036854775807", b"9223372036854775808", b"-9223372036854775809",
    b"18446744073709551616", b"1" + b"0" * 400, b"0." + b"3" * 400, b"NaN", b"Infinity", b"-Infinity", b"01", b"+1",
    b"1.", b".5", b"0x10", b'""', b'"a"', b'"1"', b'"\\ud800"', b'"\\udfff\\ud800"', b'"\\u0000"', b'"\\x"', b'"\xff"',
    b'"\xc3\xa9\xf0\x9f\x98\x80"', b'"\xed\xa0\x80"', b'"' + b"x" * 300 + b'"', b'"' + b"x" * 5000 + b'"', b"[]",
    b"[[]]", b"[null]", b"[0]", b"[-1]", b"[511]", b"[512]", b"[2147483647]", b"[2147483648]", b"[1e99]", b'["a"]',
    b'[""]', b'["a",""]', b'["a",1]', b'[[1],"a"]', b"[[1],[]]", b"[[1],[600]]", b"[" + b"1," * 99 + b"1]",
    b"[" + b"1," * 5000 + b"1]", b"[" + b'"a",' * 70 + b'"a"]', b"[" * 60 + b"]" * 60, b"[" * 20000 + b"]" * 20000,
    b"[" * 20000, b'{"a":' * 3000 + b"1" + b"}" * 3000, b"{}", b'{"a":1}', b"[{}]", b'{"include_usage":1}',
    b'{"include_usage":true,"continuous_usage_stats":true}', b'[{"role":"user"}]', b'[{"role":"user","content":null}]',
    b'[{"role":"robot","content":"a"}]', b'[{"role":"user","content":[{"type":"text","text":"a"}]}]',
    b'[{"role":"user","content":[{"type":"image_url","image_url":{"url":"http://localhost/"}}]}]',
    b'[{"role":"user","content":[{"text":"a"}]}]', b'[{"role":"user","content":"{{ 1 }}"}]', b"'a'", b"/**/1", b"",
]  # fmt: skip


def _wrong_field(rng: random.Random) -> Case:
    path = rng.choice(list(STRUCTS))
    names = [spec.encode_name for spec in msgspec.structs.fields(STRUCTS[path])]
    fields = base_fields(path)
    for _ in range(rng.choice((1, 1, 1, 2, 5))):
        fields[rng.choice(names)] = rng.choice(VALUES)
    limits = {fields.get(name, b"null") for name in ("max_tokens", "max_completion_tokens")}
    if path == "/v1/chat/completions" and limits == {b"null"}:
        fields["max_tokens"] = b"3"  # nothing wrong with it, but all of the model's length would take too long
    if "max_tokens" in fields and path.startswith("/v1"):
        fields["n"] = fields.get("n", b"1")
    return Case(request(path, as_body(fields)), 1, frozenset({200, 400, 404}))


def _unsupported(rng: random.Random) -> Case:
    path = rng.choice(list(STRUCTS)[:2])
    fields = base_fields(path) | {rng.choice(list(UNSUPPORTED)): rng.choice((b'{"a":1}', b"3", b'"b"', b"[3]"))}
    return Case(request(path, as_body(fields)), 1, frozenset({400}))


def _duplicated(rng: random.Random) -> Case:
    path = rng.choice(list(STRUCTS)[:2])
    body = as_body(base_fields(path))
    again = b'{"max_tokens":%s,' % rng.choice(VALUES[:20])
    return Case(request(path, again + body[1:]), 1, frozenset({200, 400}))


def _not_json(rng: random.Random) -> Case:
    path = rng.choice(list(STRUCTS))
    return Case(request(path, _broken(rng, as_body(base_fields(path)))), 1, frozenset({400}))


def _broken(rng: random.Random, body: bytes) -> bytes:
    """No JSON, or no object."""
    return rng.choice((
        body[: rng.randrange(len(body))], body + b"}", body + b" " + body, b"\xef\xbb\xbf" + body, body + b"\0",
        body.decode().encode("utf-16"), rng.randbytes(rng.randrange(1, 200)), b"", b"null", b"1", b'"a"', b"[]",
        b"[" + body + b"]", b"\0" * 50, b"[" * 100_000, b'{"a":' * 50_000, body.replace(b'"', b"'"), b"a=1&b=2",
    ))  # fmt: skip


def _too_large(rng: random.Random) -> Case:
    path = rng.choice(list(STRUCTS))
    size = rng.choice((MAX_BODY - 100, MAX_BODY + 1, 2 * MAX_BODY))
    field_name = "model" if path == "/detokenize" else "user"
    fields = base_fields(path) | {field_name: b'"' + b"x" * size + b'"'}
    return Case(request(path, as_body(fields)), 0, frozenset({200, 400, 413, 415}))


def _too_long(rng: random.Random) -> Case:
    """More tokens than the model takes, in one way or another."""
    fields = rng.choice((
        {"max_tokens": b"4096"}, {"max_tokens": b"1048576"}, {"prompt": b'"%s"' % (b"a" * 5000)},
        {"prompt": b"[" + b"7," * 4100 + b"7]"}, {"min_tokens": b"9"}, {"prompt": b"[513]"}, {"prompt": b"[[1],[700]]"},
        {"max_tokens": b"0"}, {"prompt": b"[]"}, {"prompt": b'""'}, {"prompt": b"[[]]"}, {"prompt": b'["a",""]'},
    ))  # fmt: skip
    return Case(request("/v1/completions", as_body(base_fields("/v1/completions") | fields)), 1, frozenset({400}))


def _valid(rng: random.Random) -> Case:
    """Anything that is allowed, in any combination."""
    path = rng.choice(("/v1/completions", "/v1/chat/completions"))
    chat = path.endswith("chat/completions")
    options: dict[str, Callable[[], Any]] = {
        "temperature": lambda: rng.choice((0, 0.0, 1, 2.0, None)), "top_p": lambda: rng.choice((0.1, 1, None)),
        "top_k": lambda: rng.choice((-1, 0, 5, None)), "min_p": lambda: rng.choice((0, 0.5)),
        "seed": lambda: rng.choice((0, -1, 2**63 - 1, -(2**63), None)),
        "stop": lambda: rng.choice((None, "a", ["b", "\n"], [])), "stop_token_ids": lambda: rng.choice(([], [1, 2])),
        "ignore_eos": lambda: rng.choice((True, False, None)), "presence_penalty": lambda: rng.uniform(-2, 2),
        "frequency_penalty": lambda: rng.uniform(-2, 2), "repetition_penalty": lambda: rng.choice((0.5, 1, 1.2)),
        "stream_options": lambda: rng.choice((None, {}, {"include_usage": True}, {"continuous_usage_stats": True})),
        "user": lambda: "someone", "priority": lambda: rng.randrange(-5, 5), "unknown_field": lambda: {"a": [1]},
        "max_tokens": lambda: rng.randrange(2, 20), "min_tokens": lambda: rng.randrange(3),
        "logprobs": lambda: rng.choice((True, False, None)) if chat else rng.choice((0, 1, 20, None)),
        "model": lambda: rng.choice((None, "")),
    }  # fmt: skip
    if chat:
        options["max_completion_tokens"] = lambda: rng.randrange(2, 9)
    else:
        options["echo"] = lambda: rng.choice((True, False))
        options["prompt"] = lambda: rng.choice((
            "é😀" + CANARY, "a" * 3000, [1, 2, 3], ["a", CANARY], [[1], [2, 3]], ["x"] * 5, [[511] * 50] * 3, "\0",
        ))  # fmt: skip
    names = rng.sample(sorted(options), rng.randrange(len(options) + 1))
    fields: dict[str, Any] = {name: options[name]() for name in names}
    if rng.random() < 0.3:
        fields["n"] = rng.randrange(1, 4)
    if rng.random() < 0.5:
        fields["stream"] = rng.choice((True, True, False, None))
    if not fields.get("stream"):
        fields.pop("stream_options", None)  # which need it
    prompt = fields.get("prompt", "")
    prompts = len(prompt) if isinstance(prompt, list) and not isinstance(prompt[0], int) else 1
    return Case(good(path, **fields), 1, frozenset({200}), choices=prompts * fields.get("n", 1))


def _leaves(rng: random.Random) -> Case:
    """A client that goes away in the middle, or before anything has come."""
    stream = rng.random() < 0.7
    path = rng.choice(("/v1/completions", "/v1/chat/completions"))
    data = good(path, max_tokens=3000, stream=stream, n=rng.choice((1, 1, 3)))
    return Case(data, leave_after=rng.choice((0, 1, 100, 1000, 5000)) if stream else 0)


def _truncated(rng: random.Random) -> Case:
    data = request(*target(rng))
    return Case(data[: rng.randrange(len(data))], half_close=rng.random() < 0.7)


def _half_closed(rng: random.Random) -> Case:
    return Case(good(rng.choice(list(STRUCTS))), half_close=True)


def _slow(rng: random.Random) -> Case:
    """The body comes in two halves, or its second half never comes."""
    data = request(*target(rng))
    if rng.random() < 0.5:
        return Case(data, 1, frozenset({200}), pause=0.1)
    return Case(data[: -rng.randrange(1, 10)], 1, frozenset({408}))


def _content_length(rng: random.Random) -> Case:
    path, body = target(rng)
    size = len(body)
    lines = rng.choice((
        b"-1", b"1e2", b"0x20", b"9" * 30, b"18446744073709551617", b"1 1", b"+%d" % size, b"", b"a", b"\xb2",
        b"%d, %d" % (size, size), b"%d\r\nContent-Length: %d" % (size, size), b"%d\r\nContent-Length: 0" % size,
        b"%d\r\nTransfer-Encoding: chunked" % size, b"0\r\nTransfer-Encoding: chunked", b"%d" % (size - 5),
        b"%d" % (size + 5), b"0", b"%d" % (1 << 40), b"00%d" % size, b"1\x00",
    ))  # fmt: skip
    begun = head(path, _maybe_key(rng))
    return Case(begun + b"Content-Length: " + lines + b"\r\n\r\n" + body, half_close=rng.random() < 0.3)


def _chunks(rng: random.Random) -> Case:
    path, body = target(rng)
    whole = b"%x\r\n%s\r\n0\r\n\r\n" % (len(body), body)
    kind = rng.choice((b"chunked", b"chunked", b"chunked", b"CHUNKED", b"gzip, chunked", b"chunked, gzip", b"identity",
                       b"chunked, chunked", b"xchunked", b"", b"\x0bchunked"))  # fmt: skip
    sent = rng.choice((
        whole, whole.replace(b"\r\n", b"\n"), b"zz\r\n" + whole, b"-1\r\n" + whole, b"f" * 20 + b"\r\n" + whole,
        whole[: rng.randrange(len(whole))], whole[:-2] + b"X: " + b"y" * 20000 + b"\r\n\r\n", b"0\r\n\r\n",
        b"%x;%s\r\n%s\r\n0\r\n\r\n" % (len(body), b"e" * 20000, body), b"%x\r\n%sXX" % (len(body), body),
        b"0" * 30 + whole, b"".join(b"1\r\n%c\r\n" % c for c in body) + b"0\r\n\r\n", b"\r\n" + whole,
        whole[:-2] + b"Content-Length: 3\r\n\r\n", b"%x \r\n" % len(body) + whole.partition(b"\r\n")[2],
    ))  # fmt: skip
    begun = head(path, _maybe_key(rng))
    return Case(begun + b"Transfer-Encoding: " + kind + b"\r\n\r\n" + sent, half_close=rng.random() < 0.3)


def _maybe_key(rng: random.Random) -> str | None:
    return rng.choice((KEY, KEY, KEY, "wrong", None))


def _admin(rng: random.Random) -> Case:
    """What only operators use, misused."""
    path, body = rng.choice(list(ADMIN_BODIES.items()))
    name = json.loads(body).popitem()[0].encode()
    refused = frozenset({400})
    data = rng.choice((
        request(path, _broken(rng, body)), request(path, b'{"%s":%s}' % (name, rng.choice(VALUES))),
        request(path, b'{"%sx":"fcfs"}' % name), request(path, b""), request(path, b'{"%s":"./x.py:X"}' % name),
    ))  # fmt: skip
    kind = rng.randrange(4)
    if kind == 0:
        hz = rng.choice(("", "0", "-1", "nan", "inf", "1e9", "a", "%00", "21", "0x1"))
        data = request(f"/admin/events?hz={hz}")
    elif kind == 1:
        refused = frozenset({404, 405})
        data = request(rng.choice((
            "/admin/workers/nobody/kill", "/admin/workers/%2e%2e/drain", "/admin/workers//restart",
            "/admin/workers/worker-0/explode", "/admin/requests/x/abort", "/admin/requests/%ff/abort", "/admin/nothing",
            "/admin/state", "/admin/",
        )), rng.choice((b"", body, b"\xff" * 100)))  # fmt: skip
    return Case(data, 1, refused)


def _method(rng: random.Random) -> Case:
    path = rng.choice((*STRUCTS, *GETS, "/v1/models/x", "/admin/state", "/nothing"))
    method = rng.choice(("GET", "POST", "PUT", "DELETE", "PATCH", "OPTIONS", "TRACE", "HEAD", "PROPFIND"))
    body = as_body(base_fields("/v1/completions")) if rng.random() < 0.5 else None
    return Case(request(path, body, method), 1, frozenset({200, 400, 404, 405}), head=method == "HEAD")


def _request_line(rng: random.Random) -> Case:
    target = b"/v1/models"
    line = rng.choice((
        b"FOO /health HTTP/1.1", b"get /health HTTP/1.1", b" GET /health HTTP/1.1", b"GET  /health HTTP/1.1",
        b"GET /health", b"GET /health HTTP/0.9", b"GET /health HTTP/2.0", b"GET /health HTTP/1.9", b"GET", b"",
        b"GET /health HTTP/1.1 x", b"GET\t/health\tHTTP/1.1", b"GET /health HTP/1.1", b"PRI * HTTP/2.0",
        b"GET * HTTP/1.1", b"OPTIONS * HTTP/1.1", b"CONNECT localhost:22 HTTP/1.1",
        b"GET http://other/v1/models HTTP/1.1", b"GET /health%3f HTTP/1.1", b"GET /\x00 HTTP/1.1",
        b"GET http://[::1/ HTTP/1.1", b"GET //v1/models HTTP/1.1", b"GET /%00 HTTP/1.1", b"GET /%ff%fe HTTP/1.1",
        b"GET /v1/models/%ed%a0%80 HTTP/1.1", b"GET /v1/models/%0aFAKE HTTP/1.1", b"GET /\xff\xfe HTTP/1.1",
        b"GET /v1/models/..%2f..%2fetc HTTP/1.1", b"GET /../../etc/passwd HTTP/1.1",
        b"GET /v1/models?a=%zz&b[]=1 HTTP/1.1", b"GET /#a HTTP/1.1", b"GET ?a HTTP/1.1", b"GET a HTTP/1.1",
        b"GET " + target + b"/" + b"x" * rng.choice((4000, 16000, 20000, 100000)) + b" HTTP/1.1",
        b"X" * 20000 + b" / HTTP/1.1", b"GET / HTTP/" + b"1" * 20000, b"GET http://user:pass@h:99999/health HTTP/1.1",
    ))  # fmt: skip
    return Case(line + b"\r\nHost: a\r\nAuthorization: Bearer %s\r\n\r\n" % KEY.encode())


def _header(rng: random.Random) -> Case:
    extra = rng.choice((
        b"X-Long: " + b"y" * rng.choice((8000, 16000, 20000, 200_000)), b"y" * 20000 + b": 1", b": empty", b"NoColon",
        b"\r\n".join(b"X-%d: 1" % n for n in range(rng.choice((50, 200, 2000)))), b"Bad Name: 1", b"X : 1", b"X: a\0b",
        b"X: 1\r\n folded", b"X: \xff\xfe", b"X\xff: 1", b"Host: other", b"Host: ", b"Expect: 100-continue",
        b"Expect: something", b"Upgrade: websocket\r\nConnection: Upgrade", b"Upgrade: h2c\r\nConnection: Upgrade",
        b"Connection: close", b"Connection: nonsense, keep-alive, close", b"Content-Type: text/plain; charset=nonsense",
        b"Content-Type: \xff", b"Content-Encoding: br", b"Content-Encoding: gzip", b"Content-Encoding: nonsense",
        b"Content-Encoding: deflate", b"Content-Encoding: zstd", b"Cookie: " + b"a=b; " * 1000, b"Range: bytes=0-1",
        b"x-request-id: " + b"\x01\x02", b"x-request-id: " + b"i" * 300, b"x-request-id: a b", b"If-Match: *",
        b"Accept-Encoding: gzip", b"Origin: http://evil", b"Trailer: X", b"TE: trailers", b"X: 1\nY: 2", b"X: 1\rY: 2",
        b"Content-Type: multipart/form-data; boundary=x", b"Sec-WebSocket-Key: a", b"X-Forwarded-For: 1.2.3.4",
    ))  # fmt: skip
    return Case(request(*target(rng), extra=extra + b"\r\n"))


def _compressed(rng: random.Random) -> Case:
    """A good body, a bomb and a broken stream."""
    body = rng.choice((as_body(base_fields("/tokenize")), b" " * (50 << 20), b'{"prompt":"' + b"a" * (1 << 20)))
    data = _squeeze(body)
    if rng.random() < 0.3:
        data = data[: len(data) // 2] + rng.randbytes(8)
    return Case(request("/tokenize", data, extra=b"Content-Encoding: gzip\r\n"), 0, frozenset({200, 400, 413, 415}))


_squeezed: dict[int, bytes] = {}


def _squeeze(body: bytes) -> bytes:
    if len(body) not in _squeezed:
        _squeezed[len(body)] = gzip.compress(body, 6, mtime=0)
    return _squeezed[len(body)]


def _flipped(rng: random.Random) -> Case:
    data = bytearray(
        request(*target(rng)) if rng.random() < 0.3 else good(rng.choice(list(STRUCTS)), stream=rng.random() < 0.3)
    )
    for _ in range(rng.choice((1, 1, 2, 5, 30))):
        at = rng.randrange(len(data))
        kind = rng.randrange(4)
        if kind == 0:
            data[at] = rng.randrange(256)
        elif kind == 1:
            data.insert(at, rng.choice((0, 10, 13, 32, 58, 255)))
        elif kind == 2:
            del data[at]
        else:
            data[at:at] = data[at : at + rng.randrange(40)]
    return Case(bytes(data), half_close=rng.random() < 0.2)


def _garbage(rng: random.Random) -> Case:
    hello = b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + rng.randbytes(300)
    data = rng.choice((rng.randbytes(rng.randrange(1, 500)), hello, b"\0" * 100, b"\r\n" * 50, b"SSH-2.0-a\r\n", b"\n"))
    return Case(data, half_close=rng.random() < 0.5)


def _pipelined(rng: random.Random) -> Case:
    count = rng.randrange(2, 12)
    if rng.random() < 0.6:
        return Case(good(max_tokens=2) * count, count, frozenset({200}))
    parts = [request(rng.choice(GETS)) if rng.random() < 0.5 else good() for _ in range(count)]
    parts[rng.randrange(count)] = _garbage(rng).data
    return Case(b"".join(parts))


def _unauthorized(rng: random.Random) -> Case:
    """Every route but /health, with no key or a wrong one; the body is not even looked at."""
    known = rng.choice(((*STRUCTS, *GETS[1:]), (*ADMIN_BODIES, *ADMIN_GETS, *ADMIN_POSTS)))
    path = rng.choice((*known, "/v1/models/x", "/nothing", "/", "/Health", "/admin", "/admin/nothing"))
    body = rng.choice((None, as_body(base_fields("/v1/completions")), b"\xff", b"[" * 5000))
    key = KEY.encode()
    value = rng.choice((
        None, b"Bearer", b"Bearer ", b"Bearer wrong", b"Basic %s" % key, key, b"Bearer\t%s" % key, b"Bearer %sx" % key,
        b"Bearer \xff\xfe", b"Bearer " + b"a" * 4000, b"Bearer right-kez", b"Bearer RIGHT-KEY",
    ))  # fmt: skip
    extra = b"" if value is None else b"Authorization: " + value + b"\r\n"
    return Case(request(path, body, key=None, extra=extra), 1, frozenset({401}))


def _unknown(rng: random.Random) -> Case:
    path = rng.choice(("/", "/v1", "/v1/", "/v1/completions/", "/v2/completions", "/v1/embeddings", "/v1/models/none",
                       "/admin", "/favicon.ico", "/v1/models/" + "a" * 3000, "/.env", "/health/"))  # fmt: skip
    body = as_body(base_fields("/v1/completions")) if rng.random() < 0.5 else None
    return Case(request(path, body), 1, frozenset({404, 405}))


def _unknown_model(rng: random.Random) -> Case:
    path = rng.choice(("/v1/completions", "/v1/chat/completions"))
    return Case(good(path, model=rng.choice(("gpt-4", "é", "a" * 512, "../x"))), 1, frozenset({404}))


# The weight of each kind; those that wait or are large are few.
KINDS: tuple[tuple[Callable[[random.Random], Case], int], ...] = (
    (_wrong_field, 60), (_unsupported, 8), (_duplicated, 6), (_not_json, 25), (_too_large, 3), (_too_long, 10),
    (_valid, 30), (_leaves, 10), (_truncated, 12), (_half_closed, 5), (_slow, 2), (_content_length, 30), (_chunks, 30),
    (_method, 15), (_request_line, 20), (_header, 20), (_compressed, 2), (_flipped, 30), (_garbage, 8), (_pipelined, 6),
    (_admin, 15), (_unauthorized, 15), (_unknown, 8), (_unknown_model, 4),
)  # fmt: skip
# Whole and well-formed, though some of them are refused for what they want.
WELL_FORMED = frozenset({"valid", "leaves", "half_closed", "method", "unauthorized", "unknown", "unknown_model"})
NEVER_ANSWERED = frozenset({"truncated", "garbage"})  # or seldom: they have no end, or are no HTTP


def is_malformed(name: str, statuses: list[int]) -> bool:
    """Whether a case of this kind that was answered so counts as a malformed request: only what surely is one."""
    refused = max(statuses) >= 400 or name in NEVER_ANSWERED
    return name not in WELL_FORMED and refused


def make_case(seed: int, index: int) -> tuple[str, Case]:
    """The kind's name and the case."""
    rng = random.Random(f"{seed}/{index}")
    kind = rng.choices([kind for kind, _ in KINDS], [weight for _, weight in KINDS])[0]
    return kind.__name__.strip("_"), kind(rng)
