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
	$(VENV)/bin/pytest

lint: $(VENV)/.tested
	$(VENV)/bin/ruff check -q .
	$(VENV)/bin/ruff format -q --check .
	cd $(VENV) && bin/mypy --config-file $(CURDIR)/pyproject.toml -p qsparse_export
	git ls-files '*.cc' '*.h' | xargs $(VENV)/bin/clang-format --dry-run -Werror

format: $(VENV)/.tested
	$(VENV)/bin/ruff check -q --fix .
	$(VENV)/bin/ruff format -q .
	git ls-files '*.cc' '*.h' | xargs $(VENV)/bin/clang-format -i

install: $(VENV)/.installed

SOURCES := CMakeLists.txt pyproject.toml $(shell find qsparse_export passes runtimes targets cmake -type f -not -name '*.pyc')

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

# The package is installed as users get it, not editable: what is tested is what is shipped.
$(VENV)/.torch: | $(VENV)/bin/python
	$(PIP) install -q $(INDEX) $(TORCH)
	touch $@

$(VENV)/.installed: $(SOURCES) $(VENV)/.torch
	$(PIP) install .
	touch $@

$(VENV)/.tested: $(SOURCES) $(VENV)/.torch
	$(PIP) install '.[dev,hf,genai,bench]'
	touch $@ $(VENV)/.installed

clean:
	rm -rf $(VENV) build out .cache
