#!/usr/bin/env bash
# Images per second of inference: 200 steps to warm up, 100 measured; mixed precision, one GPU.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
launch 1 --exec_mode predict --benchmark --warmup_steps 200 --max_steps 300 --use_amp
