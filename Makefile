# The one entry. `make help` lists every target.
SHELL := /bin/bash -o pipefail
.DEFAULT_GOAL := help
MAKEFLAGS += --no-print-directory

PYTHON ?= python3
LORA_CACHE ?= $(HOME)/.cache/lora-operator
export LORA_CACHE
export PYTHONPATH := crds:operator:trainer_image:.
export TQDM_DISABLE := 1
export PIP_DISABLE_PIP_VERSION_CHECK := 1

RUN := .venv/bin/python
PYTEST := $(RUN) -m pytest
RESULTS := -p tests.support.results --results docs/benchmarks

.PHONY: help
help: ## List every target
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  %-18s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

.PHONY: venv
venv: ## Make the Python environment (.venv) at the pinned versions
	@$(PYTHON) tools/venv.py

.PHONY: demo
demo: venv ## Run the main job for real: cluster, operator, two training pods, adapter, and what it learned
	@$(RUN) -m demo up

.PHONY: demo-down
demo-down: venv ## Remove what the demo made, its cluster included
	@$(RUN) -m demo down

.PHONY: test
test: test-unit test-controlplane test-trainer test-gputypes test-cluster ## Set up everything and pass every test

.PHONY: test-unit
test-unit: venv binaries ## Fast tests of the pure parts
	$(PYTEST) tests/unit -n 2

.PHONY: test-controlplane
test-controlplane: venv binaries skew ## Tests against a real API server
	$(PYTEST) tests/controlplane tests/security/controlplane tests/devcluster tests/skew -m "not cluster" -n 2 --dist loadscope

VERSIONS ?= 1.29 1.33

.PHONY: test-versions
test-versions: venv skew ## The tests against a real API server again on older Kubernetes: VERSIONS (1.29 1.33)
	@$(RUN) tools/versions.py $(VERSIONS)

.PHONY: skew
skew: venv ## Build the release before this one from git's history, for the tests of versions side by side
	@$(RUN) tools/skew.py

.PHONY: test-trainer
test-trainer: venv ## Training on the CPU: FSDP2, checkpoints, publishing
	$(PYTEST) tests/trainer tests/security/trainer -n 2 --dist loadfile

.PHONY: test-gputypes
test-gputypes: venv ## Every way of training with the types and the copies of a GPU, on the CPU
	$(PYTEST) tests/gputypes

.PHONY: test-cluster
test-cluster: venv binaries cluster-up images ## Tests with real pods on a real cluster
	$(PYTEST) tests/devcluster tests/cluster tests/security/cluster -m "cluster and not kueue and not nodes"

.PHONY: test-nodes
test-nodes: venv binaries ## Nodes that are drained, die and are out of service, on a cluster of two with the real trainer
	$(PYTEST) tests/cluster -m nodes $(RESULTS)/nodes.md

.PHONY: test-kueue
test-kueue: venv binaries cluster-up images ## Queues, on a real cluster with the real Kueue (builds it the first time)
	$(PYTEST) tests/cluster -m kueue $(RESULTS)/kueue.md

SEED ?= 1
MINUTES ?= 30

.PHONY: soak
soak: venv binaries skew ## Soak the operator in faults for MINUTES (30) by SEED (1): docs/benchmarks/soak.md
	$(RUN) -m bench.soak --seed $(SEED) --minutes $(MINUTES)

.PHONY: test-soak
test-soak: soak test-nodes test-kueue ## All tests that take longer than 5 minutes, with their results in docs/benchmarks

.PHONY: mutate
mutate: venv ## Change the operator's code in MINUTES (30) by SEED (1), and list the changes that no test notices (ALSO: more tests)
	$(RUN) tools/mutate.py --seed $(SEED) --minutes $(MINUTES) --also $(ALSO)

.PHONY: lint
lint: venv ## Style, types, layers and generated files
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy
	.venv/bin/lint-imports --no-cache --no-logo
	$(RUN) tools/generate.py --check

.PHONY: generate
generate: venv ## Write the generated files: CRD, chart copy, API reference
	$(RUN) tools/generate.py

.PHONY: format
format: venv ## Format the code
	$(RUN) -m ruff check --fix-only .
	$(RUN) -m ruff format .

.PHONY: binaries
binaries: venv ## Build the cluster's programs from pinned Go modules (kept in the cache)
	@$(RUN) -m devcluster binaries

.PHONY: cluster-up
cluster-up: venv ## Start the development cluster
	@$(RUN) -m devcluster up

.PHONY: cluster-down
cluster-down: venv ## End the development cluster and all that belongs to it
	@$(RUN) -m devcluster down

.PHONY: cluster-status
cluster-status: venv ## Say what runs and how to reach it
	@$(RUN) -m devcluster status

.PHONY: cluster-logs
cluster-logs: venv ## Show the last lines of the logs of the cluster's parts
	@$(RUN) -m devcluster logs

.PHONY: images
images: venv ## Build the images and load them into the cluster
	@$(RUN) -m devcluster images

.PHONY: bench-trainer
bench-trainer: venv ## Compare the trainer with plain TRL on the CPU: docs/benchmarks/trainer.md
	$(RUN) -m bench.trainer

.PHONY: bench-operator
bench-operator: venv binaries ## Measure the operator's scale and cost on a real API server: docs/benchmarks/operator.md
	$(RUN) -m bench.scale

.PHONY: bench-peers
bench-peers: venv binaries ## Compare with Kubeflow Trainer and JobSet, built the first time: docs/benchmarks/peers.md
	$(RUN) -m bench.peers

.PHONY: bench-gpu
bench-gpu: ## Benchmark the trainer on a GPU machine without internet: docs/benchmarks/GPU.json (see docs/speed.md)
	@bench/gpu/wheels.sh install
	$(PYTHON) -m bench.gpu
