#!/usr/bin/env bash
# Train as published, 40,000 steps with augmentation, then predict the test stack: mixed precision, eight GPUs.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
launch 8 --exec_mode train_and_predict --max_steps 40000 --augment --use_amp
