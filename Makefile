# Works on a fresh machine with Python 3.11+, a C++ compiler and make. Everything is installed into
# .venv, at pinned versions. Without make: python tools/install.py .venv serve,train,test,dev
PYTHON ?= python3
VENV   ?= .venv
ifeq ($(OS),Windows_NT)
BIN    := $(VENV)/Scripts
else
BIN    := $(VENV)/bin
endif
, := ,
RUN    := $(VENV)/.ready-run
DEV    := $(VENV)/.ready-dev
CPP_FILES := $(wildcard csrc/*.cpp csrc/*.h csrc/*/*.cpp csrc/*/*.h)
# All instruction sets of the build. Targets skip the ones that this CPU cannot run.
ISAS   := $(shell awk -F'[ ()]+' '/^ *lamoe_isa/ {sub(/^ */, ""); print $$2}' CMakeLists.txt)
SOURCE := pyproject.toml constraints.txt tools/install.py CMakeLists.txt $(CPP_FILES)

.PHONY: help demo test lint format test-lm-eval wheel-check long needle bench bench-busy \
        gpu-check bench-serve clients fuzz soak asan tsan clean

help:  ## list the targets
	@grep -hE '^[a-z -]+:.*##' Makefile | sed 's/:.*##/:/'

# Pass options of `lamoe train` as DEMO='--run.steps 100'.
demo: $(RUN)  ## train a small DeepSeek-V2 here, evaluate it, let it generate
	$(BIN)/lamoe train recipes/tiny.toml $(DEMO) $(if $(wildcard runs/tiny/latest),--resume)
	$(BIN)/lamoe evaluate runs/tiny
	$(BIN)/lamoe info runs/tiny
	@for prompt in 'def read(self, ' 'class Node:' 'It was a truth'; do \
	  echo; echo "--- $$prompt"; \
	  $(BIN)/lamoe generate --model runs/tiny --prompt "$$prompt" --max-tokens 80 \
	    --temperature 0.7 --seed 1 || exit 1; \
	done

test: $(DEV)  ## all tests
	$(BIN)/python -m pytest

lint: $(DEV)  ## check with ruff, clang-format and mypy, without changing files
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run -Werror $(CPP_FILES)
	$(BIN)/python tools/check_text.py
	$(BIN)/mypy

format: $(DEV)  ## apply ruff's and clang-format's layout, and ruff's safe fixes
	$(BIN)/ruff check --fix --exit-zero .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CPP_FILES)

test-lm-eval: $(DEV)  ## test lm-eval against the server; installing lm-eval takes over a minute
	$(PYTHON) tools/install.py $(VENV) serve,train,test,dev,lm-eval
	$(BIN)/python -m pytest tests/serve/test_serve_lm_eval.py

wheel-check:  ## build a wheel, install it into a bare environment, run doctor and generate there
	$(PYTHON) tools/wheel_check.py

long: $(DEV)  ## slow test at 128K positions, then cache memory against the closed form
	$(BIN)/python -m pytest -m slow
	$(BIN)/python benchmarks/long.py

needle: $(DEV)  ## train a small retrieval model, extend its context with YaRN, draw both heat maps
	$(BIN)/python benchmarks/needle.py

bench: $(DEV)  ## training speed of lamoe and transformers, alternating
	$(BIN)/python benchmarks/train.py

gpu-check: $(DEV)  ## training on a GPU: parity with the CPU, speed, memory; at most 8 minutes
	$(BIN)/python benchmarks/gpu_check.py

bench-busy: $(DEV)  ## speed of training and decoding while other programs keep all cores busy
	$(BIN)/python benchmarks/busy.py

clients: $(DEV)  ## try the server with the clients that people use (Python and npm) on SmolLM2
	$(BIN)/python tests/clients/run.py

fuzz: $(DEV)  ## send 3,000 mutated requests to a server
	$(BIN)/python benchmarks/fuzz.py

soak: $(DEV)  ## abuse a server for ten minutes: /health, memory and statuses must stay good
	$(BIN)/python benchmarks/soak.py

bench-serve: $(DEV)  ## two minutes of load on the server, hostile clients included; HTTP overhead
	$(BIN)/python benchmarks/serve.py

asan tsan:  ## run the C++ check program under a sanitizer, on every instruction set of this CPU
	cmake -S . -B build/$@ >/dev/null \
	  -DLAMOE_SANITIZE=$(if $(filter asan,$@),address$(,)undefined$(,)float-cast-overflow,thread)
	cmake --build build/$@
	@for isa in $(ISAS); do \
	  if [ $$isa = scalar ] || LAMOE_ISA=$$isa build/$@/check list >/dev/null 2>&1; then \
	    LAMOE_ISA=$$isa build/$@/check || exit 1; fi; done

$(RUN): $(SOURCE)
	$(PYTHON) tools/install.py $(VENV) serve,train
	@touch $@

$(DEV): $(SOURCE)
	$(PYTHON) tools/install.py $(VENV) serve,train,test,dev
	@touch $@ $(RUN)

clean:  ## remove the environment and all build outputs, but keep runs/
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
