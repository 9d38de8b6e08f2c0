#!/usr/bin/env bash
# Builds .venv from the pinned requirements; run by `make setup` (TORCH=2.7.1: the CUDA 12.6 stack; PYTHON=: which interpreter).
# Needs Python >= 3.10.  Writes nothing outside this folder, except system packages where apt may (root or passwordless sudo).
# FFCV and DALI are optional: what is missing is reported, with the line that adds it.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

FFCV=ffcv==1.0.2
FFCV_HEADERS="g++ pkg-config libopencv-dev libturbojpeg0-dev"
site='.venv/lib/python3*/site-packages'

say() { printf 'setup: %s\n' "$*" >&2; }
stop() { say "$*"; exit 1; }
has() { command -v "$1" >/dev/null 2>&1; }

case "${TORCH:-}" in
    "") lock=requirements.txt ;;
    2.7.1) lock=requirements-torch27.txt ;;
    *) stop "there is no lock for TORCH=$TORCH. Use TORCH=2.7.1 (CUDA 12.6), or leave it out for the newest." ;;
esac

# ------------------------------------------------------------------------------------------------ already done?
has_python_h() { [ -f "$(.venv/bin/python -c 'import sysconfig; print(sysconfig.get_path("include"))')/Python.h" ]; }
can_build_ffcv() { has g++ && has pkg-config && pkg-config --exists opencv4 libturbojpeg && has_python_h; }
has_ffcv() { compgen -G "$site/ffcv/libffcv.py" >/dev/null; }

stamp=.venv/setup-stamp
key=$(cat "$lock" requirements-dali.txt scripts/setup.sh scripts/report.py | sha256sum | cut -d' ' -f1)
if [ -f "$stamp" ] && [ "$(head -1 "$stamp")" = "$key" ] && { has_ffcv || ! can_build_ffcv; }; then
    tail -n +2 "$stamp"
    exit 0
fi

# ------------------------------------------------------------------------------------------------ what is there
recent() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; }
python=""
for candidate in ${PYTHON:-python3 python3.13 python3.12 python3.11 python3.10}; do
    if has "$candidate" && recent "$candidate"; then python=$(command -v "$candidate"); break; fi
done
[ -n "$python" ] || stop "no Python >= 3.10 found${PYTHON:+ at $PYTHON}. Install one (apt-get install python3) or name it: make setup PYTHON=/path/to/python3"

can_apt() { has apt-get && { [ "$(id -u)" = 0 ] || { has sudo && sudo -n true 2>/dev/null; }; }; }
apt_install() {
    local as_root="" log
    [ "$(id -u)" = 0 ] || as_root="sudo -n"
    log=$(mktemp)
    say "apt-get install $*"
    if $as_root apt-get update -qq >"$log" 2>&1 \
        && $as_root env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "$@" >"$log" 2>&1; then
        rm -f "$log"
    else
        tail -3 "$log" >&2
        rm -f "$log"
        return 1
    fi
}

# ------------------------------------------------------------------------------------------------ uv
# Debian's Pythons come without venv and pip, or refuse pip outside a virtual environment (PEP 668): each way in turn.
uv_in_venv() { rm -rf .venv-uv && "$python" -m venv .venv-uv >/dev/null 2>&1 && .venv-uv/bin/pip install -q uv; }
uv_in_folder() { rm -rf .venv-uv && "$python" -m pip --version >/dev/null 2>&1 && "$python" -m pip install -q --target .venv-uv uv; }
if has uv; then
    uv=uv
else
    uv=.venv-uv/bin/uv
    if ! "$uv" --version >/dev/null 2>&1; then
        say "uv is not installed: putting a copy into .venv-uv"
        uv_in_venv || uv_in_folder || { can_apt && apt_install python3-venv && uv_in_venv; } \
            || stop "$python has neither venv nor pip, or reaches no package index, and apt may not be used here. Run this, then make setup again:
    sudo apt-get install -y python3-venv"
    fi
fi

# ------------------------------------------------------------------------------------------------ the environment
has_torch27() { compgen -G "$site/torch-2.7.1.dist-info" >/dev/null; }
has_other_torch() { compgen -G "$site/torch-*.dist-info" >/dev/null && ! has_torch27; }
if { [ "$lock" = requirements.txt ] && has_torch27; } || { [ "$lock" != requirements.txt ] && has_other_torch; }; then
    # the CUDA 12 and 13 packages own files of the same name: installing one stack over the other breaks both
    say "another torch stack is installed: building .venv anew"
    rm -rf .venv
fi
if ! recent .venv/bin/python; then
    rm -rf .venv
    "$uv" venv -q --no-python-downloads --python "$python" .venv
fi
rm -f "$stamp"
install() { "$uv" pip install -q --python .venv/bin/python "$@"; }
say "installing $lock (the first time a few GB: torch brings the CUDA libraries)"
install -r "$lock" || stop "the packages of $lock could not be installed; the reason is above. Check the network and the disk (about 12 GB are needed,$(df -h --output=avail . | tail -1) are free), then run make setup again."

# ------------------------------------------------------------------------------------------------ FFCV and DALI
if ! can_build_ffcv && can_apt; then
    headers=$FFCV_HEADERS
    has_python_h || headers="$headers python$(.venv/bin/python -c 'import sys; print("%d.%d" % sys.version_info[:2])')-dev"
    # shellcheck disable=SC2086
    apt_install $headers || say "apt-get failed; going on without FFCV's headers"
fi
if ! has_ffcv && can_build_ffcv; then
    say "building $FFCV"
    # Without its dependency list, which asks for an OpenCV with windows; with our setuptools, which still has distutils;
    # and with the folders of its libraries inside, which need not be the system's (conda).
    LDFLAGS="${LDFLAGS:-} -Wl,-rpath,$(pkg-config --variable=libdir opencv4) -Wl,-rpath,$(pkg-config --variable=libdir libturbojpeg)" \
        install --no-deps --no-build-isolation "$FFCV" || say "FFCV did not build; going on without it"
fi
install -r requirements-dali.txt || say "DALI was not installed; going on without it"

{ echo "$key" && .venv/bin/python -m scripts.report; } >"$stamp.partial"
mv "$stamp.partial" "$stamp"
tail -n +2 "$stamp"
