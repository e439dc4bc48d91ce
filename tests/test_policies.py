"""The published policies compose what their docstrings say; a name on the command line becomes a policy."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from msgspec.structs import replace
from stepwise import spec
from test_engine import Hand, sizes, submit

from minidisagg.core.messages import RequestSpec, Role, SamplingParams
from minidisagg.core.policy import ClusterView, Placement, Policy, Reject, WorkerOptions, WorkerStatus
from minidisagg.core.tracked import Tracked
from minidisagg.policies import load_policy, names, pinned, rehearse, shown
from minidisagg.policies.prefill_first import PrefillFirst
from minidisagg.policies.sarathi import Sarathi


def running_decode(policy: Policy, **options: int) -> Hand:
    """One request decodes; two prompts of 6 and 5 tokens have come since."""
    hand = Hand(spec("w", options=WorkerOptions(**options)), policy)
    hand.receive(submit("old", 4, arrival=0.0))
    hand.step()
    hand.receive(submit("b", 5, arrival=2.0), submit("a", 6, arrival=1.0))
    return hand


def test_fcfs_fuses_whole_prompts_with_the_decodes() -> None:
    hand = running_decode(load_policy("fcfs"))
    assert sizes(hand.step()) == {"old": (4, 1), "a": (0, 6), "b": (0, 5)}


def test_fcfs_keeps_within_the_budgets_and_the_order() -> None:
    hand = running_decode(load_policy("fcfs"), max_num_batched_tokens=8)
    assert sizes(hand.step()) == {"old": (4, 1), "a": (0, 6), "b": (0, 1)}
    assert sizes(hand.step()) == {"old": (5, 1), "a": (6, 1), "b": (1, 4)}
    hand = running_decode(load_policy("fcfs"), max_num_seqs=2)
    assert sizes(hand.step()) == {"old": (4, 1), "a": (0, 6)}


def test_prefill_first_runs_prompts_alone() -> None:
    hand = running_decode(PrefillFirst())
    assert sizes(hand.step()) == {"a": (0, 6), "b": (0, 5)}
    assert sizes(hand.step()) == {"old": (4, 1), "a": (6, 1), "b": (5, 1)}


def test_sarathi_serves_all_decodes_and_cuts_prompts_to_its_budget() -> None:
    hand = running_decode(Sarathi(chunk=4))
    assert sizes(hand.step()) == {"old": (4, 1), "a": (0, 3)}
    assert sizes(hand.step()) == {"old": (5, 1), "a": (3, 3)}
    assert sizes(hand.step()) == {"old": (6, 1), "a": (6, 1), "b": (0, 2)}


def test_sarathi_never_leaves_a_decode_out() -> None:
    hand = running_decode(Sarathi(chunk=20))
    hand.step()
    hand.core.scheduler.policy.chunk = 1  # type: ignore[attr-defined]
    assert sizes(hand.step()) == {"old": (5, 1), "a": (6, 1), "b": (5, 1)}


def test_priority_goes_before_arrival() -> None:
    hand = Hand(spec("w", options=WorkerOptions(max_num_seqs=1)))
    first, urgent = submit("first", 4, arrival=0.0), submit("urgent", 4, arrival=1.0)
    hand.receive(first, replace(urgent, spec=replace(urgent.spec, priority=1)))
    assert sizes(hand.step()) == {"urgent": (0, 4)}


def test_a_dynamic_order_is_asked_for_each_step() -> None:
    class Youngest(Policy):
        dynamic_order = True

        def order(self, request: object, stage: str, worker: object) -> float:
            return self.sign * request.arrival  # type: ignore[attr-defined, no-any-return]

        sign = 1.0

    policy = Youngest()
    hand = Hand(spec("w", options=WorkerOptions(max_num_seqs=1)), policy)
    hand.receive(submit("a", 4, arrival=1.0), submit("b", 4, arrival=2.0))
    policy.sign = -1.0
    assert sizes(hand.step()) == {"b": (0, 4)}


def cluster(**roles: Role) -> ClusterView:
    return ClusterView(0.0, {name: WorkerStatus(name, 1, role, 64, 4) for name, role in roles.items()})


def test_placement_takes_the_least_loaded() -> None:
    view = cluster(p0=Role.PREFILL, p1=Role.PREFILL, d0=Role.DECODE, d1=Role.DECODE)
    view.workers["p0"].changed(queued_tokens=10)
    view.workers["d0"].changed(decoding=1)
    request = Tracked("a", RequestSpec(prompt=[1], sampling=SamplingParams()), 0.0).view
    assert Policy().place(request, view) == Placement("p1", "d1")
    assert Policy().place(request, cluster(w=Role.BOTH)) == Placement("w", "w")
    assert isinstance(Policy().place(request, cluster(p=Role.PREFILL)), Reject)
    assert isinstance(Policy().place(request, cluster(d=Role.DECODE)), Reject)


def test_a_policy_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "mine.py"
    path.write_text(
        "from __future__ import annotations\nfrom dataclasses import dataclass\n"
        "from minidisagg.core.policy import Policy\n"
        "@dataclass\nclass Note:\n    text: str\n"
        "class Mine(Policy):\n    def __init__(self, depth: int = 1) -> None:\n        super().__init__()\n"
        "        self.depth, self.note = depth, Note('x')\n"
    )
    policy = load_policy(f"{path}:Mine:depth=3")
    assert (type(policy).__name__, policy.depth) == ("Mine", 3)  # type: ignore[attr-defined]


def test_a_pinned_policy_is_what_its_file_was(tmp_path: Path) -> None:
    path, source = tmp_path / "mine.py", "from minidisagg import Policy\nclass Mine(Policy):\n    version = {}\n"
    path.write_text(source.format(1))
    spec = f"{path}:Mine"
    kept = pinned(spec)
    path.write_text(source.format(2))  # as long as before, and in the same second
    assert [load_policy(one).version for one in (spec, kept)] == [2, 1]  # type: ignore[attr-defined]
    path.unlink()
    assert load_policy(pinned(kept)).version == 1  # type: ignore[attr-defined]
    assert shown(kept) == spec == shown(spec) and pinned("sarathi:chunk=4") == "sarathi:chunk=4"


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("x = 1\nclass Mine(\n", "line 2 fails: SyntaxError: '(' was never closed"),
        ("def f():\n    return {}['a']\n\nf()\n", "line 2 fails: KeyError: 'a'"),
        ("import json\njson.loads('x')\n", "line 2 fails: JSONDecodeError: "),
    ],
    ids=["syntax", "inside", "elsewhere"],
)
def test_a_file_that_fails_is_told_with_its_line(source: str, said: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.py"
    path.write_text(source)
    with pytest.raises(ValueError, match=f"^policy file {path}, {re.escape(said)}"):
        load_policy(f"{path}:Mine")


def file_of(tmp_path: Path, *body: str) -> Path:
    path = tmp_path / "mine.py"
    path.write_text("\n".join(("from minidisagg import Policy", "class Mine(Policy):", *(f"    {b}" for b in body))))
    return path


ALONE = {"w": (Role.BOTH, WorkerOptions())}


def test_a_class_that_is_alone_in_its_file_needs_no_name(tmp_path: Path) -> None:
    path = file_of(tmp_path, "pass")
    assert type(load_policy(str(path))).__name__ == "Mine" and type(load_policy(pinned(str(path)))).__name__ == "Mine"
    path.write_text(path.read_text() + "\nclass Yours(Mine): ...\n")
    with pytest.raises(ValueError, match=f"say {path}:CLASS; it has Mine, Yours$"):
        load_policy(str(path))
    with pytest.raises(ValueError, match=r"named Ours; it has Mine, Yours$"):
        load_policy(f"{path}:Ours")


def test_what_a_hook_does_wrong_is_told_with_its_line(tmp_path: Path) -> None:
    path = file_of(tmp_path, "def help(self):", "    return {}['a']", "def place(self, request, cluster):",
                   "    return self.help()")  # fmt: skip
    with pytest.raises(ValueError, match=rf"^policy Mine: place raised KeyError: 'a' \({path}, line 4\)$"):
        rehearse(f"{path}:Mine", ALONE)
    path = file_of(tmp_path, "", "def place(self, request, cluster):", "    return 5")
    with pytest.raises(ValueError, match=rf"place answered 5, not Placement or Reject \({path}, line 4\)$"):
        rehearse(f"{path}:Mine", ALONE)
    path = file_of(tmp_path, "def __init__(self):", "    import nowhere")
    with pytest.raises(ValueError, match=rf"cannot be made: ModuleNotFoundError: .*nowhere.* \({path}, line 4\)$"):
        rehearse(f"{path}:Mine", ALONE)


def test_an_endless_loop_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("minidisagg.policies.PATIENCE", 0.2)
    path = file_of(tmp_path, "def order(self, *_):", "    while True: pass")
    with pytest.raises(ValueError, match=rf"order raised TimeoutError: a rehearsal has to end .*{path}, line 4\)$"):
        rehearse(f"{path}:Mine", ALONE)


def test_a_hook_that_is_misspelt_is_told_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = file_of(tmp_path, "def ordr(self, *_): return 1", "def reorder(self): ...", "def helper(self): ...")
    for _ in range(2):
        rehearse(f"{path}:Mine", ALONE)
    assert [record.message for record in caplog.records] == [
        f"policy Mine: {name} is no hook, and is never asked: is it to be order?" for name in ("ordr", "reorder")
    ] + ["policy Mine has no hook of its own: it decides as fcfs does"]


def test_what_ships_has_no_name_that_is_nearly_a_hook(caplog: pytest.LogCaptureFixture) -> None:
    for name in names():
        rehearse(name, ALONE)
    assert not caplog.records


def test_settings_and_names() -> None:
    assert load_policy("sarathi:chunk=16").chunk == 16  # type: ignore[attr-defined]
    assert {"fcfs", "prefill_first", "sarathi"} <= set(names())


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nope", f"unknown policy 'nope'; there are {', '.join(names())}, or FILE.py:CLASS"),
        ("./nope.py:Mine", "policy file nope.py does not exist"),
        ("sarathi:chunk=0", "chunk must be a number of tokens, at least 1, not 0"),
        ("sarathi:chunk=big", "chunk must be a number of tokens, at least 1, not big"),
        ("sarathi:chunk=1.5", "not 1.5"),
        ("sarathi:size=4", "policy 'sarathi:size=4': it has no setting size; it has chunk"),
        ("sarathi:chunk", "expected KEY=VALUE, not 'chunk'"),
        ("fcfs:chunk=4", "policy Fcfs has no setting chunk"),
    ],
)
def test_a_mistake_is_told_in_one_line(name: str, message: str) -> None:
    with pytest.raises(ValueError) as caught:
        load_policy(name)
    assert message in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"), [("1 / 0", "ZeroDivisionError"), ("x = 1", "no subclass"), ("(", "SyntaxError")]
)
def test_a_file_that_is_no_policy(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "broken.py"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        load_policy(f"{path}:Mine")
