# make help lists the targets.  PY= uses another interpreter than .venv/bin/python (and then sets nothing up).
SHELL := /bin/bash
VENV := .venv/bin/python
PY ?= $(VENV)
OUT ?= data/imagenet
BETON ?=
# what runs Python sets up first, but only where there is no .venv at all: an environment in use is never changed by a test
READY := $(if $(filter $(VENV),$(PY)),$(if $(wildcard .venv),,setup))
# one process per core, four at most (each holds torch), one thread each; a file's tests stay together, they share fixtures
PYTEST = OMP_NUM_THREADS=1 $(PY) -m pytest -n auto --maxprocesses 4 --dist loadfile --durations 15
COMPILE := uv pip compile -q --universal --python-version 3.10 --no-annotate --custom-compile-command "make lock"

.DEFAULT_GOAL := help
.PHONY: help setup report demo test test-all lint lock convert-imagenet bench gpu-check eval-knn eval-linear eval-all visualize

help:  ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):[^#]*## */\1|/' | while IFS='|' read -r name text; do printf '  %-18s%s\n' "$$name" "$$text"; done

setup:  ## build .venv from the pinned requirements    [TORCH=2.7.1 for CUDA 12.6] [PYTHON=python3.12]
	@TORCH="$(TORCH)" PYTHON="$(PYTHON)" bash scripts/setup.sh

report: $(READY)  ## what this environment can do, looked up again
	@$(PY) -m scripts.report

demo: $(if $(filter $(VENV),$(PY)),setup)  ## tiles -> .beton -> a few minutes of LEWEL -> k-NN    [DEMO_DATA=DIR of class folders]
	@$(PY) -m scripts.demo $(if $(DEMO_DATA),--data "$(DEMO_DATA)")

test: $(READY)  ## the tests, without the slow ones
	@$(PYTEST) -m "not slow and not gpu"

test-all: $(READY)  ## every test that needs no GPU
	@$(PYTEST) -m "not gpu"

lint: $(READY)  ## ruff
	@$(PY) -m ruff check -q . && $(PY) -m ruff format -q --check . && bash -n scripts/setup.sh .ci/run scripts/slurm/*.sh

lock:  ## compile requirements*.txt from requirements.in (needs uv)
	@$(COMPILE) requirements.in -o requirements.txt
	@$(COMPILE) requirements.in --override <(printf 'torch==2.7.1\ntorchvision==0.22.1\nnumpy<2.4\n') -o requirements-torch27.txt
	@$(COMPILE) -c requirements.txt <(echo nvidia-dali-cuda120==2.4.0) -o requirements-dali.txt

convert-imagenet: $(if $(IMAGENET),$(READY))  ## class folders, the official tars, STL-10, CIFAR, shards -> .beton, once    IMAGENET=DIR [OUT=data/imagenet] [FORMAT=webdataset] [ARGS="--verify ..."]
	@test -n "$(IMAGENET)" || { echo "Say where ImageNet is (the folder with train/ and val/, or with its tars): make convert-imagenet IMAGENET=/data/ILSVRC2012" >&2; exit 2; }
	@$(PY) -m convert.imagenet --source "$(IMAGENET)" --out "$(OUT)" $(if $(FORMAT),--format "$(FORMAT)") $(ARGS)

bench: $(READY)  ## what loader and augmentation reach, next to their bounds and to other libraries    [BETON=data/imagenet/train.beton]
	@$(PY) -m fastssl.bench loader $(if $(BETON),--path "$(BETON)")
	@$(PY) -m fastssl.bench augment

gpu-check: $(READY)  ## GPU tests and benchmarks, one JSON in benchmarks/results; without CUDA it says so    [BETON=] [ARGS="--only step"]
	@$(PY) -m scripts.gpu_check $(if $(BETON),--beton "$(BETON)") $(ARGS)

eval-knn: $(if $(CHECKPOINT),$(READY))  ## k-NN of a backbone    CHECKPOINT=FILE [DATA=data/imagenet] [PROTOCOL=knn/dino] [ARGS="--k 20"]
	@test -n "$(CHECKPOINT)" || { echo "Say which backbone: make eval-knn CHECKPOINT=runs/NAME/checkpoint_last.pt" >&2; exit 2; }
	@$(PY) -m eval.knn --checkpoint "$(CHECKPOINT)" $(if $(DATA),--data "$(DATA)") $(if $(PROTOCOL),--protocol "$(PROTOCOL)") $(ARGS)

eval-linear: $(if $(CHECKPOINT),$(READY))  ## linear classifier on a frozen backbone    CHECKPOINT=FILE [DATA=data/imagenet] [PROTOCOL=linear/lewel] [ARGS="--epochs 5"]
	@test -n "$(CHECKPOINT)" || { echo "Say which backbone: make eval-linear CHECKPOINT=runs/NAME/checkpoint_last.pt" >&2; exit 2; }
	@$(PY) -m eval.linear --checkpoint "$(CHECKPOINT)" $(if $(DATA),--data "$(DATA)") $(if $(PROTOCOL),--protocol "$(PROTOCOL)") $(ARGS)

eval-all: $(if $(CKPT),$(READY))  ## every protocol that fits a backbone, in fewer epochs, and a table    CKPT=FILE [DATA=data/imagenet] [EPOCHS=5] [ARGS="--crop 64 --resize 72 --only linear"]
	@test -n "$(CKPT)" || { echo "Say which backbone: make eval-all CKPT=runs/NAME/checkpoint_last.pt DATA=data/NAME" >&2; exit 2; }
	@$(PY) -m eval.all --checkpoint "$(CKPT)" $(if $(DATA),--data "$(DATA)") $(if $(EPOCHS),--epochs $(EPOCHS)) $(ARGS)

visualize: $(if $(CHECKPOINT),$(READY))  ## where a network looks: SCFS, LEWEL, ViTs    CHECKPOINT=FILE [ARGS="photo.jpg --out sheet.png"]
	@test -n "$(CHECKPOINT)" || { echo "Say which network: make visualize CHECKPOINT=runs/NAME/checkpoint_last.pt" >&2; exit 2; }
	@$(PY) -m eval.visualize --checkpoint "$(CHECKPOINT)" $(ARGS)
