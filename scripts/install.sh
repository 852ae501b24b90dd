#!/usr/bin/env bash
# Make a virtual environment and install this project into it, editable.
#
#   scripts/install.sh VENV [EXTRAS]      e.g.  scripts/install.sh .venv dev,cpu
#
# PYTHON names the interpreter (default python3); it must be 3.11 or newer.
set -euo pipefail

TORCH="torch==2.13.0"

if [[ $# -lt 1 || $# -gt 2 ]]; then
    echo "usage: $0 VENV [EXTRAS]   for example: $0 .venv dev,cpu" >&2
    exit 2
fi
venv=$1
extras=${2:-}
python=${PYTHON:-python3}
cd "$(dirname "$0")/.."

if ! command -v "$python" >/dev/null; then
    echo "'$python' is not on the path: install Python 3.11, or name another interpreter with PYTHON=/path/to/python" >&2
    exit 1
fi
if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
    echo "$("$python" --version) is too old, 3.11 is needed: name another interpreter with PYTHON=/path/to/python3.11" >&2
    exit 1
fi
if [[ ! -x "$venv/bin/python" ]]; then
    if ! "$python" -m venv "$venv"; then
        echo "'$python -m venv' failed: on Debian and Ubuntu install the package python3-venv" >&2
        exit 1
    fi
fi
pip=("$venv/bin/python" -m pip install --quiet --disable-pip-version-check)

# Editable installs from setup.cfg alone need pip 21.3; anything newer is left as it is.
if ! "$venv/bin/python" -c 'import pip, sys; sys.exit(tuple(int(n) for n in pip.__version__.split(".")[:2]) < (21, 3))'; then
    "${pip[@]}" --upgrade pip
fi

# torch goes first and alone: the whole matrix hangs on this version, and whichever build of it (CPU or CUDA) the
# machine's pip is set up to take is then kept by everything that follows.
echo "installing $TORCH into $venv"
"${pip[@]}" "$TORCH"
echo "installing rex-rag${extras:+ with extras $extras}"
"${pip[@]}" --editable ".${extras:+[$extras]}"
