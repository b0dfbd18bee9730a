#!/usr/bin/env bash
# What scripts share that make a Python environment; to be sourced.

pick_python() {
  local candidate
  for candidate in "${PYTHON:-}" python3.11 python3 python3.12 python3.13 python3.10; do
    if [ -n "$candidate" ] && "$candidate" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null; then
      echo "$candidate"
      return
    fi
  done
  echo "setup: no Python 3.10 to 3.13 found; install one, or name it with PYTHON=..." >&2
  return 1
}

# What decides about an environment, as one number: the contents of files, and of all files of folders.
digest() {  # FILE_OR_FOLDER...
  find "$@" -type f -not -name '*.pyc' -print0 | sort -z | xargs -0 cat | sha256sum | cut -d' ' -f1
}

# Makes FOLDER with COMMAND, unless it was made from the same files. A folder of somebody else's is never removed.
make_environment() {  # FOLDER DIGEST COMMAND...
  local python
  if [ "$(cat "$1/.stamp" 2>/dev/null)" != "$2" ]; then
    if [ -e "$1" ] && [ ! -e "$1/.stamp" ] && [ -n "$(ls -A "$1")" ]; then
      echo "setup: $1 exists and is no environment made here (it has no .stamp); choose another folder, or remove it" >&2
      return 1
    fi
    python="$(pick_python)"
    rm -rf "$1"
    mkdir -p "$1"
    echo unfinished > "$1/.stamp"  # what an interruption leaves is replaced next time
    "$python" -m venv "$1"
    "${@:3}"
    echo "$2" > "$1/.stamp"
  fi
}

pip_install() {  # ENVIRONMENT ARGUMENT...
  "$1/bin/python" -m pip install --quiet --disable-pip-version-check "${@:2}"
}
