"""A dry call of every hook of a policy, before anybody depends on it: the cluster in little, without clock or device.

A few requests go through the production router and engines, whose pools are so small that something has to be evicted.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping

from minidisagg.core.checked import PolicyError, policy_name
from minidisagg.core.effects import AbortLink, Effect, Send, StartPiece, drain
from minidisagg.core.engine import EngineCore
from minidisagg.core.inputs import AbortConfirmed, PieceDone, Received, Schedule, StepDone, Tick
from minidisagg.core.messages import ROUTER, Envelope, Hello, RequestSpec, Role, SamplingParams
from minidisagg.core.policy import Policy, WorkerOptions
from minidisagg.core.router import Router, RouterSpec
from minidisagg.core.spec import EngineSpec
from minidisagg.core.tracked import Emit

Workers = Mapping[str, tuple[Role, WorkerOptions]]
PROMPT, OUTPUT, REQUESTS = 6, 8, 3  # tokens of each, and how many requests
PAGES, PAGE_SIZE = 8, 4  # hold two whole requests
MOST = 16  # workers of a role: each tells of itself to all others
TURN, TURNS = 0.25, 400  # seconds that each turn pretends to take; a policy may well keep everybody waiting


def rehearse(make_policy: Callable[[], Policy], workers: Workers) -> None:
    """Raises `PolicyError` in one line if a hook raises, answers nonsense, or leaves work undone for ever."""
    stage = _Stage(make_policy, workers)
    try:
        stage.play()
    except PolicyError:
        raise
    except Exception as error:  # whatever it did to what it was shown
        what = f"{type(error).__name__}: {error}".partition("\n")[0]
        raise PolicyError(f"policy {policy_name(stage.router.policy)}: a rehearsal ends in {what}") from error


class _Stage:
    def __init__(self, make_policy: Callable[[], Policy], workers: Workers) -> None:
        self.now = 0.0
        self.router = Router(RouterSpec(), make_policy())
        self.cores = {}
        roles = Counter[Role]()
        for name, (role, options) in workers.items():
            roles[role] += 1
            if roles[role] > MOST:
                continue
            spec = EngineSpec(name, 1, role, PAGES, PAGE_SIZE, 1, "", options=options)
            self.cores[name] = EngineCore(spec, lambda _: make_policy())
            hello = Hello(role, PAGES, PAGE_SIZE, PAGES * PAGE_SIZE, "", "", 0, 1)
            self.router.on_message(Envelope(name, 1, hello), self.now)

    def play(self) -> None:
        for number in range(REQUESTS):
            sampling = SamplingParams(max_tokens=OUTPUT, temperature=0.0)
            spec = RequestSpec(prompt=[number] * PROMPT, sampling=sampling, priority=number)
            self.router.on_request(f"rehearsal-{number}", spec, self.now)
        for _ in range(TURNS):
            self._settle()
            if not self.router.requests:
                return
            self.now += TURN
            self.router.on_tick(self.now)
            for name, core in self.cores.items():
                core.on(Tick(), self.now)
                self.router.on_message(Envelope(name, 1, core.stats()), self.now)
                if (plan := core.on(Schedule(), self.now)) is not None:
                    core.on(StepDone(plan.step_id, [0] * sum(item.sample for item in plan.items), 0.01), self.now)

    def _settle(self) -> None:
        """Deliver until nobody has anything to say."""
        while self.router.outbox or any(core.outbox for core in self.cores.values()):
            for effect in drain(self.router.outbox):
                if isinstance(effect, Send):
                    self.cores[effect.dest].on(Received(Envelope(ROUTER, 0, effect.body)), self.now)
                elif isinstance(effect, Emit) and effect.finish == "error":
                    raise PolicyError(effect.error)
            for core in self.cores.values():
                for wanted in drain(core.outbox):
                    self._carry_out(core, wanted)

    def _carry_out(self, core: EngineCore, effect: Effect) -> None:
        if isinstance(effect, Send):
            envelope = Envelope(core.spec.name, 1, effect.body)
            if effect.dest == ROUTER:
                self.router.on_message(envelope, self.now)
            else:
                self.cores[effect.dest].on(Received(envelope), self.now)
        elif isinstance(effect, StartPiece):
            piece = effect.piece
            core.on(PieceDone(piece.peer, piece.link_epoch, piece.seq, piece.send, ok=True), self.now)
        elif isinstance(effect, AbortLink):
            core.on(AbortConfirmed(effect.peer, effect.link_epoch, effect.outgoing), self.now)
