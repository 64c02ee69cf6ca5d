#!/usr/bin/env bash
# Install what `make test-full` uses beside Python into the given folder: buf (npm) and grpcurl (Go).
# A toolchain that isn't there is told, not an error: the tests that need it say so.
set -u
dir=$(mkdir -p "$1" && cd "$1" && pwd)
if command -v npm >/dev/null; then
  echo "installing buf …"
  npm install --loglevel=error --no-audit --no-fund --prefix "$dir" @bufbuild/buf@1.75.0 || echo "buf could not be installed" >&2
else
  echo "npm is missing: no buf" >&2
fi
if command -v go >/dev/null; then
  echo "installing grpcurl …"
  GOBIN="$dir/bin" go install github.com/fullstorydev/grpcurl/cmd/grpcurl@v1.9.3 || echo "grpcurl could not be installed" >&2
else
  echo "go is missing: no grpcurl" >&2
fi
