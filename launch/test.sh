#!/usr/bin/env bash
# Installs gkd_jax with its test requirements into .venv-test, checks style and
# types, and runs all tests. PYTHON=python3.12 chooses the Python.
set -euo pipefail
cd "$(dirname "$0")/.."
"${PYTHON:-python3}" -m venv .venv-test
# Most modules of TensorFlow are never imported: those that are, are compiled once.
unset PYTHONDONTWRITEBYTECODE
.venv-test/bin/pip install --quiet --no-compile -e ".[demo,test]"
export JAX_PLATFORMS=cpu TF_CPP_MIN_LOG_LEVEL=3 CUDA_VISIBLE_DEVICES=-1
# Compiled programs stay for the next time.
export JAX_COMPILATION_CACHE_DIR=${JAX_COMPILATION_CACHE_DIR-$PWD/.venv-test/programs}
.venv-test/bin/ruff check .
.venv-test/bin/pyright --pythonpath .venv-test/bin/python
# Python's modules are compiled here, not by each process of pytest anew.
.venv-test/bin/python -c "from gkd_jax.command_line import gin_settings
gin_settings.import_tensorflow()
import gkd_jax.infer, gkd_jax.train"
# A file's tests share programs and fixtures: they run in one process, and the
# files in the order of tests/conftest.py.
.venv-test/bin/python -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder "$@"
