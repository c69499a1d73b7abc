# Two commands: `make demo` and `make test`. Both make their own virtual environment, once.
#   make demo   MiniLM to NVFP4, a decoder to NVFP4 and ternary, beside ONNX Runtime; results in out/
#   make test   lint, types, and all tests, those in C++ included
#   make lint   the first part of it

PYTHON ?= python3
ifeq ($(origin CXX),default)
CXX := $(firstword $(shell command -v c++ || command -v g++ || command -v clang++) c++)
endif
PIP_FLAGS ?=
# A file stays with one worker: its fixtures (an exported model, a compiled one) are made once.
PYTEST_FLAGS ?= -n 2 --dist loadfile

BIN := .venv/bin
MODELS := out/minilm.onnx out/tinystories.onnx
SOURCES := git ls-files -z 'runtime/*.h' 'runtime/*.hpp' 'runtime/*.c' 'runtime/*.cc'

.PHONY: demo test lint format clean check-tools

demo: .venv/.demo $(MODELS)
	$(BIN)/python benchmarks/demo.py out/minilm.onnx
	$(BIN)/python benchmarks/demo_decoder.py out/tinystories.onnx

$(MODELS): out/%.onnx: | .venv/.demo
	@mkdir -p out
	$(BIN)/python -m qgraph.models export $* $@

test: lint
	$(BIN)/python -m pytest $(PYTEST_FLAGS)

lint: .venv/.test
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(SOURCES) | xargs -0 -r $(BIN)/clang-format --dry-run -Werror

format: .venv/.test
	$(BIN)/ruff check --fix
	$(BIN)/ruff format
	$(SOURCES) | xargs -0 -r $(BIN)/clang-format -i

# The sources are installed editable; the environment is brought up to date when the requirements change.
.venv/.demo: pyproject.toml | check-tools
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q $(PIP_FLAGS) -e '.[demo]'
	@touch $@

.venv/.test: pyproject.toml | check-tools
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q $(PIP_FLAGS) -e '.[test]'
	@touch $@

check-tools:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || \
	  { echo "error: qgraph needs Python 3.11 or newer: make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || \
	  { echo "error: $(PYTHON) makes no virtual environments: install its venv module (python3-venv)" >&2; exit 1; }
	@echo '#include <filesystem>' | $(CXX) -std=c++17 -fsyntax-only -x c++ - 2>/dev/null || \
	  { echo "error: no C++17 compiler: install g++ or clang++, or set CXX" >&2; exit 1; }

clean:
	rm -rf .venv out build dist
