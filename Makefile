# The commands of the README. Each does all it needs, from nothing but Python >= 3.10 and a C++
# compiler: a virtual environment in .venv, pinned dependencies, the build, the run.

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
NATIVE := CMakeLists.txt setup.py $(shell find cmake csrc -type f)

.PHONY: demo test check format bench peers docs gpu-check clean

demo: $(VENV)/demo
	$(BIN)/taylor-kernels demo

# Two processes: a file's tests stay together, since some share what takes long to make, and files
# are taken in the order of tests/conftest.py, long ones first. Each has one thread, but where a test
# asks for more: second threads that wait for a core which the other process holds make small layers
# tens of times slower. Threads that wait give their core away. Dozens of programs that tests start
# import the package: from bytecode, also where the environment forbids to write it.
test: $(VENV)/zoo $(VENV)/peers
	$(BIN)/python -m compileall -q taylor_kernels
	OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive $(BIN)/python -m pytest --zoo -n 2 --dist loadfile --no-loadscope-reorder

check: $(VENV)/built
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $(filter csrc/%,$(NATIVE))
	$(BIN)/mypy

format: $(VENV)/built
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(filter csrc/%,$(NATIVE))

# Ends in a table of targets; report.md and the plots lie in bench/results.
bench: $(VENV)/built
	$(BIN)/python -m bench

# The site, in build/site. A warning is an error; so is a link that leads nowhere.
docs: $(VENV)/docs
	$(BIN)/python -m tools.docs_blocks --check
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# On a machine with an NVIDIA GPU, without network: uses the python3 that has torch, pybind11, ninja
# and cmake. Writes one JSON and one log into $$OUT. STEPS="build tests" runs these alone.
gpu-check:
	$(PYTHON) tools/gpu_check.py $(STEPS)

# PyTorch first and by exact version: whatever else names it is then content with it.
$(VENV)/dependencies: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -c constraints.txt torch
	$(BIN)/python -m pip install -c constraints.txt setuptools cmake ninja pybind11
	touch $@

INSTALL = PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -m pip install -c constraints.txt \
	--no-build-isolation --editable

$(VENV)/built: $(VENV)/dependencies $(NATIVE)
	$(INSTALL) '.[dev]'
	touch $(VENV)/demo $@

# A part of that: who wants to see the demo alone need not wait for what tests it.
$(VENV)/demo: $(VENV)/dependencies $(NATIVE)
	$(INSTALL) '.[demo]'
	touch $@

# The networks that tests/zoo prunes. pytorchcv names torchvision, which stays away.
$(VENV)/zoo: $(VENV)/built
	$(BIN)/python -m pip install -c constraints.txt --no-build-isolation \
		transformers monai efficientnet_pytorch requests
	$(BIN)/python -m pip install -c constraints.txt --no-deps pytorchcv
	touch $@

# The libraries that tests/integrations stand beside, and what they import. Several name torchvision,
# which stays away; Avalanche brings a package named `tests`, which would hide ours.
$(VENV)/peers: $(VENV)/built
	$(BIN)/python -m pip install -c constraints.txt --no-deps \
		avalanche-lib dill psutil torchmetrics lightning lightning-utilities accelerate \
		opacus opt_einsum backpack-for-pytorch einops unfoldNd \
		laplace-torch asdl asdfghjkl curvlinops-for-pytorch einconv linear_operator jaxtyping wadler_lindig \
		nvidia-modelopt omegaconf antlr4-python3-runtime pulp onnx onnxscript onnx-ir ml_dtypes protobuf \
		tensorboardX
	rm -rf $(VENV)/lib/python3*/site-packages/tests
	touch $@

peers: $(VENV)/peers

$(VENV)/docs: $(VENV)/built
	$(BIN)/python -m pip install -c constraints.txt mkdocs-material 'mkdocstrings[python]'
	touch $@

clean:
	rm -rf $(VENV) build *.egg-info taylor_kernels/_native*.so
