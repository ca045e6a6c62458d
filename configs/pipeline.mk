# The pipeline's rules. Artifacts are the targets: each rule reads files and writes files, is run again only if the
# contents of what it reads have changed (dates do not count), and continues after a kill. The Makefile that includes this
# file sets
#   DATASET  the folder of configs/ that is meant when none is named: DATASET ?= demo
#   RECSYS   the command recsys, if it is not the one on PATH
#   PYTHON   a Python, which finds the nearest name of a misspelled one; default: python3
#   READY    a file that must be made before RECSYS can run; empty where it is installed already
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help

RECSYS ?= recsys
PYTHON ?= python3
RAW ?=
SEED ?=
WITH ?=
REFIT ?=
OTHER ?=
FOLDS ?=
TARGETS ?= 8
TRUST ?=

CONFIG := configs/$(DATASET)
DATA := data/$(DATASET)
comma := ,
quote := '
space := $(subst ,, )
NAME := runs/$(subst $(space),-,$(strip $(DATASET) $(WITH)))
seeded := $(if $(SEED),-seed$(SEED))
RUN ?= $(NAME)$(if $(OTHER),-pair)$(seeded)
ifeq ($(strip $(RUN)),)
$(error RUN is empty, expected a folder of your own for the run, such as RUN=runs/own; or leave it out)
endif
FIRST = $(if $(OTHER),$(NAME)$(seeded),$(RUN))# with OTHER, the first stage is that of the run without it
# REFIT trains again what validation has chosen, in folders of its own: the ranker on all its lists (ranker); or
# retriever and signals on all events before the test targets (all) or on all events (production, without a report)
# FOLDS=5 trains five more retrievers, each without a fifth of the users; lists of the users it left out train the ranker
# too, TARGETS of each user on average. That ranker has a folder of its own
CHOSEN = $(RUN)$(if $(FOLDS),/folds-$(FOLDS))# of the ranker that validation chooses
OUT = $(CHOSEN)$(if $(REFIT),/refit-$(REFIT))
relearned := $(filter all production,$(REFIT))
INDEX = $(FIRST)$(if $(relearned),/refit-$(REFIT))/index
RANKER = $(if $(relearned),$(CHOSEN),$(OUT))/ranker

# the word of $(2) that is spelled most like $(1), as a question
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

# $(call check_whole,VALUE,NAME,LEAST,ADVICE) stops unless VALUE is empty or a whole number from LEAST to 1000
whole = $(shell number='$(subst $(quote),,$(1))'; [[ $$number =~ ^[1-9][0-9]{0,3}$$ ]] && ((number >= $(3) && number <= 1000)) && echo yes)
check_whole = $(if $(1),$(if $(call whole,$(1),,$(3)),,$(error $(2)=$(1), expected a whole number from $(3) to 1000; set $(2)=$(4))))
$(call check_whole,$(FOLDS),FOLDS,2,5 for example$(comma) or leave it out)
$(call check_whole,$(if $(FOLDS),$(TARGETS)),TARGETS,1,8$(comma) or to nothing for as many as resemble the requests that are served)
folds := $(if $(FOLDS),$(shell seq 0 $$(($(FOLDS) - 1))))# their numbers

second := $(patsubst %/,%,$(OTHER))# its refit and its folds lie beside it
beside := $(patsubst %/,%,$(dir $(second)))
ifneq ($(OTHER),)
ifeq ($(wildcard $(second)/manifest.json),)
$(error OTHER=$(OTHER) has no manifest.json, expected the folder of another run's index; make that run first)
endif
again := $(if $(relearned),$(beside)/refit-$(REFIT)/index)
ifneq ($(again),)
ifeq ($(wildcard $(again)/manifest.json),)
$(error OTHER=$(OTHER) was not refitted, expected $(again)/manifest.json; make that run with REFIT=$(REFIT) first)
endif
endif
folded := $(folds:%=$(beside)/folds-$(FOLDS)/%/index/manifest.json)
lacking := $(filter-out $(wildcard $(folded)),$(folded))
ifneq ($(lacking),)
$(error OTHER=$(OTHER) has no such folds, expected $(firstword $(lacking)); make that run's retrievers with FOLDS=$(FOLDS) first: make retriever)
endif
endif

# modules of one's own, such as TRUST="my_signals my_index", whose classes artifacts may name
trust := $(if $(TRUST),--trust '[$(subst $(space),$(comma),$(strip $(TRUST)))]')

# a stage's config, where the dataset has one
config = $(wildcard $(CONFIG)/$(1).yaml)
with_config = $(addprefix --config ,$(call config,$(1)))

# a dataset whose prepare.yaml reads data/raw/demo is simulated first
simulated := $(if $(RAW),,$(if $(shell grep -s data/raw/demo $(CONFIG)/prepare.yaml),data/raw/demo/ratings.csv))

# --- What is out of date
# Every recipe is considered each time (FORCE), and is empty unless the inputs of its target differ from those noted when
# it was made. The note, .NAME.inputs beside the target NAME, has the SHA-256 of each config and manifest that was read,
# and options. TRUST is not among them: it permits classes and changes no result. An artifact of an earlier version has
# no note; it is up to date if it is newer than its inputs, and is given one. To run a stage again, remove its folder.
SHA256 := $(if $(shell command -v sha256sum),sha256sum,shasum -a 256)
noted = $(@D)/.$(@F).inputs
# exists from the start of a stage to its note; what is newer was replaced by a stage that was killed before its note
begun = $(dir $(@D)).$(notdir $(@D)).$(@F).begun
begins = mkdir -p $(dir $(@D)); : > $(begun); $(cleared)
parents = $(filter-out FORCE,$^)
inputs = { $(SHA256) $(parents)$(if $(1),; echo "$(1)"); } 2> /dev/null
sums = sed "s/  .*//"
same = { now=$$($(call inputs,$(1))); was=$$(< $(or $(2),$(noted))); [ "$$now" = "$$was" ] || \
	[ "$$($(sums) <<< "$$now")" = "$$($(sums) <<< "$$was")" ]; }# or the same under other paths
newer = find -L $(parents) -prune -newer
flag = $(findstring $(1),$(filter-out --%,$(firstword -$(MAKEFLAGS))))
dry := $(call flag,n)$(call flag,q)# nothing is written by a dry run, which takes what it would make as changed
pretended :=
# $(call stale,OPTIONS) is empty if the target is up to date
stale = $(if $(filter $(pretended),$^),x,$(shell if [ ! -e $@ ] || [ -e $(begun) -a $@ -nt $(begun) ]; then echo x; \
	elif [ -e $(noted) ]; then $(call same,$(1)) || echo x; \
	elif [ -n "$$($(newer) $@ 2> /dev/null)" ]; then echo x; \
	$(if $(dry),,else { $(call inputs,$(1)) > $(noted); } 2> /dev/null || true;) fi))
# what changed since the target was made, or since its training began
changes = $(if $(wildcard $(noted) $@ $(@D)/last.ckpt),$(sort $(shell if [ -e $(noted) ]; then \
	comm -3 <($(call inputs,$(1)) | sort) <(sort $(noted)) | tr -d "\t" | sed "s/^[0-9a-f]*  //"; \
	else for made in $@ $(@D)/last.ckpt; do [ ! -e $$made ] || { $(newer) $$made; break; }; done; fi 2> /dev/null)))

# What was read for DATASET: RAW, then the SHA-256, size and date, and path of each file and folder of the raw data; of a
# folder, the hash of its names. A file is hashed again only if its size or date differ. raw_changed prints what changed
raw := data/.$(DATASET).raw
listed = sed -n '/^  "inputs": \[$$/,/^  \]/s/^    "\(.*\)",\{0,1\}$$/\1/p' $(DATA)/manifest.json$(if $(RAW),; echo "$(RAW)")
hashing = hash() { if [ -d "$$1" ]; then ls "$$1"; else cat "$$1"; fi | $(SHA256) | cut -d " " -f 1; }; \
	state() { stat -Lc %s:%.9Y "$$1" 2> /dev/null || stat -Lf %z:%Fm "$$1"; }
note_raw = { { echo "$(1)"; { $(listed); } | sort -u | while IFS= read -r path; do \
	if [ -e $(begun) -a "$$path" -nt $(begun) ]; then echo "written-meanwhile - $$path"; \
	elif [ -e "$$path" ]; then echo "$$(hash "$$path") - $$path"; fi; done; } > $(raw).partial; mv $(raw).partial $(raw); }
raw_changed = $(shell $(hashing); [ -e $(DATA)/manifest.json ] || exit 0; changed() { echo "$${1:-$(raw)}"; exit 0; }; \
	{ read -r given && lines=$$(cat); } 2> /dev/null < $(raw) || { given=; lines=; }; \
	$(if $(RAW),[ "$$given" = "$(RAW)" ] || changed "RAW";) \
	if [ -z "$$lines" ]; then while IFS= read -r path; do \
		if [ ! -e "$$path" ] || [ "$$path" -nt $(DATA)/manifest.json ]; then changed "$$path"; fi; done < <($(listed)); \
		$(if $(dry),,$(call note_raw,$$given) 2> /dev/null ||) exit 0; exit 0; fi; \
	now=; while read -r sum state path; do \
		[ -e "$$path" ] || changed "$$path"; current=$$(state "$$path"); \
		[ "$$current" = "$$state" ] || [ "$$(hash "$$path")" = "$$sum" ] || changed "$$path"; \
		now+="$$sum $$current $$path"$$'\n'; done <<< "$$lines"; \
	$(if $(dry),,[ "$$now" = "$$lines"$$'\n' ] || \
		{ { echo "$$given"; printf %s "$$now"; } > $(raw).partial; mv $(raw).partial $(raw); }))
# what the prepared data hold, without when and from which paths they were made
content = cd $(DATA) && find . -type f ! -name manifest.json ! -name ".*" -exec $(SHA256) {} + | sort && \
	sed -n '/^  "counts"/,$$p' manifest.json

# --- How a stage is run
# $(call begin,STAGE,TEXT,PATH,CHANGES) prints "[3/8] TEXT: PATH (changed: CHANGES)"
fold_stages = retriever-$(1) index-$(1) candidates-$(1)
stages := $(if $(simulated),simulate) prepare retriever index candidates $(foreach fold,$(folds),$(call fold_stages,$(fold))) \
	ranker $(if $(REFIT),refit) $(if $(relearned),reindex) bundle $(if $(filter production,$(REFIT)),,report) lists
counted :=
$(foreach stage,$(stages),$(eval counted += x)$(eval number_$(stage) := $(words $(counted))))
begin = $(info [$(number_$(1))/$(words $(stages))] $(2): $(3)$(if $(4), (changed: $(4))))$(if \
	$(dry),$(eval pretended += $@))
interrupted := trap 'echo "Interrupted. The same command continues where it stopped." >&2; exit 130' INT

# $(call run,STAGE,TEXT,PATH,OPTIONS,COMMAND) runs `recsys COMMAND` if the target is out of date
define run
$(if $(call stale,$(4)),$(call begin,$(1),$(2),$(3),$(call changes,$(4)))
@$(if $(dry),$(RECSYS) $(5),$(interrupted); $(begins) inputs=$$($(call inputs,$(4))); \
	RECSYS_HINTS=0 $(RECSYS) $(5) && echo "$$inputs" > $(noted) && rm -f $(begun)))
endef

cleared = [ -e $@ ] || rm -f $(noted);# recsys writes into empty folders only

# $(call fit,STAGE,TEXT,WORDS) trains. An interrupted fit resumes from its last checkpoint if its inputs are those that it
# began with. Else it starts anew, and what was trained before is kept in the folder .before, and taken back if the change
# is undone
define fit
$(if $(call regain,$(seed)),$(info $(@D): back from $(@D).before$(comma) which began with the same inputs))$(if $(call \
	stale,$(seed)),$(call begin,$(1),$(2),$(@D),$(call changes,$(seed)))$(eval resume := $(call last,$(seed)))
@$(if $(dry),,$(interrupted); $(running) || { $(if $(resume),,$(aside)) inputs=$$($(call inputs,$(seed))); \
	mkdir -p $(@D); echo "$$inputs" > $(noted); }; RECSYS_HINTS=0) $(RECSYS) fit $(3) $(addprefix --seed_everything ,$(SEED)) \
	$(trust) --output $(@D) $(addprefix --ckpt_path ,$(resume)))
endef
last = $(shell if [ ! -e $(@D)/last.ckpt ]; then :; \
	elif if [ -e $(noted) ]; then $(call same,$(1)); else [ -z "$$($(newer) $(@D)/last.ckpt)" ]; fi; \
	then echo $(@D)/last.ckpt; fi)
trained = [ -n "$$(ls $(1)/{last.ckpt,best.ckpt,manifest.json} 2> /dev/null)" ]
aside = if $(call trained,$(@D)); then rm -rf $(@D).before; mv $(@D) $(@D).before; \
	echo "Training starts from scratch. What was trained before is kept in $(@D).before until the next change."; fi;
regain = $(if $(dry),,$(if $(wildcard $(before)),$(shell [ ! -e $(noted) ] || $(call same,$(1)) || ! $(call same,$(1),$(before)) || \
	$(running) || { rm -rf $(@D).other; mv $(@D) $(@D).other; mv $(@D).before $(@D); \
	! $(call trained,$(@D).other) || mv $(@D).other $(@D).before; rm -rf $(@D).other; echo x; })))
before = $(@D).before/.$(@F).inputs
# whether another process writes this folder, perhaps on another host: recsys will refuse a second one
lock = $(dir $(@D)).$(notdir $(@D)).running
held = sed -n 's/.*"$(1)": "\{0,1\}\([^",}]*\).*/\1/p' $(lock)
running = { [ -s $(lock) ] && { [ "$$($(call held,host))" != "$$(uname -n)" ] || { pid=$$($(call held,pid)); \
	ps -p "$$pid" &> /dev/null && { [ ! -e /proc/$$pid/stat ] || \
	[ "$$(sed "s/.*) //" /proc/$$pid/stat | cut -d " " -f 20)" = "$$($(call held,started))" ]; }; }; }; }

.PHONY: FORCE help pipeline stages retriever clean

help: ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /\1\t/' | expand -t 16

pipeline: stages ## both stages on DATASET (RAW=folder or zip of the raw data)
	@echo; $(if $(filter production,$(REFIT)),echo "No report: the test events are trained on too. REFIT=all has one."; \
		echo,sed '/^95 %/q' $(OUT)/report.md; echo)
	@[ ! -s $(OUT)/examples.txt ] || { cat $(OUT)/examples.txt; echo; }
	@echo "written:"; for path in $(DATA)/ $(FIRST)/{retriever,index}/ $(if $(relearned),$(FIRST)/refit-$(REFIT)/{retriever$(comma)index}/) \
		$(RUN)/candidates/ $(if $(FOLDS),$(FIRST)/folds-$(FOLDS)/) $(CHOSEN)/ranker/ \
		$(if $(filter ranker,$(REFIT)),$(OUT)/ranker/) $(OUT)/bundle/ \
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
	$(call begin,simulate,simulate a log,$(@D))
	@$(interrupted); RECSYS_HINTS=0 $(RECSYS) simulate --size demo --output $(@D)

# data that are prepared again with the same content keep their manifest, so nothing that was made from them is redone
define prepare
$(if $(or $(call stale),$(raw_changed)),$(call begin,prepare,prepare the data,$(@D),$(or $(call changes),$(raw_changed)))
@$(if $(dry),$(prepare_data),$(interrupted); $(begins) $(hashing); inputs=$$($(call inputs)); \
	before=$$({ $(content); } 2> /dev/null) || before=; cp -p $@ $(former) 2> /dev/null || true; \
	RECSYS_HINTS=0 $(prepare_data) || { status=$$?; rm -f $(former); exit $$status; }; \
	$(call note_raw,$(RAW)); \
	if [ -n "$$before" ] && [ "$$before" = "$$($(content))" ]; then mv $(former) $@; \
		echo "The prepared data are the same as before."; fi; \
	rm -f $(former); echo "$$inputs" > $(noted); rm -f $(begun)))
endef
former = data/.$(DATASET).manifest.$$$$
prepare_data = $(RECSYS) prepare-data --config $< --output $(@D) $(if $(RAW),--source.path $(RAW))
# recsys writes each of them as a whole, so what an interrupt finds is kept
first := retriever index $(REFIT:%=refit-%/retriever) $(REFIT:%=refit-%/index) $(foreach fold,$(folds),$(addprefix folds-$(FOLDS)/$(fold)/,retriever index))
chosen := ranker bundle $(REFIT:%=refit-%/ranker) $(REFIT:%=refit-%/bundle) $(folds:%=%/candidates)
.PRECIOUS: $(patsubst %,%/manifest.json,$(DATA) $(first:%=$(FIRST)/%) $(RUN)/candidates $(chosen:%=$(CHOSEN)/%)) \
	$(OUT)/report.json $(OUT)/recommendations.parquet

$(DATA)/manifest.json: $(CONFIG)/prepare.yaml FORCE | $(simulated) $(READY)
	$(prepare)

seed := $(SEED:%=SEED=%)
fit_retriever = --config $(CONFIG)/retriever.yaml $(addprefix --config ,$(overlays)) --data.init_args.path $(DATA)
export_index = export-index $(call with_config,index) $(trust) --retriever $(@D:index=retriever)/best.ckpt --data $(DATA) --output $(@D)
# $(call mine,INDEX,OTHER INDEX,WORDS); OTHER=folder: the index of a second retriever on the same data
mine = mine-negatives $(call with_config,mine) $(trust) $(if $(2),--signals+=OtherRetriever --signals.index=$(2) --signals.candidates=100) \
	$(addprefix --seed ,$(SEED)) --data $(DATA) --index $(1) --output $(@D) $(3)

$(FIRST)/retriever/manifest.json: $(CONFIG)/retriever.yaml $(overlays) $(DATA)/manifest.json FORCE | $(READY)
	$(call fit,retriever,train the retriever,$(fit_retriever))

$(FIRST)/index/manifest.json: $(FIRST)/retriever/manifest.json $(call config,index) FORCE
	$(call run,index,export the index,$(@D),,$(export_index))

$(RUN)/candidates/manifest.json: $(FIRST)/index/manifest.json $(call config,mine) $(addsuffix /manifest.json,$(second)) FORCE
	$(call run,candidates,mine candidate lists,$(@D),$(seed),$(call mine,$(FIRST)/index,$(second)))

# each fold is retrieved by a retriever that was trained without its users; $* is its number
ifneq ($(FOLDS),)
$(folds:%=$(FIRST)/folds-$(FOLDS)/%/retriever/manifest.json): $(FIRST)/folds-$(FOLDS)/%/retriever/manifest.json: \
		$(CONFIG)/retriever.yaml $(overlays) $(DATA)/manifest.json FORCE | $(READY)
	$(call fit,retriever-$*,train a retriever without fold $*/$(FOLDS),$(fit_retriever) --data.init_args.fold $*/$(FOLDS))

$(folds:%=$(FIRST)/folds-$(FOLDS)/%/index/manifest.json): $(FIRST)/folds-$(FOLDS)/%/index/manifest.json: \
		$(FIRST)/folds-$(FOLDS)/%/retriever/manifest.json $(call config,index) FORCE
	$(call run,index-$*,export its index,$(@D),,$(export_index))

$(folds:%=$(CHOSEN)/%/candidates/manifest.json): $(CHOSEN)/%/candidates/manifest.json: \
		$(FIRST)/folds-$(FOLDS)/%/index/manifest.json $(call config,mine) \
		$(if $(OTHER),$(beside)/folds-$(FOLDS)/%/index/manifest.json) FORCE
	$(call run,candidates-$*,mine lists of fold $*/$(FOLDS),$(@D),$(strip $(seed) $(TARGETS:%=TARGETS=%)),$(call \
		mine,$(FIRST)/folds-$(FOLDS)/$*/index,$(if $(OTHER),$(beside)/folds-$(FOLDS)/$*/index),--fold $*/$(FOLDS) $(TARGETS:%=--targets %)))
endif

fold_lists := $(folds:%=$(CHOSEN)/%/candidates)
# the states of folds are those of other retrievers, so the ranker is trained without them
fit_ranker = --config $(CONFIG)/ranker.yaml --data.init_args.path $(RUN)/candidates \
	$(if $(FOLDS),--data.init_args.folds '[$(subst $(space),$(comma),$(fold_lists))]' --model.init_args.without+=state)
$(CHOSEN)/ranker/manifest.json: $(CONFIG)/ranker.yaml $(RUN)/candidates/manifest.json $(fold_lists:%=%/manifest.json) FORCE
	$(call fit,ranker,train the ranker,$(fit_ranker))

$(CHOSEN)/refit-ranker/ranker/manifest.json: $(CONFIG)/ranker.yaml $(CHOSEN)/ranker/manifest.json FORCE
	$(call fit,refit,train the ranker on all lists,$(fit_ranker) --data.init_args.refit $(CHOSEN)/ranker)

ifneq ($(relearned),)
$(FIRST)/refit-$(REFIT)/retriever/manifest.json: $(CONFIG)/retriever.yaml $(overlays) $(FIRST)/retriever/manifest.json FORCE | $(READY)
	$(call fit,refit,train the retriever again,$(fit_retriever) --data.init_args.refit $(FIRST)/retriever \
		--data.init_args.until $(if $(filter production,$(REFIT)),end,test))

$(INDEX)/manifest.json: $(FIRST)/refit-$(REFIT)/retriever/manifest.json $(call config,index) FORCE
	$(call run,reindex,export its index,$(@D),,$(export_index))
endif

$(OUT)/bundle/manifest.json: $(RANKER)/manifest.json $(INDEX)/manifest.json $(call config,bundle) $(addsuffix /manifest.json,$(again)) FORCE
	$(call run,bundle,export the bundle,$(@D),,export-bundle $(call with_config,bundle) $(trust) --index $(INDEX) \
		--ranker $(RANKER)/best.ckpt $(if $(relearned),--data $(DATA)) $(addprefix --other ,$(again)) --output $(@D))

$(OUT)/report.json: $(OUT)/bundle/manifest.json $(call config,evaluate) FORCE
	$(call run,report,evaluate both stages,$(OUT)/report.md,,evaluate $(call with_config,evaluate) $(trust) \
		--bundle $(OUT)/bundle --data $(DATA) --output $(@D) > /dev/null)

$(OUT)/recommendations.parquet: $(OUT)/bundle/manifest.json $(call config,recommend) FORCE
	$(call run,lists,recommend for all users,$@,,recommend --show 3 $(call with_config,recommend) $(trust) \
		--bundle $(OUT)/bundle --data $(DATA) --output $@ > $(@D)/examples.txt)

# the retrievers: that of the run, with REFIT its refit, with FOLDS those of the folds
retriever: $(FIRST)/index/manifest.json $(INDEX)/manifest.json $(folds:%=$(FIRST)/folds-$(FOLDS)/%/index/manifest.json)

clean: ## remove what the pipeline made for DATASET
	rm -rf $(DATA) $(raw) data/.$(DATASET).manifest.* $(FIRST) $(RUN) $(dir $(RUN)).$(notdir $(RUN)).*.begun
