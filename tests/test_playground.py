"""The playground: its Python under CPython, and the page in a headless browser, which shows the same numbers."""

from __future__ import annotations

import asyncio
import base64
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from asyncio.subprocess import PIPE
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import ModuleType
from typing import Any

import aiohttp
import msgspec
import pytest

from minidisagg.measure.goodput import SLO
from minidisagg.measure.records import RunRecord
from minidisagg.measure.stats import samples_of, value_of
from minidisagg.policies import names

ROOT = Path(__file__).parent.parent


def load(path: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(Path(path).stem, ROOT / path)
    assert spec is not None and spec.loader is not None
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


play, builder = load("playground/play.py"), load("scripts/build_playground.py")
SMALL = {"requests": 16, "output": 8, "prompt": 900, "rate": 40.0}


def policy(*lines: str) -> dict[str, Any]:
    return SMALL | {"source": "\n".join(["from minidisagg import Policy, Reject", "class Mine(Policy):", *lines])}


# ---------------------------------------------------------------- under CPython


def test_it_says_what_there_is() -> None:
    about = play.describe()
    assert set(about["policies"]) == {"example", *names()}
    assert about["defaults"]["profile"] in about["profiles"]
    assert "class Mine(Policy)" in about["policies"]["example"]


def test_both_sides_have_all_that_is_drawn() -> None:
    told: list[tuple[str, int]] = []
    result = play.run(SMALL, lambda *news: told.append(news))
    assert {side for side, _ in told} == {"colocated", "disagg"} and told[-1] == ("disagg", 16)
    colocated, disagg = result["sides"]
    assert colocated["workers"] == [f"worker-{n}" for n in range(4)]
    assert disagg["workers"] == ["prefill-0", "prefill-1", "decode-0", "decode-1"]
    assert len(result["lengths"]) == 16 and all(450 <= prompt <= 1350 for prompt, _ in result["lengths"])
    tokens = sum(prompt for prompt, _ in result["lengths"]), sum(output - 1 for _, output in result["lengths"])
    for side in result["sides"]:
        steps = side["steps"]
        assert (sum(steps["prefill"]), sum(steps["decode"])) == tokens, "equal steps are told one by one"
        assert len({len(column) for column in steps.values()}) == 1
        for number in range(4):
            own = [row for row in zip(*steps.values(), strict=True) if row[0] == number]
            ends = [0.0] + [begin + seconds for _, begin, seconds, *_ in own]
            assert all(row[1] >= end - 3e-6 for row, end in zip(own, ends, strict=False)), "one after the other"
            assert sum(row[2] for row in own) == pytest.approx(side["busy"][number] * side["wall"], abs=1e-3)
        assert len(side["requests"]) == 16
    mixed = [any(p and d for p, d in zip(s["steps"]["prefill"], s["steps"]["decode"], strict=True))
             for s in result["sides"]]  # fmt: skip
    assert mixed == [True, False], "on one side only prompts disturb decodes"
    assert [sum(row[3] for row in side["requests"]) > 0 for side in result["sides"]] == [False, True]
    json.dumps(result, allow_nan=False)


def test_statistics_are_those_of_the_tables(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[RunRecord, SLO]] = []
    measured = play.measured

    def noted(*of: Any) -> Any:
        seen.append(of)
        return measured(*of)

    monkeypatch.setattr(play, "measured", noted)
    result = play.run(SMALL)
    for side, (run, slo) in zip("ab", seen, strict=True):
        assert slo == SLO(**result["slo"])
        metrics = samples_of(run, slo).metrics
        for name, row in result["table"].items():
            statistic, _, metric = name.partition("_") if name not in metrics else ("mean", "", name)
            assert row[side] == pytest.approx(value_of(metrics[metric], statistic), rel=1e-12), name


def test_the_same_seed_gives_the_same_and_another_does_not() -> None:
    first, again, other = play.run(SMALL), play.run(SMALL), play.run(SMALL | {"seed": 1})
    assert first == again
    assert first["table"] != other["table"] and first["lengths"] != other["lengths"]


@pytest.mark.parametrize("name", names())
def test_a_policy_that_ships_can_be_edited(name: str) -> None:
    result = play.run(SMALL | {"source": play.describe()["policies"][name], "baseline": "mine"})
    assert result["table"]["attainment"] and [side["policy"] for side in result["sides"]] == ["mine", "mine"]


@pytest.mark.parametrize(
    ("given", "line", "message"),
    [
        (policy("    def order(self"), 3, "SyntaxError: '(' was never closed"),
        (policy("    x = 1 / 0"), 3, "ZeroDivisionError: division by zero"),
        (policy("    def __init__(self):", "        self.x = y"), 4, "NameError: name 'y' is not defined"),
        (policy("    def help(self):", "        return {}[1]", "    def place(self, r, c):", "        self.help()"), 4,
         "policy Mine: place raised KeyError: 1"),
        (policy("    x = 1", "    def accept(self, offer, worker):", "        return 7"), 4,
         "policy Mine: accept answered 7, not True or False"),
        (policy("    def accept(self, offer, worker):", "        return worker.now < 0.2"), 3,
         "policy Mine: accept refuses it though worker"),
        (policy("    def compose(self, batch, worker):", "        pass"), 0, "policy Mine plans nothing"),
        (policy("    def compose(self, batch, worker):", "        if worker.now > 0.2: batch.nope()",
                "        super().compose(batch, worker)"), 4, "policy Mine: compose raised AttributeError"),
        (policy("    def place(self, r, c):", "        if c.now > 0.2: 1 / 0",
                "        return super().place(r, c)"), 4, "policy Mine: place raised ZeroDivisionError"),
        (SMALL | {"source": "class Mine: pass"}, 0, "there is no class here like `class Mine(Policy)`"),
        (SMALL | {"source": ""}, 0, "there is no class here like `class Mine(Policy)`"),
    ],
)  # fmt: skip
def test_an_error_of_a_policy_is_told_with_its_line(given: dict[str, Any], line: int, message: str) -> None:
    error = play.run(given)["error"]
    assert message in error["message"] and "\n" not in error["message"]
    assert (error["where"], error["line"]) == ("policy", line)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"prefill": 0}, "`int` >= 1"),
        ({"rate": -1.0}, "> 0.0"),
        ({"profile": "h100_sxm llama-9b bfloat16 tp1"}, "no profile 'h100_sxm llama-9b bfloat16 tp1'"),
        ({"prompt": 100_000, "profile": "a100_sxm llama-70b bfloat16 tp2"}, "more than the KV cache of a worker"),
        ({"baseline": "lifo"}, "unknown policy 'lifo'"),
        ({"baseline": "sarathi:chunk=0"}, "chunk must be a number of tokens"),
        ({"nonsense": 1}, "unknown field `nonsense`"),
    ],
)
def test_an_error_of_the_settings_is_told_in_one_line(wrong: dict[str, Any], message: str) -> None:
    error = play.run(SMALL | wrong)["error"]
    assert message in error["message"] and "\n" not in error["message"]
    assert error["where"] == "settings"


def test_requests_that_are_turned_away_or_never_end() -> None:
    for since, some in ("-1", 0), ("0.2", 1):
        late = policy("    def admit(self, r, cluster):", f"        if cluster.now > {since}: return Reject(1, 'x')")
        result = json.loads(play.run_json(json.dumps(late), lambda *news: None))
        a, b = result["sides"]
        assert a["rejected"] == 0 and b["rejected"] == sum(not any(row[1:]) for row in b["requests"])
        assert bool(some) == (b["rejected"] < 16) == (result["table"]["p50_ttft"]["b"] is not None), "null: no number"
    stuck = policy("    def accept(self, offer, worker):", "        return worker.now < 0.35")
    assert "accept refuses it though worker decode-0 is empty" in play.run(stuck)["error"]["message"]


def test_its_archive_is_enough_without_numpy_and_torch(tmp_path: Path) -> None:
    for name, content in builder.python_files().items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(content)
    packages = Path(msgspec.__file__).parent.parent
    code = f"""
import json, sys
sys.modules.update(dict.fromkeys(["numpy", "torch", "rich", "click", "aiohttp"]))  # none of them can be imported
sys.path[:0] = [{str(tmp_path)!r}, {str(packages)!r}]
import play
play.describe()
print(json.dumps([play.__file__, play.run({SMALL})["table"]]))
"""
    # -S: an editable install finds what the archive lacks
    out = subprocess.run([sys.executable, "-I", "-S", "-c", code], capture_output=True, text=True, check=False)
    assert out.returncode == 0, out.stderr
    assert json.loads(out.stdout) == [str(tmp_path / "play.py"), play.run(SMALL)["table"]]


def test_the_page_and_its_script_name_the_same_things() -> None:
    page, script = ((ROOT / "playground" / name).read_text(encoding="utf-8") for name in ("index.html", "app.js"))
    names = {*re.findall(r'\$\("(\w+)"\)', script)} - set(re.findall(r'id="(\w+)"', page))
    of = {table: set(re.findall(r"^  (\w+): \[", text, re.MULTILINE))
          for table, text in re.findall(r"const (FIELDS|ROWS) = \{\n(.*?)\n\};", script, re.DOTALL)}  # fmt: skip
    assert names <= of["FIELDS"]
    assert of["FIELDS"] | {"profile", "baseline", "source"} == set(play.Settings.__struct_fields__)
    assert of["ROWS"] == set(play.run(SMALL)["table"])


def test_a_part_that_cannot_be_had_is_told_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(builder, "PARTS", tmp_path)
    with pytest.raises(builder.BuildError, match=r"^no-such-program is not installed, which fetches a part"):
        builder._fetch("no-such-program")
    with pytest.raises(builder.BuildError, match=r"fails: nothing to be had$"):
        builder._fetch(sys.executable, "-c", "import sys; sys.exit('as they say\\nnothing to be had')")


# ---------------------------------------------------------------- in a browser

BROWSERS = "chromium", "chromium-browser", "google-chrome", "chrome"
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
    "--disable-background-networking", "--disable-component-update", "--disable-extensions", "--disable-dev-shm-usage",
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1", "--remote-debugging-port=0", "--window-size=1280,800",
)  # fmt: skip
LOADS = 120.0  # seconds, on a machine that is busy


class Page:
    """A tab, by the DevTools protocol."""

    def __init__(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        self.socket, self.count = socket, 0
        self.asked: set[str] = set()  # addresses
        self.wrong: list[Any] = []

    async def call(self, method: str, **params: Any) -> dict[str, Any]:
        self.count += 1
        await self.socket.send_json({"id": self.count, "method": method, "params": params})
        while True:
            told = json.loads(await self.socket.receive_str())
            if told.get("id") == self.count:
                assert "error" not in told, told
                return told["result"]  # type: ignore[no-any-return]
            if told["method"] == "Network.requestWillBeSent":
                self.asked.add(told["params"]["request"]["url"])
            elif told["method"] == "Runtime.exceptionThrown":
                self.wrong.append(told["params"])
            elif told["method"] == "Log.entryAdded" and told["params"]["entry"]["level"] == "error":
                self.wrong.append(told["params"])

    async def value(self, expression: str) -> Any:
        told = await self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in told, told
        return told["result"].get("value")

    async def state(self, wanted: str) -> None:
        """Until the page is in this state; it has run all that it was asked for."""
        async with asyncio.timeout(LOADS):
            await self.value(f"""new Promise((done) => {{
                const look = () => document.body?.dataset.state === "{wanted}" ? done() : setTimeout(look, 20);
                look();
            }})""")


@asynccontextmanager
async def opened(site: Path, profile: Path) -> AsyncIterator[Page]:
    """The site, served and shown; skips where there is no browser."""
    asked = [os.environ.get(name, "") for name in ("BROWSER", "CHROME")]
    candidates = [name for name in asked if "chrom" in Path(name).name] + [*BROWSERS]
    browser = next((found for name in candidates if (found := shutil.which(name))), None)
    if browser is None:
        pytest.skip(f"no headless browser: neither $BROWSER, $CHROME, nor one of {', '.join(BROWSERS)} is a Chrome")
    try:
        builder.build(site)
    except builder.BuildError as error:
        pytest.skip(str(error))
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(site)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    process = await asyncio.create_subprocess_exec(browser, *FLAGS, f"--user-data-dir={profile}", stderr=PIPE)
    assert process.stderr is not None
    try:
        async with asyncio.timeout(LOADS):
            while not (at := re.search(rb"DevTools listening on ws://[^:]*:(\d+)", await process.stderr.readline())):
                assert process.returncode is None
        drain = asyncio.create_task(process.stderr.read())  # a full pipe would stop it
        port = int(at[1])
        async with aiohttp.ClientSession(f"http://127.0.0.1:{port}") as session:
            async with session.put("/json/new?about:blank") as answer:
                where = (await answer.json(content_type=None))["webSocketDebuggerUrl"]
            async with session.ws_connect(where, max_msg_size=1 << 26) as socket:
                page = Page(socket)
                for domain in "Network", "Runtime", "Log", "Page":
                    await page.call(f"{domain}.enable")
                await page.call("Page.navigate", url=f"http://127.0.0.1:{server.server_port}/")
                yield page
    finally:
        server.shutdown()
        server.server_close()
        with suppress(ProcessLookupError):
            process.terminate()
        await process.wait()
    await drain


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: Any) -> None:
        pass


async def drawn(page: Page, canvas: str) -> set[str]:
    """The names of the colours that are to be seen there."""
    names: list[str] = await page.value(f"""(() => {{
        const read = (canvas) => new Uint32Array(
          canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data.buffer);
        const there = new Set(read(document.getElementById("{canvas}")));
        return ["queue", "prefill", "mixed", "transfer", "wait", "decode"].filter((name) => {{
            const dot = Object.assign(document.createElement("canvas"), {{width: 1, height: 1}});
            dot.getContext("2d").fillStyle = color(name);
            dot.getContext("2d").fillRect(0, 0, 1, 1);
            return there.has(read(dot)[0]);
        }});
    }})()""")
    return {*names}


def test_a_browser_shows_the_numbers_of_cpython(tmp_path: Path) -> None:
    async def visit() -> None:
        async with opened(tmp_path / "site", tmp_path / "profile") as page:
            await page.state("done")
            for change in ("", "seed=3&rate=40&prefill=3&decode=1&baseline=sarathi%3Achunk%3D512&requests=100"):
                if change:
                    await page.value(f"document.body.dataset.state = 'asked', location.hash = '{change}'")
                    await page.state("done")
                given = await page.value("({...settings(), source: document.getElementById('source').value})")
                shown = json.loads(await page.value("JSON.stringify(shown)"))
                assert shown == json.loads(json.dumps(play.run(given))), "to the last digit"
            assert given["seed"] == 3 and given["baseline"] == "sarathi:chunk=512"
            cells = await page.value("[...document.querySelectorAll('#table td')].map((cell) => cell.textContent)")
            assert len(cells) == 3 * len(shown["table"]) and all(cells)
            assert {"prefill", "mixed", "decode"} <= await drawn(page, "strips")
            assert {"prefill", "decode"} <= await drawn(page, "waterfall")
            picture = base64.b64decode((await page.call("Page.captureScreenshot"))["data"])
            assert picture.startswith(b"\x89PNG")
            await page.value("setSource('class Mine(Policy):\\n    x = 1 /'), document.getElementById('run').click()")
            await page.state("error")
            assert "line 2: SyntaxError" in await page.value("document.getElementById('error').textContent")
            host = await page.value("location.host")
            assert not page.wrong and all(url.split("/")[2] == host for url in page.asked if url.startswith("http"))

    asyncio.run(visit())


def test_a_folder_that_cannot_be_made_is_told_in_a_line() -> None:
    done = subprocess.run(
        [sys.executable, str(builder.__file__), "/proc/nope"], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 1 and re.fullmatch(r".*'/proc/nope'\n", done.stderr)
