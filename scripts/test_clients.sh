#!/usr/bin/env bash
# Real clients (guidellm, lm-eval, the openai package) against `minidisagg serve`, colocated and disaggregated.
# They live in an environment of their own, $MINIDISAGG_CLIENTS_VENV (.venv-clients), which a second run finds ready.
# Arguments go to test_clients.py: --mode MODE, --json.
set -euo pipefail
# shellcheck source=scripts/setup.sh
. "$(dirname "${BASH_SOURCE[0]}")/setup.sh"

CLIENTS=${MINIDISAGG_CLIENTS_VENV:-$ROOT/.venv-clients}
WANTED=(guidellm "lm-eval[api]" openai)
PINS=$ROOT/scripts/test_clients.txt # versions of these and of all that they need

wanted_clients() { printf '%s %s' "${WANTED[*]}" "$(sha256sum "$PINS" | cut -c1-64)"; }

clients_are_ready() {
    [[ $(cat "$CLIENTS/clients.stamp" 2>/dev/null) == "$(wanted_clients)" ]] && "$CLIENTS/bin/python" -c '' 2>/dev/null
}

make_clients() {
    local python VENV=$CLIENTS # setup.sh's functions work on $VENV
    python=$(find_python) || exit
    make_venv
    install_torch # guidellm needs one; pip by itself would take the build with CUDA
    say "pip install ${WANTED[*]}, versions of ${PINS#"$ROOT"/}"
    "$VENV/bin/python" -m pip install -qq -c "$PINS" "${WANTED[@]}"
    wanted_clients >"$VENV/clients.stamp"
}

{ # the table or the JSON alone goes to stdout
    if clients_are_ready; then
        echo "clients in $CLIENTS: ready, nothing to download"
    else
        echo "clients in $CLIENTS: to download: ${WANTED[*]} and what they need (200 MB)," \
            "torch (190 MB where pip finds a CPU build)"
    fi
    set_up run
    clients_are_ready || make_clients
} >&2
exec "$CLIENTS/bin/python" "$ROOT/scripts/test_clients.py" --python "$VENV/bin/python" "$@"
