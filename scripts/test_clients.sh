#!/usr/bin/env bash
# Real clients (guidellm, lm-eval, the openai package) against `minidisagg serve`, colocated and disaggregated.
# They live in an environment of their own, $MINIDISAGG_CLIENTS_VENV (.venv-clients), which a second run finds ready.
# Arguments go to test_clients.py: --mode MODE, --json.
set -euo pipefail
# shellcheck source=scripts/setup.sh
. "$(dirname "${BASH_SOURCE[0]}")/setup.sh"

CLIENTS=${MINIDISAGG_CLIENTS_VENV:-$ROOT/.venv-clients}
PINS=("guidellm==0.8.1" "lm-eval[api]==0.4.13" "openai==3.54.0") # a set that installs together on Python 3.11

clients_are_ready() {
    [[ $(cat "$CLIENTS/clients.stamp" 2>/dev/null) == "${PINS[*]}" ]] && "$CLIENTS/bin/python" -c '' 2>/dev/null
}

make_clients() {
    local python VENV=$CLIENTS # setup.sh's functions work on $VENV
    python=$(find_python) || exit
    make_venv
    install_torch # guidellm needs one; pip by itself would take the build with CUDA
    say "pip install ${PINS[*]}"
    "$VENV/bin/python" -m pip install -qq "${PINS[@]}"
    printf '%s' "${PINS[*]}" >"$VENV/clients.stamp"
}

{ # the table or the JSON alone goes to stdout
    if clients_are_ready; then
        echo "clients in $CLIENTS: ready, nothing to download"
    else
        echo "clients in $CLIENTS: to download: ${PINS[*]} and what they need (200 MB)," \
            "torch (190 MB where pip finds a CPU build)"
    fi
    set_up run
    clients_are_ready || make_clients
} >&2
exec "$CLIENTS/bin/python" "$ROOT/scripts/test_clients.py" --python "$VENV/bin/python" "$@"
