#!/usr/bin/env bash
# From a fresh clone to an answer: installs into .venv, gets the default model, and compares colocated with
# disaggregated serving on this machine. Give it flags of `minidisagg bench` to compare something else.
set -euo pipefail
# shellcheck source=scripts/setup.sh
. "$(dirname "${BASH_SOURCE[0]}")/setup.sh"

set_up run
say "minidisagg bench --mode both --preset quick $*"
"$VENV/bin/minidisagg" bench --mode both --preset quick --result-dir "$ROOT/bench-results" "$@"

cat <<END

Next:
  source $(printf %q "$VENV/bin/activate")
  minidisagg chat --mode disagg
  minidisagg bench --mode disagg --against colocated:sarathi --preset quick
  minidisagg bench --mode both --find-goodput --preset quick
END
