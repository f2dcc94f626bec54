# make figures [PROFILE=smoke|desk|paper] [ONLY=61] [TRAIN=never|missing|always]
PYTHON ?= python3
PROFILE ?= smoke
ONLY ?=
TRAIN ?=
VENV ?= .venv

BIN := $(VENV)/bin
LOCK := requirements-lock.txt
# of these, settings.ini has an upper bound that `make test-latest` lifts
NEWEST := torch torchvision transformers peft accelerate datasets
INSTALLED := $(VENV)/.installed
COMMAND := $(BIN)/krause-repro
ONLY_OPTION := $(if $(ONLY),--only '$(ONLY)')
TRAINS := $(filter smoke,$(PROFILE))$(filter missing always,$(TRAIN))
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
.PHONY: figures book test test-thorough test-latest lock site pdf help

figures: $(INSTALLED)  ## execute the notebooks (desk: experiments and reports) and build the page that shows every figure
	$(if $(TRAINS),$(COMMAND) data fashion_mnist)
	$(COMMAND) run --profile '$(PROFILE)' $(ONLY_OPTION) $(TRAIN_OPTION)

book: $(INSTALLED)  ## execute the committed notebooks in place (desk results, no training) and clean them
	$(COMMAND) book $(ONLY_OPTION)
	$(BIN)/python -c 'from krause_repro.report import update_readme; update_readme()'

test: $(INSTALLED)  ## ruff and the tests
	$(COMMAND) data fashion_mnist
	$(BIN)/python -m ruff check .
	$(BIN)/python -m pytest --numprocesses=logical --maxprocesses=4 --dist=worksteal

test-thorough: $(INSTALLED)  ## the tests with twenty times as many random examples, drawn anew
	KRAUSE_TEST_EXAMPLES=20 $(BIN)/python -m pytest --numprocesses=logical --maxprocesses=4 --dist=worksteal --timeout=3600

test-latest:  ## the tests with the newest release of every requirement, in an environment of its own
	$(MAKE) test VENV='$(VENV)-latest' LOCK=

site: $(INSTALLED)  ## build runs/PROFILE/site again from what has been executed
	$(COMMAND) site --profile '$(PROFILE)'

pdf: $(INSTALLED)  ## print the page of claims to runs/desk/claims.pdf; needs Chromium
	$(COMMAND) run --profile desk --only 68
	browser=$$(command -v chromium || command -v chromium-browser || command -v google-chrome) \
		|| { echo 'make pdf needs chromium, chromium-browser or google-chrome' >&2; exit 1; }; \
	"$$browser" --headless --no-sandbox --disable-gpu --no-pdf-header-footer \
		--print-to-pdf='$(CURDIR)/runs/desk/claims.pdf' 'file://$(CURDIR)/runs/desk/site/68_claims.html'

lock: $(INSTALLED)  ## resolve the requirements of settings.ini anew and write requirements-lock.txt
	$(BIN)/python -m pip install 'uv>=0.9'
	$(BIN)/uv pip compile --universal --generate-hashes --upgrade --quiet --custom-compile-command 'make lock' \
		--python-version "$$(sed -n 's/^min_python = //p' settings.ini)" --extra dev --extra eval --output-file requirements-lock.txt setup.py

help:  ## this list
	@echo "make [TARGET] [PROFILE=smoke|desk|paper] [ONLY=61,70_report] [TRAIN=never|missing|always] [PYTHON=python3] [VENV=.venv]"
	@sed -n 's/^\([a-z-]*\):.*##/  \1\t/p' Makefile | expand -t 16

# The stamp is written only by an installation that succeeded; new requirements install again. Without a lock, the newest releases
# are installed. The packages of [build-system] come first, so that what is built from source is built by locked versions, too.
# The lock is complete: with --no-deps, pip need not tell `typepy[datetime]` from the locked `typepy`, which old releases of it refuse.
$(INSTALLED): settings.ini setup.py pyproject.toml $(LOCK)
	$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit(f"needs Python 3.11 or newer, got {sys.version.split()[0]}: set PYTHON=python3.11")'
	test -x $(BIN)/python || $(PYTHON) -m venv '$(VENV)'
ifneq ($(LOCK),)
	sed -n '/^\(setuptools\|wheel\|packaging\)==/,/[^\\]$$/p' $(LOCK) > $(VENV)/build.txt
	$(BIN)/python -m pip install --require-hashes --requirement $(VENV)/build.txt
	$(BIN)/python -m pip install --require-hashes --no-deps --no-build-isolation --requirement $(LOCK)
	$(BIN)/python -m pip install --no-deps --no-build-isolation --editable .
	$(BIN)/python -m pip check
else
	$(BIN)/python -m pip install --upgrade --upgrade-strategy eager --editable '.[dev,eval]'
	$(BIN)/python -m pip install --upgrade $(NEWEST)
endif
	$(COMMAND) kernels
	touch $@
