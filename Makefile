# The commands a newcomer needs; `make help` lists them.

SHELL := /bin/sh
CARGO ?= cargo
PREFIX ?= /usr/local
DESTDIR ?=

# The agent runs where no library is: musl makes the smallest such program; where its target is not
# installed, the host's own C library is linked in statically.
HOST_TARGET := $(shell rustc -vV 2>/dev/null | sed -n 's/^host: //p')
ARCHITECTURE := $(firstword $(subst -, ,$(HOST_TARGET)))
MUSL_TARGET := $(ARCHITECTURE)-unknown-linux-musl
HAVE_MUSL := $(wildcard $(shell rustc --print sysroot 2>/dev/null)/lib/rustlib/$(MUSL_TARGET)/lib)
AGENT_TARGET ?= $(if $(HAVE_MUSL),$(MUSL_TARGET),$(HOST_TARGET))
TARGET_DIR := $(abspath $(or $(CARGO_TARGET_DIR),target))
# target/debug/fcvm and target/release/fcvm find the agent as ../agent/fc-agent.
AGENT := $(TARGET_DIR)/agent/fc-agent
AGENT_BUILT := $(TARGET_DIR)/agent-build/$(AGENT_TARGET)/agent/fc-agent
# Built by itself it has some of its libraries compiled anew: `make test` takes what the workspace's build has made.
XTASK ?= $(CARGO) xtask
# The guest kernel that tests and benches boot, fetched once.
TEST_DATA := $(TARGET_DIR)/test-data

.PHONY: help
help: ## list these commands
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 12

.PHONY: demo
demo: ## install what is missing, build, and run an image in a VM
	scripts/install-deps
	$(MAKE) --no-print-directory build
	scripts/demo $(TARGET_DIR)/release/fcvm

.PHONY: build
build: agent ## build the release programs
	$(CARGO) build --locked --release -p fcvm

.PHONY: agent
agent: ## build the guest's process 1, static, into target/agent
	RUSTFLAGS="-C target-feature=+crt-static" $(CARGO) build --locked --profile agent -p fc-agent \
	    --target $(AGENT_TARGET) --target-dir $(TARGET_DIR)/agent-build
	@mkdir -p $(dir $(AGENT))
	@cmp -s $(AGENT_BUILT) $(AGENT) || { cp $(AGENT_BUILT) $(AGENT).new && mv $(AGENT).new $(AGENT); }

.PHONY: deps
deps: ## install the Debian packages that fcvm and its tests need
	scripts/install-deps --test

.PHONY: test
test: ## everything that CI runs: lint, checks, all tests
	scripts/install-deps --test
	$(MAKE) --no-print-directory agent
	$(CARGO) build --locked --workspace --all-targets
	$(MAKE) --no-print-directory lint XTASK=$(TARGET_DIR)/debug/xtask
	$(MAKE) --no-print-directory guest-kernel
	FCVM_TEST_KERNEL_SOURCES=$(TEST_DATA)/kernels/sources FCVM_AGENT_BIN=$(AGENT) FCVM_TEST_AGENT=$(AGENT) FCVM_TEST_KERNEL_DIR=$(TEST_DATA)/kernels/current \
	    $(CARGO) test --locked --workspace --no-fail-fast
	$(CARGO) test --locked -p blockpool --features shuttle --test interleavings

# Where the package archive is out of reach the tests that boot say that they are skipped.
.PHONY: guest-kernel
guest-kernel:
	@mkdir -p $(TEST_DATA)
	$(TARGET_DIR)/debug/fcvm --data-dir $(TEST_DATA) setup kernel || \
	    echo "make test: no guest kernel could be had: tests that boot one are skipped" >&2

.PHONY: test-kernel
test-kernel: agent ## build kernels from source, boot them, and work with ZFS in one: takes up to an hour
	scripts/install-deps --test
	$(CARGO) build --locked -p fcvm
	@mkdir -p $(TEST_DATA)
	FCVM_AGENT_BIN=$(AGENT) scripts/test-kernel $(TARGET_DIR)/debug/fcvm $(TEST_DATA)
	FCVM_AGENT_BIN=$(AGENT) scripts/test-kernel-zfs $(TARGET_DIR)/debug/fcvm $(TEST_DATA)

.PHONY: lab-test
lab-test: agent ## the end-to-end tests on KVM, in an emulated machine: Firecracker (FCVM_FIRECRACKER_BIN) and QEMU
	scripts/install-deps --test
	$(CARGO) build --locked -p fcvm
	$(MAKE) --no-print-directory guest-kernel
	$(CARGO) xtask lab-test

.PHONY: lab-bench
lab-bench: agent ## measure how VMs begin under Firecracker (FCVM_FIRECRACKER_BIN), in that emulated machine
	scripts/install-deps --test
	$(CARGO) build --locked -p fcvm
	$(CARGO) build --locked --release -p fcvm -p fcvm-bench
	$(MAKE) --no-print-directory guest-kernel
	BENCH_OPTIONS="$(BENCH_OPTIONS)" $(CARGO) xtask lab-bench

.PHONY: lint
lint: ## formatting, clippy, dependency rule, licences, advisories, tidiness
	$(CARGO) fmt --all --check
	$(CARGO) clippy --locked --workspace --all-targets -- -D warnings
	$(XTASK) check

.PHONY: bench
bench: agent ## measure against the floor and the peers; prints a table and JSON
	scripts/install-deps --test
	$(CARGO) build --locked --release -p fcvm -p fcvm-bench
	$(TARGET_DIR)/release/fcvm-bench $(BENCH_OPTIONS)

.PHONY: fuzz
fuzz: ## build the fuzz targets and let each search for FUZZ_SECONDS (30)
	scripts/fuzz

.PHONY: soak-pool
soak-pool: ## try random steps, faults and crashes on the pool for MINUTES (30)
	$(CARGO) run --locked -p blockpool --example soak -- $(or $(MINUTES),30)

.PHONY: bench-pool
bench-pool: ## measure the pool beside its peers and a plain file, in memory and in the target directory
	scripts/install-deps --test
	$(CARGO) build --locked --release -p fcvm
	$(CARGO) build --locked --release -p blockpool --example bench
	$(TARGET_DIR)/release/examples/bench /dev/shm
	$(TARGET_DIR)/release/examples/bench $(TARGET_DIR)
	$(TARGET_DIR)/release/fcvm pool bench --directory /dev/shm --plot docs/design/clone-cost.svg $(BENCH_OPTIONS)

.PHONY: bench-references
bench-references: ## measure three ways to count references side by side, and show how the wrong ones fail
	$(CARGO) run --locked --release -p reference-schemes --example explain
	$(CARGO) run --locked --release -p reference-schemes --example measure

# Under sudo nothing is built, so that no file of root's gets among the user's: 'make build' comes first.
.PHONY: install
install: $(if $(SUDO_USER),,build) ## install programs, manual pages and completions below PREFIX
	@test -x $(TARGET_DIR)/release/fcvm -a -x $(AGENT) || { echo "make install: run 'make build' first" >&2; exit 1; }
	install -D -m 755 $(TARGET_DIR)/release/fcvm $(DESTDIR)$(PREFIX)/bin/fcvm
	install -D -m 755 $(AGENT) $(DESTDIR)$(PREFIX)/libexec/fcvm/fc-agent
	@rm -rf $(TARGET_DIR)/man && mkdir -p $(TARGET_DIR)/man
	$(TARGET_DIR)/release/fcvm man $(TARGET_DIR)/man
	install -d $(DESTDIR)$(PREFIX)/share/man/man1
	install -m 644 $(TARGET_DIR)/man/*.1 $(DESTDIR)$(PREFIX)/share/man/man1
	install -d $(DESTDIR)$(PREFIX)/share/bash-completion/completions \
	    $(DESTDIR)$(PREFIX)/share/zsh/site-functions $(DESTDIR)$(PREFIX)/share/fish/vendor_completions.d
	$(TARGET_DIR)/release/fcvm completion bash >$(DESTDIR)$(PREFIX)/share/bash-completion/completions/fcvm
	$(TARGET_DIR)/release/fcvm completion zsh >$(DESTDIR)$(PREFIX)/share/zsh/site-functions/_fcvm
	$(TARGET_DIR)/release/fcvm completion fish >$(DESTDIR)$(PREFIX)/share/fish/vendor_completions.d/fcvm.fish

.PHONY: uninstall
uninstall: ## remove what install put below PREFIX
	rm -f $(DESTDIR)$(PREFIX)/bin/fcvm $(DESTDIR)$(PREFIX)/libexec/fcvm/fc-agent
	rm -f $(DESTDIR)$(PREFIX)/share/man/man1/fcvm.1 $(DESTDIR)$(PREFIX)/share/man/man1/fcvm-*.1
	rm -f $(DESTDIR)$(PREFIX)/share/bash-completion/completions/fcvm \
	    $(DESTDIR)$(PREFIX)/share/zsh/site-functions/_fcvm \
	    $(DESTDIR)$(PREFIX)/share/fish/vendor_completions.d/fcvm.fish
	-rmdir $(DESTDIR)$(PREFIX)/libexec/fcvm 2>/dev/null
