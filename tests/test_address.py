"""A server on an IPv6 address: what it says of itself, and who finds it there."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket

import openai
import pytest
from fake_engine import MODEL, FakeFrontend
from serving import serving
from test_server import get

from minidisagg.address import at, bare, server_url
from minidisagg.bench.http_client import HttpServer
from minidisagg.bench.settings import parse_base_url
from minidisagg.config import ClusterSettings, ModelSettings, RunSettings
from minidisagg.monitor import beside
from minidisagg.monitor.app import MonitorOptions, run_monitor
from minidisagg.options import Engine
from minidisagg.server import run
from minidisagg.server.app import ServerSettings, check_port


def has_ipv6() -> bool:
    """A loopback address, which some containers lack."""
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        return False
    return True


needs_ipv6 = pytest.mark.skipif(not has_ipv6(), reason="there is no ::1")


def test_addresses_are_written_as_urls_want_them() -> None:
    assert server_url("127.0.0.1", 80) == "http://127.0.0.1:80" and server_url("::1", 80) == "http://[::1]:80"
    assert at("fe80::1%eth0", 80) == "[fe80::1%25eth0]:80" and at("localhost", "80") == "localhost:80"
    assert [bare(host) for host in ("[::1]", "::1", "host", "[", "")] == ["::1", "::1", "host", "[", ""]


@needs_ipv6
def test_clients_of_all_kinds_reach_it(capsys: pytest.CaptureFixture[str]) -> None:
    with serving(host="::1") as served:
        assert served.url.startswith("http://[::1]:")
        assert get(served, "/health")[0] == 200
        with openai.OpenAI(base_url=served.url + "/v1", api_key="none", max_retries=0) as client:
            assert client.completions.create(model=MODEL, prompt="a", max_tokens=2).usage is not None
        run_monitor(MonitorOptions(url=served.url + "/v1", once=True, as_json=True))
        assert json.loads(capsys.readouterr().out)["stages"]

        async def known() -> HttpServer:
            async with HttpServer(parse_base_url(served.url)) as server:
                await server.connect()
                return server

        server = asyncio.run(known())
        assert (server.model, server.label) == (MODEL, served.url.removeprefix("http://"))
        port = int(served.url.rpartition(":")[2])
        with pytest.raises(ValueError, match=rf"cannot listen on \[::1\]:{port}: "):
            check_port(ServerSettings(host="::1", port=port))


@needs_ipv6
def test_serve_says_where_it_listens(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(run, "Frontend", FakeFrontend)
    engine = Engine(ModelSettings(model=MODEL), ClusterSettings(prefill_workers=1, decode_workers=0), RunSettings())

    async def drive() -> str:
        serve = asyncio.create_task(run._serve(engine, ServerSettings(host="::1", port=0), (9, 999), False))
        said = ""
        while "serving on" not in said and not serve.done():
            await asyncio.sleep(0.01)
            said += capsys.readouterr().err
        os.kill(os.getpid(), signal.SIGTERM)
        await serve
        return said

    said = asyncio.run(drive())
    found = beside.SERVING.search(said)
    assert found is not None and found[0] == f"serving on {server_url('::1', found[1])}/v1"
