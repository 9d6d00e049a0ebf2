# hasten: the two commands a newcomer needs are `make repro` and `make test`.
# Every target creates .venv and installs into it when pyproject.toml or constraints.txt changed.
#   PLAN=name        the study to run (conf/plans/name.yaml)         default: the one in params.yaml
#   PIP_ARGS="..."   passed to pip, for example an index with CPU-only torch wheels
#   PYTHON=python3   the interpreter that creates .venv (3.11 or 3.12)

PYTHON   ?= $(shell command -v python3.11 || command -v python3.12 || echo python3)
PIP_ARGS ?=
PORT     ?= 5000
VENV     := $(CURDIR)/.venv
STAMP    := $(VENV)/.installed
export PATH := $(VENV)/bin:$(PATH)
unexport VIRTUAL_ENV

.PHONY: repro test test-all check format sweep ui publish notebooks constraints clean install help
help: ; @sed -n '1,5p' Makefile; grep -E '^[a-z-]+:.*##' Makefile | sed 's/:.*##/\t/'

install: $(STAMP) ## create .venv and install hasten with its engines and development tools
$(STAMP): pyproject.toml constraints.txt
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install $(PIP_ARGS) -c constraints.txt -e '.[cpu-engines,dev]'
	touch $(STAMP)

repro: $(STAMP) ## run the plan: text -> model -> variants -> measurements -> verdict
	python pipelines/plan.py $(if $(PLAN),name=$(PLAN))
	dvc repro
	python pipelines/show.py

test: $(STAMP) ## the tests (fast ones and the smoke test of the whole graph)
	pytest -m "not slow" -n logical --maxprocesses 8 --dist loadfile --max-worker-restart 0 --ignore tests/smoke
	pytest -m "not slow" -n 2 --dist loadfile --max-worker-restart 0 tests/smoke

test-all: $(STAMP) ## every test, the slow ones too
	pytest

check: $(STAMP) ## format, lint, types, architecture
	ruff format --check .
	ruff check .
	mypy
	lint-imports

format: $(STAMP) ## let ruff rewrite what it can
	ruff format .
	ruff check --fix .

sweep: $(STAMP) ## example sweep: rtn at 4 and 8 bits on both engines
	python pipelines/sweep.py -m compression=rtn compression.bits=4,8 engine=eager,llamacpp

publish: $(STAMP) ## rebuild the MLflow store from the records on disk
	python pipelines/publish.py

ui: $(STAMP) ## the MLflow UI on loopback
	MLFLOW_DISABLE_TELEMETRY=true mlflow ui --host 127.0.0.1 --port $(PORT) \
		--backend-store-uri $${MLFLOW_TRACKING_URI:-sqlite:///$(CURDIR)/mlflow.db}

constraints: $(STAMP) ## write the installed versions to constraints.txt
	{ sed '/^[^#]/,$$d' constraints.txt; pip freeze --exclude-editable | sed 's/+cpu//'; } > constraints.new
	mv constraints.new constraints.txt

clean: ## remove what can be made again, keep .venv and the DVC cache
	rm -rf artifacts .work multirun .pytest_cache .mypy_cache .ruff_cache .import_linter_cache
