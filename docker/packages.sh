#!/bin/sh
# Writes to standard output, as a tar archive, what an image says of its packages: docker/packages.sh unet-serve:cpu
# That is dpkg's list and the metadata of the Python packages, the one that Triton came in included.
set -eu
cd "$(dirname "$0")/.."
# shellcheck source=docker/engine.sh
. docker/engine.sh
# shellcheck disable=SC2016
in_image "$1" sh -c 'cd / && tar -c var/lib/dpkg/status $(find opt/venv/lib/python3*/site-packages opt/tritonserver \
    -maxdepth 1 \( -name "*.dist-info" -o -name "*.egg-info" \) 2>/dev/null)' \
    || { echo "error: the packages of $1 could not be read: build it first (make images)" >&2; exit 2; }
