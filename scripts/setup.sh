# Sourced by scripts/quickstart and scripts/test: makes `.venv` and sees to it that the
# simulator can draw. Safe to run again: whatever is in place already is left alone.
#
#   PYTHON=/path/to/python   use this interpreter (>= 3.12) instead of looking for one
#   MUJOCO_GL=egl|osmesa     insist on one rendering back-end
# shellcheck shell=bash

set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

VENV=.venv
EXTRAS="${EXTRAS:-dev}"

say() { printf '\033[1m==> %s\033[0m\n' "$*"; }
die() { printf '\033[1;31m%s\033[0m\n' "$*" >&2; exit 2; }

# Debian splits `venv` and `ensurepip` off, and a pyenv shim exists for versions that are switched off:
# only running the interpreter tells. 3.14 is left out until the simulator's packages have wheels for it.
is_suitable() {
    "$1" -c 'import sys, venv, ensurepip; sys.exit(not (3, 12) <= sys.version_info[:2] < (3, 14))' 2>/dev/null
}

find_python() {
    local candidate
    if [[ -n "${PYTHON:-}" ]]; then
        is_suitable "$PYTHON" || die "PYTHON=$PYTHON is not a Python 3.12 or 3.13 with venv and ensurepip."
        printf '%s' "$PYTHON"
        return
    fi
    for candidate in python3.12 python3.13 python3 python \
        "${PYENV_ROOT:-$HOME/.pyenv}"/versions/3.12*/bin/python \
        "${PYENV_ROOT:-$HOME/.pyenv}"/versions/3.13*/bin/python; do
        candidate="$(command -v "$candidate" 2>/dev/null)" || continue
        if is_suitable "$candidate"; then
            printf '%s' "$candidate"
            return
        fi
    done
    if command -v uv >/dev/null; then
        uv python install --quiet 3.12 >&2 && uv python find 3.12
        return
    fi
    die "No Python 3.12 or 3.13 was found on PATH or in pyenv, and uv is not installed. Install one of them, for
example with 'sudo apt-get install python3.12 python3.12-venv' or 'curl -LsSf https://astral.sh/uv/install.sh | sh',
or name an interpreter: PYTHON=/path/to/python $0"
}

make_venv() {
    if [[ -x "$VENV/bin/python" ]] && is_suitable "$VENV/bin/python"; then
        return
    fi
    local python
    python="$(find_python)"
    say "Making $VENV with $python"
    "$python" -m venv --clear "$VENV"
}

# uv resolves and unpacks several times faster than pip; where it cannot reach an index that pip is
# configured for, pip does the same job.
install_package() {
    local stamp="$VENV/.installed" wanted
    wanted="$(cat pyproject.toml - <<<"$PWD $EXTRAS" | sha256sum | cut -d' ' -f1)"
    if [[ -f "$stamp" && "$(cat "$stamp")" == "$wanted" ]]; then
        return
    fi
    say "Installing CogMerge [$EXTRAS] into $VENV (the first time downloads about 3 GB)"
    rm -f "$stamp"
    local started=$SECONDS
    "$VENV/bin/python" -m pip install --quiet --disable-pip-version-check uv
    "$VENV/bin/python" -m uv pip install --quiet --python "$VENV/bin/python" -e ".[$EXTRAS]" \
        || "$VENV/bin/python" -m pip install --quiet --disable-pip-version-check -e ".[$EXTRAS]"
    # openpi's client asks for numpy < 2, which nothing else here can live with, but runs with numpy 2.
    if [[ "$EXTRAS" == *dev* ]]; then
        "$VENV/bin/python" -m uv pip install --quiet --python "$VENV/bin/python" --no-deps openpi-client==0.1.2 \
            || "$VENV/bin/python" -m pip install --quiet --no-deps openpi-client==0.1.2
    fi
    # uv leaves compiling to the first import; where Python may not write bytecode, as in many containers,
    # every process would compile the libraries anew (17 instead of 8 CPU seconds to import the policy).
    # A file that does not compile is no reason to stop here: whoever imports it is told.
    "$VENV/bin/python" -W ignore -m compileall -qq -j 0 "$VENV"/lib/python3.*/site-packages || true
    printf '%s' "$wanted" >"$stamp"
    say "Installed in $((SECONDS - started)) s"
}

# Ask for a context in a fresh process, the way the simulator will: a library that loads may still have
# no driver behind it.
can_draw() {
    MUJOCO_GL="$1" PYOPENGL_PLATFORM="$1" "$VENV/bin/python" -c '
import mujoco
mujoco.GLContext(64, 64).make_current()' >/dev/null 2>&1
}

choose_renderer() {
    local backend
    for backend in ${MUJOCO_GL:-egl osmesa}; do
        if can_draw "$backend"; then
            export MUJOCO_GL="$backend" PYOPENGL_PLATFORM="$backend"
            return 0
        fi
    done
    return 1
}

install_renderer() {
    local packages="libegl1 libgl1 libgl1-mesa-dri libglx-mesa0 libosmesa6"
    choose_renderer && return
    command -v apt-get >/dev/null \
        || die "No headless OpenGL (EGL or OSMesa) works here; install Mesa's EGL or OSMesa with your package manager."
    if [[ "$(id -u)" -ne 0 ]]; then
        die "The simulator needs headless OpenGL. Run this once, then $0 again:
    sudo apt-get update && sudo apt-get install -y --no-install-recommends $packages"
    fi
    say "Installing the system libraries for headless rendering: $packages"
    apt-get update -qq
    # shellcheck disable=SC2086  # the list is meant to be split
    DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $packages >/dev/null
    choose_renderer || die "EGL and OSMesa still do not work; '$VENV/bin/vla doctor' says what is missing."
}

make_venv
install_package
install_renderer
say "Ready: $("$VENV/bin/python" --version) in $VENV, rendering with ${MUJOCO_GL}"
