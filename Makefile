# make demo and make test are all a newcomer needs; both make .venv on first use.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
STAMP = $(VENV)/.installed

.PHONY: demo test llama check parity golden clean help
help:
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 12

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) scripts/install.py --venv $(VENV)
	@touch $@

demo: $(STAMP) ## SFT, then DPO, on the embedded model, and both scored (minutes, two CPU cores, no hub)
	$(BIN)/smolmlx train notes/pipeline

test: $(STAMP) ## all tests, a process for each core (they compute on one thread each)
	$(BIN)/pytest -n auto --dist loadfile

llama: $(STAMP) ## llama.cpp, the judge of GGUF files (built once, about ten minutes on two cores; pip keeps the wheel)
	$(BIN)/pip install --quiet --constraint constraints.txt llama-cpp-python

check: $(STAMP) ## lint, format, types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy smolmlx backends

parity: $(STAMP) ## measure MLX = PyTorch again and rewrite docs/parity.md
	$(BIN)/python tests/parity/publish.py

golden: $(STAMP) ## record the golden files again
	$(BIN)/pytest tests/golden --record

clean:
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
