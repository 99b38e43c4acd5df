# Works on a fresh machine with Python 3.11+, a C++ compiler and make. Everything is installed into .venv, at pinned versions.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
, := ,
READY  := $(VENV)/.ready

.PHONY: demo test test-lm-eval long needle bench bench-serve asan tsan clean

demo: $(READY)  ## train a small DeepSeek-V2 on this machine, report on it, let it speak; DEMO='--run.threads 1' where other programs keep the cores busy
	$(BIN)/lamoe train recipes/tiny.toml $(DEMO) $(if $(wildcard runs/tiny/latest),--resume)
	$(BIN)/lamoe evaluate runs/tiny
	$(BIN)/lamoe info runs/tiny
	@for prompt in 'def read(self, ' 'class Node:' 'It was a truth'; do echo; echo "--- $$prompt"; \
	  $(BIN)/lamoe generate --model runs/tiny --prompt "$$prompt" --max-tokens 80 --temperature 0.7 --seed 1 || exit 1; done

test: $(READY)  ## all tests
	$(BIN)/python -m pytest

test-lm-eval: $(READY)  ## lm-eval against the server; apart, because installing lm-eval takes more than a minute
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[serve,train,test,lm-eval]'
	$(BIN)/python -m pytest tests/serve/test_serve_lm_eval.py

long: $(READY)  ## 128K positions: the slow test, then the cache's memory there against the closed form
	$(BIN)/python -m pytest -m slow
	$(BIN)/python benchmarks/long.py

needle: $(READY)  ## train a small model for retrieval, lengthen its context with YaRN, and draw both heat maps
	$(BIN)/python benchmarks/needle.py

bench: $(READY)  ## training speed beside transformers, alternating
	$(BIN)/python benchmarks/train.py

asan tsan:  ## csrc/check.cpp under AddressSanitizer + UBSan, or ThreadSanitizer, on every instruction set of this CPU
	cmake -S . -B build/$@ -DLAMOE_SANITIZE=$(if $(filter asan,$@),address$(,)undefined$(,)float-cast-overflow,thread) >/dev/null
	cmake --build build/$@
	@for isa in scalar avx2 avxvnni avx512vnni avx512 amx; do \
	  if [ $$isa = scalar ] || LAMOE_ISA=$$isa build/$@/check list >/dev/null 2>&1; then LAMOE_ISA=$$isa build/$@/check || exit 1; fi; done

bench-serve: $(READY)  ## two minutes of load on the server: 64 clients, some of them rude; and what HTTP costs a token
	$(BIN)/python benchmarks/serve.py

$(READY): pyproject.toml constraints.txt CMakeLists.txt $(wildcard csrc/*)
	$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "lamoe needs Python 3.11 or newer, found " + sys.version.split()[0] + "; set PYTHON=python3.11 or newer")'
	@echo 'building $(VENV): downloads and a compilation, some minutes without a word'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[serve,train,test]'
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache
