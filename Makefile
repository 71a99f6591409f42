.PHONY: help fmt lint test matrix train mutants gpu

help:  ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/'

fmt:  ## format and mend what ruff can
	ruff check --fix .
	ruff format .

lint:  ## ruff and mypy
	ruff check .
	ruff format --check .
	mypy

test:  ## the whole suite, CPU only
	pytest

matrix:  ## the suite and the resource report at each PyTorch and Triton, installed for the while
	python tests/matrix.py

train:  ## the ablation, at the machine's preset
	python train.py

mutants:  ## plant faults in a copy of the kernels; the parity tests must catch each
	python tests/mutants.py

OUT ?= gpu_results
TESTS ?= tests/*/test_*_gpu.py
BENCH ?= bench/bench_*.py

gpu:  ## on a GPU, in under 9 minutes: TESTS for parity, then BENCH for speed; all lands in OUT
	mkdir -p $(OUT)
	-nvidia-smi > $(OUT)/nvidia-smi.txt
	-timeout -s INT 270 python3 -m pytest -n 8 $(TESTS) > $(OUT)/parity.txt 2>&1
	tail -n 25 $(OUT)/parity.txt
	-timeout -s INT 250 python3 -m pytest -n 0 $(BENCH) -rs --benchmark-json=$(OUT)/raw.json > $(OUT)/bench.txt 2>&1
	python3 -m bench.results collect $(OUT)/raw.json --output $(OUT)
