# Each target sets up what it needs, in .venv. PYTHON is the interpreter the environment is made with.
PYTHON ?= python3
PY := .venv/bin/python

.PHONY: demo demo-dalle test check bench gpu-check gate torture docs docs-serve clean

demo: .venv/demo      ## train CLIP, prior and decoder on the CPU, sample a grid, print a table
	$(PY) train.py -m model=clip,prior,decoder name=demo resume=true
	$(PY) sample.py name=demo prompts=prompts/shapes.txt
	$(PY) -m dalle demo logs/demo

demo-dalle: .venv/demo    ## the same with the first generation: image tokenizer and transformer
	$(PY) train.py -m model=vqvae,dalle image_tokenizer=vqgan name=demo resume=true
	$(PY) sample.py pipeline=dalle name=demo prompts=prompts/shapes.txt
	$(PY) -m dalle demo logs/demo --pipeline dalle

# One thread a process: two that spin for each other's cores slow small kernels down twentyfold.
test: export OMP_NUM_THREADS = 1
test: .venv/dev       ## all tests; compiled networks in a second call, without the shape checks that break torch.compile
	$(PY) -m pytest -n 2 -m "not compile" --jaxtyping-packages=dalle,typecheck.beartype
	$(PY) -m pytest -m compile

check: .venv/dev      ## lint, format, types
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/pyright

.venv/bin/python:
	$(PYTHON) -m venv .venv
	$(PY) -m pip install --quiet --upgrade pip

.venv/demo: .venv/bin/python pyproject.toml constraints.txt
	$(PY) -m pip install --quiet --constraint constraints.txt --editable .
	@touch $@

.venv/dev: .venv/bin/python pyproject.toml constraints.txt
	$(PY) -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	@touch $@ .venv/demo

.venv/docs: .venv/bin/python pyproject.toml constraints.txt
	$(PY) -m pip install --quiet --constraint constraints.txt --editable ".[docs]"
	@touch $@ .venv/demo

bench: .venv/dev      ## speed beside diffusers and open_clip; see benchmarks/README.md
	$(PY) benchmarks/speed.py

gpu-check: .venv/demo ## on a GPU, six minutes: is everything right, and how fast is it? ONLY=speed chooses parts
	$(PY) benchmarks/gpu_check.py $(if $(ONLY),--only $(ONLY))

gate: .venv/demo      ## measure the demo's run again; fails when a figure has left its recorded interval. RECORD=1 records
	$(PY) -m dalle gate logs/demo $(if $(RECORD),--record)

torture: .venv/dev    ## try to lose work and to break commands: kills, full disks, signals, NaN, damaged files, mistakes
	PYTHONPATH=tests $(PY) -m torture

docs: .venv/docs      ## the documentation as a site in site/; a broken link fails
	$(PY) -m mkdocs build --strict

docs-serve: .venv/docs    ## the same at localhost, built anew whenever a page changes
	$(PY) -m mkdocs serve

clean:                ## remove the environment; runs in logs/ stay
	rm -rf .venv
