PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
export PYTHON VENV

.DEFAULT_GOAL := help
.PHONY: help install lock demo demo-tool trl pages trackio test test-slow test-fast lint format bench lm-eval house serve serve-tool check-wheel docker-test vllm-next ray-serve keys docs lint-deploy clean

help:  ## Show this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-12s %s\n", $$1, $$2}'

install:  ## Make .venv with the pinned CPU stack (a second call is a no-op)
	@bash requirements/install.sh

lock:  ## Resolve requirements/cpu.in into cpu.lock again
	@bash requirements/lock.sh

demo: install  ## Train SmolLM2 to add, for real, in about 10 minutes; ARGS="--steps 5" and so on
	$(BIN)/openrlhf-alp launch recipes/demo.toml $(ARGS)

demo-tool: install  ## Train SmolLM2 to multiply by writing Python, in about 12 minutes
	$(BIN)/openrlhf-alp launch recipes/demo_tool.toml $(ARGS)

test: install lint  ## Lint, type check, architecture contracts and all tests but the slowest
	$(BIN)/python -m pytest -m "not slow" $(ARGS)

test-slow: install  ## Launches that are stopped and killed at their stages: minutes each
	$(BIN)/python -m pytest -m slow $(ARGS)

test-fast: install  ## Tests that start no Ray, no vLLM and no second process
	$(BIN)/python -m pytest -m "not e2e and not gpu" $(ARGS)

lint: install lint-deploy  ## ruff, mypy, the import contracts, and lint-deploy
	$(BIN)/ruff check . && $(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: install  ## Format and fix what ruff can fix
	$(BIN)/ruff format . && $(BIN)/ruff check --fix .

bench: install  ## Print the ratios of benchmarks/ that need no data set
	@for file in $(filter-out benchmarks/grading.py,$(wildcard benchmarks/*.py)); do echo "== $$file"; $(BIN)/python $$file || exit 1; done

lm-eval: install  ## Compare with lm-evaluation-harness: make lm-eval MODEL=DIR DATA=gsm8k_test.jsonl
	@[ -x .venv-lm-eval/bin/lm_eval ] || { $(PYTHON) -m venv .venv-lm-eval && \
	  .venv-lm-eval/bin/python -m pip install -qq --requirement requirements/lm-eval.txt; }
	$(BIN)/python benchmarks/foreign/lm_eval_agreement.py --model $(MODEL) --data $(DATA) \
	  --python .venv-lm-eval/bin/python $(ARGS)

house: install  ## Print the figures of the code base itself: circles, lengths, repeats
	@$(BIN)/python benchmarks/house.py $(ARGS)

serve: install  ## Serve a model for rollouts: make serve MODEL=/path/to/model
	$(BIN)/python -m services.rollout --model $(MODEL) $(ARGS)

serve-tool: install  ## Serve sandboxed Python: make serve-tool ARGS="--port 8090"
	$(BIN)/python -m services.tool $(ARGS)

check-wheel:  ## Build the wheel and use it in an empty environment
	@$(PYTHON) requirements/check_wheel.py

docker-test: install  ## Build the images, attack the tool image, train a step through compose.yaml; starts an engine if none answers
	$(BIN)/python dockerfiles/check.py $(ARGS)

keys:  ## Write the keys of the compose stack into secrets/
	@sh deploy/keys.sh

docs: install  ## Build the documentation site in build/site (mkdocs-material in .venv-docs)
	@[ -x .venv-docs/bin/mkdocs ] || { $(PYTHON) -m venv .venv-docs && .venv-docs/bin/pip install -q mkdocs-material==9.8.2; }
	$(BIN)/python docs/_generate.py
	.venv-docs/bin/mkdocs build

lint-deploy:  ## Check Dockerfiles, compose.yaml, Kubernetes objects; look for secrets (in .venv-deploy)
	@$(PYTHON) deploy/lint.py

VLLM_NEXT := 0.32.0
VLLM_VENV := .venv-vllm-$(VLLM_NEXT)
vllm-next: install  ## Train a step against a rollout service on a newer vLLM, in an environment of its own
	test -x $(VLLM_VENV)/bin/python || $(BIN)/python -m venv --without-pip $(VLLM_VENV)
	$(BIN)/python -c "import site; print(site.getsitepackages()[0])" > $$(echo $(VLLM_VENV)/lib/python3.*/site-packages)/base.pth
	$(BIN)/python -m pip --python $(VLLM_VENV)/bin/python install -qq --no-deps --disable-pip-version-check \
	  --requirement requirements/vllm-$(VLLM_NEXT).txt
	$(BIN)/python requirements/check_vllm.py $(VLLM_VENV)/bin/python $(ARGS)

ray-serve: install  ## Test the tool service on Ray Serve, which needs an older protobuf than vLLM
	test -d .ray-serve || $(BIN)/python -m pip install -qq --no-deps --disable-pip-version-check --target .ray-serve protobuf==6.33.6
	PYTHONPATH=.ray-serve $(BIN)/python -m pytest tests/deploy/test_ray_serve.py $(ARGS)

TRL_VENV := .venv-trl
trl: install  ## Test examples/alp_in_trl.py against the pinned TRL, in an environment of its own
	test -x $(TRL_VENV)/bin/python || $(BIN)/python -m venv --without-pip $(TRL_VENV)
	$(BIN)/python -c "import site; print(site.getsitepackages()[0])" > $$(echo $(TRL_VENV)/lib/python3.*/site-packages)/base.pth
	$(BIN)/python -m pip --python $(TRL_VENV)/bin/python install -qq --no-deps --disable-pip-version-check trl==1.16.0
	PYTHONPATH=examples $(TRL_VENV)/bin/python -m pytest -p no:cacheprovider examples $(ARGS)

PAGES_VENV := .venv-pages
pages: install  ## Test the report and the episode browser in a headless Chromium (Debian: chromium chromium-driver)
	test -x $(PAGES_VENV)/bin/python || $(BIN)/python -m venv --without-pip $(PAGES_VENV)
	$(BIN)/python -c "import site; print(site.getsitepackages()[0])" > $$(echo $(PAGES_VENV)/lib/python3.*/site-packages)/base.pth
	$(BIN)/python -m pip --python $(PAGES_VENV)/bin/python install -qq --disable-pip-version-check --requirement requirements/pages.txt
	$(PAGES_VENV)/bin/python -m pytest -p no:cacheprovider tests/report/browser $(ARGS)

trackio: install  ## Test run.trackio against the pinned Trackio, beside the locked environment
	test -d .venv-trackio || $(BIN)/python -m pip install -qq --no-deps --target .venv-trackio \
	  trackio==0.43.0 gradio-client==2.7.2 brotli==1.2.1
	PYTHONPATH=.venv-trackio $(BIN)/python -m pytest tests/report/test_tracking.py $(ARGS)

clean:  ## Remove caches and runs/, keep .venv
	rm -rf runs build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
