"""The offline API: `LLM(...).generate(prompts, SamplingParams(...))`."""

from __future__ import annotations

import asyncio
import atexit
import threading
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import msgspec

from minidisagg.config import DEFAULT_MODEL, ClusterSettings, ModelSettings, RunSettings
from minidisagg.core.messages import SamplingParams
from minidisagg.core.tracked import StageTimes
from minidisagg.model.pull import ensure
from minidisagg.model.tokenizer import Tokenizer
from minidisagg.runtime.frontend import Frontend
from minidisagg.runtime.output import OutputProcessor, TokenText, with_stops

T = TypeVar("T")
Prompt = str | list[int]
OnText = Callable[[str], None]


@dataclass(frozen=True)
class Output:
    """What came of one prompt. `finish_reason` is "stop" or "length"; anything else raises instead."""

    text: str
    token_ids: list[int]
    prompt_token_ids: list[int]
    finish_reason: str
    times: StageTimes | None


class GenerationError(RuntimeError):
    """The engine could not finish a request; one line."""


async def complete(
    frontend: Frontend, tokenizer: Tokenizer, prompt: Prompt, sampling: SamplingParams, on_text: OnText | None = None,
    session: str = "",
) -> Output:  # fmt: skip
    """One request to its end, a turn of `session`; `on_text` hears each part of text as soon as it is final."""
    ids = tokenizer.encode(prompt) if isinstance(prompt, str) else list(prompt)
    processor = OutputProcessor(tokenizer, sampling)
    parts: list[TokenText] = []
    times = None
    stream = frontend.generate(ids, with_stops(sampling, tokenizer), session=session)
    try:
        async for emit in stream:
            for part in processor.push(emit):
                parts.append(part)
                if part.text and on_text is not None:
                    on_text(part.text)
            times = emit.times
            if processor.finish:
                break
            if emit.finish:
                raise GenerationError(emit.error or emit.finish)
    finally:
        await stream.aclose()  # type: ignore[attr-defined]
    text = "".join(part.text for part in parts)
    return Output(text, [part.token for part in parts], ids, processor.finish, times)


class LLM:
    """A cluster of workers behind a blocking interface.

        with LLM("smollm2-135m", mode="disagg") as llm:
            for output in llm.generate(["The capital of France is"], SamplingParams(temperature=0.0, max_tokens=8)):
                ...

    `settings` are the fields of `ClusterSettings` (mode, prefill_workers, prefill, link, policy, …) and of
    `ModelSettings` (max_model_len, block_size, …). Raises `ValueError` or `StartError` in one line.
    """

    def __init__(self, model: str = DEFAULT_MODEL, *, seed: int = 0, **settings: Any) -> None:
        ensure(model)
        model_fields = {field.name for field in msgspec.structs.fields(ModelSettings)}
        of_model = {key: value for key, value in settings.items() if key in model_fields}
        of_cluster = {key: value for key, value in settings.items() if key not in model_fields}
        self.tokenizer = Tokenizer.load(model)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="minidisagg-llm", daemon=True)
        self._thread.start()
        try:
            colocated = of_cluster.get("mode", "colocated") == "colocated"
            one_worker: dict[str, Any] = {"prefill_workers": 1, "decode_workers": 0} if colocated else {}
            cluster = ClusterSettings(**one_worker | of_cluster)
            self.frontend = self._run(
                Frontend.start(ModelSettings(model=model, **of_model), cluster, RunSettings(seed=seed))
            )
        except BaseException:
            self._end_loop()
            raise
        atexit.register(self.close)  # a script that forgets it leaves no sockets behind

    def generate(
        self, prompts: Prompt | Sequence[Prompt], sampling: SamplingParams | Sequence[SamplingParams] | None = None
    ) -> list[Output]:
        """All prompts (text or token ids) at once, continuously batched; outputs in the order of the prompts.

        `sampling` is for all prompts, or one for each. Raises `ValueError` and `GenerationError` in one line.
        """
        batch = [prompts] if isinstance(prompts, str) or (prompts and isinstance(prompts[0], int)) else prompts
        each = sampling if isinstance(sampling, Sequence) else [sampling or SamplingParams()] * len(batch)
        if len(each) != len(batch):
            raise ValueError(f"{len(batch)} prompts, but {len(each)} sampling parameters")

        async def all_of_them() -> list[Output]:
            pairs = zip(batch, each, strict=True)
            jobs = [complete(self.frontend, self.tokenizer, prompt, params) for prompt, params in pairs]  # type: ignore[arg-type]
            try:
                async with asyncio.TaskGroup() as group:  # the first failure aborts the others
                    tasks = [group.create_task(job) for job in jobs]
            except ExceptionGroup as failed:
                raise failed.exceptions[0] from None
            return [task.result() for task in tasks]

        return self._run(all_of_them())

    def stream(self, prompt: Prompt, on_text: OnText, sampling: SamplingParams | None = None) -> Output:
        """One prompt; `on_text` is called from the engine's thread with each part of text."""
        return self._run(complete(self.frontend, self.tokenizer, prompt, sampling or SamplingParams(), on_text))

    def close(self) -> None:
        """Stop the workers."""
        atexit.unregister(self.close)
        if self._thread.is_alive():
            self._run(self.frontend.stop())
            self._end_loop()

    def __enter__(self) -> LLM:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _run(self, work: Coroutine[Any, Any, T]) -> T:
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return future.result()
        except BaseException:  # Ctrl-C too: what runs is aborted
            future.cancel()
            raise

    def _end_loop(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()
