# What a person types. Everything it needs it sets up by itself, once: see the stamps in .make/.
PYTHON ?= python3
BIN := .venv/bin
WORKERS ?= 4
SECONDS ?= 60
export PIP_DISABLE_PIP_VERSION_CHECK := 1
PARALLEL := -n $(WORKERS) --dist worksteal

.DEFAULT_GOAL := help
.PHONY: help setup run test faults soak lint bench pyz clean

help: ## list these targets
	@sed -n 's/^\([a-z]*\):[^#]*## \(.*\)/  make \1	\2/p' Makefile | expand -t 16

setup: .make/venv .make/nix .make/systemd .make/disks ## the virtual environment in .venv, Nix and what tests need where it is missing

run: setup ## see the whole thing work: two hosts, a cache, a deployment, a rollback (build/run)
	@$(BIN)/python tests/demo.py

test: setup ## all tests, with real Nix, and a fifth of the fault cases; ARGS="-k name" chooses
	$(BIN)/python -m pytest $(PARALLEL) $(ARGS)

faults: setup ## every fault in every step of a deployment, and how many cases of each promise have held
	$(BIN)/python -m pytest $(PARALLEL) --faults -m promise $(ARGS)

soak: setup ## random faults in random deployments for SECONDS=60; SEED=n begins with that schedule
	$(BIN)/python -m pytest $(PARALLEL) tests/faults/test_soak.py --seconds $(SECONDS) $(if $(SEED),--seed $(SEED))

lint: .make/venv ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check --quiet .
	$(BIN)/mypy

bench: setup ## speed and size, as ratios
	@set -e; for f in bench/[a-z]*.py; do PYTHONPATH=tests $(BIN)/python "$$f"; done

pyz: dist/cachix-deploy.pyz ## the agent and the CI command in one file, dist/cachix-deploy.pyz

dist/cachix-deploy.pyz: .make/venv tools/pyz.py cachix_deploy.py cachix_activate.py $(wildcard activate/*.py)
	@$(BIN)/python -W ignore::SyntaxWarning tools/pyz.py $@

clean: ## remove all that was made here (Nix stays)
	rm -rf .venv .make build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -prune -exec rm -rf {} +

# pip says nothing unless it fails; the environment is made anew where an earlier attempt broke off.
.make/venv: setup.cfg setup.py
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 9))' \
	  || { echo 'error: Python 3.9 or newer is needed: name one with `make PYTHON=...`' >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null \
	  || { echo 'error: this Python can make no virtual environments: `apt-get install python3-venv`' >&2; exit 1; }
	@echo 'setting up .venv ...'
	@mkdir -p .make && rm -rf .venv && $(PYTHON) -m venv .venv
	@$(BIN)/pip install --use-pep517 --editable '.[workspace,test]' </dev/null >.make/pip.log 2>&1 \
	  || { cat .make/pip.log; exit 1; }
	@touch $@

# The tests mount stores of their own over /nix, which Debian's package does not make.
.make/nix:
	@mkdir -p .make; if command -v nix-store >/dev/null; then :; \
	elif [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
	  echo 'installing nix-bin ...'; \
	  { apt-get update && DEBIAN_FRONTEND=noninteractive apt-get install --yes --no-install-recommends nix-bin; } \
	    </dev/null >.make/nix.log 2>&1 || { cat .make/nix.log; exit 1; }; \
	else echo 'error: Nix is missing: `sudo apt-get install nix-bin`, or see https://nixos.org/download' >&2; exit 1; fi
	@[ -d /nix ] || mkdir /nix 2>/dev/null \
	  || { echo 'error: the directory /nix is missing: `sudo mkdir /nix`' >&2; exit 1; }
	@touch $@

# tests/test_systemd.py boots containers; where these can't be had it says so, and what to do.
.make/systemd:
	@mkdir -p .make; if command -v systemd-nspawn >/dev/null && command -v debootstrap >/dev/null; then touch $@; \
	elif [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
	  echo 'installing systemd-container and debootstrap ...'; \
	  export DEBIAN_FRONTEND=noninteractive; \
	  install='apt-get install --yes --no-install-recommends systemd-container debootstrap debian-archive-keyring'; \
	  { $$install || { apt-get update && $$install; }; } </dev/null >.make/systemd.log 2>&1 \
	    && touch $@ || tail -n 3 .make/systemd.log; fi

# tests/faults cuts the power of file systems of its own, and looks by strace at what is made durable when.
.make/disks:
	@mkdir -p .make; if command -v mkfs.ext4 >/dev/null && command -v strace >/dev/null; then touch $@; \
	elif [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
	  echo 'installing e2fsprogs and strace ...'; \
	  export DEBIAN_FRONTEND=noninteractive; install='apt-get install --yes --no-install-recommends e2fsprogs strace'; \
	  { $$install || { apt-get update && $$install; }; } </dev/null >.make/disks.log 2>&1 \
	    && touch $@ || tail -n 3 .make/disks.log; fi
