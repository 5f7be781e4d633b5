#!/bin/sh
# Builds the CPU images, unet-serve:cpu, unet-train:cpu and unet-client:cpu: docker/images.sh [serve] [train] [client]
# With Docker, if its engine answers; else with buildah, which needs no daemon.
#   CPU_BASE  what they are built on; by default debian:12-slim, or where buildah and mmdebstrap are, a Debian 12 that
#             mmdebstrap makes from the packages themselves
#   PIP_CERT  certificate of an authority that pip has to trust while it builds
set -eu
cd "$(dirname "$0")/.."
[ $# -gt 0 ] || set -- serve train client
cache=.cache/images
mkdir -p "$cache"

# shellcheck source=docker/engine.sh
. docker/engine.sh
if [ "$engine" = buildah ] && [ -z "${CPU_BASE:-}" ] && command -v mmdebstrap >/dev/null; then
    CPU_BASE=localhost/unet-base
    if [ ! -f "$cache/base.tar" ]; then
        echo "making a Debian 12 for the base (about two minutes, only once)"
        # mmdebstrap makes an archive of what ends in .tar, and a folder of anything else.
        # As debian:12-slim: no documentation, no translations, no lists of packages.
        # shellcheck disable=SC2016
        mmdebstrap --quiet --variant=minbase \
            --dpkgopt='path-exclude=/usr/share/doc/*' --dpkgopt='path-exclude=/usr/share/man/*' \
            --dpkgopt='path-exclude=/usr/share/locale/*' \
            --customize-hook='rm -rf "$1"/var/cache/apt/* "$1"/var/lib/apt/lists/* "$1"/var/log/*' \
            bookworm "$cache/base.part.tar"
        mv "$cache/base.part.tar" "$cache/base.tar"
    fi
    printf 'FROM scratch\nADD base.tar /\n' >"$cache/Dockerfile"
    buildah --storage-driver vfs bud --isolation chroot -q -t unet-base "$cache" >/dev/null
fi

for image in "$@"; do
    echo "building unet-$image:cpu (log: $cache/$image.log)"
    build --target cpu -t "unet-$image:cpu" -f "docker/Dockerfile.$image" --build-arg "CPU_BASE=${CPU_BASE:-debian:12-slim}" \
        ${PIP_CERT:+--build-arg PIP_CERT=/run/pip.crt --volume "$PIP_CERT:/run/pip.crt:ro"} >"$cache/$image.log" 2>&1 \
        || { tail -n 20 "$cache/$image.log" >&2; echo "error: unet-$image:cpu was not built: the whole log is $cache/$image.log" >&2; exit 1; }
done
