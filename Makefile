# `make demo` and `make test` work from a bare clone; `make help` lists the rest.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help

VENV := .venv
BIN := $(VENV)/bin
export DATA_DIR ?= data
PROFILE ?= cpu

HOROVOD := 0.28.1
TORCH := torch==2.13.0;python_version>='3.10' torch==2.8.0;python_version<'3.10'
WHEELS := $(or $(XDG_CACHE_HOME),$(HOME)/.cache)/unet-medical-triton/wheels

# The newest Python that TensorFlow 2.15 supports; another can be named with PYTHON=.
PYTHON ?= $(shell for p in python3.11 python3.10 python3.9 python3; do \
	$$p -c 'import sys, venv, ensurepip; sys.exit(not (3, 9) <= sys.version_info[:2] <= (3, 11))' 2>/dev/null \
	&& { command -v $$p; break; }; done)

.PHONY: help
help:  ## this list
	@sed -n 's/^\([a-z-]*\):.*  ## /\1\t/p' $(MAKEFILE_LIST) | expand -t 14

.PHONY: check-tools
check-tools:
	@[ -n "$(PYTHON)" ] || { echo "error: no Python 3.9, 3.10 or 3.11 with venv was found: install one (Debian: apt-get install python3 python3-venv) or name it with PYTHON=/path/to/python" >&2; exit 2; }
	@for tool in g++ cmake; do command -v $$tool >/dev/null \
	|| { echo "error: $$tool is missing; Horovod is compiled with it: install it (Debian: apt-get install $$tool)" >&2; exit 2; }; done

.PHONY: install
install: $(VENV)/.installed  ## create .venv with everything that this machine can run

$(VENV)/.installed: pyproject.toml constraints.txt Makefile | check-tools
	@echo "installing into $(VENV) with $$($(PYTHON) --version)"
	@[ -x $(BIN)/python ] || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install -qq -c constraints.txt -e '.[train,export,serve,zarr,dask,int8,dev]'
	@PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -m tools.install_horovod --version $(HOROVOD) --wheels "$(WHEELS)"
	@touch $@

.PHONY: demo
demo: install  ## train briefly, export, serve, segment, score and benchmark
	@$(BIN)/python -m tools.demo --data_dir "$(DATA_DIR)" $(DEMO_FLAGS)

.PHONY: test
test: install  ## the tests, under ten minutes on two cores
	@$(BIN)/python -m pytest -m "not slow and not gpu and not images"

.PHONY: test-slow
test-slow: install  ## the tests that take longer
	@$(BIN)/python -m pytest -m "slow and not gpu and not images"

.PHONY: test-gpu
test-gpu: install  ## the tests that need an NVIDIA GPU
	@$(BIN)/python -m pytest -m gpu

.PHONY: images
images:  ## build the CPU images of server and trainer, with Docker or buildah
	@docker/images.sh

.PHONY: test-images
test-images: install  ## run the images that `make images` built (needs buildah)
	@$(BIN)/python -m pytest -m images

.PHONY: install-helm
install-helm: .cache/helm/helm  ## Helm, for the tests of the chart in docker/helm

.cache/helm/helm: tools/install_helm.py | $(VENV)/.installed
	@$(BIN)/python -m tools.install_helm --out $@

.PHONY: lint
lint: install  ## ruff
	@$(BIN)/ruff check . && $(BIN)/ruff format --check .

.PHONY: types
types: install  ## mypy
	@$(BIN)/mypy

.PHONY: serve
# The wheel's Triton has the backend of the CPU profile; the GPU profiles are served in the container.
serve: install  ## the published model on Triton until Ctrl-C; BACKGROUND=1 returns once it is ready; PROFILE=cpu|v100|gpu
	@case $(PROFILE) in \
	cpu) $(BIN)/python serve/triton.py $(if $(BACKGROUND),start,run) $(SERVE_FLAGS) ;; \
	v100|gpu) docker compose -f docker/compose.yaml --profile gpu up --build $(if $(BACKGROUND),--wait) ;; \
	*) echo "error: PROFILE is $(PROFILE); there are cpu, v100 and gpu" >&2; exit 2 ;; esac

.PHONY: stop
stop: install  ## stop what `make serve` started
	@case $(PROFILE) in \
	cpu) $(BIN)/python serve/triton.py stop ;; \
	*) docker compose -f docker/compose.yaml --profile gpu down ;; esac

.PHONY: doctor
doctor: install  ## what this machine can do, and what to install for more
	@$(BIN)/python -m serve.doctor

.PHONY: install-rtx
install-rtx: install  ## TensorRT-RTX (proprietary), whose builder checks graph and profiles without a GPU
	@$(BIN)/python -m pip install -qq -c constraints.txt -e '.[rtx]'

.PHONY: v100-report
v100-report: install  ## on a machine with a V100: build the plan, prove it, measure it (REPORT_FLAGS=)
	@$(BIN)/python export/gpu_report.py --target v100 $(REPORT_FLAGS)

.PHONY: benchmark
benchmark: install  ## images per second of what is served, level by level in one run (BENCHMARK_FLAGS=)
	@$(BIN)/python serve/benchmark.py $(BENCHMARK_FLAGS)

.PHONY: peers-install
peers-install: .venv-peers/.installed  ## PyTorch for `make peers`, in an environment of its own

.venv-peers/.installed: Makefile | check-tools
	@[ -x .venv-peers/bin/python ] || $(PYTHON) -m venv .venv-peers
	@.venv-peers/bin/python -m pip install -qq $(foreach one,$(TORCH),"$(one)") 'numpy<2'
	@touch $@

.PHONY: peers
peers: install peers-install  ## the same network by TensorFlow, ONNX Runtime, OpenVINO and PyTorch (PEERS_FLAGS=)
	@$(BIN)/python serve/peers.py $(PEERS_FLAGS)

.PHONY: report
report: install  ## one page with slices, scores, speed and card of what the demo made
	@$(BIN)/python serve/report.py --images demo/held-out-volume.tif --probability demo/held-out-volume-probability.tif \
	--labels demo/held-out-labels.tif --benchmark demo/benchmark/benchmark.json --artefacts demo/artefacts $(REPORT_FLAGS)

.PHONY: constraints
constraints: install  ## resolve constraints.txt anew, for every supported Python
	@$(BIN)/python -m pip install -qq uv
	@$(BIN)/uv pip compile -q --universal --python-version 3.9 --python $(BIN)/python --index-strategy unsafe-best-match \
	--no-annotate --custom-compile-command "make constraints" \
	--extra train --extra export --extra serve --extra zarr --extra dask --extra int8 --extra rtx --extra dev \
	pyproject.toml -o constraints.txt

.PHONY: clean
clean:  ## remove what was built, but not data/ nor results
	@rm -rf $(VENV) .venv-peers .cache .mypy_cache .ruff_cache .pytest_cache .hypothesis *.egg-info
