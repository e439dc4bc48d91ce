"""`python -m minidisagg.policies`: is this policy fit to be used? Asked by whoever does not want to try it himself.

On stdin JSON: [name, {worker: [role, options]}]. Exit code 0: it passes its rehearsal; else stdout says why not.
"""

from __future__ import annotations

import sys

import msgspec

from minidisagg.core.messages import Role, WorkerOptions
from minidisagg.policies import rehearse


def main() -> int:
    """The exit code."""
    asked = tuple[str, dict[str, tuple[Role, WorkerOptions]]]
    spec, workers = msgspec.json.decode(sys.stdin.buffer.read(), type=asked)
    out, sys.stdout = sys.stdout, sys.stderr  # what the file itself prints is no reason
    try:
        rehearse(spec, workers)
    except ValueError as error:
        out.write(" ".join(str(error).split()))
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
