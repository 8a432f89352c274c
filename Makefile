# vitrail: `make demo` trains a masked autoencoder on this machine, `make test` runs the tests.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin

# Waiting threads spin briefly and then sleep: spinning on, they take the cores from whatever else runs there.
export GOMP_SPINCOUNT ?= 20000
STAMP  := $(VENV)/.installed

# The benchmarks of a GPU machine need neither the environment nor an installation.
ANY_PYTHON := $(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON))
# `make bench-gpu --dry` is make's own --dry-run, under which lines that begin with + run all the same.
DRY := $(if $(findstring n,$(firstword -$(MAKEFLAGS))),--dry)

.PHONY: demo test check bench bench-gpu figures wheelhouse links clean
.DEFAULT_GOAL := demo

# Everything the demo, the tests and the checks need, at the exact versions that are tested. torch comes first: the
# build of the compiled extension looks at it, and is skipped with a reason where there is no CUDA toolkit.
$(STAMP): setup.py constraints.txt $(wildcard csrc/*.* csrc/*/*.*)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt pip setuptools wheel ninja torch numpy
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python -m pip install --quiet --constraint constraints.txt \
		--no-build-isolation --editable '.[dev,bench]'
	touch $(STAMP)

demo: $(STAMP)
	$(BIN)/deepspeed recipes/mae_vith.py --demo $(ARGS)

# In two processes, each file as a whole in one of them: most tests keep one core busy.
test: $(STAMP)
	$(BIN)/pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder $(ARGS)

check: $(STAMP) links
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy -p vitrail.kernels -p vitrail.engine -p vitrail.recipes -p bench

# Every benchmark on this machine, beside its peers; rows in benchmarks/results, see benchmarks/README.md.
bench: $(STAMP)
	$(BIN)/pytest benchmarks --benchmark-quiet $(ARGS)

# One command on a GPU machine: checks every op, then measures ops, steps and their parts; call it again to go on.
bench-gpu:
	+$(ANY_PYTHON) benchmarks/harness/gpu.py $(DRY) $(ARGS)

# Charts, docs/benchmarks.md and the README's section on performance, from the rows.
figures: $(STAMP)
	$(BIN)/python benchmarks/harness/figures.py $(ARGS)

# What a GPU machine without a network needs beside torch, small packages first (Python 3.12, x86-64 Linux).
wheelhouse: $(STAMP)
	$(BIN)/python tools/wheelhouse.py --constraint constraints.txt --output wheelhouse $(ARGS)

# The namespace as a folder of links: for mypy, and for use without an installation (PYTHONPATH=.links).
links:
	@mkdir -p .links/vitrail
	@for folder in kernels engine recipes; do ln -sfn ../../$$folder .links/vitrail/$$folder; done

clean:
	rm -rf $(VENV) .links build wheelhouse *.egg-info kernels/*.so kernels/extension.json
