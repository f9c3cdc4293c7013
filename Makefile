# Every target installs what it needs into .venv. `make help` lists the targets.
PYTHON ?= python3
VENV   := .venv
PY     := $(VENV)/bin/python
STAMP  := $(VENV)/.installed
ONNX_PINNED := 1.21.0
CASES  := .cache/onnx-$(ONNX_PINNED)
PIP    := $(PY) -m pip install -q --disable-pip-version-check

.PHONY: chromium help demo demo-llm demo-serve bench-llm bench-serve bench-llm-gpu test check unit conformance zoo bench-cpu gpu-check bench-overheads bench-gpu docs clean

help:            ## list the targets
	@grep -E '^[a-z-]+:.*##' Makefile | sed 's/:.*##/\t/' | expand -t 16

$(STAMP): pyproject.toml
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PY) -c 'import torch' 2>/dev/null || $(PIP) torch==2.13.0
	$(PIP) -e '.[dev]'
	touch $@

$(CASES)/.done: $(STAMP)
	mkdir -p $(CASES)
	$(PIP) --no-deps --upgrade --target $(CASES) onnx==$(ONNX_PINNED)
	touch $@

demo: $(STAMP)   ## build two models, check them, show accuracy and speed
	$(PY) -m venturi demo

demo-llm: $(STAMP)  ## generate text with a small language model, streaming
	$(PY) -m venturi llm explain examples/llm/pydoc-5m
	$(PY) -m venturi llm run examples/llm/pydoc-5m --prompt "Return the" --max-tokens 80 --temperature 0.7 --seed 1
	$(PY) -m venturi llm bench latency examples/llm/pydoc-5m --osl 64

demo-serve: $(STAMP)  ## serve a model, ask it over HTTP and gRPC, stop
	$(PY) examples/serve/demo.py

test: check unit ## everything CI runs

check: $(STAMP)  ## lint, types
	$(VENV)/bin/ruff check .
	$(VENV)/bin/mypy

unit: $(STAMP) $(CASES)/.done chromium  ## all tests that need no GPU
	VENTURI_VERIFY=2 $(PY) -m pytest -n 2 --dist worksteal -m 'not gpu'

# The dashboard's test needs a browser; where none can be had it is skipped and says so.
chromium:
	@command -v chromium >/dev/null || { test "$$(id -u)" = 0 && command -v apt-get >/dev/null \
	  && (apt-get install -qq -y --no-install-recommends chromium || { apt-get update -qq \
	  && apt-get install -qq -y --no-install-recommends chromium; }) >/dev/null 2>&1; } || true

conformance: $(STAMP) $(CASES)/.done  ## the ONNX conformance table beside onnxruntime
	$(PY) -m benchmarks.conformance --peer

zoo: $(STAMP)    ## build and check every architecture of the zoo
	$(PY) -m benchmarks.zoo

bench-cpu: $(STAMP)  ## CPU latency, throughput, int8 and costs beside onnxruntime and, where installed, OpenVINO (40 min)
	$(PY) -m benchmarks.cpu --batches 1,8
	$(PY) -m benchmarks.cpu_streams
	$(PY) -m benchmarks.cpu_int8
	$(PY) -m benchmarks.cpu_costs

bench-llm: $(STAMP)  ## language models on the CPU beside transformers
	$(PY) -m benchmarks.llm.cpu

bench-llm-gpu: $(STAMP)  ## decode latency and throughput of language models (needs an NVIDIA GPU)
	$(PY) -m benchmarks.llm.decode --quants none,fp8
	$(PY) -m benchmarks.llm.throughput --quant fp8 --kv fp8 --cells 128/128/4000,1000/1000/1024,2048/128/600

gpu-check: $(STAMP)  ## tests marked gpu (needs an NVIDIA GPU)
	$(PY) -m pytest -n 4 -m gpu tests/gpu

bench-overheads: $(STAMP)  ## import, per-run, build, load and inspect times
	$(PY) -m benchmarks.overheads

bench-serve: $(STAMP)  ## requests per second of the server beside a trivial echo
	$(PY) -m benchmarks.serve

bench-gpu: $(STAMP)  ## the GPU benchmark table beside torch.compile (needs an NVIDIA GPU)
	$(PY) -m benchmarks.gpu --out benchmarks/results/gpu

docs: $(STAMP)   ## regenerate docs/operators.md and docs/env.md
	$(PY) -m docs.generate

clean:           ## remove what make created
	rm -rf $(VENV) .cache build *.egg-info
