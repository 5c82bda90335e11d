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
TARGET_DIR := $(or $(CARGO_TARGET_DIR),target)
# The command line finds the agent beside itself's directory: ../agent/fc-agent.
AGENT := $(TARGET_DIR)/agent/fc-agent

.PHONY: help
help: ## list these commands
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 12

.PHONY: agent
agent: ## build the guest's process 1, static, into target/agent
	RUSTFLAGS="-C target-feature=+crt-static" $(CARGO) build --locked --profile agent -p fc-agent \
	    --target $(AGENT_TARGET) --target-dir $(TARGET_DIR)/agent-build
	@mkdir -p $(dir $(AGENT))
	@cmp -s $(TARGET_DIR)/agent-build/$(AGENT_TARGET)/agent/fc-agent $(AGENT) || \
	    { cp $(TARGET_DIR)/agent-build/$(AGENT_TARGET)/agent/fc-agent $(AGENT).new && mv $(AGENT).new $(AGENT); }
	@ls -l $(AGENT)
