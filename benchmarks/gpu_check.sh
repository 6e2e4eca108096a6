#!/usr/bin/env bash
# Whether the GPU here computes what a CPU does, and how fast BAGEL of its real size is on it: under 8 minutes on 80 GB.
#
#     bash benchmarks/gpu_check.sh RESULTS [--tiny] [PART ...]
#
# Parts: parity agree draw train decode compiled; all of them by default, in this order, that of their worth. Every part
# has a time limit of its own and writes RESULTS/PART.txt line by line, so that a run that is cut short still reports.
# The parts that compare run side by side, those that are timed one after the other. The exit status is 0 if all that
# was compared agrees. --tiny: everything at a toy size on the CPU, with ten times as long. PYTHON: default python3;
# LIMIT: seconds for everything.
set -u
results=${1:?usage: gpu_check.sh RESULTS [--tiny] [PART ...]}
shift
tiny='' device=cuda longer=1
[ "${1:-}" = --tiny ] && { tiny=--tiny device=cpu longer=10; shift; }
wanted=" ${*:-parity agree draw train decode compiled} "
python=${PYTHON:-python3}
limit=${LIMIT:-$((470 * longer))}
mkdir -p "$results"

run() { # run PART SECONDS COMMAND...: write RESULTS/PART.txt within the time, and no longer than the whole may take
    local part=$1 most=$(($2 * longer)) left=$((limit - SECONDS)) status
    shift 2
    [ "$left" -lt "$most" ] && most=$left
    [ "$most" -lt 2 ] && { echo "no time left" >"$results/$part.txt"; return 1; }
    PYTHONUNBUFFERED=1 timeout -k 5 "$most" "$python" -W ignore -m "$@" >"$results/$part.txt" 2>&1 </dev/null
    status=$?
    echo "exit status $status, at $SECONDS s" >>"$results/$part.txt"
    return $status
}

report() { # report PART [PATTERN]: its first lines that match
    echo "== $1"
    grep -E "${2:-.}" "$results/$1.txt" | grep -vE "^(USDT|ERROR|[WEI][0-9]{4})" | head -n 32 | cut -c1-260
}

wants() { [[ $wanted == *" $1 "* ]]; }

compared=() processes=() failed=0
compare() { # compare PART SECONDS COMMAND...: beside the others
    compared+=("$1")
    run "$@" & processes+=($!)
}
golden=tests/golden/bagel
if wants parity; then
    compare parity-fp32 80 benchmarks.parity --golden $golden --device $device
    compare parity-bf16 80 benchmarks.parity --golden $golden --device $device --precision bf16
fi
wants agree && compare agree 110 benchmarks.gpu_check agree $tiny
for process in ${processes[@]+"${processes[@]}"}; do wait "$process" || failed=1; done
for part in ${compared[@]+"${compared[@]}"}; do report "$part" "MISS|quantities|Error|status|agrees|DIFFERS|no time"; done

while read -r part most; do
    wants "$part" && { run "$part" "$most" benchmarks.gpu_check "$part" $tiny; report "$part"; }
done <<'PARTS'
draw 95
train 100
decode 70
compiled 90
PARTS
echo "$([ $failed = 0 ] && echo "all that was compared agrees" || echo "SOMETHING DIFFERS"), $SECONDS s"
exit $failed
