# Sourced by scripts/run and scripts/test: finds Python, makes .venv and installs the package into it.
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
venv=${MOE_RL_VENV:-$root/.venv}

stop() { echo "$(basename "$0"): $*" >&2; exit 2; }

find_python() {  # the first Python >= 3.11 that runs: $PYTHON, python3.11, python3
    local p
    for p in "${PYTHON:-}" python3.11 python3.12 python3; do
        [ -n "$p" ] || continue
        if "$p" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then echo "$p"; return; fi
        [ "$p" = "${PYTHON:-}" ] && stop "PYTHON=$p is not a Python of 3.11 or newer"
    done
    stop "Python 3.11 is missing: install it, or name one with PYTHON=/path/to/python3.11"
}

narrate() {  # what pip does, a line every few seconds; everything from its first error on
    local line last=-10
    while IFS= read -r line; do
        case $line in
            *WARNING*) ;;
            *[Ee]rror* | *ERROR*) echo "$line"; last=-1000 ;;
            *) if [ $last = -1000 ] || [ $((SECONDS - last)) -ge 5 ]; then echo "  ${line:0:150}"; [ $last = -1000 ] || last=$SECONDS; fi ;;
        esac
    done
}

install() {  # install EXTRAS: the package with these extras ("" for the base), versions as in constraints.txt
    local extras=$1 stamp="$venv/.moe_rl_installed" want
    command -v git >/dev/null || stop "git is missing: install it (Debian: apt-get install git)"
    command -v gcc >/dev/null || stop "gcc is missing: one dependency of reasoning-gym is compiled (Debian: apt-get install gcc)"
    if [ ! -x "$venv/bin/python" ]; then
        local python; python=$(find_python)
        "$python" -c 'import ensurepip, venv' 2>/dev/null || stop "$python has no venv module: install it (Debian: apt-get install python3.11-venv)"
        echo "making $venv with $("$python" --version)" >&2
        "$python" -m venv "$venv"
    fi
    want="$extras $(cat "$root/pyproject.toml" "$root/constraints.txt" | sha256sum)"
    if ! grep -qxF "$want" "$stamp" 2>/dev/null; then
        echo "installing moe_rl${extras:+[$extras]} into $venv: minutes, the first time" >&2
        "$venv/bin/python" -m pip install --disable-pip-version-check -c "$root/constraints.txt" -e "$root${extras:+[$extras]}" 2>&1 | narrate >&2 ||
            stop "pip install failed (see above); nothing was run"
        echo "$want" >> "$stamp"
    fi
}
