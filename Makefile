# Two commands: `make demo` and `make test`. Both make their own virtual environment, once.
#   make demo   MiniLM to NVFP4, compiled, run beside ONNX Runtime; results in out/
#   make test   lint, types, and all tests, those in C++ included
#   make lint   the first part of it

PYTHON ?= python3
CXX ?= c++
PIP_FLAGS ?=
PYTEST_FLAGS ?= -n 2

DEMO := .venv/bin
TEST := .venv-test/bin
MODEL := out/minilm.onnx

.PHONY: demo test lint format clean check-tools

demo: $(DEMO)/.installed $(MODEL)
	$(DEMO)/python -m qgraph.models demo minilm $(MODEL) -o out

$(MODEL): | $(DEMO)/.installed
	@mkdir -p out
	$(DEMO)/python -m qgraph.models export minilm $@

test: lint
	$(TEST)/python -m pytest $(PYTEST_FLAGS)

lint: $(TEST)/.installed
	$(TEST)/ruff check
	$(TEST)/ruff format --check
	$(TEST)/mypy
	git ls-files -z 'runtime/*.h' 'runtime/*.cc' 'runtime/*.cpp' 'runtime/*.c' | xargs -0 -r $(TEST)/clang-format --dry-run -Werror

format: $(TEST)/.installed
	$(TEST)/ruff check --fix
	$(TEST)/ruff format
	git ls-files -z 'runtime/*.h' 'runtime/*.cc' 'runtime/*.cpp' 'runtime/*.c' | xargs -0 -r $(TEST)/clang-format -i

# An environment is remade when the requirements change; the sources are installed editable.
$(DEMO)/.installed: pyproject.toml | check-tools
	$(PYTHON) -m venv .venv
	$(DEMO)/python -m pip install -q $(PIP_FLAGS) -e '.[demo]'
	@touch $@

$(TEST)/.installed: pyproject.toml | check-tools
	$(PYTHON) -m venv .venv-test
	$(TEST)/python -m pip install -q $(PIP_FLAGS) -e '.[test]' 'setuptools>=77'
	@touch $@

check-tools:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || \
	  { echo "error: qgraph needs Python 3.11 or newer: set PYTHON, e.g. make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || \
	  { echo "error: $(PYTHON) cannot make virtual environments: install its venv module (Debian: python3-venv)" >&2; exit 1; }
	@echo '#include <filesystem>' | $(CXX) -std=c++17 -fsyntax-only -x c++ - 2>/dev/null || \
	  { echo "error: no C++17 compiler: install g++ or clang++ and set CXX" >&2; exit 1; }

clean:
	rm -rf .venv .venv-test out build dist
