#!/usr/bin/env bash
# From a fresh clone to an answer: installs into .venv, gets the default model, and compares colocated with
# disaggregated serving on this machine. Give it flags of `minidisagg bench` to compare something else.
set -euo pipefail
# shellcheck source=scripts/setup.sh
. "$(dirname "${BASH_SOURCE[0]}")/setup.sh"

set_up run
results=$ROOT/bench-results
mkdir -p "$results"
touch "$VENV/minidisagg.began" # BSD's find compares with files only
say "minidisagg bench --mode both --preset quick $*"
"$VENV/bin/minidisagg" bench --mode both --preset quick --result-dir "$results" "$@"

latest=$(find "$results" -mindepth 1 -maxdepth 1 -type d -newer "$VENV/minidisagg.began" | sort | tail -n 1)
cat <<END

The whole report: ${latest:-none, nothing was measured}
Next:
  source $(printf %q "$VENV/bin/activate")
  minidisagg chat --mode disagg
  minidisagg bench --mode disagg --against colocated:sarathi --preset quick
  minidisagg bench --mode both --find-goodput --preset quick
END
