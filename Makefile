# make test-e2e  the clients through OllProx against a real Ollama (see CONTRIBUTING.md)
# make run      start OllProx            make test     the tests
# make demo     see a miss and a hit     make check    lint, format, types, security, tests
PYTHON ?= python3
BIN := .venv/bin

.DEFAULT_GOAL := check
.PHONY: run demo test test-e2e bench profile soak check fix pin audit clean

run: .venv/run.stamp
	@$(BIN)/python ollprox.py

demo: .venv/run.stamp
	@bash tests/demo.sh $(BIN)/python

test: .venv/dev.stamp tests/node/node_modules/.stamp
	$(BIN)/python -X dev -m pytest -n 2 $(ARGS)

test-e2e: .venv/dev.stamp tests/node/node_modules/.stamp
	$(BIN)/python -m pytest -rs -n 0 tests/test_e2e.py $(ARGS)

# Each program can also be run by itself; the report uses the last results of each.
bench: .venv/run.stamp
	-$(BIN)/python bench/shared.py
	$(BIN)/python bench/speed.py
	$(BIN)/python bench/streams.py
	$(BIN)/python bench/memory.py
	$(BIN)/python bench/big.py
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
	$(BIN)/bandit -q -c pyproject.toml -r *.py wire answers watch
	$(MAKE) test

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
	rm -rf .venv .mypy_cache .ruff_cache .pytest_cache .hypothesis

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
