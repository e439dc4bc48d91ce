"""The A/A control: colocated against colocated must name no winner in at least nine of ten seeds.

    python scripts/aa_control.py --seeds 10 -- --num-prompts 60 --request-rate 0.5x

What follows `--` goes to `minidisagg bench`. Prints a line per seed, then JSON with the command and the machine.
"""

from __future__ import annotations

import json
import subprocess
import sys
from argparse import ArgumentParser, RawDescriptionHelpFormatter

from minidisagg.measure.machine import command_line, machine


def main() -> int:
    """Returns 0 if the control holds."""
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("flags", nargs="*")
    arguments = parser.parse_args()
    verdicts: dict[str, str] = {}  # by seed
    for seed in range(arguments.seeds):
        command = [
            sys.executable, "-m", "minidisagg", "bench", "--mode", "colocated", "--against", "colocated",
            "--seed", str(seed), "--json", *arguments.flags,
        ]  # fmt: skip
        done = subprocess.run(command, stdout=subprocess.PIPE, check=True)
        verdicts[str(seed)] = json.loads(done.stdout)["verdict"]
        sys.stdout.write(f"seed {seed}: {verdicts[str(seed)]}\n")
        sys.stdout.flush()
    quiet = sum(verdict.startswith("No winner") for verdict in verdicts.values())
    result = {"command": command_line(), "machine": machine(), "seeds": arguments.seeds, "no_winner": quiet}
    sys.stdout.write(json.dumps({**result, "verdicts": verdicts}, indent=1) + "\n")
    return 0 if quiet >= 0.9 * arguments.seeds else 1


if __name__ == "__main__":
    sys.exit(main())
