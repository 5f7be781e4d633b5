# Sourced by the example scripts, which are called as
#   SCRIPT PATH_TO_MAIN_PY DATA_DIR RESULTS_DIR [BATCH_SIZE]
# PATH_TO_MAIN_PY is the folder of main.py, or main.py itself. Two variables change what a script does:
#   UNET_RANKS  the number of ranks, where it is not the number of GPUs in the script's name
#   UNET_FLAGS  more flags for main.py, after the script's own
set -euo pipefail

if [ $# -lt 3 ] || [ $# -gt 4 ]; then
    echo "usage: $0 PATH_TO_MAIN_PY DATA_DIR RESULTS_DIR [BATCH_SIZE]" >&2
    exit 2
fi
main=$1
if [ -d "$main" ]; then
    main=$main/main.py
fi
if [ ! -f "$main" ]; then
    echo "error: $main does not exist: name the folder of train/main.py first" >&2
    exit 2
fi
data_dir=$2
results=$3
batch_size=${4:-1}

# launch GPUS FLAG...: main.py as one process, or as one rank for each GPU.
launch() {
    local ranks=${UNET_RANKS:-$1}
    shift
    local launcher=()
    if [ "$ranks" -gt 1 ]; then
        launcher=(horovodrun -np "$ranks")
    fi
    # UNET_FLAGS is meant to be split into words.
    # shellcheck disable=SC2086
    exec "${launcher[@]}" python "$main" --data_dir "$data_dir" --model_dir "$results" --batch_size "$batch_size" \
        "$@" ${UNET_FLAGS:-}
}
