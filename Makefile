# Commands for people. Each sets up whatever it needs by itself, once: see the stamps in .make/.
PYTHON ?= python3
BIN := .venv/bin
WORKERS ?= 4
SECONDS ?= 60
ON_POSTGRESQL := $(patsubst %,tests/test_workspace_%.py,audit life links logs management orders \
  owners retention state tokens) tests/test_webhooks.py
export PIP_DISABLE_PIP_VERSION_CHECK := 1
PARALLEL := -n $(WORKERS) --dist worksteal
# $(call tests,OPTIONS): what fails beside other tests is run once more, alone, and must pass there:
# a machine that stands still for a second is no fault. Status 1 says that all tests have run.
define tests
$(BIN)/python -m pytest $(PARALLEL) $(1) $(ARGS) || { [ $$? = 1 ] && \
  echo 'once more, alone, the tests that failed:' && \
  $(BIN)/python -m pytest --verbose --exitfirst --last-failed --last-failed-no-failures=none \
  $(1) $(ARGS); }
endef
AGENT := $(wildcard cachix_*.py) activate
PREFIX ?= /usr/local
TO = $(DESTDIR)$(PREFIX)
SHARED := man/man1 bash-completion/completions zsh/site-functions fish/vendor_completions.d \
  cachix-deploy
AGENT_SOURCES := $(shell find $(AGENT) -name '*.py')

.DEFAULT_GOAL := help
.PHONY: help setup run test test-slow quick faults soak soak-workspace lint bench screenshots \
  manuals pyz install relock clean

help: ## list these targets
	@sed -n 's/^\([a-z-]*\):[^#]*## \(.*\)/  make \1	\2/p' Makefile | expand -t 20

setup: .make/venv .make/nix .make/systemd .make/disks .make/shells ## make .venv, install test tools

run: setup ## watch the whole thing: three hosts, a cache, a deployment, a rollback (build/run)
	@$(BIN)/python tests/demo.py

test: setup ## run the tests, with real Nix, and some of the fault cases; ARGS="-k name" selects
	$(call tests)

test-slow: setup .make/browser .make/proxies .make/postgresql ## run the long ones
	$(call tests,--long)
	$(call tests,--postgresql -m "not long" $(ON_POSTGRESQL))

quick: lint ## run lint and the tests that need neither Nix nor root, in under a minute
	$(BIN)/python -m pytest $(PARALLEL) -q -m "not slow" $(ARGS)

faults: setup ## try every fault in every step of a deployment, and count the cases of each promise
	$(BIN)/python -m pytest $(PARALLEL) --faults -m promise $(ARGS)

soak: setup ## try random faults in random deployments for SECONDS=60; SEED=n sets the first seed
	$(BIN)/python -m pytest $(PARALLEL) tests/faults/test_soak.py --long --seconds $(SECONDS) \
	  $(if $(SEED),--seed $(SEED))

soak-workspace: setup .make/proxies .make/postgresql ## try random faults of the workspace
	$(BIN)/python -m pytest -rP tests/test_soak_workspace.py --long --seconds $(SECONDS) \
	  $(if $(SEED),--seed $(SEED))

# The agent's side runs on Python 3.9: mypy checks it for the oldest version that it still knows.
lint: .make/venv ## run ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check --quiet .
	$(BIN)/mypy
	@set -e; for oldest in 3.9 3.10; do \
	  if $(BIN)/mypy --python-version $$oldest --version >/dev/null 2>&1; then break; fi; done; \
	  set -x; $(BIN)/mypy --python-version $$oldest $(AGENT)

bench: setup ## measure speed and size, as ratios
	@set -e; for f in bench/[a-z]*.py; do PYTHONPATH=tests $(BIN)/python "$$f"; done

screenshots: .make/venv .make/browser ## draw the pictures in docs/ anew; ALL=DIRECTORY: all pages
	$(BIN)/python tools/screenshots.py $(if $(ALL),--all $(ALL))

manuals: .make/venv .make/nix ## write completions, man pages and docs/options.rst anew
	$(BIN)/python tools/manuals.py
	$(BIN)/python tools/options.py

pyz: dist/cachix-deploy.pyz ## build dist/cachix-deploy.pyz: agent and CI command in one file

install: pyz ## copy agent, man pages, completions and contrib/ to PREFIX=/usr/local, below DESTDIR=
	install -D -m 755 dist/cachix-deploy.pyz $(TO)/bin/cachix-deploy
	install -d $(addprefix $(TO)/share/,$(SHARED))
	install -m 644 contrib/man/cachix-deploy.1 $(TO)/share/man/man1
	install -m 644 contrib/completions/cachix-deploy.bash \
	  $(TO)/share/bash-completion/completions/cachix-deploy
	install -m 644 contrib/completions/_cachix-deploy $(TO)/share/zsh/site-functions
	install -m 644 contrib/completions/cachix-deploy.fish $(TO)/share/fish/vendor_completions.d
	for kind in systemd launchd cron openrc ci; do \
	  cp -R contrib/$$kind $(TO)/share/cachix-deploy || exit 1; done
	find $(TO)/share/cachix-deploy -type f -exec sed -i.orig 's,/usr/local/bin,$(PREFIX)/bin,g' {} +
	find $(TO)/share/cachix-deploy -name '*.orig' -exec rm {} +

PACKER := tools/pyz.py cachix_workspace/program.py cachix_workspace/pyz_main.py
dist/cachix-deploy.pyz: .make/venv $(PACKER) $(AGENT_SOURCES)
	@$(BIN)/python tools/pyz.py $@

# One file serves all Pythons, so that each package in it has one version ("fewest").
PINNED := requirements-build.txt requirements-agent.txt requirements-tests.txt
UV := uv pip compile --quiet --universal --python-version 3.9.2 --no-python-downloads \
  --upgrade --no-strip-extras --generate-hashes --custom-compile-command 'make relock'
relock: ## pin the newest versions of all dependencies, with hashes, in requirements-*.txt, by uv
	@command -v uv >/dev/null || { echo 'error: uv is missing: `pip install uv`' >&2; exit 1; }
	sed -n 's/^requires = \["\(.*\)"\]$$/\1/p' pyproject.toml | $(UV) - -o requirements-build.txt
	$(UV) --fork-strategy fewest setup.py -o requirements-agent.txt
	$(UV) setup.py --all-extras --constraint requirements-agent.txt -o requirements-tests.txt

clean: ## remove everything that was made here (Nix stays)
	rm -rf .venv .make build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -prune -exec rm -rf {} +

# Nothing is installed but what these files have hashes of. A package that must be built is built
# by the setuptools from there: by itself, pip would take any. pip prints nothing unless it fails.
# An environment that was left unfinished is made anew.
INSTALL := $(BIN)/pip install --no-build-isolation --use-pep517
.make/venv: setup.cfg setup.py pyproject.toml $(PINNED)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 9))' || { echo 'error: Python 3.9' \
	  'or newer is needed: name one with `make PYTHON=...`' >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { echo 'error: this Python can make no' \
	  'virtual environments: `apt-get install python3-venv`' >&2; exit 1; }
	@echo 'setting up .venv ...'
	@mkdir -p .make && rm -rf .venv && $(PYTHON) -m venv .venv
	@{ $(INSTALL) --require-hashes -r requirements-build.txt && \
	  $(INSTALL) --require-hashes -r requirements-tests.txt && \
	  $(INSTALL) --no-deps --editable .; } </dev/null >.make/pip.log 2>&1 \
	  || { cat .make/pip.log; exit 1; }
	@touch $@

# $(call provide,PROGRAM,PACKAGES): as root on Debian, install the packages if the program is
# missing. Fails without the program; the stamp's .log file then has the output of apt-get, if any.
define provide
mkdir -p .make; rm -f $@.log; command -v $(1) >/dev/null || \
  { [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null && echo 'installing $(2) ...' && \
    export DEBIAN_FRONTEND=noninteractive && \
    install='apt-get install --yes --no-install-recommends $(2)' && \
    { $$install || { apt-get update && $$install; }; } </dev/null >$@.log 2>&1; }
endef

# The tests mount stores of their own over /nix, which Debian's package does not make.
.make/nix:
	@{ $(call provide,nix-store,nix-bin); } || { [ ! -e $@.log ] || cat $@.log; \
	  echo 'error: Nix is missing: `sudo apt-get install nix-bin`, or see' \
	  'https://nixos.org/download' >&2; exit 1; }
	@[ -d /nix ] || mkdir /nix 2>/dev/null \
	  || { echo 'error: the directory /nix is missing: `sudo mkdir /nix`' >&2; exit 1; }
	@touch $@

# tests/test_systemd.py boots containers. Without these programs it names them, and is skipped.
.make/systemd:
	@{ $(call provide,systemd-nspawn,systemd-container); } \
	  && { $(call provide,debootstrap,debootstrap debian-archive-keyring); } \
	  && touch $@ || { [ ! -e $@.log ] || tail -n 3 $@.log; }

# Without a browser its tests are skipped, and there are no screenshots.
.make/browser:
	@{ $(call provide,chromedriver,chromium chromium-driver fonts-dejavu-core); } \
	  && { $(call provide,chromium,chromium); } \
	  && touch $@ || { [ ! -e $@.log ] || tail -n 3 $@.log; }

# tests/test_workspace_front.py tries contrib/nginx.conf and contrib/Caddyfile, where they are.
# While policy-rc.d says no, Debian starts no services of packages that are installed.
POLICY := /usr/sbin/policy-rc.d
define without_services
[ -e $(POLICY) ] || [ ! -w /usr/sbin ] || { trap 'rm -f $(POLICY)' EXIT; \
  printf '#!/bin/sh\nexit 101\n' >$(POLICY); chmod 755 $(POLICY); }
endef
.make/proxies:
	@$(without_services); { PATH="$$PATH:/usr/sbin"; $(call provide,nginx,nginx-light); } \
	  && { $(call provide,caddy,caddy); } \
	  && touch $@ || { [ ! -e $@.log ] || tail -n 3 $@.log; }

# Tests of several nodes, and of the workspace on PostgreSQL, start clusters of their own.
.make/postgresql:
	@$(without_services); PATH="$$PATH:/usr/sbin:$$(echo /usr/lib/postgresql/*/bin | tr ' ' :)"; \
	{ $(call provide,initdb,postgresql); } && { $(call provide,nft,nftables); } \
	  && touch $@ || { [ ! -e $@.log ] || tail -n 3 $@.log; }

# tests/test_manuals.py lets them read our completions and man pages, where they are.
.make/shells:
	@{ $(call provide,fish,fish zsh groff); } && touch $@ || { [ ! -e $@.log ] || tail -n 3 $@.log; }

# tests/faults cuts the power of its own file systems, and checks by strace when they are synced.
.make/disks:
	@{ $(call provide,mkfs.ext4,e2fsprogs); } && { $(call provide,strace,strace); } \
	  && touch $@ || { [ ! -e $@.log ] || tail -n 3 $@.log; }
