#!/usr/bin/env bash
# All checks, as CI runs them. --full adds the slow tests; other arguments go to pytest. What runs is decided by the
# tests' marks alone (tests/conftest.py).
set -euo pipefail
# shellcheck source=scripts/setup.sh
. "$(dirname "${BASH_SOURCE[0]}")/setup.sh"

marks="not slow and not gpu"
if [[ ${1:-} == --full ]]; then
    shift
    marks="not gpu"
    ! command -v nvidia-smi >/dev/null || marks="gpu or not gpu"
fi
set_up dev
cd "$ROOT"
export PATH=$VENV/bin:$PATH
failed=()

check() { # check NAME COMMAND...: a header, the command, its seconds; goes on where it fails
    local name=$1 began=$SECONDS
    shift
    say "$name"
    "$@" || failed+=("$name")
    printf '   %s: %d s\n' "$name" $((SECONDS - began))
}

check "size and forbidden calls" python scripts/check_size.py
check "ruff" ruff check .
check "import contracts" lint-imports
# Beside the tests, which leave a core idle now and then.
types=$(mktemp)
trap 'rm -f "$types"' EXIT
nice mypy >"$types" 2>&1 &
mypy=$!
types_checked() {
    local status=0
    wait "$mypy" || status=$?
    cat "$types"
    return "$status"
}
# Two processes: one computes while the other waits for a cluster. A file stays in one, for what its tests share.
check "tests" python -m pytest -n 2 --dist loadfile -m "$marks" "$@"
check "mypy" types_checked

if ((${#failed[@]})); then
    printf '\nfailed: %s\n' "$(IFS=,; echo "${failed[*]}")" >&2
    exit 1
fi
printf '\nall checks pass, %d s\n' "$SECONDS"
