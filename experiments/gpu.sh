#!/bin/bash
# What one GPU has to tell, in some eight minutes: bash experiments/gpu.sh FOLDER
# Every line of the list is a file in FOLDER; what takes longer than its seconds is ended, and its
# file says so. Needs nothing but the repository and its packages.
out=${1:?name a folder for the results}
mkdir -p "$out"

measure() { # seconds, file, command …
    local seconds=$1 file="$out/$2.txt"
    shift 2
    echo "$*" > "$file"
    timeout "$seconds" "$@" >> "$file" 2>> "$out/errors.txt" || echo "not measured: it failed or took over $seconds s" >> "$file"
}

nvidia-smi > "$out/machine.txt" 2>&1
bench="python -m experiments.bench"
measure 60 step-paper-fp32 $bench step --model paper --repeats 5
measure 60 step-paper-bf16 $bench step --model paper --repeats 5 --dtype bf16
measure 60 inference-paper-fp32 $bench inference --model paper --repeats 7
measure 60 inference-paper-bf16 $bench inference --model paper --repeats 7 --dtype bf16
measure 120 inference-paper-compiled $bench inference --model paper --repeats 7 --compile
measure 60 lrpo-paper $bench lrpo --model paper --repeats 5
measure 90 demo python train.py --hard-ratio 0.3 --out "$out/demo"
tail -n +1 "$out"/*.txt
