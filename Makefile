# make figures [PROFILE=smoke|desk|paper] [ONLY=31] [TRAIN=never|missing|always]
PYTHON ?= python3
PROFILE ?= smoke
ONLY ?=
TRAIN ?=

BIN := .venv/bin
INSTALLED := .venv/.installed
COMMAND := $(BIN)/krause-repro
ONLY_OPTION := $(if $(ONLY),--only '$(ONLY)')
TRAIN_OPTION := $(if $(TRAIN),--train '$(TRAIN)')

ifeq ($(filter $(PROFILE),smoke desk paper),)
$(error PROFILE must be smoke, desk or paper, got '$(PROFILE)')
endif
ifneq ($(TRAIN),)
ifeq ($(filter $(TRAIN),never missing always),)
$(error TRAIN must be never, missing or always, got '$(TRAIN)')
endif
endif

.DEFAULT_GOAL := figures
.DELETE_ON_ERROR:
.NOTPARALLEL:
.PHONY: figures book test site help

figures: $(INSTALLED)  ## execute the notebooks under PROFILE and build the page that shows every figure
	$(COMMAND) data fashion_mnist
	$(COMMAND) run --profile '$(PROFILE)' $(ONLY_OPTION) $(TRAIN_OPTION)

book: $(INSTALLED)  ## execute the committed notebooks in place (desk results, no training) and clean them
	$(COMMAND) book $(ONLY_OPTION)
	$(BIN)/python -c 'from krause_repro.report import update_readme; update_readme()'

test: $(INSTALLED)  ## ruff and the tests
	$(COMMAND) data fashion_mnist
	$(BIN)/python -m ruff check .
	$(BIN)/python -m pytest

site: $(INSTALLED)  ## build runs/PROFILE/site again from what has been executed
	$(COMMAND) site --profile '$(PROFILE)'

help:  ## this list
	@echo "make [TARGET] [PROFILE=smoke|desk|paper] [ONLY=31,40_report] [TRAIN=never|missing|always] [PYTHON=python3]"
	@sed -n 's/^\([a-z]*\):.*##/  \1\t/p' Makefile | expand -t 12

# The stamp is written only by an installation that succeeded; new requirements install again.
$(INSTALLED): settings.ini setup.py pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -e '.[dev,eval]'
	$(COMMAND) kernels
	touch $@
