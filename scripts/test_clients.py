"""guidellm, lm-eval and the openai package against `minidisagg serve`, colocated and then disaggregated.

Runs in the environment of the clients (test_clients.sh makes it). The servers, and `--reference`, which computes what
the answers must be, run in the project's. Everything is float32, so that both can be compared. Nothing is downloaded.
Exits with 1 if a check fails.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import re
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

MODEL = "smollm2-135m"
KEY = "a-key-of-this-test"
SHOWN = 40  # statements before each of the long items, which are the rest: more than two pages of 128 tokens
LONGER_THAN = 200  # tokens of every context of theirs
TOLERANCE = 1e-3  # absolute, of a log-likelihood
MAX_TOKENS = 12  # of a greedy answer
GONE_WITHIN = 30.0  # seconds in which nothing is left of a request whose client is gone; a step under way ends first

# Beginning | an end that fits | one that does not.
STATEMENTS = """\
The sun rises in the|east|kitchen
Ice is made of frozen|water|music
A dog wags its|tail|window
Birds build their nests in|trees|spoons
The opposite of hot is|cold|purple
She poured a cup of|tea|gravel
He locked the door with a|key|cloud
Bread is baked in an|oven|ocean
There are seven days in a|week|shoe
The baby began to|cry|negotiate
We read books in the|library|engine
The cat chased the|mouse|calendar
Rain falls from the|clouds|carpet
Bees make|honey|furniture
A bicycle has two|wheels|opinions
The moon goes around the|Earth|table
Sugar tastes|sweet|angry
At night the sky is|dark|wooden
The farmer milked the|cow|ladder
Fish swim in the|sea|attic
Snow is|white|loud
He wrote the letter with a|pen|sandwich
The train arrived at the|station|lemon
A triangle has three|sides|sisters
They planted roses in the|garden|elevator
The doctor works in a|hospital|bottle
In winter we wear warm|coats|bridges
The clock on the wall shows the|time|taste
She cut the paper with|scissors|whispers
Apples grow on|trees|shelves of ice
The king lives in a|castle|pocket
The teacher wrote on the|board|soup
Fire is|hot|square
My grandmother is my mother's|mother|umbrella
The plane landed at the|airport|aquarium
A spider has eight|legs|languages
Milk comes from|cows|rocks
The ship sailed across the|ocean|ceiling
You see with your|eyes|elbows
The capital of France is|Paris|potato
After Monday comes|Tuesday|gravity
The river flows into the|sea|alphabet
He brushed his|teeth|thunder
To make an omelette you need|eggs|bricks
The children played in the|park|dictionary
Two plus two is|four|Thursday
The soldier was given a medal for his|courage|curtains
In autumn the leaves turn|brown|into telephones
The orchestra played a|symphony|staircase
A year has twelve|months|mountains
"""

PROMPTS = (
    "The capital of France is", "Once upon a time, in a small village,", "def fibonacci(n):\n", "Water boils at",
    "The three primary colours are", "Dear Sir or Madam,\n", "1, 2, 3, 4,", "The best way to learn a language is",
    "In the year 1969,", "Photosynthesis is the process by which",
)  # fmt: skip


def statements() -> list[tuple[str, list[str]]]:
    """Each beginning with its two ends, the fitting one first."""
    rows = [line.split("|") for line in STATEMENTS.splitlines()]
    return [(row[0], row[1:]) for row in rows]


def items() -> dict[str, list[tuple[str, list[str]]]]:
    """By task. The long ones share a prefix, as the examples of a few-shot task do."""
    short = statements()
    shown = "".join(f"{beginning} {ends[0]}.\n" for beginning, ends in short[:SHOWN])
    return {"plain_statements": short, "long_statements": [(shown + text, ends) for text, ends in short[SHOWN:]]}


# ---------------------------------------------------------------- what the answers must be: the project's environment


def reference() -> dict[str, Any]:
    """Greedy texts of the offline API, and log-likelihoods of one dense forward pass each."""
    import torch

    from minidisagg import LLM, SamplingParams
    from minidisagg.config import WorkerSettings
    from minidisagg.core.plan import PlanItem
    from minidisagg.model.attention import build_batch
    from minidisagg.model.loader import load_config, load_weights, resolve
    from minidisagg.model.tokenizer import Tokenizer
    from minidisagg.model.transformer import Transformer
    from minidisagg.runtime.kv_cache import KVCache

    greedy = SamplingParams(temperature=0.0, max_tokens=MAX_TOKENS)
    with LLM(MODEL, prefill=WorkerSettings(dtype="float32")) as llm:
        texts = [llm.generate(prompt, greedy)[0].text for prompt in PROMPTS]

    config, cpu, tokenizer = load_config(MODEL), torch.device("cpu"), Tokenizer.load(MODEL)
    model = Transformer(config, load_weights(MODEL, config), torch.float32, cpu)

    def score(beginning: str, end: str) -> tuple[float, bool, int]:
        """Log-likelihood, whether it is greedy, and tokens of the context."""
        first, ids = len(tokenizer.encode(beginning)), tokenizer.encode(f"{beginning} {end}")
        cache = KVCache(config, 1, len(ids), torch.float32, cpu)
        batch = build_batch([PlanItem("", 0, 0, len(ids), ids, [0], True, 0)], [ids], cache, torch.float32, cpu)
        logprobs_NV = model.logits(model.hidden(batch, cache)).log_softmax(-1)
        rows = logprobs_NV[first - 1 : -1]  # row i is of token i + 1
        target = torch.tensor(ids[first:])
        own = rows[torch.arange(len(target)), target]
        return own.sum().item(), bool((rows.argmax(-1) == target).all()), first

    scores = {task: [score(text, end) for text, ends in rows for end in ends] for task, rows in items().items()}
    return {"texts": texts, "scores": scores, "directory": str(resolve(MODEL))}


# ---------------------------------------------------------------- a server


def tell(line: str) -> None:
    """How it goes, apart from the result."""
    sys.stderr.write(line + "\n")


@dataclass
class Row:
    """One line of the table."""

    mode: str
    check: str
    figure: str
    ok: bool


@dataclass
class Run:
    """A server in one mode, what its answers must be, and what came of the checks."""

    mode: str
    url: str
    expected: dict[str, Any]
    folder: Path
    rows: list[Row] = field(default_factory=list)

    def check(self, name: str, work: Callable[[], tuple[str, bool]]) -> None:
        """Note what `work` finds; an exception is a failure."""
        began = time.monotonic()
        try:
            figure, ok = work()
        except Exception as error:
            figure, ok = f"{type(error).__name__}: {str(error).strip()[-300:]}", False
        self.rows.append(Row(self.mode, name, figure, ok))
        verdict = "ok" if ok else "FAILED"
        tell(f"{self.mode}: {name}: {figure}: {verdict}, {time.monotonic() - began:.0f} s")

    def metrics(self, name: str) -> float:
        """The sum of one metric over its labels."""
        asked = urllib.request.Request(f"{self.url}/metrics", headers={"Authorization": f"Bearer {KEY}"})
        with urllib.request.urlopen(asked, timeout=10) as answer:
            lines = answer.read().decode().splitlines()
        found = [float(line.rpartition(" ")[2]) for line in lines if re.match(rf"minidisagg:{name}[ {{]", line)]
        if not found:
            raise ValueError(f"there is no metric {name}")
        return sum(found)


@contextlib.contextmanager
def server(python: str, mode: str, log: Path) -> Iterator[str]:
    """The address of a server, which must end well when asked to."""
    command = [python, "-m", "minidisagg", "serve", MODEL, "--mode", mode, "--dtype", "float32", "--port", "0"]
    with log.open("w") as out:
        process = subprocess.Popen([*command, "--api-key", KEY], stderr=out, stdout=out)
    try:
        deadline = time.monotonic() + 180
        while not (found := re.search(r"serving on (http://\S+)/v1", log.read_text())):
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"the server did not start:\n{log.read_text()}")
            time.sleep(0.2)
        yield found[1]
    finally:
        process.terminate()
        try:
            code = process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()
            raise
    if code:
        raise RuntimeError(f"the server ended with {code}:\n{log.read_text()[-2000:]}")


def tool(name: str, *arguments: str, folder: Path) -> None:
    """Run a command of this environment without network; raises RuntimeError with the end of what it said."""
    folder.mkdir(parents=True, exist_ok=True)
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "COLUMNS": "200"}
    home = {"HF_HOME": str(folder / "hf"), "OPENAI_API_KEY": KEY, "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(
        [str(Path(sys.executable).with_name(name)), *arguments],
        cwd=folder, env={**os.environ, **offline, **home}, capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    if done.returncode:
        raise RuntimeError(f"{name} ended with {done.returncode}: {(done.stdout + done.stderr)[-2000:]}")


# ---------------------------------------------------------------- guidellm


def guidellm(run: Run, endpoint: str, profile: str, count: int) -> tuple[str, bool]:
    """Every request done, by its own report, with as many tokens as it asked for."""
    folder = run.folder / f"guidellm-{profile.partition(',')[0]}"
    tool(
        "guidellm", "run", "--disable-console",
        "--backend", f"kind=openai_http,target={run.url},model={MODEL},request_format={endpoint},api_key={KEY}",
        "--profile", f"kind={profile}",
        "--constraint", f"kind=max_requests,count={count}",
        "--tokenizer", f"kind=huggingface_auto,model={run.expected['directory']}",
        "--data", "kind=synthetic_text,prompt_tokens=48,output_tokens=8",
        "--output", f"kind=json,path={folder / 'report.json'}",
        folder=folder,
    )  # fmt: skip
    metrics = json.loads((folder / "report.json").read_text())["benchmarks"][0]["metrics"]
    totals = metrics["request_totals"]
    tokens = metrics["output_token_count"]["successful"]["total_sum"]
    ttft = metrics["time_to_first_token_ms"]["successful"]["median"]
    failed = totals["errored"] + totals["incomplete"]
    figure = f"{totals['successful']} of {count} requests, {failed} failed, {tokens:.0f} tokens, TTFT {ttft:.0f} ms"
    return figure, failed == 0 and totals["successful"] == count and tokens == 8 * count


# ---------------------------------------------------------------- lm-eval


def lm_eval(run: Run, name: str, concurrency: int, batch: int) -> tuple[str, bool]:
    """Its log-likelihoods are the model's own."""
    folder, rows = run.folder / name, items()[name]
    folder.mkdir()
    lines = [json.dumps({"beginning": text, "ends": ends, "label": 0}) for text, ends in rows]
    (folder / "items.jsonl").write_text("\n".join(lines) + "\n")
    task = {
        "task": name, "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(folder / "items.jsonl")}},
        "test_split": "test", "output_type": "multiple_choice", "num_fewshot": 0, "doc_to_text": "{{beginning}}",
        "doc_to_choice": "ends", "doc_to_target": "label", "metric_list": [{"metric": "acc"}],
        "metadata": {"version": 1.0},
    }  # fmt: skip
    (folder / f"{name}.yaml").write_text(json.dumps(task))  # JSON is YAML
    arguments = (
        f"model={MODEL},base_url={run.url}/v1/completions,tokenizer={run.expected['directory']},"
        f"tokenizer_backend=huggingface,tokenized_requests=True,num_concurrent={concurrency},max_retries=1"
    )
    tool(
        "lm-eval", "run", "--model", "local-completions", "--model_args", arguments, "--batch_size", str(batch),
        "--tasks", name, "--include_path", str(folder), "--output_path", str(folder / "out"), "--log_samples",
        folder=folder,
    )  # fmt: skip
    (samples,) = (folder / "out").rglob(f"samples_{name}_*.jsonl")
    logged = sorted((json.loads(line) for line in samples.read_text().splitlines()), key=lambda row: row["doc_id"])
    found = [(float(score), str(greedy) == "True") for row in logged for ((score, greedy),) in row["resps"]]
    expected = run.expected["scores"][name]
    far = max(abs(a - b) for (a, _), (b, _, _) in zip(found, expected, strict=True))
    greedy = sum(a == b for (_, a), (_, b, _) in zip(found, expected, strict=True))
    right = sum(found[i][0] > found[i + 1][0] for i in range(0, len(found), 2))
    shortest, longest = (pick(tokens for _, _, tokens in expected) for pick in (min, max))
    figure = (
        f"{len(logged)} items of {shortest} to {longest} tokens, {len(found)} log-likelihoods, largest difference "
        f"{far:.1e}, is_greedy equal {greedy}, accuracy {right}/{len(logged)}"
    )
    long_enough = name != "long_statements" or shortest >= LONGER_THAN
    return figure, len(logged) == len(rows) and far <= TOLERANCE and greedy == len(expected) and long_enough


# ---------------------------------------------------------------- the openai package


def _equal(run: Run, texts: list[str]) -> tuple[str, bool]:
    same = sum(a == b for a, b in zip(texts, run.expected["texts"], strict=True))
    return f"{same} of {len(PROMPTS)} texts equal the offline API's", same == len(PROMPTS)


def openai_sync(run: Run) -> tuple[str, bool]:
    """Whole answers, one after another."""
    import openai

    with openai.OpenAI(base_url=f"{run.url}/v1", api_key=KEY, max_retries=0) as client:
        if MODEL not in [model.id for model in client.models.list()]:
            return f"{MODEL} is not among the models", False
        made = [
            client.completions.create(model=MODEL, prompt=prompt, temperature=0, max_tokens=MAX_TOKENS)
            for prompt in PROMPTS
        ]
    return _equal(run, [answer.choices[0].text for answer in made])


def openai_async(run: Run) -> tuple[str, bool]:
    """Streams, all at once."""
    import openai

    async def one(client: openai.AsyncOpenAI, prompt: str) -> str:
        stream = await client.completions.create(
            model=MODEL, prompt=prompt, temperature=0, max_tokens=MAX_TOKENS, stream=True,
            stream_options={"include_usage": True},
        )  # fmt: skip
        chunks = [chunk async for chunk in stream]
        usage, tokens = chunks[-1].usage, sum(len(chunk.choices) for chunk in chunks)
        if chunks[-1].choices or usage is None or usage.completion_tokens != tokens:
            raise ValueError(f"the last chunk is {chunks[-1]}, after {tokens} tokens")
        return "".join(chunk.choices[0].text for chunk in chunks[:-1])

    async def every() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{run.url}/v1", api_key=KEY, max_retries=0) as client:
            return await asyncio.gather(*(one(client, prompt) for prompt in PROMPTS))

    return _equal(run, asyncio.run(every()))


def openai_chat(run: Run) -> tuple[str, bool]:
    """The stream says what the whole answer says."""
    import openai

    asked: Any = {
        "model": MODEL, "temperature": 0, "max_completion_tokens": 16,
        "messages": [{"role": "user", "content": [{"type": "text", "text": "Name a colour."}]}],
    }  # fmt: skip
    with openai.OpenAI(base_url=f"{run.url}/v1", api_key=KEY, max_retries=0) as client:
        whole = client.chat.completions.create(**asked).choices[0].message.content
        chunks = list(client.chat.completions.create(**asked, stream=True))
    streamed = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    return f"{len(chunks)} chunks, {whole!r}", bool(whole) and streamed == whole


def openai_errors(run: Run) -> tuple[str, bool]:
    """Each error comes as the class, parameter and code that programs look at."""
    import openai

    wrong: list[tuple[str, dict[str, Any], str | None, str | None]] = [
        ("BadRequestError", {"temperature": 7.0}, "temperature", None),
        ("BadRequestError", {"max_tokens": 1 << 20}, "prompt", "context_length_exceeded"),
        ("BadRequestError", {"logit_bias": {"5": 1}}, "logit_bias", None),
        ("NotFoundError", {"model": "gpt-9"}, "model", "model_not_found"),
        ("AuthenticationError", {"extra_headers": {"Authorization": "Bearer no"}}, None, "invalid_api_key"),
    ]
    misses = []
    with openai.OpenAI(base_url=f"{run.url}/v1", api_key=KEY, max_retries=0) as client:
        for kind, change, param, code in wrong:
            for stream in (False, True):
                asked: Any = {"model": MODEL, "prompt": "a", "max_tokens": 4, "stream": stream, **change}
                try:
                    client.completions.create(**asked)
                    misses.append(f"no {kind}")
                except openai.APIStatusError as error:
                    found = type(error).__name__, error.param, error.code
                    if found != (kind, param, code) or not error.request_id:
                        misses.append(f"{found}, not {(kind, param, code)}")
    return ", ".join(misses) or f"{2 * len(wrong)} errors as they should be", not misses


def openai_disconnect(run: Run) -> tuple[str, bool]:
    """A client leaves while it waits for an answer, in a stream, or by cancelling: nothing stays behind."""
    import openai

    long: Any = {"model": MODEL, "prompt": "one two " * 200, "max_tokens": 500, "extra_body": {"ignore_eos": True}}

    async def cancelled() -> None:
        async with openai.AsyncOpenAI(base_url=f"{run.url}/v1", api_key=KEY, max_retries=0) as client:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(client.completions.create(**{**long, "prompt": "Hello", "n": 2}), 1.0)

    def left() -> float:
        names = ("cluster_running", "cluster_waiting", "num_requests_running", "num_requests_held")
        return sum(run.metrics(name) for name in (*names, "kv_cache_usage_perc"))

    took = []
    with openai.OpenAI(base_url=f"{run.url}/v1", api_key=KEY, max_retries=0) as client:

        def while_it_waits() -> None:
            with contextlib.suppress(openai.APITimeoutError):
                client.completions.create(**long, timeout=0.2)
                raise ValueError("it did not time out")

        def in_the_stream() -> None:
            with client.completions.create(**{**long, "prompt": "Hello"}, stream=True) as stream:
                for _ in zip(range(3), stream, strict=False):
                    pass

        for leave in (while_it_waits, in_the_stream, lambda: asyncio.run(cancelled())):
            leave()
            began = time.monotonic()
            time.sleep(0.5)  # workers report four times a second
            while left() and time.monotonic() - began < GONE_WITHIN:
                time.sleep(0.05)
            took.append(time.monotonic() - began)
    return "gone after " + ", ".join(f"{seconds:.1f} s" for seconds in took), max(took) < GONE_WITHIN


# ---------------------------------------------------------------- all of it


def check_mode(python: str, mode: str, expected: dict[str, Any], folder: Path) -> list[Row]:
    """Start a server in `mode` and let every client at it."""
    folder.mkdir()
    rows: list[Row] = []
    try:
        with server(python, mode, folder / "server.log") as url:
            run = Run(mode, url, expected, folder, rows)
            run.check("openai, sync", lambda: openai_sync(run))
            run.check("openai, async streams", lambda: openai_async(run))
            run.check("openai, chat", lambda: openai_chat(run))
            run.check("openai, errors", lambda: openai_errors(run))
            run.check("openai, disconnects", lambda: openai_disconnect(run))
            run.check("lm-eval, short items", lambda: lm_eval(run, "plain_statements", concurrency=2, batch=4))
            run.check("lm-eval, one prefix, one by one",
                      lambda: lm_eval(run, "long_statements", concurrency=1, batch=1))  # fmt: skip
            run.check("guidellm, completions, synchronous", lambda: guidellm(run, "/v1/completions", "synchronous", 10))
            run.check("guidellm, chat, 1 request/s",
                      lambda: guidellm(run, "/v1/chat/completions", "constant,rate=1", 20))  # fmt: skip
        rows.append(Row(mode, "the server ends when asked to", "exit status 0", True))
    except RuntimeError as error:
        rows.append(Row(mode, "the server", str(error), False))
    return rows


def main() -> int:
    """The checks, as a table or as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--python", default=sys.executable, help="interpreter that has minidisagg")
    parser.add_argument("--mode", choices=("colocated", "disagg", "both"), default="both")
    parser.add_argument("--json", action="store_true", help="the result as JSON on stdout")
    parser.add_argument("--reference", action="store_true", help="print what the answers must be")
    asked = parser.parse_args()
    if asked.reference:
        sys.stdout.write(json.dumps(reference()))
        return 0
    tell("computing what the answers must be")
    made = subprocess.run([asked.python, __file__, "--reference"], stdout=subprocess.PIPE, text=True)
    if made.returncode:
        tell(f"{asked.python} cannot compute them")
        return 2
    expected = json.loads(made.stdout)
    with tempfile.TemporaryDirectory(prefix="minidisagg-clients-") as folder:
        rows = [
            row
            for mode in (("colocated", "disagg") if asked.mode == "both" else (asked.mode,))
            for row in check_mode(asked.python, mode, expected, Path(folder) / mode)
        ]
    if asked.json:
        sys.stdout.write(json.dumps([asdict(row) for row in rows], indent=1) + "\n")
    else:
        widths = [max(len(getattr(row, name)) for row in rows) for name in ("mode", "check")]
        for row in rows:
            verdict = "ok    " if row.ok else "FAILED"
            sys.stdout.write(f"{row.mode:{widths[0]}}  {verdict}  {row.check:{widths[1]}}  {row.figure}\n")
    return 0 if all(row.ok for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
