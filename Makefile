PYTHON ?= python3
# Debian packages that the tests need; installed by `make setup` when it runs as root.
DEBIAN_PACKAGES ?= g++ openmpi-bin slurm-wlm munge iproute2

BIN := .venv/bin
STAMP := .venv/.installed
# Scored sentences of real reviews, which only the source archive has.
SENTENCES := .venv/share/vaderSentiment-3.3.2.tar.gz
# Processes that share the tests. Each has up to four ranks of its own, most of which wait: on two cores three are faster
# than two.
JOBS ?= 3
PYTEST := $(BIN)/pytest -q -n $(JOBS) --dist loadgroup --no-loadscope-reorder
# A mark of tests that `make test-all` leaves out.
WITHOUT ?=
# Where the candidates of the scale run go.
SCRATCH ?= runs/scale
# Texts and images of the proof.
PACKAGES := $(addprefix runs/proof/packages/.,linux-doc-6.1 dict-gcide dataset-fashion-mnist)
IMAGES := $(lastword $(PACKAGES))
# Which tasks and seeds of the proof are run: all when not given.
TASK ?=
SEEDS ?=
PROOF = $(BIN)/python -m examples.proof.run $(if $(TASK),--task $(TASK)) --sentences $(SENTENCES)
export NO_MKDOCS_2_WARNING := 1
# Hundreds of processes that the tests start would each compile the package again.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: help setup quickstart soup scale-run results proof proof-trials proof-oracle proof-small test test-slow test-all test-chaos gpu-wheels test-gpu check docs release clean
.DEFAULT_GOAL := help

help: ## Show this list.
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: $(STAMP) ## Make .venv and install the package with its development tools.

$(STAMP): pyproject.toml constraints.txt Makefile
ifneq ($(strip $(DEBIAN_PACKAGES)),)
	if [ "$$(id -u)" = 0 ]; then apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends $(DEBIAN_PACKAGES); \
	else echo "not root: these Debian packages are expected to be there: $(DEBIAN_PACKAGES)"; fi
endif
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -qq --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

quickstart: setup ## Train a small model on real text, average its candidates, and compare the results.
	$(BIN)/python examples/quickstart/run.py

soup: setup $(SENTENCES) ## Fine-tune a pretrained transformer several times, and average the results.
	$(BIN)/python examples/soup/run.py --sentences $(SENTENCES)

$(SENTENCES): | $(STAMP)
	$(BIN)/python -m pip download -qq --disable-pip-version-check --no-deps --no-binary :all: -d $(@D) vaderSentiment==3.3.2

scale-run: setup ## A billion parameters and 16 candidates on two ranks: 40 GB of disk, 23 GB of memory, SCRATCH=dir.
	$(BIN)/python examples/scale/run.py --scratch $(SCRATCH)

results: setup ## Repeat the quickstart with three seeds and rewrite docs/results.md.
	$(BIN)/python examples/quickstart/seeds.py

proof: setup $(PACKAGES) $(SENTENCES) ## Compare TWA with other methods at equal cost: hours, 28 GB of disk; continues where it was. TASK=name SEEDS="0 1".
	OMP_NUM_THREADS=1 $(PROOF) $(if $(SEEDS),--seeds $(SEEDS)) --page

proof-trials: setup $(PACKAGES) $(SENTENCES) ## Compare settings of the recipes on development seeds: hours. TASK=name SEEDS="100".
	OMP_NUM_THREADS=1 $(PROOF) --size trials $(if $(SEEDS),--seeds $(SEEDS)) --page

proof-oracle: setup $(PACKAGES) ## Train coefficients on the validation data that judges them, on a development seed: an hour.
	OMP_NUM_THREADS=1 $(PROOF) --size oracle $(if $(TASK),,--task language images vit detection) --page

proof-small: setup $(PACKAGES) $(SENTENCES) ## The same at a small size, in minutes, for one development seed: losses on the validation split.
	$(PROOF) --size small --out runs/proof-small --seeds 100

runs/proof/packages/.%: | $(STAMP)
	mkdir -p $(@D)
	cd $(@D) && apt-get download $* && touch $(@F)

test: setup ## Run the tests, without slow ones, chaos, those that need a GPU, and the rest of large grids of options.
	$(PYTEST) -m "not slow and not grid and not gpu and not chaos"

test-slow: setup $(SENTENCES) $(IMAGES) ## Run only the slow tests, and the rest of large grids of options.
	$(PYTEST) -m "(slow or grid) and not gpu and not chaos" --ignore=tests/scale
	$(BIN)/pytest -q -m "slow and not gpu" tests/scale # alone: it measures memory and time

test-all: setup $(SENTENCES) $(IMAGES) ## Run every test that needs no GPU, without chaos; WITHOUT=grid for the pairs of options of large grids only.
	$(PYTEST) -m "not gpu and not chaos$(if $(WITHOUT), and not $(WITHOUT))" --ignore=tests/scale
	$(BIN)/pytest -q -m "not gpu" tests/scale # alone: it measures memory and time

test-chaos: setup ## Damage, kills, full disks and missing ranks at random moments; CHAOS_SEED=n for others.
	$(BIN)/pytest -m chaos -s tests/chaos

gpu-wheels: setup ## Collect in .gpu/ what a GPU machine without a network lacks.
	$(BIN)/python tests/gpu/wheels.py collect .gpu

# No `setup`: the machine may have no network. Its own Python is taken, which has torch and Triton.
test-gpu: ## Measure and test on a GPU, in eight minutes; prints a table for docs/performance.md.
	PYTHON=$(PYTHON) bash tests/gpu/run.sh

check: setup ## Format, lint, types, generated pages, documentation links.
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python docs/tools/configuration.py --check
	$(BIN)/python docs/tools/pictures.py --check
	$(BIN)/mkdocs build --strict

docs: setup ## Regenerate pages of settings and architectures, and the pictures, and build the site into site/.
	$(BIN)/python docs/tools/configuration.py
	$(BIN)/python docs/tools/architectures.py
	$(BIN)/python docs/tools/pictures.py
	$(BIN)/mkdocs build --strict

release: ## Build wheel and sdist into dist/, check them, and install each in an environment of its own.
	rm -rf dist build/release
	$(PYTHON) -m venv build/release/tools
	build/release/tools/bin/python -m pip install -qq --disable-pip-version-check -c constraints.txt build twine
	build/release/tools/bin/python -m build --outdir dist
	build/release/tools/bin/twine check --strict dist/*
	for package in dist/*.whl dist/*.tar.gz; do \
	  $(PYTHON) -m venv --clear build/release/bare && \
	  build/release/bare/bin/python -m pip install -qq --disable-pip-version-check -c constraints.txt $$package && \
	  (cd build/release && bare/bin/twa-scale --version && bare/bin/python -c "import twa_scale; twa_scale.attach") || exit 1; \
	done

clean: ## Remove caches and built files; .venv and runs/ stay.
	rm -rf site build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +
