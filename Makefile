# make demo   exports a real model for this machine, verifies it, and generates text with it
# make test   builds and runs every test
# Both set everything up first: a virtual environment in .venv with PyTorch's CPU build.

VENV    ?= .venv
PYTHON  ?= python3
# PyPI's own torch wheel for Linux on x86-64 brings CUDA along (gigabytes, works too): set TORCH_INDEX to an index of
# PyTorch's CPU wheels where pip does not find one by itself.
TORCH   ?= torch==2.13.0
PIP     := $(VENV)/bin/python -m pip --disable-pip-version-check
INDEX   := $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX))

.PHONY: demo test lint format install clean

demo: $(VENV)/.installed
	PATH="$(abspath $(VENV))/bin:$$PATH" bash samples/01_smollm2/run.sh

test: $(VENV)/.tested
	$(VENV)/bin/python -m pytest

lint: $(VENV)/.tested
	$(VENV)/bin/ruff check -q .
	$(VENV)/bin/ruff format -q --check .
	$(VENV)/bin/mypy
	git ls-files '*.cc' '*.h' | xargs $(VENV)/bin/clang-format --dry-run -Werror

format: $(VENV)/.tested
	$(VENV)/bin/ruff check -q --fix .
	$(VENV)/bin/ruff format -q .
	git ls-files '*.cc' '*.h' | xargs $(VENV)/bin/clang-format -i

install: $(VENV)/.installed

SOURCES := $(shell find runtimes cmake -name '*.cc' -o -name '*.h' -o -name '*.cmake' -o -name 'CMakeLists.txt' 2>/dev/null)

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: pyproject.toml CMakeLists.txt $(SOURCES) | $(VENV)/bin/python
	$(PIP) install -q $(INDEX) $(TORCH)
	$(PIP) install -e .
	touch $@

$(VENV)/.tested: $(VENV)/.installed
	$(PIP) install -q -e '.[dev,hf,genai]'
	touch $@

clean:
	rm -rf $(VENV) build out .cache
