#!/usr/bin/env bash
# Makes .venv with this project and the given extras, all versions pinned (requirements/constraints.txt); does nothing when
# it is up to date.
# Usage: source scripts/setup.sh [EXTRA...]      (PYTHON=... chooses the interpreter, VENV=... the folder)
set -euo pipefail
ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
source "$ROOT/scripts/environment.sh"
VENV="${VENV:-$ROOT/.venv}"
EXTRAS="$(IFS=,; echo "$*")"

# Python sources are used in place (editable install); only what is compiled or installed goes into the stamp.
stamp() {
  (cd "$ROOT" && echo "$EXTRAS" && cat pyproject.toml requirements/build.txt requirements/constraints.txt \
    && find plugins -type f \( -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh' -o -name CMakeLists.txt -o -name '*.cmake' \) \
      -not -path '*/build/*' -print0 | sort -z | xargs -0 cat) | sha256sum | cut -d' ' -f1
}

if [ ! -f "$VENV/.stamp" ] || [ "$(cat "$VENV/.stamp")" != "$(stamp)" ]; then
  [ -x "$VENV/bin/python" ] || "$(pick_python)" -m venv "$VENV"
  rm -f "$VENV/.stamp"
  # Whoever tests compiles the C++ tests with the libraries: scripts/test_plugins.sh then finds build/wheel complete.
  defines=()
  case ",$EXTRAS," in *,test,*) defines+=(--config-settings=cmake.define.PT_BUILD_TESTS=ON) ;; esac
  "$VENV/bin/python" -m pip install --quiet --disable-pip-version-check -r "$ROOT/requirements/build.txt"
  "$VENV/bin/python" -m pip install --quiet --disable-pip-version-check --no-build-isolation "${defines[@]}" \
    -c "$ROOT/requirements/constraints.txt" -e "$ROOT${EXTRAS:+[$EXTRAS]}"
  stamp > "$VENV/.stamp"
fi
export PATH="$VENV/bin:$PATH"
