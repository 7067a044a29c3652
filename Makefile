# make demo: trains on digits and on text, beside dense training too, and draws pictures (about five minutes)
# make test: lint, types and the tests on the TensorFlow, JAX and PyTorch backends (about ten minutes)
# make test-all: what `make test` leaves out: all combinations, models, drivers, examples
# make docs: builds the documentation into docs/_build, and runs every example in it
# make browser: serves the page that runs a dense and a sparse network side by side (needs npm)
# make browser-test: tests that page in headless Chromium (needs Node 20, npm and Chromium)
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
# The one that has been tried.
TORCH = torch==2.13.0
# For tests only, and without its dependency tensorflow-text, which would bring a second TensorFlow.
KERAS_HUB = keras-hub==0.32.0 kagglehub==1.0.3 kagglesdk==0.1.28 tokenizers regex sentencepiece

export TF_CPP_MIN_LOG_LEVEL ?= 3

PAGE = examples/browser
PORT ?= 8000

.PHONY: demo docs linkcheck test test-tensorflow test-jax test-torch test-all all-tensorflow all-jax all-torch lint nightly-keras bench peers browser browser-test clean

demo: $(VENV)/.demo
	$(BIN)/python examples/digits.py
	$(BIN)/python examples/train_faster.py

docs: $(VENV)/.docs
	KERAS_BACKEND=tensorflow $(BIN)/python -m sphinx --fail-on-warning --keep-going --jobs 2 docs docs/_build/html
	@echo "Open docs/_build/html/index.html"

# Links to other sites; `make docs` checks those within this one.
linkcheck: $(VENV)/.docs
	$(BIN)/python -m sphinx -D nb_execution_mode=off -b linkcheck docs docs/_build/links

test: lint test-tensorflow test-jax test-torch

test-tensorflow test-jax test-torch: test-%: $(VENV)/.test
	KERAS_BACKEND=$* $(BIN)/python -m pytest --numprocesses 2 -m "not exhaustive"

test-all: all-tensorflow all-jax all-torch

all-tensorflow all-jax all-torch: all-%: $(VENV)/.test
	KERAS_BACKEND=$* $(BIN)/python -m pytest --numprocesses 2 -m exhaustive

# Puts the nightly Keras into the environment of the tests.
nightly-keras: $(VENV)/.test
	$(BIN)/python -m pip uninstall --quiet --yes keras
	$(BIN)/python -m pip install --quiet --no-deps --pre keras-nightly

lint: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(VENV)/.test
	$(BIN)/python benchmarks/step_overhead.py
	$(BIN)/python benchmarks/mask_update.py
	$(BIN)/python benchmarks/memory.py
	$(BIN)/python benchmarks/structure_updates.py
	$(BIN)/python benchmarks/block_inference.py
	$(BIN)/python benchmarks/file_sizes.py
	$(BIN)/python benchmarks/train_faster.py
	$(BIN)/python benchmarks/condensed.py
	$(BIN)/python benchmarks/compaction.py
	$(BIN)/python benchmarks/soak.py
	$(BIN)/python benchmarks/input_pipeline.py
	$(BIN)/python benchmarks/crash_and_resume.py

# An hour, and some GB: each peer gets an environment of its own in .peers/.
peers: $(VENV)/.test
	$(BIN)/python benchmarks/peers/compare.py

browser: $(PAGE)/node_modules/@litertjs/core/package.json
	@echo "Open http://localhost:$(PORT)"
	$(PYTHON) -m http.server $(PORT) --bind 127.0.0.1 --directory $(PAGE)

browser-test: $(PAGE)/node_modules/puppeteer-core/package.json
	cd $(PAGE) && PYTHON=$(PYTHON) npm test

$(PAGE)/node_modules/@litertjs/core/package.json:
	cd $(PAGE) && npm install --silent --omit=dev

$(PAGE)/node_modules/puppeteer-core/package.json:
	cd $(PAGE) && npm install --silent

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.demo: $(VENV)/bin/python setup.cfg
	$(BIN)/python -m pip install --quiet --editable ".[cpu,examples]"
	touch $@

$(VENV)/.test: $(VENV)/bin/python setup.cfg
	$(BIN)/python -m pip install --quiet --editable ".[cpu,jax,examples,test]"
	$(BIN)/python -m pip install --quiet $(TORCH) onnx onnxscript onnxruntime
	$(BIN)/python -m pip install --quiet --no-deps $(KERAS_HUB)
	touch $@

$(VENV)/.docs: $(VENV)/.test
	$(BIN)/python -m pip install --quiet --editable ".[docs]"
	touch $@

clean:
	rm -rf $(VENV) .peers docs/_build build dist *.egg-info
