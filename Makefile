# Two commands: `make demo` shows the project at work, `make test` runs all tests.
# Both build .venv on first use. PYTHON picks the interpreter, 3.11 or newer.

PYTHON ?= python3
SCATTER ?= yes
VENV := .venv
PIP := $(VENV)/bin/python -m pip install --quiet --constraint constraints.txt

.PHONY: demo test check format clean

demo: $(VENV)/.installed
	$(VENV)/bin/python -m train.imagenet --graph mbv1_dnw --data digits --image-size 32 \
	  --batch-size 64 --lr 0.05 --epochs 3 --out runs/demo --overwrite
	$(VENV)/bin/python examples/draw_wiring.py runs/demo --out runs/demo/wiring.png

test: $(VENV)/.installed-tests
	$(VENV)/bin/python -m pytest --numprocesses auto --maxprocesses 4 --dist loadgroup

check: $(VENV)/.installed-tests
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

format: $(VENV)/.installed-tests
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

clean:
	rm -rf $(VENV)

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; v = "%d.%d" % sys.version_info[:2]; sys.exit(sys.version_info < (3, 11) and \
	  f"dnw-graph needs Python 3.11 or newer, but $(PYTHON) is {v}: run make PYTHON=/path/to/python3.11")'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: $(VENV)/bin/python pyproject.toml constraints.txt
	@echo "Installing PyTorch and the rest; the first time takes a few minutes."
	$(PIP) --editable ".[train,report]"
	@touch $@

# torch-scatter is compiled against the PyTorch installed above: about eight minutes the first time,
# then pip has it cached. Tests run without it too, and say what they skip: make test SCATTER=no
$(VENV)/.installed-tests: $(VENV)/.installed
	$(PIP) --editable ".[train,report,export,dev]"
ifeq ($(SCATTER),yes)
	@$(VENV)/bin/python -c "import torch_scatter" 2>/dev/null || \
	  echo "Compiling torch-scatter; the first time takes about eight minutes (SCATTER=no leaves it out)."
	$(PIP) setuptools wheel
	$(PIP) --no-build-isolation --editable ".[scatter]"
endif
	@touch $@
