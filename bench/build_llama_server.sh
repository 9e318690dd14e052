#!/usr/bin/env bash
# llama.cpp's server from the source inside the llama-cpp-python sdist, built for this machine's processor:
#
#     bench/build_llama_server.sh DIRECTORY        (prints the path of the binary as its last line)
#
# LLAMA_SDIST=FILE takes a sdist that is already here instead of PyPI's; JOBS=N compiles N files at once (all CPUs).
# Without TLS and without the web page, which the sdist does not hold: neither is measured.
set -euo pipefail
version=0.3.36
[ $# -eq 1 ] || { echo "usage: $0 DIRECTORY" >&2; exit 2; }
mkdir -p "$1"
directory=$(cd "$1" && pwd)

sdist=${LLAMA_SDIST:-$directory/llama_cpp_python-$version.tar.gz}
if [ ! -e "$sdist" ]; then
    # pip asks a source for its metadata even where it only fetches; a build of it that does nothing is enough for that.
    CMAKE_ARGS="-DLLAMA_BUILD=OFF" "${PYTHON:-python3}" -m pip download --quiet --no-deps \
        --no-binary llama-cpp-python "llama-cpp-python==$version" --dest "$directory" >&2
fi
tar xzf "$sdist" -C "$directory"

cmake -S "$directory/llama_cpp_python-$version/vendor/llama.cpp" -B "$directory/build" \
    -DCMAKE_BUILD_TYPE=Release -DGGML_NATIVE=ON -DBUILD_SHARED_LIBS=OFF -DLLAMA_OPENSSL=OFF \
    -DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_EXAMPLES=OFF -DLLAMA_BUILD_APP=OFF \
    -DLLAMA_BUILD_UI=OFF -DLLAMA_USE_PREBUILT_UI=OFF >&2
cmake --build "$directory/build" --target llama-server --parallel "${JOBS:-$(nproc)}" >&2
echo "$directory/build/bin/llama-server"
