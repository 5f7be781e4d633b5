# shellcheck shell=sh
# What builds and runs the images: Docker, if its engine answers; else buildah, which needs no daemon. Sourced by the
# scripts beside it, from the project's folder.
# shellcheck disable=SC2034
if docker info >/dev/null 2>&1; then
    engine=docker
    build() { docker build "$@" .; }
    # in_image IMAGE COMMAND...: a command in a fresh container.
    in_image() {
        image=$1
        shift
        docker run --rm --entrypoint "" "$image" "$@"
    }
elif command -v buildah >/dev/null; then
    engine=buildah
    build() { buildah --storage-driver vfs bud --isolation chroot --format docker "$@" .; }
    in_image() {
        container=$(buildah --storage-driver vfs from --pull-never "localhost/$1" 2>/dev/null) || return
        shift
        code=0
        buildah --storage-driver vfs run --isolation chroot "$container" -- "$@" || code=$?
        buildah --storage-driver vfs rm "$container" >/dev/null
        return "$code"
    }
else
    echo "error: no Docker engine answers and buildah is missing: install one of them (Debian: apt-get install buildah mmdebstrap)" >&2
    exit 2
fi
