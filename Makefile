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

# npm writes this file last. Without npm the tests in tests/web fail, and say what to install.
NODE_PACKAGES := $(if $(shell command -v npm 2>/dev/null), \
  $(addsuffix /node_modules/.package-lock.json,samples/04_web tests/web))
COMMA   := ,

.PHONY: demo test lint format install clean

demo: $(VENV)/.installed
	PATH="$(abspath $(VENV))/bin:$$PATH" bash samples/01_smollm2/run.sh

# A file's tests stay together: what they share is made once. One process more than cores, since some wait for others'
# answers; in order, since files of few tests can take long. Their report is what docs/backends.md is made of.
test: $(VENV)/.tested $(NODE_PACKAGES)
	$(VENV)/bin/pytest -n $$($(PYTHON) -c "import os; print(min(os.cpu_count() + 1, 4))") --dist loadscope --no-loadscope-reorder \
	  --junitxml=build/tests.xml

lint: $(VENV)/.tested
	$(VENV)/bin/ruff check -q .
	$(VENV)/bin/ruff format -q --check .
	cd $(VENV) && bin/mypy --config-file $(CURDIR)/pyproject.toml -p qsparse_export
	git ls-files '*.cc' '*.h' '*.cu' | xargs $(VENV)/bin/clang-format --dry-run -Werror

format: $(VENV)/.tested
	$(VENV)/bin/ruff check -q --fix .
	$(VENV)/bin/ruff format -q .
	git ls-files '*.cc' '*.h' '*.cu' | xargs $(VENV)/bin/clang-format -i

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
	$(PIP) install '.[dev,hf,genai,bench,tvm,tvm-gpu-test$(if $(shell command -v nvcc),,$(COMMA)cuda)]'
	touch $@ $(VENV)/.installed

%/node_modules/.package-lock.json: %/package-lock.json
	npm ci --loglevel=error --no-audit --no-fund --prefix $*

clean:
	rm -rf $(VENV) build out .cache samples/04_web/node_modules tests/web/node_modules
