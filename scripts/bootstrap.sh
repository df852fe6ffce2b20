#!/bin/sh
# Make .venv with everything the package and its tests need.
#
#   sh scripts/bootstrap.sh            or: make setup
#   PYTHON=/path/to/python3.12 sh scripts/bootstrap.sh
#
# A finished .venv is kept (the call then takes no time); a half-made one is made anew.
set -eu
cd "$(dirname "$0")/.."

VENV=.venv
STAMP=$VENV/.bootstrap-stamp         # written last: Python, folder and checksum it was made from
UNFINISHED=$VENV/.bootstrap-unfinished
SPACE_NEEDED_KB=9000000

# Runs under any Python, even 2.7; prints "usable X.Y /path" or ends with the reason why not.
PROBE='
import os, sys
if sys.version_info < (3, 12):
    sys.exit("it is Python %d.%d.%d" % sys.version_info[:3])
version = "%d.%d" % sys.version_info[:2]
try:
    import ensurepip, venv
except ImportError as error:
    sys.exit("%s; on Debian and Ubuntu: apt install python%s-venv" % (error, version))
print("usable %s %s" % (version, os.path.realpath(sys._base_executable or sys.executable)))'

tried=""        # one line per candidate that failed
python=""       # what find_python chose
version=""

# Starts candidate $1 for real: sets answer to "usable X.Y /path" or to the reason why not.
probe() {
    if ! command -v "$1" >/dev/null 2>&1; then
        answer="not found"
    elif output=$("$1" -c "$PROBE" 2>&1 </dev/null); then
        answer=$(printf '%s\n' "$output" | grep '^usable ' | head -n 1)
        [ -n "$answer" ] || answer="it starts but does not run Python code"
    else
        answer=$(printf '%s\n' "$output" | grep -v '^ *$' | head -n 1)
        [ -n "$answer" ] || answer="it does not start"
    fi
}

candidates() {
    [ -z "${PYTHON:-}" ] || printf '%s\n' "$PYTHON"
    printf '%s\n' python3.12 python3.13 python3.14 python3
    for folder in "${PYENV_ROOT:-}/versions" "${HOME:-}/.pyenv/versions" \
        "${HOME:-}/.local/share/uv/python"; do
        for file in "$folder"/3.1[2-9]*/bin/python "$folder"/cpython-3.1[2-9]*/bin/python3; do
            [ ! -e "$file" ] || printf '%s\n' "$file"
        done
    done
}

# Sets python and version to the first candidate that starts.  Python 3.12 and 3.13 come first:
# for later ones megatron-core 0.19 has no wheel and must be compiled.
find_python() {
    later=""
    while IFS= read -r candidate; do
        probe "$candidate"
        case $answer in
            "usable 3.12 "* | "usable 3.13 "*)
                later=$answer
                break
                ;;
            usable*) [ -n "$later" ] || later=$answer ;;
            *)
                tried="$tried  $candidate: $answer
"
                ;;
        esac
    done <<END
$(candidates)
END
    [ -n "$later" ] || fail_no_python
    later=${later#usable }
    version=${later%% *}
    python=${later#* }
}

fail_no_python() {
    cat >&2 <<END
bootstrap: no Python 3.12 or newer starts on this machine. Tried:
$tried
Remedy, one of:
  pyenv install 3.12                          (then call this again)
  apt install python3.12 python3.12-venv      (Debian, Ubuntu)
  uv python install 3.12
  PYTHON=/path/to/python3.12 make setup       (one that is somewhere else)
END
    exit 1
}

notice_python() {
    if [ -n "${PYTHON:-}" ]; then
        case $tried in "  $PYTHON: "*)
            echo "bootstrap: PYTHON cannot be used: ${tried%%
*}" >&2 ;;
        esac
    fi
    case $version in
        3.12 | 3.13) echo "bootstrap: making $VENV with Python $version ($python)" ;;
        *) echo "bootstrap: only Python $version starts here ($python). There is no ready-made" \
            "megatron-core for it: pip compiles one, which needs a C++ compiler." ;;
    esac
}

notice_space() {
    free=$(df -Pk . 2>/dev/null | awk 'NR == 2 { print $4 }')
    if [ -n "$free" ] && [ "$free" -lt "$SPACE_NEEDED_KB" ]; then
        echo "bootstrap: $((free / 1000000)) GB are free here, the packages need about" \
            "$((SPACE_NEEDED_KB / 1000000)) GB" >&2
    fi
}

# What $VENV depends on, with $1 as its Python.
stamp() {
    printf '%s\n' "$1"
    pwd
    cat setup.cfg pyproject.toml | cksum
}

# Whether the $VENV there is can be kept.  One without a stamp of ours is somebody's own: kept too,
# if it starts.
venv_is_sound() {
    [ ! -e "$UNFINISHED" ] && [ -x "$VENV/bin/python" ] || return 1
    "$VENV/bin/python" -c "$PROBE; import pip" >/dev/null 2>&1 </dev/null || return 1
    [ -e "$STAMP" ] || return 0
    [ "$(sed -n 2p "$STAMP")" = "$(pwd)" ] || return 1 # moved: its scripts point elsewhere
    [ -z "${PYTHON:-}" ] || [ "$(sed -n 1p "$STAMP")" = "$python" ]
}

venv_is_current() {
    venv_is_sound && [ -e "$STAMP" ] || return 1
    [ "$(cat "$STAMP")" = "$(stamp "$(sed -n 1p "$STAMP")")" ]
}

make_venv() {
    notice_python
    notice_space
    rm -rf "$VENV"
    mkdir "$VENV"
    : >"$UNFINISHED"
    "$python" -m venv "$VENV"
}

# Prints assignments for uv, which does not read pip's configuration files and variables.
uv_settings() {
    "$VENV/bin/python" -m pip config list 2>/dev/null | awk -F "='" '
        BEGIN {
            uv["index-url"] = "UV_DEFAULT_INDEX"; uv["extra-index-url"] = "UV_INDEX"
            uv["find-links"] = "UV_FIND_LINKS"; uv["constraint"] = "UV_CONSTRAINT"
            uv["cert"] = "SSL_CERT_FILE"
        }
        {
            name = $1; sub(/.*[.]/, "", name); sub(/\047$/, "", $2)
            # Variables (":env:") come before files, and override them.
            if (name in uv && !(name in seen) && $2 !~ /\047/) {
                seen[name] = 1; print uv[name] "=\047" $2 "\047"
            }
        }'
}

# uv downloads and unpacks on all cores, in a third of pip's time.  Fails where uv cannot be had, or
# where it cannot do what pip can.
install_with_uv() {
    uv=$(command -v uv) || {
        "$VENV/bin/python" -m pip install --disable-pip-version-check --quiet uv || return 1
        uv=$VENV/bin/uv
    }
    (
        settings=$(uv_settings)
        set -a
        eval "$settings"
        # As pip does: the best version of all indexes.
        UV_INDEX_STRATEGY=unsafe-best-match
        set +a
        "$uv" pip install --python "$VENV/bin/python" -e '.[test]'
    )
}

# uv leaves modules uncompiled.  Where PYTHONDONTWRITEBYTECODE is set (many container images do) each
# process would compile what it imports: 15 s more for every rank of a training.
keep_bytecode() {
    env -u PYTHONDONTWRITEBYTECODE "$VENV/bin/python" -W ignore -c \
        'import transformers, trinity_megatron.training.pretrain' >/dev/null 2>&1 || :
}

install() {
    : >"$UNFINISHED"
    rm -f "$STAMP"
    install_with_uv || "$VENV/bin/python" -m pip install --disable-pip-version-check \
        -e '.[test]' || {
        echo "bootstrap: pip could not install the packages; its message is above. Remedy: see to" \
            "the network and to free disk space ($((SPACE_NEEDED_KB / 1000000)) GB), then call" \
            "this again." >&2
        exit 1
    }
    keep_bytecode
    stamp "$python" >"$STAMP"
    rm -f "$UNFINISHED"
    echo "bootstrap: $VENV is ready"
}

[ -z "${PYTHON:-}" ] || find_python
if venv_is_current; then
    exit 0
elif venv_is_sound; then
    probe "$VENV/bin/python"
    python=${answer#usable * }
else
    [ -n "$python" ] || find_python
    make_venv
fi
install
