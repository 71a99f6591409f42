.PHONY: help fmt lint test matrix train mutants gpu gpu-parity gpu-bench gpu-tune

help:  ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/'

fmt:  ## format and mend what ruff can
	ruff check --fix .
	ruff format .

lint:  ## ruff and mypy
	ruff check .
	ruff format --check .
	mypy

test:  ## the whole suite, CPU only, with what `pytest` alone leaves out
	pytest -m "slow or not slow"

matrix:  ## the suite and the resource report at each PyTorch and Triton, installed for the while
	python tests/matrix.py

train:  ## the ablation, at the machine's preset
	python train.py

mutants:  ## plant faults in a copy of the kernels; the parity tests must catch each
	python tests/mutants.py

OUT ?= gpu_results
TESTS ?= tests/*/test_*_gpu.py
BENCH ?= bench/bench_*.py
PARTS ?= parity bench tune
LIMIT = $(shell expr 500 / $(words $(PARTS)))  # seconds of each part
WITHIN = timeout -s INT -k 10 $(LIMIT)

gpu:  ## on a GPU, in under 9 minutes that PARTS share ("parity bench tune", or only some): TESTS, BENCH, which tiles are the fastest; all lands in OUT
	mkdir -p $(OUT)
	-nvidia-smi > $(OUT)/nvidia-smi.txt
	for part in $(PARTS); do $(MAKE) --no-print-directory gpu-$$part || exit 1; done

gpu-parity:
	-$(WITHIN) python3 -m pytest -n 8 $(TESTS) > $(OUT)/parity.txt 2>&1
	tail -n 25 $(OUT)/parity.txt

gpu-bench:
	-$(WITHIN) python3 -m pytest -n 0 $(BENCH) -rs --benchmark-json=$(OUT)/raw.json > $(OUT)/bench.txt 2>&1
	-python3 -m bench.results collect $(OUT)/raw.json --output $(OUT)

gpu-tune:
	-$(WITHIN) python3 -m bench.tune --output $(OUT) --budget-s $(shell expr $(LIMIT) - 40) > $(OUT)/tune.txt 2>&1
	tail -n 100 $(OUT)/tune.txt
