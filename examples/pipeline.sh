#!/usr/bin/env bash
# The whole pipeline, first through a pipe, then stage by stage with explicit files.
# Usage: examples/pipeline.sh [CHECKPOINT] [IMAGES]      works in a temporary folder, which it removes
set -euo pipefail
checkpoint=${1:-demo:digits}
images=${2:-2048}
case $checkpoint in demo:*) ;; *) checkpoint=$(realpath "$checkpoint") ;; esac
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"

ditmoe profile-experts "$checkpoint" -o piped.profile.safetensors |
    ditmoe prune --keep 0.5 -o piped.pruned.safetensors |
    ditmoe quantize --bits 4 -o piped.small.safetensors |
    ditmoe fid --images "$images" --extractor pixels

ditmoe inspect "$checkpoint"
ditmoe profile-experts "$checkpoint" -o own.profile.safetensors -q
ditmoe prune "$checkpoint" --profile own.profile.safetensors --keep 0.5 --dry-run > plan.json
ditmoe plan plan.json
ditmoe apply "$checkpoint" --plan plan.json --profile own.profile.safetensors -o own.pruned.safetensors -q
ditmoe quantize own.pruned.safetensors --bits 4 -o own.small.safetensors -q
ditmoe fid own.small.safetensors --ref "$checkpoint" --images "$images" --extractor pixels -o own.score.safetensors
cmp piped.pruned.safetensors own.pruned.safetensors # the same plan gives the same bytes
ditmoe inspect "$checkpoint" own.small.safetensors --verify --text # what became of it, by every byte of both
