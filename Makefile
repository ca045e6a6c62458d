# Artifacts are the targets: each rule reads files and writes files, redoes only what changed, and goes on after a kill.
#   make pipeline DATASET=ml-1m RAW=path/to/ml-1m.zip SEED=1 WITH="item-tower dot"
#   make results DATASET=ml-1m RAW=path/to/ml-1m.zip
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

DATASET ?= ml-20m
RAW ?=
SEED ?=
WITH ?=
REFIT ?=
SEEDS ?= 0 1 2
OTHER ?=
TRUST ?=
PAIR ?= $(word 2,$(SEEDS))
PYTHON ?= python3

CONFIG := configs/$(DATASET)
DATA := data/$(DATASET)
comma := ,
space := $(subst ,, )
NAME := runs/$(subst $(space),-,$(strip $(DATASET) $(WITH)))
seeded := $(if $(SEED),-seed$(SEED))
RUN ?= $(NAME)$(if $(OTHER),-pair)$(seeded)
FIRST = $(if $(OTHER),$(NAME)$(seeded),$(RUN))# with OTHER, the first stage is that of the run without it
RANKER = $(RUN)/$(if $(REFIT),refit,ranker)
BIN := .venv/bin
RECSYS := $(BIN)/recsys

# modules of one's own, such as TRUST="my_signals my_index", whose classes artifacts may name
trust := $(if $(TRUST),--trust '[$(subst $(space),$(comma),$(strip $(TRUST)))]')

# a stage's config, where the dataset has one
config = $(wildcard $(CONFIG)/$(1).yaml)
with_config = $(addprefix --config ,$(call config,$(1)))
ifeq ($(strip $(DATASET)),)
$(error DATASET is empty; name a folder of configs/, for example DATASET=ml-1m)
endif
ifneq ($(RAW),)
ifeq ($(wildcard $(RAW)),)
$(error RAW=$(RAW) does not exist; name the folder or zip with the raw data, without spaces in its path)
endif
endif
# changes when RAW does, whatever the dates of the files: another archive is another dataset
raw := $(if $(RAW),data/.$(DATASET).raw)
$(if $(RAW),$(shell mkdir -p data; [ "$$(cat $(raw) 2>&1)" = "$(RAW)" ] || echo "$(RAW)" > $(raw)))

# the manifest names the raw files and folders that were read: where one is newer or gone, the data are made anew
listed := sed -n '/^  "inputs": \[$$/,/^  \]/s/^    "\(.*\)",\{0,1\}$$/\1/p' $(DATA)/manifest.json
changed := $(shell [ ! -e $(DATA)/manifest.json ] || $(listed) | while IFS= read -r path; do \
	if [ ! -e "$$path" ] || [ "$$path" -nt $(DATA)/manifest.json ]; then echo changed; break; fi; done)

overlays := $(WITH:%=configs/with/%.yaml)
unknown := $(filter-out $(wildcard $(overlays)),$(overlays))
ifneq ($(unknown),)
$(error $(unknown) does not exist; WITH takes $(notdir $(basename $(wildcard configs/with/*.yaml))))
endif
# an interrupted fit goes on from its last checkpoint, unless anything it depends on is newer
resume = $$(for parent in $^; do [[ $(@D)/last.ckpt -nt $$parent ]] || { rm -f $(@D)/{best,last}.ckpt; exit; }; done; \
	echo --ckpt_path $(@D)/last.ckpt)
fit_options = $(addprefix --seed_everything ,$(SEED)) $(trust) --output $(@D)

# tests that compare computed floats, for test-portable
NUMERIC := tests/retrieval $(patsubst %,tests/ranking/test_%.py,list_losses reranker scorers) tests/evaluation/test_evaluate.py \
	$(patsubst %,tests/test_%.py,devices estimator features metrics precision recommender)

.PHONY: changed help setup demo pipeline results test test-portable test-slow lint format clean

help: ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /\1\t/' | expand -t 16

setup: .venv/ready ## install the package and its tools into .venv

.venv/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".[dev]"
	@touch $@

demo: ## the whole pipeline on a generated world, in a few minutes
	@$(MAKE) --no-print-directory pipeline DATASET=demo

pipeline: $(RUN)/report.json $(RUN)/recommendations.parquet ## both stages on DATASET (default ml-20m; RAW=folder or zip)
	@sed '/^95 %/q' $(RUN)/report.md
	@echo; echo "Written:"; ls -d $(DATA) $(FIRST)/{retriever,index}/ $(RUN)/{candidates,ranker,bundle}/ $(RUN)/{report.md,report.json,ranks.parquet,recommendations.parquet} | sed 's/^/  /'

results: ## the headline of DATASET: seeds 0, 1 and 2 (SEEDS), each beside the next one's retriever (PAIR= for none)
	@for seed in $(SEEDS); do $(MAKE) --no-print-directory SEED=$$seed $(NAME)-seed$$seed/index/manifest.json; done
	@set -- $(SEEDS); for seed in $(SEEDS); do shift; $(MAKE) --no-print-directory pipeline SEED=$$seed \
		$(if $(PAIR),OTHER=$(NAME)-seed$${1:-$(firstword $(SEEDS))}/index) > /dev/null; done
	@$(BIN)/python benchmarks/results.py $(SEEDS:%=$(NAME)$(if $(PAIR),-pair)-seed%)

data/raw/demo/ratings.csv: | .venv/ready
	$(RECSYS) simulate --size demo --output $(@D)

data/demo/manifest.json: data/raw/demo/ratings.csv

$(DATA)/manifest.json: $(CONFIG)/prepare.yaml $(RAW) $(raw) $(changed) | .venv/ready
	$(RECSYS) prepare-data --config $< --output $(@D) $(if $(RAW),--source.path $(RAW))

$(FIRST)/retriever/manifest.json: $(CONFIG)/retriever.yaml $(overlays) $(DATA)/manifest.json | .venv/ready
	$(RECSYS) fit --config $< $(addprefix --config ,$(overlays)) --data.init_args.path $(DATA) $(fit_options) \
		$(resume)

$(FIRST)/index/manifest.json: $(FIRST)/retriever/manifest.json $(call config,index)
	$(RECSYS) export-index $(call with_config,index) $(trust) --retriever $(FIRST)/retriever/best.ckpt --data $(DATA) --output $(@D)

# OTHER=folder: the index of a second retriever on the same data, which joins the second stage
other := $(if $(OTHER),--signals+=OtherRetriever --signals.index=$(OTHER) --signals.candidates=100)
$(RUN)/candidates/manifest.json: $(FIRST)/index/manifest.json $(call config,mine) $(addsuffix /manifest.json,$(OTHER))
	$(RECSYS) mine-negatives $(call with_config,mine) $(trust) $(other) $(addprefix --seed ,$(SEED)) --data $(DATA) --index $(FIRST)/index --output $(@D)

$(RUN)/ranker/manifest.json: $(CONFIG)/ranker.yaml $(RUN)/candidates/manifest.json
	$(RECSYS) fit --config $< --data.init_args.path $(RUN)/candidates $(fit_options) \
		$(resume)

# REFIT=1: once it is selected, the ranker is trained anew on all lists, for as many epochs
$(RUN)/refit/manifest.json: $(CONFIG)/ranker.yaml $(RUN)/ranker/manifest.json
	$(RECSYS) fit --config $< --data.init_args.path $(RUN)/candidates --data.init_args.refit $(RUN)/ranker $(fit_options) \
		$(resume)

$(RUN)/bundle/manifest.json: $(FIRST)/index/manifest.json $(RANKER)/manifest.json $(call config,bundle)
	$(RECSYS) export-bundle $(call with_config,bundle) $(trust) --index $(FIRST)/index --ranker $(RANKER)/best.ckpt --output $(@D)

$(RUN)/report.json: $(RUN)/bundle/manifest.json $(call config,evaluate)
	$(RECSYS) evaluate $(call with_config,evaluate) $(trust) --bundle $(RUN)/bundle --data $(DATA) --output $(@D) > /dev/null

$(RUN)/recommendations.parquet: $(RUN)/bundle/manifest.json $(call config,recommend)
	$(RECSYS) recommend $(call with_config,recommend) $(trust) --bundle $(RUN)/bundle --data $(DATA) --output $@

test: .venv/ready ## the tests
	$(BIN)/python -m pytest -q -m "not slow"

# the kernels of torch, oneDNN, MKL and OpenBLAS of two older processors; set before Python starts, for they are read once
test-portable: .venv/ready ## the numeric tests with the vector widths of other processors
	ATEN_CPU_CAPABILITY=default ONEDNN_MAX_CPU_ISA=SSE41 MKL_ENABLE_INSTRUCTIONS=SSE4_2 OPENBLAS_CORETYPE=Nehalem \
		$(BIN)/python -m pytest -q -m "not slow" $(NUMERIC)
	ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 MKL_ENABLE_INSTRUCTIONS=AVX2 OPENBLAS_CORETYPE=Haswell \
		$(BIN)/python -m pytest -q -m "not slow" $(NUMERIC)

test-slow: .venv/ready ## the tests that take longer
	$(BIN)/python -m pytest -q -m slow

lint: .venv/ready ## ruff and mypy
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy

format: .venv/ready ## let ruff rewrite the code
	$(BIN)/ruff check --fix . && $(BIN)/ruff format .

clean: ## remove what the pipeline made for DATASET
	rm -rf $(DATA) $(FIRST) $(RUN)
