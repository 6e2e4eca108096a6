#!/usr/bin/env bash
# Whether the GPU here computes what a CPU does, and how fast BAGEL of its real size is on it: under 4.5 minutes on 80 GB.
#
#     bash benchmarks/gpu_check.sh RESULTS [--tiny]
#
# Every part has a time limit of its own and writes RESULTS/PART.txt, so that a run that is cut short still reports. The
# parts that compare run side by side, those that are timed one after the other, in the order of their worth. The exit
# status is 0 if all that was compared agrees. --tiny: everything at a toy size on the CPU. PYTHON: default python3.
set -u
results=${1:?usage: gpu_check.sh RESULTS [--tiny]}
tiny=${2:-}
device=cuda
[ -n "$tiny" ] && device=cpu
python=${PYTHON:-python3}
limit=262 # seconds for everything
mkdir -p "$results"

run() { # run PART SECONDS COMMAND...: write RESULTS/PART.txt within the time, and no longer than the whole may take
    local part=$1 most=$2 left=$((limit - SECONDS)) status
    shift 2
    [ "$left" -lt "$most" ] && most=$left
    [ "$most" -lt 5 ] && { echo "no time left" >"$results/$part.txt"; return 1; }
    PYTHONUNBUFFERED=1 timeout -k 5 "$most" "$python" -W ignore -m "$@" >"$results/$part.txt" 2>&1
    status=$?
    echo "exit status $status, at $SECONDS s" >>"$results/$part.txt"
    return $status
}

report() { # report PART [PATTERN]: its first lines that match
    echo "== $1"
    grep -E "${2:-.}" "$results/$1.txt" | grep -vE "^(USDT|ERROR|[WEI][0-9]{4})" | head -n 32 | cut -c1-260
}

golden=tests/golden/bagel
run parity-fp32 80 benchmarks.parity --golden $golden --device $device & fp32=$!
run parity-bf16 80 benchmarks.parity --golden $golden --device $device --precision bf16 & bf16=$!
run agree 110 benchmarks.gpu_check agree $tiny & agree=$!
failed=0
for part in $fp32 $bf16 $agree; do wait $part || failed=1; done
report parity-fp32 "MISS|quantities|Error|status"
report parity-bf16 "MISS|quantities|Error|status"
report agree

run draw 75 benchmarks.gpu_check draw $tiny
report draw
run decode 50 benchmarks.gpu_check decode $tiny
report decode
run train 80 benchmarks.gpu_check train $tiny
report train
run compiled 70 benchmarks.gpu_check compiled $tiny
report compiled
echo "$([ $failed = 0 ] && echo "all that was compared agrees" || echo "SOMETHING DIFFERS"), $SECONDS s"
exit $failed
