# make demo    set up .venv and run the main job on scikit-learn's digits: every method, the table, a report
# make test    set up .venv and run the linters and all tests
# Both take a Python of your choice with  make PYTHON=/path/to/python3.12 ...

PYTHON ?= $(shell for p in python3.11 python3; do $$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
BIN := .venv/bin
export OMP_WAIT_POLICY := passive
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: demo test lint docs prototxts proto image benchmark clean
.DELETE_ON_ERROR:

demo: .venv/demo.stamp
	@$(BIN)/hintkd demo

test: lint
	@$(BIN)/python -m pytest -q -n auto --maxprocesses 4

lint: .venv/dev.stamp
	@$(BIN)/ruff check --quiet .
	@$(BIN)/mypy --no-error-summary

prototxts: .venv/demo.stamp      # the committed nets and solvers of tables 1 and 3
	@$(BIN)/hintkd generate table1
	@$(BIN)/hintkd generate table3

docs: .venv/demo.stamp           # the generated parts of README.md and docs/
	@$(BIN)/python docs/render.py
	@$(BIN)/python docs/render_torchcaffe.py

proto: .venv/dev.stamp           # torchcaffe/proto/caffe_pb2.py from caffe.proto
	@$(BIN)/python -m torchcaffe.proto.generate

benchmark: .venv/demo.stamp      # wants a quiet machine; writes docs/performance.md
	@for program in step scaling memory remembered zoo; do $(BIN)/python benchmarks/$$program.py && $(BIN)/python benchmarks/$$program.py --render || exit; done

image:
	@docker build --tag hintkd .

clean:
	@rm -rf .venv build dist python/*.egg-info

.venv/demo.stamp: EXTRAS := demo,images
.venv/dev.stamp: EXTRAS := dev
.venv/%.stamp: pyproject.toml constraints.txt | .venv/bin/python
	@echo "Installing hintkd and what it needs into .venv (torch is large; this takes a while once)"
	@$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[$(EXTRAS)]'
	@touch $@

.venv/bin/python:
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || \
	  { echo "hintkd needs Python 3.11 or newer, as python3.11 or python3 or named: make PYTHON=/path/to/python" >&2; exit 1; }
	@"$(PYTHON)" -m venv .venv
