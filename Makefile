# Each target sets up .venv by itself. PYTHON picks the interpreter (3.11 is tested).
PYTHON ?= python3.11
VENV   := .venv
LIGHT  := .venv-light
BIN    := $(VENV)/bin
# A file's tests share fixtures, so they stay in one process; the slowest files begin (tests/conftest.py).
# Three processes for two cores: a fifth of their time they wait, for servers and for what they have killed.
PARALLEL := -n 3 --dist loadfile --no-loadscope-reorder
# Sources whose change means a new native build.
NATIVE := CMakeLists.txt $(wildcard mbv2/kernels/CMakeLists.txt mbv2/kernels/*.cc mbv2/kernels/*.h mbv2/kernels/*/*.cc mbv2/kernels/*/*.h mbv2/kernels/*/*.inl \
          imnet_prep/images/native/CMakeLists.txt imnet_prep/images/native/*.cc imnet_prep/images/native/*.h)

# The tests start processes by the hundred, which would each compile the modules anew.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo test test-fast test-light test-long test-wheel check wheel bench sanitize cross venv docs clean

venv: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml $(NATIVE)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable '.[dev,dask,browse,export,tensorboard,bench]'
	touch $@

demo: venv
	$(BIN)/imnet-prep demo

test: venv
	$(BIN)/python -m pytest $(PARALLEL)

# Leaves out what takes more than a second of processor time: two minutes.
test-fast: venv
	$(BIN)/python -m pytest $(PARALLEL) -m 'not slow and not long'

# What needs no MindSpore, in an environment without it: NumPy 2, the newest OpenCV. Where PyTorch is installed in it, its
# test runs as well.
test-light: $(LIGHT)/.installed
	$(LIGHT)/bin/python -c 'from importlib.util import find_spec; assert find_spec("mindspore") is None'
	$(LIGHT)/bin/python -m pytest $(PARALLEL) -m 'light and not long'

$(LIGHT)/.installed: requirements-light.txt pyproject.toml $(NATIVE)
	test -x $(LIGHT)/bin/python || $(PYTHON) -m venv $(LIGHT)
	$(LIGHT)/bin/python -m pip install --quiet --requirement requirements-light.txt \
	  pytest pytest-timeout pytest-xdist flask fsspec pyarrow webdataset
	$(LIGHT)/bin/python -m pip install --quiet --no-deps --editable .
	touch $@

# Interrupts each command at every place where it changes a file, resumes every pair of options: about an hour.
test-long: venv
	$(BIN)/python -m pytest -n 2 -m long

# The wheel for this system, with the libjpeg-turbo that it was compiled against inside: dist/.
wheel: venv
	rm -rf dist build/wheels
	$(BIN)/python -m build --wheel --outdir build/wheels
	$(BIN)/python -m zipfile --list build/wheels/*.whl | grep mbv2_kernels  # a build that fails leaves the libraries out
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/auditwheel repair --wheel-dir dist build/wheels/*.whl
	$(BIN)/auditwheel show dist/*.whl
	$(BIN)/python -m zipfile --list dist/*.whl | grep libs/libjpeg  # without its headers there is no decoder

# The wheel in a bare Debian without a compiler and libjpeg. As root, with the network: ten minutes.
test-wheel: wheel
	command -v debootstrap || apt-get install --yes --no-install-recommends debootstrap
	$(BIN)/python -m pytest -m long tests/e2e/test_wheel.py

check: venv
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	for platform in linux darwin win32; do \
	  $(BIN)/mypy --platform $$platform --cache-dir .mypy_cache/$$platform || exit 1; \
	done

# Ours beside the peers, each in an environment of its own (6 GB): their NumPy is not MindSpore's. BENCH=--short is a trial,
# BENCH='--images DIR' takes your own photographs.
bench: venv .venv-peers/.installed .venv-img2dataset/.installed
	$(BIN)/python -m benchmarks $(BENCH)

# PyTorch's peers, and our loader for PyTorch beside them.
.venv-peers/.installed: benchmarks/requirements-peers.txt requirements-light.txt
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip install --quiet --requirement $< --requirement requirements-light.txt
	$(@D)/bin/python -m pip install --quiet --no-deps --editable .
	touch $@

.venv-img2dataset/.installed: benchmarks/requirements-download.txt
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip install --quiet --requirement $<
	touch $@

# The site, into build/site.
docs: venv
	$(BIN)/python -m pip install --quiet --requirement docs/requirements.txt
	$(BIN)/python -m mkdocs build

# The C++ operators under AddressSanitizer and ThreadSanitizer.
sanitize:
	for kind in address thread; do \
	  cmake -S . -B build/sanitize-$$kind -DMBV2_SANITIZE=$$kind && \
	  cmake --build build/sanitize-$$kind --target mbv2_stress --parallel 2 && \
	  build/sanitize-$$kind/mbv2/kernels/mbv2_stress build/sanitize-$$kind/mbv2/kernels/mbv2_kernels.so || exit 1; \
	done

# The C++ for arm64 and for Windows, run under qemu and Wine, must make what it makes here. On Debian: installs the compilers,
# qemu and Wine. IMAGES: a tar of JPEGs to decode beside those that the target makes.
IMAGES ?= $(wildcard ../shared/data/imagenet-samples-250.tar)

cross: venv
	tests/e2e/cross.sh $(abspath $(IMAGES))

clean:
	rm -rf $(VENV) $(LIGHT) .venv-peers .venv-img2dataset build .mypy_cache .ruff_cache .pytest_cache
