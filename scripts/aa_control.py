"""The controls of a comparison: nothing where nothing is, and what was planted where something was.

    python scripts/aa_control.py --seeds 10 -- --num-prompts 60 --request-rate 0.5x
    python scripts/aa_control.py --seeds 10 --planted 15% -- --num-prompts 60 --repeats 5

Colocated against colocated, on one set of workers, must name no winner in at least nine of ten seeds. With `--planted`
each step of side B is longer by that share of its time, and at least eight of ten seeds must name B as the worse one.
What follows `--` goes to `minidisagg bench`. Prints a line per seed, then JSON with the command and the machine.
"""

from __future__ import annotations

import json
import subprocess
import sys
from argparse import ArgumentParser, RawDescriptionHelpFormatter

from minidisagg.measure.machine import command_line, machine

QUIET, NAMED = 0.9, 0.8  # least shares of the seeds


def main() -> int:
    """Returns 0 if the control holds."""
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=10, help="How many.")
    parser.add_argument("--first", type=int, default=0, help="The first of them.")
    parser.add_argument("--planted", default="", metavar="SHARE", help="15%%: so much longer are the steps of side B.")
    parser.add_argument("flags", nargs="*")
    arguments = parser.parse_args()
    planted = ["--plant-slowdown", arguments.planted] if arguments.planted else []
    verdicts: dict[str, str] = {}  # by seed
    right = 0
    for seed in range(arguments.first, arguments.first + arguments.seeds):
        command = [
            sys.executable, "-m", "minidisagg", "bench", "--mode", "colocated", "--against", "colocated",
            "--seed", str(seed), "--json", *planted, *arguments.flags,
        ]  # fmt: skip
        done = subprocess.run(command, stdout=subprocess.PIPE, check=True)
        result = json.loads(done.stdout)
        verdicts[str(seed)] = verdict = result["verdict"]
        b, a = reversed(result["sides"])
        right += verdict.startswith(f"{b} is worse than {a}:" if planted else "No winner")
        tpot = result["ratios"]["mean_tpot"]
        sys.stdout.write(f"seed {seed}: TPOT {tpot['ratio']:.3f} [{tpot['low']:.3f}, {tpot['high']:.3f}]: {verdict}\n")
        sys.stdout.flush()
    found = {"planted": arguments.planted, "named": right} if planted else {"no_winner": right}
    result = {"command": command_line(), "machine": machine(), "seeds": arguments.seeds, **found}
    sys.stdout.write(json.dumps({**result, "verdicts": verdicts}, indent=1) + "\n")
    return 0 if right >= (NAMED if planted else QUIET) * arguments.seeds else 1


if __name__ == "__main__":
    sys.exit(main())
