# Everything runs in the environment $(VENV), which the first command makes from requirements.txt. `make help` lists the
# commands. With VENV= (empty) no environment is made: $(PYTHON) is used as it is, and nothing is installed into it.

PYTHON ?= python3
VENV := .venv
RUN := $(if $(VENV),$(VENV)/bin/python,"$(PYTHON)")
BIN := $(if $(VENV),$(VENV)/bin/)
INSTALLED := $(if $(VENV),$(VENV)/installed)

UNIT := -m pytest -n 2 --ignore=tests/site --ignore=tests/cuda
QUICK := $(UNIT) -m "not slow and not thorough"
SITE := -m pytest -n 2 tests/site -m "not thorough"
NBVAL := $(RUN) -m pytest -n 2 --dist loadscope -p no:cacheprovider --nbval --nbval-current-env
# Without vector instructions and with two threads, products are summed in another order: outputs must not depend on it.
# tests/test_notebooks_on_cuda.py runs so, on a pretended GPU; the chapter on kernels has none.
PLAIN_CPU := ATEN_CPU_CAPABILITY=default ONEDNN_MAX_CPU_ISA=SSE41 MKL_ENABLE_INSTRUCTIONS=SSE4_2

# Hundreds of processes import torch, which takes seconds to compile: where the machine says otherwise too, that is kept.
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.PHONY: help book pdf archive test test-thorough lint unit site release other-build test-other-build test-oldest-torch notebooks assignments serve bench test-cuda bench-cuda clean

help: ## list these commands
	@sed -n 's/^\([a-z-]*\):.*## /  make \1	/p' Makefile | expand -t 26

book: $(INSTALLED) ## build the book in _build/html
	@rm -rf _build/html _build/.doctrees  # pages of what is gone, and warnings already given, must not be kept
	@$(BIN)jupyter-book build . --all -n -W --keep-going

pdf: book ## the whole book as one PDF, in _build/
	@$(RUN) -m tools.pdf

archive: book ## the site as one file that opens offline, in _build/
	@$(RUN) -m tools.release site

test: $(INSTALLED) ## lint, types, unit, property and notebook tests, and the checks on the built book
	@$(MAKE) --no-print-directory -j2 lint book  # each takes one core
	@$(MAKE) --no-print-directory unit
	@$(RUN) $(SITE)

lint: $(INSTALLED)
	@$(BIN)ruff check .
	@$(BIN)ruff format --check .
	@$(BIN)ruff format --check --line-length 120 $(addprefix dsv2_ref/,__main__.py checkpoint.py checks.py config_checks.py files.py loading.py pretrained.py published.py saving.py strict_json.py tensors.py training_checks.py)
	@$(BIN)mypy
	@$(BIN)zizmor --offline --quiet --no-progress --strict-collection .github/workflows

unit: $(INSTALLED)
	@$(RUN) $(UNIT) -m "not thorough"
	@$(NBVAL) book

# What `make test` leaves out, so that it ends in half an hour on two cores. `make release` runs both.
test-thorough: book ## what takes long and says more of the same: notebooks on a pretended GPU, trainings, more examples
	@$(RUN) $(UNIT) -m "thorough or hypothesis" --hypothesis-profile=thorough
	@$(PLAIN_CPU) OMP_NUM_THREADS=2 $(NBVAL) book/kernels.ipynb
	@$(RUN) -m pytest -n 2 tests/site -m thorough

site: book
	@$(RUN) $(SITE)

# On PyPI, torch for Linux is built with CUDA; builds for the CPU lie elsewhere, and pip's settings decide which of them an
# environment gets. The tests must pass with both, and without the check of signatures that tests switch on.
OTHER_BUILD = $(shell $(RUN) -c 'import torch; print("cpu" if torch.version.cuda else "cuda")')

other-build: $(INSTALLED)
	@$(MAKE) --no-print-directory .venv/$(OTHER_BUILD)/installed

test-other-build: $(INSTALLED) ## on Linux: the unit tests with the build of torch that .venv has not, with CUDA or without
	@if [ "$$(uname)" != Linux ]; then \
		echo "make $@: torch has only one build for this system"; \
	elif $(MAKE) --no-print-directory other-build; then \
		.venv/$(OTHER_BUILD)/bin/python $(QUICK) --as-shipped; \
	elif [ "$$CI" = true ] && [ -z "$$UV_OFFLINE" ]; then \
		echo "make $@: cannot install torch's $(OTHER_BUILD) build; with UV_OFFLINE=1 its tests are left out" >&2; exit 1; \
	else \
		echo "make $@: cannot install torch's $(OTHER_BUILD) build, so the tests with it were left out"; \
	fi

test-oldest-torch: .venv/oldest/installed ## the unit tests with the oldest torch that is supported
	@.venv/oldest/bin/python $(QUICK) --as-shipped

UV := uv==0.13.9

# uv, as pip would give the same build again. The oldest torch wants its own Triton, whose
# interpreter needs an older NumPy, and an older setuptools.
.venv/cpu/installed: BACKEND := --torch-backend cpu
.venv/oldest/installed: PINS := s/^torch==.*/torch==2.11.0/; s/^triton==[^;]*/triton==3.6.0/; \
	s/^setuptools==.*/setuptools==81.0.0/; s/^numpy==.*/numpy==2.3.5/

.venv/cuda/installed .venv/cpu/installed .venv/oldest/installed: .venv/%/installed: requirements.txt pyproject.toml
	@"$(PYTHON)" -m venv .venv/$*
	@.venv/$*/bin/python -m pip install --quiet --disable-pip-version-check --retries 1 $(UV)
	@sed '$(PINS)' requirements.txt >.venv/$*/requirements.txt
	@.venv/$*/bin/uv pip install --quiet --python .venv/$*/bin/python $(BACKEND) -r .venv/$*/requirements.txt
	@.venv/$*/bin/python -c 'import sys, torch; found = "cuda" if torch.version.cuda else "cpu"; \
		sys.exit(None if "$*" in (found, "oldest") else "torch has no $* build for this system")'
	@touch $@

notebooks: $(INSTALLED) ## run every notebook of the book again and store its outputs
	@$(RUN) -m tools.notebooks

assignments: $(INSTALLED) ## for a course: the students' and the instructors' archive, in _build
	@$(RUN) -m tools.assignments

serve: book ## build the book and serve it on http://localhost:8000
	@$(RUN) -m http.server --bind localhost --directory _build/html 8000

bench: $(INSTALLED) ## time the layer against transformers and the machine, and what fewer bits do
	@$(RUN) -m bench
	@$(RUN) -m bench.bits

test-cuda: $(INSTALLED) ## on a machine with an NVIDIA GPU: every path of the layer and its kernels against float64, and every notebook
	@$(RUN) -m tools.gpu "make $@" jaxtyping torch beartype hypothesis ipykernel matplotlib nbval pytest safetensors
	@DSV2_TEST_DEVICE=cuda $(RUN) -m pytest -rs tests/cuda
	@$(RUN) -m pytest -p no:cacheprovider --nbval --nbval-current-env book

bench-cuda: $(INSTALLED) ## on a machine with an NVIDIA GPU: time the layer's parts there, against transformers and flash-attn
	@$(RUN) -m tools.gpu "make $@" jaxtyping torch
	@$(RUN) -m bench.cuda

# After the tests, which build the book and the PDF. The tag is made last, here and nowhere else: who pushes it, releases.
TWINE := $(abspath .venv/release)/bin/twine

release: $(INSTALLED) ## check that VERSION=x.y.z may be released and prepare dist/ and the tag; DRY=1: neither tests nor tag
	@$(RUN) -m tools.release check "$(VERSION)"
	@$(if $(DRY),,$(MAKE) --no-print-directory test test-thorough)
	@$(MAKE) --no-print-directory pdf archive $(TWINE)
	@$(RUN) -m tools.release build $(TWINE)
	@$(if $(DRY),,$(RUN) -m tools.release tag)

$(TWINE):
	@"$(PYTHON)" -m venv .venv/release
	@.venv/release/bin/python -m pip install --quiet --disable-pip-version-check twine==7.0.0

clean: ## remove what was built, the environment included
	rm -rf .venv _build dist

ifneq ($(VENV),)
$(INSTALLED): requirements.txt pyproject.toml
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Python 3.11 or newer is needed; say which with: make PYTHON=/path/to/python3.11 …" >&2; exit 1; }
	@"$(PYTHON)" -c 'import ensurepip, venv' 2>/dev/null || \
		{ echo "$(PYTHON) cannot make an environment: install venv and ensurepip (on Debian and Ubuntu: apt install" \
			"python3-venv), or use a Python that has the packages already: make VENV= …" >&2; exit 1; }
	@"$(PYTHON)" -m venv $(VENV)
	@$(BIN)python -m pip install --quiet --no-compile --disable-pip-version-check -r requirements.txt
	@touch $(INSTALLED)
endif

# flash-attn's Python half, for tests that put a double in the place of its compiled half: off every path, as an install
# without CUDA can be imported by nobody else. Where it is not to be had, these tests say so and are skipped.
FLASH_ATTN := flash-attn==2.8.3.post2
FLASH_ATTN_FRONT_END := .venv/flash-attn/installed

unit test-thorough test-other-build test-oldest-torch: $(FLASH_ATTN_FRONT_END)

$(FLASH_ATTN_FRONT_END): $(INSTALLED)
	@mkdir -p $(@D)
	@FLASH_ATTENTION_SKIP_CUDA_BUILD=TRUE FLASH_ATTENTION_FORCE_BUILD=TRUE $(RUN) -m pip install --quiet \
		--disable-pip-version-check --retries 1 --no-deps --no-build-isolation --upgrade --target $(@D) $(FLASH_ATTN) && \
		touch $@ || echo "$(FLASH_ATTN) was not installed for its tests: they will be skipped"
