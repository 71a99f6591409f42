.PHONY: help fmt lint test train

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

train:  ## the ablation, at the machine's preset
	python train.py
