#!/usr/bin/env bash
# Images per second of training: 200 steps to warm up, 100 measured; float32, eight GPUs.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
launch 8 --exec_mode train --benchmark --warmup_steps 200 --max_steps 300 --augment
