# `make demo` and `make test` work from a bare clone; `make help` lists the rest.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help

VENV := .venv
BIN := $(VENV)/bin
export DATA_DIR ?= data
PROFILE ?= cpu

HOROVOD := 0.28.1
TORCH := torch==2.13.0
MUTMUT := mutmut==3.8.1
COSMIC_RAY := cosmic-ray==8.7.0
EXTRAS := train,export,serve,zarr,n5,http,s3,gs,hdf5,mrc,dask,int8,bioimageio,otlp,sign,docs,dev
CACHE := $(or $(XDG_CACHE_HOME),$(HOME)/.cache)/unet-medical-triton
LOGS := .cache/install
# Much of the tests' time is waiting for servers. The tests of one file share their servers and networks.
PARALLEL := -n 2 --dist loadfile

# TensorFlow 2.15 and Triton's wheel need Python 3.11; it can be named with PYTHON=.
PYTHON ?= $(shell for p in python3.11 python3 python; do \
	$$p -c 'import sys, venv, ensurepip; sys.exit(sys.version_info[:2] != (3, 11))' 2>/dev/null \
	&& { command -v $$p; break; }; done)
# For what needs no package: the environment where there is one, else any Python.
ANY_PYTHON = $(or $(wildcard $(BIN)/python),$(PYTHON),python3)
# constraints.lock is constraints.txt with hashes, which uv checks; plain pip would want them of the project itself too.
# Where Python may write no bytecode (a common setting in containers), each start of TensorFlow would compile it all anew,
# which takes twice as long as the rest of the start: so it is compiled once.
INSTALL = $(BIN)/uv pip install --quiet --python $(BIN)/python --constraint constraints.lock \
	$(if $(PYTHONDONTWRITEBYTECODE),--compile-bytecode)

.PHONY: help
help:
	@sed -n -e 's/^##@ \(.*\)/\n\1/p' -e 's/^\([a-z0-9-]*\):.*  ## /  \1\t/p' $(MAKEFILE_LIST) | expand -t 17

##@ Start here

.PHONY: install
install: $(VENV)/.installed $(VENV)/.backend  ## create .venv with everything that this machine can run

.PHONY: check-tools
check-tools:
	@missing=(); [ -n "$(PYTHON)" ] || missing+=("Python 3.11 with venv"); \
	for tool in g++ cmake; do command -v $$tool >/dev/null || missing+=("$$tool"); done; \
	[ $${#missing[@]} = 0 ] || { list=$$(printf ', %s' "$${missing[@]}"); echo "error: not found: $${list:2}; install it \
	(Debian, Ubuntu: apt-get install python3.11-venv g++ cmake), or name another Python with PYTHON=/path/to/python3.11" >&2; exit 2; }

$(VENV)/.installed: pyproject.toml constraints.lock Makefile | check-tools
	@echo "installing into $(VENV) with $$($(PYTHON) --version): about two minutes, less with the packages in a cache"
	@[ -x $(BIN)/python ] || $(PYTHON) tools/progress.py --title "creating $(VENV)" --expected_s 4 --log $(LOGS)/venv.log \
	-- $(PYTHON) -m venv $(VENV)
	@$(PYTHON) tools/progress.py --title "installing uv" --expected_s 3 --log $(LOGS)/uv.log \
	-- $(BIN)/python -m pip install --constraint constraints.txt uv
	@$(PYTHON) tools/progress.py --title "installing packages" --expected_s 40 --log $(LOGS)/packages.log \
	-- $(INSTALL) --editable '.[$(EXTRAS)]'
	@PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -m tools.install_horovod --version $(HOROVOD) --wheels "$(CACHE)/wheels"
	@touch $@

# Triton's backend for OpenVINO, in C++. Without it the python backend serves, so that a failure stops nothing.
BACKEND := serve/models/openvino_backend
$(VENV)/.backend: $(wildcard $(BACKEND)/CMakeLists.txt $(BACKEND)/src/*) $(VENV)/.installed
	@$(PYTHON) tools/progress.py --title "building Triton's backend" --expected_s 20 --log $(LOGS)/backend.log -- bash -ec '\
	cmake -S $(BACKEND) -B .cache/openvino_backend -DPython3_EXECUTABLE="$(CURDIR)/$(BIN)/python" \
	-DCMAKE_INSTALL_PREFIX="$(CURDIR)/$(VENV)/lib/triton" && cmake --build .cache/openvino_backend --target install --parallel 2' \
	|| echo "Triton's backend for OpenVINO was not built: the python backend serves, a little slower" >&2
	@touch $@

.PHONY: demo
demo: install  ## train briefly, export, serve, segment, score and benchmark (DEMO_FLAGS="--minutes N")
	@$(BIN)/python -m tools.demo --data_dir "$(DATA_DIR)" $(DEMO_FLAGS)

.PHONY: report
report: install  ## one page with slices, scores, speed and card of what the demo made (REPORT_FLAGS=)
	@$(BIN)/python serve/report.py $(REPORT_FLAGS)

.PHONY: doctor
doctor:  ## what this machine can do, and what to install for more
	@$(ANY_PYTHON) serve/doctor.py

##@ Serve

.PHONY: serve
# The wheel's Triton has the backend of the CPU profile; the GPU profiles are served in the container.
serve: install  ## the published model on Triton until Ctrl-C; BACKGROUND=1 returns once it is ready; PROFILE=cpu|v100|gpu
	@case $(PROFILE) in \
	cpu) $(BIN)/python serve/triton.py $(if $(BACKGROUND),start,run) $(SERVE_FLAGS) ;; \
	v100|gpu) docker compose -f docker/compose.yaml --profile gpu up --build $(if $(BACKGROUND),--wait) ;; \
	*) echo "error: PROFILE is $(PROFILE); there are cpu, v100 and gpu" >&2; exit 2 ;; esac

.PHONY: stop
stop:  ## stop what `make serve` started
	@case $(PROFILE) in \
	cpu) $(ANY_PYTHON) serve/triton.py stop ;; \
	*) docker compose -f docker/compose.yaml --profile gpu down ;; esac

##@ Measure

.PHONY: benchmark
benchmark: install  ## images per second of what is served, or else of the newest model (BENCHMARK_FLAGS=)
	@$(if $(findstring --url,$(BENCHMARK_FLAGS)),,$(BIN)/python serve/triton.py status >/dev/null \
	|| { trap '$(BIN)/python serve/triton.py stop' EXIT; $(BIN)/python serve/triton.py start; };) \
	$(BIN)/python serve/benchmark.py $(BENCHMARK_FLAGS)

.PHONY: peers
peers: install  ## the same network by TensorFlow, ONNX Runtime, OpenVINO and PyTorch (PEERS_FLAGS=)
	@$(BIN)/python serve/peers.py --check $(PEERS_FLAGS)
	@$(MAKE) --no-print-directory peers-install
	@$(BIN)/python serve/peers.py $(PEERS_FLAGS)

.PHONY: peers-install
peers-install: .venv-peers/.installed  ## PyTorch for `make peers`, in an environment of its own

.venv-peers/.installed: Makefile | install
	@[ -x .venv-peers/bin/python ] || $(PYTHON) -m venv .venv-peers
	@$(PYTHON) tools/progress.py --title "installing PyTorch" --expected_s 60 --log $(LOGS)/torch.log \
	-- $(BIN)/uv pip install --quiet --python .venv-peers/bin/python $(TORCH) 'numpy<2'
	@touch $@

.PHONY: nnunet
nnunet: .venv-nnunet/.installed  ## this network beside nnU-Net's on the same slices, cores and minutes (NNUNET_FLAGS=)
	@$(BIN)/python -m tools.nnunet $(NNUNET_FLAGS)

.venv-nnunet/.installed: Makefile | install
	@[ -x .venv-nnunet/bin/python ] || $(PYTHON) -m venv .venv-nnunet
	@$(PYTHON) tools/progress.py --title "installing nnU-Net" --expected_s 120 --log $(LOGS)/nnunet.log \
	-- .venv-nnunet/bin/pip install --quiet $(TORCH) nnunetv2==2.8.1
	@touch $@

.PHONY: tissues
tissues: install  ## a network for a second, synthetic tissue: from nothing and from a trained network (TISSUES_FLAGS=)
	@$(BIN)/python -m tools.tissues --data_dir "$(DATA_DIR)" $(TISSUES_FLAGS)

.PHONY: v100-report
v100-report: install  ## on a machine with a V100: build the plan, prove it, measure it (REPORT_FLAGS=)
	@$(BIN)/python export/gpu_report.py --check $(REPORT_FLAGS)
	@$(INSTALL) --editable '.[gpu]'
	@$(BIN)/python export/gpu_report.py --target v100 $(REPORT_FLAGS)

##@ Containers

.PHONY: images
images:  ## build the CPU images of server, trainer and client, with Docker or buildah
	@docker/images.sh

.PHONY: test-images
test-images: install  ## run the images that `make images` built (needs buildah)
	@$(BIN)/python -m pytest -m images

.PHONY: install-helm
install-helm: .cache/helm/helm  ## Helm, for the tests of the chart in docker/helm

.cache/helm/helm: tools/install_helm.py | $(VENV)/.installed
	@$(BIN)/python -m tools.install_helm --out $@

##@ Develop

.PHONY: test
test: install  ## the tests, about twelve minutes on two cores
	@$(BIN)/python -m pytest $(PARALLEL) -m "not slow and not gpu and not images"

.PHONY: test-slow
test-slow: install  ## the tests that take longer
	@$(BIN)/python -m pytest -m "slow and not gpu and not images"

.PHONY: torture
torture: install  ## damaged files and requests, faults of disk and network, kills, too much load; counts in torture.md (four hours)
	@$(BIN)/python -m tests.torture.fuzz --inputs 100000 --out torture.md
	@$(BIN)/python -m tests.torture.artefacts --inputs 10000 --out torture.md
	@$(BIN)/python -m tests.torture.faults.campaign --out torture.md
	@$(BIN)/python -m tests.torture.kills --kills 300 --out torture.md
	@$(BIN)/python -m tests.torture.network --runs 300 --out torture.md
	@$(BIN)/python -m tests.torture.publishing --changes 100 --out torture.md
	@$(BIN)/python -m tests.torture.messages --inputs 20000 --out torture.md
	@$(BIN)/python -m tests.torture.load --minutes 5 --inferences 100000 --kills 1000 --out torture.md

.PHONY: mutation
mutation: install  ## small changes of our own code, each of which a test must notice; what survives is listed (mutmut, half an hour)
	@$(INSTALL) $(MUTMUT)
	@$(BIN)/python -m mutmut run $(MUTATION_FLAGS)
	@$(BIN)/python -m mutmut results

# cosmic-ray starts a process for each change, and changes the files in place: so in a copy of the last commit.
.PHONY: mutation-tensorflow
mutation-tensorflow: install  ## the same of the trainer's losses, schedule and scores, which run TensorFlow (cosmic-ray, two hours)
	@$(INSTALL) $(COSMIC_RAY)
	@rm -rf .cache/mutation && git clone --quiet . .cache/mutation
	@cd .cache/mutation && export PYTHONPATH="$$PWD" PATH="$(CURDIR)/$(BIN):$$PATH" && mutants=tests/train/mutants.toml && \
	cosmic-ray init $$mutants mutants.sqlite && cr-filter-operators mutants.sqlite $$mutants && \
	cosmic-ray exec $$mutants mutants.sqlite && cr-report --surviving-only --show-diff mutants.sqlite

.PHONY: torture-shards
torture-shards: install  ## 200 SIGKILLs of tasks, workers, clients and schedulers; every byte compared (TORTURE_FLAGS=)
	@$(BIN)/python -m tests.serve.volume.shards.torture $(TORTURE_FLAGS)

.PHONY: test-gpu
test-gpu: install  ## the tests that need an NVIDIA GPU
	@$(BIN)/python -m pytest -m gpu

.PHONY: lint
lint: install  ## ruff, the contracts between the rooms, and their counts
	@$(BIN)/ruff check . && $(BIN)/ruff format --check .
	@$(BIN)/lint-imports
	@$(BIN)/python -m tools.rooms --strict

.PHONY: types
types: install  ## mypy
	@$(BIN)/mypy

.PHONY: docs
docs: install  ## the documentation as a site, in site/
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet
	@echo "site/index.html"

.PHONY: constraints
constraints: install  ## resolve constraints.txt and constraints.lock anew, for every supported Python
	@$(BIN)/uv pip compile --quiet --universal --upgrade --generate-hashes --python-version 3.11 --python $(BIN)/python \
	--index-strategy unsafe-best-match --no-annotate --custom-compile-command "make constraints" \
	$(foreach extra,train export serve zarr n5 http s3 gs hdf5 mrc dask int8 bioimageio otlp sign gpu rtx docs dev,--extra $(extra)) pyproject.toml -o constraints.lock
	@sed -e '/^    --hash/d' -e 's/ \\$$//' constraints.lock > constraints.txt

.PHONY: sbom
sbom: install  ## sbom/: the packages of .venv, and the requirements of the wheel that it builds in dist/, as CycloneDX
	@$(PYTHON) tools/progress.py --title "building the wheel" --expected_s 5 --log $(LOGS)/wheel.log \
	-- $(BIN)/uv build --no-build-isolation --python $(BIN)/python --out-dir dist
	@$(BIN)/python -m tools.sbom --out sbom/environment.cdx.json environment
	@$(BIN)/python -m tools.sbom --out sbom/wheel.cdx.json wheel dist/*-$$($(BIN)/python -c 'import unet; print(unet.__version__)')-*.whl

.PHONY: sbom-images
sbom-images: install  ## sbom/: the packages of the images that `make images` built, as CycloneDX
	@mkdir -p .cache/images; for image in serve train client; do \
	docker/packages.sh unet-$$image:cpu > .cache/images/packages.tar; \
	$(BIN)/python -m tools.sbom --out sbom/unet-$$image.cdx.json image unet-$$image .cache/images/packages.tar; done

.PHONY: install-rtx
install-rtx: install  ## TensorRT-RTX (proprietary), whose builder checks graph and profiles without a GPU
	@$(INSTALL) --editable '.[rtx]'

.PHONY: clean
clean:  ## remove what was built, but not data/ nor results
	@rm -rf $(VENV) .venv-peers .venv-nnunet .cache .mypy_cache .ruff_cache .import_linter_cache .pytest_cache .hypothesis site mutants *.egg-info
