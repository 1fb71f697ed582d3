# The commands of the checkout. `make run` and `make test` need Python 3.11 to 3.13 and nothing
# else; they prepare what is missing and say first what it costs. Options:
#   PYTHON=python3.12     which Python to make the environments with
#   ARGS="..."            given on: to `tidegate up`, to pytest, to the bench
#   ENGINE=simulated      `make run` with the simulated engine: no vLLM, no model, instant
#   TIDEGATE_ENGINE=cpu   cpu or cuda, instead of looking for an NVIDIA GPU
#   KUBEBUILDER_ASSETS=/dir  etcd, kube-apiserver and kube-controller-manager for `make cluster-test`
#   TIDEGATE_ENGINE_PIP_ARGS="--index-url ..."   given on to pip for the engine environment

.DEFAULT_GOAL := help
.PHONY: help run test cluster-test control-plane lint format bench dev engine doctor clean clean-engine

NAMED := $(if $(filter undefined,$(origin PYTHON)),,--python-given)
PYTHON ?= python3
ARGS ?=
ENGINE ?=
BOOTSTRAP := $(PYTHON) deploy/bootstrap.py $(NAMED) $(if $(filter simulated,$(ENGINE)),--simulated)
BIN := .venv/bin
PACKAGES := gateway autoscaler loaders forecaster modelcache router
SOURCES := $(PACKAGES) bench deploy tests

help: ## This list
	@grep -hE '^[a-z-]+:.*## ' Makefile | sed -E 's/:.*## /\t/' | while IFS="$$(printf '\t')" read -r name text; do printf '  make %-14s %s\n' "$$name" "$$text"; done

run: ## Prepare everything that is missing, then serve a model (ENGINE=simulated: without vLLM)
	@exec $(BOOTSTRAP) run $(ARGS)

test: ## Prepare everything that is missing, then run the whole suite (ARGS="-k name")
	@exec $(BOOTSTRAP) test $(ARGS)

cluster-test: ## Prepare a real Kubernetes control plane (KUBEBUILDER_ASSETS, or built once), then test on it
	@exec $(BOOTSTRAP) cluster-test $(ARGS)

lint: dev ## ruff format and check, mypy --strict, import contracts
	$(BIN)/ruff format --check $(SOURCES)
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/mypy
	MYPYPATH=deploy $(BIN)/mypy --strict --config-file= deploy/prepare.py
	$(BIN)/lint-imports

format: dev ## Rewrite the sources as lint wants them
	$(BIN)/ruff format $(SOURCES)
	$(BIN)/ruff check --fix $(SOURCES)

bench: dev ## Measure, against the simulated engine and the peers (ARGS="...")
	@exec $(BIN)/python -m bench $(ARGS)

doctor: dev ## Check the machine and the settings, and say what to do
	@exec $(BIN)/tidegate doctor $(ARGS)

dev: ## Only the gateway's environment, with the tools of test and lint
	@$(BOOTSTRAP) dev

engine: ## Only the environments and the default model, nothing started
	@$(BOOTSTRAP) engine

control-plane: ## Only the programs of `make cluster-test`, nothing started
	@$(BOOTSTRAP) control-plane

clean-engine: ## Remove the engine environment
	@$(BOOTSTRAP) clean-engine

clean: ## Remove the environments, the model and everything else that was made here
	@$(BOOTSTRAP) clean
