# make install   an environment in .venv with everything, from the tested versions
# make demo      dense and Skiparse attention on a real clip; writes demo_out/report.html
# make test      lint, types, and the tests: what CI runs
# make smoke     a minute of something of every part: for the inner loop
# make test-full the long matrices as well
# make docs      the documentation, in build/docs; begin at build/docs/docs/index.html
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed

.PHONY: install demo smoke test test-full lint types torch_npu readme docs clean

install: $(STAMP)

$(STAMP): pyproject.toml setup.py constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

demo: install
	$(BIN)/skiparse demo --out demo_out

# As many processes as cores, each with whole files of tests: what they make for themselves, they
# share. A test computes on one thread (tests/conftest.py).
PYTEST := $(BIN)/python -m pytest -n auto --maxprocesses 8 --dist loadfile

# By tests, not by files: the longest file would be half of it.
smoke: install
	$(BIN)/python -m pytest -m smoke -n auto --maxprocesses 8

test: lint types torch_npu
	$(PYTEST)

test-full: lint types torch_npu
	$(PYTEST) -m 'full or not full'

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# On the wheel, because only there models/ and bench/ carry the names they are imported by.
types: install
	rm -rf build/types && mkdir -p build/types
	$(BIN)/python -m pip wheel --quiet --disable-pip-version-check --no-deps --no-build-isolation -w build/types .
	cd build/types && ../../$(BIN)/python -m zipfile -e skiparse-*.whl unpacked
	cd build/types/unpacked && ../../../$(BIN)/mypy --config-file ../../../pyproject.toml -p skiparse

# The headers and the library of torch_npu, which a test compiles and links against. Unzipped, and
# never installed: with it in the environment and no NPU, `import torch` fails. It is on offer for
# Linux; elsewhere the test says that it skips.
NPU := build/torch_npu

torch_npu: $(NPU)/.unzipped

$(NPU)/.unzipped: constraints.txt | install
	rm -rf $(NPU) && mkdir -p $(NPU)
	if $(BIN)/python -m pip download --quiet --disable-pip-version-check --no-deps \
		-c constraints.txt -d $(NPU) torch_npu; then \
		$(BIN)/python -m zipfile -e $(NPU)/*.whl $(NPU)/unzipped && \
		rm $(NPU)/*.whl && touch $@; \
	fi

# The generated tables of the books: backends from the registry, figures from bench/results.jsonl.
readme: install
	$(BIN)/python -m skiparse.bench.op.tables README.md docs/measuring.md

# Guides, the books and the reference, from Markdown and docstrings. What leads nowhere is an error.
docs: install
	$(BIN)/python -m sphinx -q -W -E --keep-going -c docs . build/docs

clean:
	rm -rf .venv build dist *.egg-info demo_out
