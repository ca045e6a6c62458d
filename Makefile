# The package's own targets; those of the pipeline are in configs/pipeline.mk, which `recsys init` copies into a project.
#   make pipeline DATASET=ml-1m RAW=path/to/ml-1m.zip SEED=1 WITH="item-tower dot"
#   make results DATASET=ml-1m RAW=path/to/ml-1m.zip
DATASET ?= ml-20m
SEEDS ?= 0 1 2
PAIR ?= $(word 2,$(SEEDS))
PYTHON ?= python3
JOBS ?= 2# processes of the tests, of one thread each
BIN := .venv/bin
RECSYS := $(BIN)/recsys
READY := .venv/ready
PYTEST := $(BIN)/python -m pytest -q -n $(JOBS) --dist loadfile --no-loadscope-reorder

include configs/pipeline.mk

# tests that compare computed floats, for test-portable
NUMERIC := tests/retrieval $(patsubst %,tests/ranking/test_%.py,list_losses reranker scorers) tests/evaluation/test_evaluate.py \
	$(patsubst %,tests/test_%.py,devices estimator metrics precision recommender)

.PHONY: setup demo serve results test test-portable test-slow lint format docs docs-serve figures

setup: .venv/ready ## install the package and its tools into .venv

.venv/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".[dev]"
	@touch $@

demo: ## the whole pipeline on a simulated log, in a few minutes
	@$(MAKE) --no-print-directory pipeline DATASET=demo

serve: ## the demo's recommendations as a service with a page, at http://127.0.0.1:8000/ (PORT=)
	@$(MAKE) --no-print-directory pipeline DATASET=demo REFIT=all
	$(RECSYS) serve --bundle runs/demo/refit-all/bundle --data data/demo --port $(or $(PORT),8000)

# each table without and with the refit, which is REFIT=all unless another one is given; REFIT= for none
refit_results := $(if $(filter file,$(origin REFIT)),all,$(REFIT))
results: ## the main result of DATASET: seeds 0, 1 and 2 (SEEDS), each with the next seed's retriever as the second one (PAIR= for none)
	@$(if $(filter production,$(REFIT)),$(error REFIT=production has no metrics, expected REFIT=all, ranker or none; leave it out))
	@for seed in $(SEEDS); do $(MAKE) --no-print-directory retriever SEED=$$seed REFIT=$(refit_results); done
	@for refit in '' $(refit_results); do set -- $(SEEDS); for seed in $(SEEDS); do shift; \
		$(MAKE) --no-print-directory stages SEED=$$seed REFIT=$$refit \
		$(if $(PAIR),OTHER=$(NAME)-seed$${1:-$(firstword $(SEEDS))}/index); done; done
	@for refit in '' $(refit_results:%=/refit-%); do \
		for seed in $(SEEDS); do echo $(NAME)$(if $(PAIR),-pair)-seed$$seed$(FOLDS:%=/folds-%)$$refit; done | \
		xargs $(BIN)/python benchmarks/results.py; done

test: .venv/ready ## the tests
	$(PYTEST) -m "not slow"

# the kernels of torch, oneDNN, MKL and OpenBLAS of two older processors; set before Python starts, for they are read once
test-portable: .venv/ready ## the numeric tests with the vector widths of other processors
	ATEN_CPU_CAPABILITY=default ONEDNN_MAX_CPU_ISA=SSE41 MKL_ENABLE_INSTRUCTIONS=SSE4_2 OPENBLAS_CORETYPE=Nehalem \
		$(PYTEST) -m "not slow" $(NUMERIC)
	ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 MKL_ENABLE_INSTRUCTIONS=AVX2 OPENBLAS_CORETYPE=Haswell \
		$(PYTEST) -m "not slow" $(NUMERIC)

test-slow: .venv/ready ## the tests that take longer
	$(BIN)/python -m pytest -q -m slow

lint: .venv/ready ## ruff and mypy
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy

format: .venv/ready ## let ruff rewrite the code
	$(BIN)/ruff check --fix . && $(BIN)/ruff format .

# NO_MKDOCS_2_WARNING: the theme's note on its next version
MKDOCS := NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs

docs: .venv/ready ## the documentation as a site in site/, which works offline; any warning is an error
	$(MKDOCS) build --strict --quiet

docs-serve: .venv/ready ## the documentation at http://127.0.0.1:8001/ while you write (PORT=)
	$(MKDOCS) serve --dev-addr 127.0.0.1:$(or $(PORT),8001)

figures: .venv/ready ## draw the figures of the documentation again, into docs/figures/
	$(BIN)/python -m docs.figures
