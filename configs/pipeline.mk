# The pipeline's rules. Artifacts are the targets: each rule reads files and writes files, redoes only what changed, and
# goes on after a kill. The Makefile that includes this file sets
#   DATASET  the folder of configs/ that is meant when none is named: DATASET ?= demo
#   RECSYS   the command recsys, if it is not the one on PATH
#   PYTHON   a Python, which finds the nearest name of a misspelt one; default: python3
#   READY    a file that must be made before RECSYS can run; empty where it is installed already
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

RECSYS ?= recsys
PYTHON ?= python3
RAW ?=
SEED ?=
WITH ?=
REFIT ?=
OTHER ?=
TRUST ?=

CONFIG := configs/$(DATASET)
DATA := data/$(DATASET)
comma := ,
quote := '
space := $(subst ,, )
NAME := runs/$(subst $(space),-,$(strip $(DATASET) $(WITH)))
seeded := $(if $(SEED),-seed$(SEED))
RUN ?= $(NAME)$(if $(OTHER),-pair)$(seeded)
FIRST = $(if $(OTHER),$(NAME)$(seeded),$(RUN))# with OTHER, the first stage is that of the run without it
# REFIT trains again what validation has chosen, in folders of its own: the ranker on all its lists (ranker); or
# retriever and signals on all events before the test targets (all) or on all events (production, without a report)
OUT = $(RUN)$(if $(REFIT),/refit-$(REFIT))
relearned := $(filter all production,$(REFIT))
INDEX = $(FIRST)$(if $(relearned),/refit-$(REFIT))/index
RANKER = $(if $(relearned),$(RUN),$(OUT))/ranker

# the word of $(2) that is spelt most like $(1), as a question
nearest = $(addprefix ; did you mean ,$(addsuffix ?,$(shell $(PYTHON) -c 'import difflib, sys; \
	print(*difflib.get_close_matches(sys.argv[1], sys.argv[2:], 1))' '$(subst $(quote),,$(1))' $(2) 2> /dev/null)))
datasets := $(sort $(patsubst configs/%/retriever.yaml,%,$(wildcard configs/*/retriever.yaml)))
ifeq ($(strip $(DATASET)),)
$(error DATASET is empty; name a folder of configs/, for example DATASET=$(firstword $(datasets)))
endif
ifneq ($(words $(DATASET)),1)
$(error DATASET=$(DATASET) has $(words $(DATASET)) words, expected one of: $(datasets); overlays are given by WITH)
endif
ifeq ($(wildcard $(CONFIG)/*.yaml),)
$(error DATASET=$(DATASET): there is no folder $(CONFIG) with configs, expected one of: $(datasets)$(call nearest,$(DATASET),$(datasets)))
endif
ifneq ($(RAW),)
ifeq ($(wildcard $(RAW)),)
$(error RAW=$(RAW) does not exist; name the folder or zip with the raw data, without spaces in its path)
endif
endif
overlays := $(WITH:%=configs/with/%.yaml)
unknown := $(filter-out $(wildcard $(overlays)),$(overlays))
ifneq ($(unknown),)
known := $(sort $(notdir $(basename $(wildcard configs/with/*.yaml))))
$(error $(unknown) does not exist; WITH takes $(known)$(call nearest,$(notdir $(basename $(firstword $(unknown)))),$(known)))
endif

refits := ranker all production
ifneq ($(filter-out $(refits),$(REFIT))$(word 2,$(REFIT)),)
$(error REFIT=$(REFIT), expected one of: $(refits)$(if $(filter 1,$(REFIT)),; what was REFIT=1 is REFIT=ranker,$(call nearest,$(REFIT),$(refits))))
endif

ifneq ($(OTHER),)
ifeq ($(wildcard $(OTHER)/manifest.json),)
$(error OTHER=$(OTHER) has no manifest.json, expected the folder of another run's index; make that run first)
endif
again := $(if $(relearned),$(patsubst %/,%,$(dir $(OTHER)))/refit-$(REFIT)/index)
ifneq ($(again),)
ifeq ($(wildcard $(again)/manifest.json),)
$(error OTHER=$(OTHER) was not refitted, expected $(again)/manifest.json; make that run with REFIT=$(REFIT) first)
endif
endif
endif

# modules of one's own, such as TRUST="my_signals my_index", whose classes artifacts may name
trust := $(if $(TRUST),--trust '[$(subst $(space),$(comma),$(strip $(TRUST)))]')

# a stage's config, where the dataset has one
config = $(wildcard $(CONFIG)/$(1).yaml)
with_config = $(addprefix --config ,$(call config,$(1)))

# changes when RAW does, whatever the dates of the files: another archive is another dataset
raw := $(if $(RAW),data/.$(DATASET).raw)
$(if $(RAW),$(shell mkdir -p data; [ "$$(cat $(raw) 2>&1)" = "$(RAW)" ] || echo "$(RAW)" > $(raw)))

# a dataset whose prepare.yaml reads data/raw/demo is simulated first
simulated := $(if $(RAW),,$(if $(shell grep -s data/raw/demo $(CONFIG)/prepare.yaml),data/raw/demo/ratings.csv))

# the manifest names the raw files and folders that were read: where one is newer or gone, the data are made anew
listed := sed -n '/^  "inputs": \[$$/,/^  \]/s/^    "\(.*\)",\{0,1\}$$/\1/p' $(DATA)/manifest.json
changed := $(shell [ ! -e $(DATA)/manifest.json ] || $(listed) | while IFS= read -r path; do \
	if [ ! -e "$$path" ] || [ "$$path" -nt $(DATA)/manifest.json ]; then echo changed; break; fi; done)

# an interrupted fit goes on from its last checkpoint, unless anything it depends on is newer
resume = $$(for parent in $^; do [[ $(@D)/last.ckpt -nt $$parent ]] || { rm -f $(@D)/{best,last}.ckpt; exit; }; done; \
	echo --ckpt_path $(@D)/last.ckpt)
fit_options = $(addprefix --seed_everything ,$(SEED)) $(trust) --output $(@D)

# $(call stage,NAME,TEXT) prints "[3/8] TEXT: the folder or file"; it stands in a recipe, so only where that runs
stages := $(if $(simulated),simulate) prepare retriever index candidates ranker $(if $(REFIT),refit) \
	$(if $(relearned),reindex) bundle $(if $(filter production,$(REFIT)),,report) lists
up_to = $(if $(filter $(1),$(firstword $(2))),x,x $(call up_to,$(1),$(wordlist 2,$(words $(2)),$(2))))
stage = $(info [$(words $(call up_to,$(1),$(stages)))/$(words $(stages))] $(2): $(3))
interrupted := trap 'echo "Interrupted. The same command goes on where it stopped." >&2; exit 130' INT
recsys := @$(interrupted); RECSYS_HINTS=0 $(RECSYS)

.PHONY: changed help pipeline stages retriever clean

help: ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /\1\t/' | expand -t 16

pipeline: stages ## both stages on DATASET (RAW=folder or zip of the raw data)
	@echo; $(if $(filter production,$(REFIT)),echo "No report: the test events are trained on too. REFIT=all has one."; \
		echo,sed '/^95 %/q' $(OUT)/report.md; echo)
	@[ ! -s $(OUT)/examples.txt ] || { cat $(OUT)/examples.txt; echo; }
	@echo "written:"; for path in $(DATA)/ $(FIRST)/{retriever,index}/ $(if $(relearned),$(FIRST)/refit-$(REFIT)/{retriever$(comma)index}/) \
		$(RUN)/{candidates,ranker}/ $(if $(filter ranker,$(REFIT)),$(OUT)/ranker/) $(OUT)/bundle/ \
		$(if $(filter production,$(REFIT)),,$(OUT)/report.{md$(comma)json} $(OUT)/ranks.parquet $(OUT)/*.png) \
		$(OUT)/{recommendations.parquet,examples.txt}; do [ ! -e "$$path" ] || echo "  $$path"; done
	@$(if $(REFIT),,echo "to learn from the validation events too before serving: the same command with REFIT=all")
	@echo "next: $(RECSYS) serve --bundle $(OUT)/bundle --data $(DATA)"

required := $(patsubst %,$(CONFIG)/%.yaml,prepare retriever ranker)
stages: $(required) $(if $(filter production,$(REFIT)),,$(OUT)/report.json) $(OUT)/recommendations.parquet# a missing config is found before anything is trained

$(required):
	@echo "$@ does not exist, expected $(CONFIG)/{prepare,retriever,ranker}.yaml; copy it from another folder of \
	configs/ and change its paths" >&2; exit 1

data/raw/demo/ratings.csv: | $(READY)
	$(call stage,simulate,simulate a log,$(@D))
	$(recsys) simulate --size demo --output $(@D)

$(DATA)/manifest.json: $(CONFIG)/prepare.yaml $(RAW) $(raw) $(simulated) $(changed) | $(READY)
	$(call stage,prepare,prepare the data,$(@D))
	$(recsys) prepare-data --config $< --output $(@D) $(if $(RAW),--source.path $(RAW))

$(FIRST)/retriever/manifest.json: $(CONFIG)/retriever.yaml $(overlays) $(DATA)/manifest.json | $(READY)
	$(call stage,retriever,train the retriever,$(@D))
	$(recsys) fit --config $< $(addprefix --config ,$(overlays)) --data.init_args.path $(DATA) $(fit_options) \
		$(resume)

$(FIRST)/index/manifest.json: $(FIRST)/retriever/manifest.json $(call config,index)
	$(call stage,index,export the index,$(@D))
	$(recsys) export-index $(call with_config,index) $(trust) --retriever $(FIRST)/retriever/best.ckpt --data $(DATA) --output $(@D)

# OTHER=folder: the index of a second retriever on the same data, which joins the second stage
other := $(if $(OTHER),--signals+=OtherRetriever --signals.index=$(OTHER) --signals.candidates=100)
$(RUN)/candidates/manifest.json: $(FIRST)/index/manifest.json $(call config,mine) $(addsuffix /manifest.json,$(OTHER))
	$(call stage,candidates,mine candidate lists,$(@D))
	$(recsys) mine-negatives $(call with_config,mine) $(trust) $(other) $(addprefix --seed ,$(SEED)) --data $(DATA) --index $(FIRST)/index --output $(@D)

$(RUN)/ranker/manifest.json: $(CONFIG)/ranker.yaml $(RUN)/candidates/manifest.json
	$(call stage,ranker,train the ranker,$(@D))
	$(recsys) fit --config $< --data.init_args.path $(RUN)/candidates $(fit_options) \
		$(resume)

$(RUN)/refit-ranker/ranker/manifest.json: $(CONFIG)/ranker.yaml $(RUN)/ranker/manifest.json
	$(call stage,refit,train the ranker on all lists,$(@D))
	$(recsys) fit --config $< --data.init_args.path $(RUN)/candidates --data.init_args.refit $(RUN)/ranker $(fit_options) \
		$(resume)

ifneq ($(relearned),)
$(FIRST)/refit-$(REFIT)/retriever/manifest.json: $(CONFIG)/retriever.yaml $(overlays) $(FIRST)/retriever/manifest.json | $(READY)
	$(call stage,refit,train the retriever again,$(@D))
	$(recsys) fit --config $< $(addprefix --config ,$(overlays)) --data.init_args.path $(DATA) \
		--data.init_args.refit $(FIRST)/retriever --data.init_args.until $(if $(filter production,$(REFIT)),end,test) \
		$(fit_options) $(resume)

$(INDEX)/manifest.json: $(FIRST)/refit-$(REFIT)/retriever/manifest.json $(call config,index)
	$(call stage,reindex,export its index,$(@D))
	$(recsys) export-index $(call with_config,index) $(trust) --retriever $(FIRST)/refit-$(REFIT)/retriever/best.ckpt --data $(DATA) --output $(@D)
endif

$(OUT)/bundle/manifest.json: $(RANKER)/manifest.json $(INDEX)/manifest.json $(call config,bundle) $(addsuffix /manifest.json,$(again))
	$(call stage,bundle,export the bundle,$(@D))
	$(recsys) export-bundle $(call with_config,bundle) $(trust) --index $(INDEX) --ranker $(RANKER)/best.ckpt \
		$(if $(relearned),--data $(DATA)) $(addprefix --other ,$(again)) --output $(@D)

$(OUT)/report.json: $(OUT)/bundle/manifest.json $(call config,evaluate)
	$(call stage,report,evaluate both stages,$(OUT)/report.md)
	$(recsys) evaluate $(call with_config,evaluate) $(trust) --bundle $(OUT)/bundle --data $(DATA) --output $(@D) > /dev/null

$(OUT)/recommendations.parquet: $(OUT)/bundle/manifest.json $(call config,recommend)
	$(call stage,lists,recommend for all users,$@)
	$(recsys) recommend --show 3 $(call with_config,recommend) $(trust) --bundle $(OUT)/bundle --data $(DATA) --output $@ \
		> $(@D)/examples.txt

# the retriever and, with REFIT, its refit
retriever: $(FIRST)/index/manifest.json $(INDEX)/manifest.json

clean: ## remove what the pipeline made for DATASET
	rm -rf $(DATA) $(FIRST) $(RUN)
