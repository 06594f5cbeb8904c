# Everything runs in .venv, which the first command makes from requirements.txt. `make help` lists the commands.

PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/installed

NBVAL := $(BIN)/python -m pytest -n 2 --dist loadscope -p no:cacheprovider --nbval --nbval-current-env book
# Without vector instructions and with two threads, products are summed in another order: outputs must not depend on it.
PLAIN_CPU := ATEN_CPU_CAPABILITY=default ONEDNN_MAX_CPU_ISA=SSE41 MKL_ENABLE_INSTRUCTIONS=SSE4_2

on_a_gpu = $(BIN)/python -c 'import sys, torch; torch.cuda.is_available() or sys.exit("make $(1): torch sees no CUDA GPU here")'

.DEFAULT_GOAL := help
.PHONY: help book test lint unit site notebooks serve bench test-cuda bench-cuda clean

help: ## list these commands
	@sed -n 's/^\([a-z-]*\):.*## /  make \1	/p' Makefile | expand -t 20

book: $(INSTALLED) ## build the book in _build/html
	@rm -rf _build/html _build/.doctrees  # pages of what is gone, and warnings already given, must not be kept
	@$(BIN)/jupyter-book build . --all -n -W --keep-going

test: lint unit site ## lint, types, unit, property and notebook tests, and the checks on the built book

lint: $(INSTALLED)
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

unit: $(INSTALLED)
	@$(BIN)/python -m pytest -n 2 --ignore=tests/site --ignore=tests/cuda
	@$(NBVAL)
	@$(PLAIN_CPU) OMP_NUM_THREADS=2 $(NBVAL)

site: book
	@$(BIN)/python -m pytest -n 2 tests/site

notebooks: $(INSTALLED) ## run every notebook of the book again and store its outputs
	@$(BIN)/python -m tools.notebooks

serve: book ## build the book and serve it on http://localhost:8000
	@$(BIN)/python -m http.server --bind localhost --directory _build/html 8000

bench: $(INSTALLED) ## time the layer against transformers and the machine
	@$(BIN)/python -m bench

test-cuda: $(INSTALLED) ## on a machine with an NVIDIA GPU: every path of the layer and its kernels against float64, and every notebook
	@$(call on_a_gpu,$@)
	@DSV2_TEST_DEVICE=cuda $(BIN)/python -m pytest -rs tests/cuda
	@$(BIN)/python -m pytest -p no:cacheprovider --nbval --nbval-current-env book

bench-cuda: $(INSTALLED) ## on a machine with an NVIDIA GPU: time the layer's parts there, against transformers and flash-attn
	@$(call on_a_gpu,$@)
	@$(BIN)/python -m bench.cuda

clean: ## remove what was built, the environment included
	rm -rf .venv _build

$(INSTALLED): requirements.txt pyproject.toml
	@$(PYTHON) -c 'import sys, venv; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Python 3.11 or newer with venv is needed; say which with: make PYTHON=/path/to/python3.11 …"; exit 1; }
	@$(PYTHON) -m venv .venv
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	@touch $(INSTALLED)

# flash-attn's Python half, for tests that put a double in the place of its compiled half: off every path, as an install
# without CUDA can be imported by nobody else. Where it is not to be had, these tests say so and are skipped.
FLASH_ATTN := flash-attn==2.8.3.post2
FLASH_ATTN_FRONT_END := .venv/flash-attn/installed

unit: $(FLASH_ATTN_FRONT_END)

$(FLASH_ATTN_FRONT_END): $(INSTALLED)
	@mkdir -p $(@D)
	@FLASH_ATTENTION_SKIP_CUDA_BUILD=TRUE FLASH_ATTENTION_FORCE_BUILD=TRUE $(BIN)/python -m pip install --quiet \
		--disable-pip-version-check --retries 1 --no-deps --no-build-isolation --upgrade --target $(@D) $(FLASH_ATTN) && \
		touch $@ || echo "$(FLASH_ATTN) was not installed for its tests: they will be skipped"
