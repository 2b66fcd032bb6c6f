#!/usr/bin/env bash
# The checks that need a GPU, with prebuilt binaries: no Rust, no network, under eight minutes.
#
#   tests/gpu.sh BELFRY [GOLDEN_TEST_BINARY] [OUT]
#
# BELFRY              the binary `belfry`, built with `--features cuda`
# GOLDEN_TEST_BINARY  the test `golden` of worker/model, built likewise
#                     (of target/release/deps/golden-* the one whose --list has
#                     bf16_stays_near_f32); `-` or nothing: its section is skipped
# OUT                 a folder for logs, the timeline and the table; default: a new one in /tmp
#
# DEVICE=cuda:0           the device; DEVICE=cpu runs the same script on a machine without GPUs
# BELFRY_GPU_SMOKE=1      tiny sizes: checks the script, not the machine
# BELFRY_GPU_SECONDS=460  time for everything; what does not fit is skipped and says so
# BELFRY_PYTHON=python3   a Python with torch
# BELFRY_TORCH_BENCH=...  the same step in PyTorch; default: bench_torch.py in shared/reference
# BELFRY_GOLDEN_DIR=...   golden files; default: shared/golden, else tests/golden
#
# Sections go on whatever fails before them. The last lines are a table; the script fails if a
# section does. Nothing is written but into OUT and a temporary folder.
set -uo pipefail
export LC_ALL=C

if [ $# -lt 1 ] || [ ! -x "$1" ]; then
    echo "usage: tests/gpu.sh BELFRY [GOLDEN_TEST_BINARY] [OUT]; BELFRY must be a program" >&2
    exit 2
fi
belfry=$(realpath "$1")
golden=${2:--}
house=$(realpath "$(dirname "$0")/..")
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
out=${3:-$(mktemp -d)}
mkdir -p "$out"
out=$(realpath "$out")
[ "$golden" = - ] || golden=$(realpath "$golden")
cd "$house" || exit 2

device=${DEVICE:-cuda:0}
smoke=${BELFRY_GPU_SMOKE:-0}
seconds_in_all=${BELFRY_GPU_SECONDS:-460}
python=${BELFRY_PYTHON:-python3}

if [ "$smoke" = 1 ]; then
    step_file=configs/tiny.toml micro_batch=2 sizes="2 4" steps=2 millions=1 lanes=4
else
    step_file=configs/pretrain-4m.toml micro_batch=8 sizes="32 8 128 64 16" steps=20
    millions=100 lanes=64
fi
parity_f32=every_case_is_the_authors parity_bf16=bf16_stays_near_f32
[ "$smoke" = 1 ] && parity_f32=resized_position_tables parity_bf16=every_file_is_understood

results=()
failed=0

heading() { printf '\n==== %s (after %d s) ====\n' "$1" "$SECONDS"; }

# result NAME WORD DETAIL: a line of the table at the end.
result() {
    results+=("$(printf '%-34s %-8s %s' "$1" "$2" "$3")")
    printf '%s: %s %s\n' "$1" "$2" "$3"
    case $2 in FAILED | TIMEOUT) failed=1 ;; esac
}

# limited NAME SECONDS COMMAND...: runs it within its time and what is left of all time; output in
# OUT/NAME.out and .err. Returns its status; 124 means too slow, 125 that no time was left.
limited() {
    local name=$1 budget=$2 left=$((seconds_in_all - SECONDS))
    shift 2
    [ "$budget" -le "$left" ] || budget=$left
    [ "$budget" -ge 3 ] || return 125
    timeout -k 5 "$budget" "$@" >"$out/$name.out" 2>"$out/$name.err"
}

# unless_well NAME STATUS LOG: the table's line of what did not go well.
unless_well() {
    local last
    case $2 in
        124 | 137) result "$1" TIMEOUT "ran past its time" ;;
        125) result "$1" SKIPPED "no time was left" ;;
        *)
            last=$(grep -v '^[[:space:]]*$' "$out/$3.err" | tail -n 1)
            [ -n "$last" ] || last=$(tail -n 1 "$out/$3.out")
            result "$1" FAILED "status $2: ${last:0:200}"
            ;;
    esac
}

# said NAME KEY: a value of the JSON line with which OUT/NAME.out ends.
said() { tail -n 1 "$out/$1.out" | sed -n "s/.*\"$2\":\"\{0,1\}\([^,\"}]*\).*/\1/p"; }

# over A B: A / B with two digits.
over() { awk -v a="$1" -v b="$2" 'BEGIN { if (b > 0) printf "%.2f", a / b; else printf "-" }'; }

# short NUMBER: three digits that count.
short() { awk -v x="$1" 'BEGIN { printf "%.3g", x }'; }

in_gb() { case $1 in '' | null) echo unknown ;; *) awk -v b="$1" 'BEGIN { printf "%.1f GB", b / 1e9 }' ;; esac; }

machine() {
    heading "machine"
    "$belfry" --version
    uname -srm
    if command -v nvidia-smi >/dev/null; then
        nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader
    else
        echo "nvidia-smi: not here"
    fi
    echo "device $device, smoke $smoke, logs in $out"
}

golden_folder() {
    local folder
    for folder in "${BELFRY_GOLDEN_DIR:-}" shared/golden ../shared/golden tests/golden; do
        [ -n "$folder" ] && [ -d "$folder" ] && realpath "$folder" && return
    done
}

# golden_parity LABEL SECONDS FILTER
golden_parity() {
    local label="golden parity $1" log="golden-$1" folder status cases
    heading "$label"
    if [ "$golden" = - ]; then
        result "$label" SKIPPED "no golden test binary was given"
        return
    fi
    folder=$(golden_folder)
    if [ -z "$folder" ]; then
        result "$label" SKIPPED "no golden folder"
        return
    fi
    BELFRY_GOLDEN_DIR=$folder BELFRY_GOLDEN_DEVICE=$device \
        limited "$log" "$2" "$golden" --nocapture --test-threads=1 "$3"
    status=$?
    cat "$out/$log.out"
    if [ $status -ne 0 ]; then
        unless_well "$label" $status "$log"
        return
    fi
    cases=$(sed -n 's/^test result: ok. \([0-9]*\) passed.*/\1/p' "$out/$log.out")
    if [ "${cases:-0}" -gt 0 ]; then
        result "$label" ok "$cases tests, $folder"
    else
        result "$label" FAILED "the filter $3 found no test"
    fi
}

# tiny NAME WORKERS MORE...: a whole run; hashes of parameters and optimizer in `hashes`.
tiny() {
    local name=$1 workers=$2 status
    shift 2
    limited "$name" 60 "$belfry" run configs/tiny.toml --workers "$workers" \
        --root "$work/$name" --set "run.device=$device" \
        --set "data.train=$work/packed/train" --set "data.validation=$work/packed/validation" "$@"
    status=$?
    hashes="$(said "$name" parameters_sha256) $(said "$name" optimizer_sha256)"
    return $status
}

# alike LABEL EXPECTED FOUND
alike() {
    if [ -n "${2// /}" ] && [ "$2" = "$3" ]; then
        result "$1" ok "${2:0:16}..."
    else
        result "$1" FAILED "${2:0:16} and ${3:0:16} differ"
    fi
}

bits() {
    heading "the same bits"
    local first status run
    tiny run-w1 1
    status=$?
    first=$hashes
    if [ $status -ne 0 ]; then
        unless_well "bits: a run" $status run-w1
        return
    fi
    for run in "again 1" "w2 2"; do
        set -- $run
        tiny "run-$1" "$2"
        status=$?
        if [ $status -ne 0 ]; then
            unless_well "bits: $2 workers, $1" $status "run-$1"
        else
            alike "bits: 1 worker = $2 workers ($1)" "$first" "$hashes"
        fi
    done
    one_worker=$first
}

# step NAME PAIRS SECONDS STEPS MORE...
step() {
    local name=$1 pairs=$2 budget=$3 count=$4
    shift 4
    limited "$name" "$budget" "$belfry" bench step "$step_file" --device "$device" \
        --pairs "$pairs" --steps "$count" --set "batch.micro_batch=$micro_batch" \
        --set "batch.device_batch=$((pairs / micro_batch))" "$@"
}

bits_of_steps() {
    heading "the same bits of $step_file"
    local pairs=$((2 * micro_batch)) status run
    for run in a b; do
        step "step-bits-$run" "$pairs" 60 2 --set precision.matmul=bf16
        status=$?
        if [ $status -ne 0 ]; then
            unless_well "bits: steps of $pairs pairs" $status "step-bits-$run"
            return
        fi
    done
    alike "bits: steps of $pairs pairs, twice" "$(said step-bits-a parameters_sha256)" \
        "$(said step-bits-b parameters_sha256)"
}

nccl_library() {
    ldconfig -p 2>/dev/null | sed -n 's/.*=> \(.*libnccl\.so[^ ]*\)$/\1/p' | head -n 1 | grep . && return
    "$python" -c 'import glob, nvidia.nccl as n
print((glob.glob(list(n.__path__)[0] + "/lib/libnccl.so*") or [""])[0])' 2>/dev/null
}

nccl() {
    heading "NCCL at world 1"
    local label="NCCL, world 1 = TCP" library status
    if [ "${device#cuda}" = "$device" ]; then
        result "$label" SKIPPED "the device is $device"
        return
    fi
    library=$(nccl_library)
    if [ -z "$library" ]; then
        result "$label" SKIPPED "no libnccl on this machine"
        return
    fi
    if ! "$belfry" config configs/tiny.toml --set "run.device=$device" \
        --set collective.transport=nccl >/dev/null 2>"$out/nccl.err"; then
        result "$label" SKIPPED "this binary refuses it: $(head -n 1 "$out/nccl.err")"
        return
    fi
    mkdir -p "$work/nccl"
    ln -sf "$library" "$work/nccl/libnccl.so"
    LD_LIBRARY_PATH="$work/nccl:$(dirname "$library")${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}" \
        tiny run-nccl 1 --set collective.transport=nccl
    status=$?
    if [ $status -ne 0 ]; then
        unless_well "$label" $status run-nccl
    elif grep -q 'sums go over TCP' "$out/run-nccl.err"; then
        # The run goes on without links, to the same bits; then this proves nothing.
        result "$label" FAILED "$(grep -m 1 -o 'sums go over TCP.*' "$out/run-nccl.err")"
    else
        alike "$label" "${one_worker:-}" "$hashes"
    fi
}

staging() {
    heading "all-reduce and staging"
    local status
    limited reduce 60 "$belfry" bench reduce --device "$device" --workers 2 --lanes "$lanes" \
        --millions "$millions" --rounds 3
    status=$?
    if [ $status -ne 0 ]; then
        unless_well "all-reduce, staging" $status reduce
        return
    fi
    cat "$out/reduce.out"
    local memcpy up down
    memcpy=$(said reduce memcpy_bytes_per_second)
    up=$(said reduce to_device_bytes_per_second) down=$(said reduce to_host_bytes_per_second)
    if [ -n "$up" ]; then
        result "staging, host to device" ok "$(in_gb "$up")/s, $(over "$up" "$memcpy") x memcpy"
        result "staging, device to host" ok "$(in_gb "$down")/s, $(over "$down" "$memcpy") x memcpy"
    fi
    result "all-reduce, 2 workers, TCP" ok \
        "$(over "$(said reduce seconds)" "$(said reduce raw_seconds)") x raw sockets"
}

torch_bench() {
    local file
    for file in "${BELFRY_TORCH_BENCH:-}" shared/reference/bench_torch.py \
        ../shared/reference/bench_torch.py; do
        [ -n "$file" ] && [ -f "$file" ] && realpath "$file" && return
    done
}

# Why PyTorch cannot be measured; nothing if it can.
no_torch() {
    if [ "$smoke" = 1 ]; then
        echo "smoke"
    elif [ -z "$(torch_bench)" ]; then
        echo "no bench_torch.py"
    elif ! "$python" -c 'import torch' 2>/dev/null; then
        echo "$python has no torch"
    elif [ "$device" != cpu ] && ! "$python" -c 'import torch; torch.zeros(1).cuda()' 2>/dev/null; then
        echo "torch has no GPU"
    fi
}

# torch NAME PAIRS SECONDS MORE...: samples per second in `rate`, memory in `memory`.
torch() {
    local name=$1 pairs=$2 budget=$3 status
    shift 3
    limited "$name" "$budget" "$python" "$(torch_bench)" --device "${device%%:*}" \
        --micro-batch "$pairs" --steps "$steps" "$@"
    status=$?
    grep '^torch' "$out/$name.out"
    rate=$(sed -n 's/.* \([0-9.]*\) samples\/s.*/\1/p' "$out/$name.out")
    memory=$(sed -n 's/.*peak memory \([0-9.]*\) GiB.*/\1/p' "$out/$name.out")
    [ $status -ne 0 ] || [ -n "$rate" ] || status=1
    return $status
}

# beside_torch LABEL NAME PAIRS SECONDS OURS MORE...
beside_torch() {
    local label=$1 name=$2 pairs=$3 budget=$4 ours=$5
    shift 5
    torch "$name" "$pairs" "$budget" "$@"
    local status=$?
    if [ $status -eq 125 ]; then
        result "$label" SKIPPED "no time was left"
        return
    elif [ $status -ne 0 ]; then
        # The peer's trouble (no compiler for --compile, its own memory) is no failure of Belfry.
        result "$label" SKIPPED "PyTorch ended with $status: $(tail -n 1 "$out/$name.err")"
        return
    fi
    result "$label" ok \
        "$(short "$rate") samples/s, peak $memory GiB; Belfry/PyTorch $(over "$ours" "$rate")"
}

# step_row PAIRS ARITHMETIC: samples per second in `ours`.
step_row() {
    local pairs=$1 arithmetic=$2 name="step-$1-$2" label="step, $1 pairs, $2" status peak
    ours=
    heading "$label"
    step "$name" "$pairs" 60 "$steps" --warm-up 2 --set "precision.matmul=$arithmetic"
    status=$?
    if [ $status -ne 0 ]; then
        unless_well "$label" $status "$name"
        return
    fi
    cat "$out/$name.out"
    ours=$(said "$name" samples_per_second)
    peak=$(said "$name" device_peak_bytes)
    [ -n "$peak" ] || peak=$(said "$name" host_peak_bytes)
    result "$label" ok "$(short "$ours") samples/s, $(short "$(said "$name" tflops)") TFLOP/s, \
MFU $(over "$(said "$name" mfu)" 1), peak $(in_gb "$peak")"
}

steps() {
    local missing pairs
    missing=$(no_torch)
    [ -z "$missing" ] || result "PyTorch" SKIPPED "$missing"
    for pairs in $sizes; do
        step_row "$pairs" bf16
        [ -z "$missing" ] && [ -n "$ours" ] || continue
        beside_torch "  PyTorch, $pairs pairs" "torch-$pairs" "$pairs" 60 "$ours"
        if [ "$pairs" = 32 ] || [ "$pairs" = 128 ]; then
            beside_torch "  PyTorch compiled, $pairs pairs" "compiled-$pairs" "$pairs" 90 "$ours" \
                --compile
        fi
    done
    # How much bf16 is worth.
    case $device in cuda*) step_row "${sizes%% *}" tf32 ;; esac
    step_row "${sizes%% *}" f32
}

timeline() {
    heading "where a step's time goes"
    local label="timeline" pairs=${sizes%% *} status
    step trace "$pairs" 45 3 --trace --out "$out/trace.json" --set precision.matmul=bf16
    status=$?
    if [ $status -ne 0 ]; then
        unless_well "$label" $status trace
        return
    fi
    cat "$out/trace.out"
    result "$label" ok "$out/trace.json"
}

machine
golden_parity f32 90 "$parity_f32"
golden_parity bf16 60 "$parity_bf16"
bits
bits_of_steps
nccl
staging
timeline
steps

heading "table"
printf '%s\n' "${results[@]}" | tee "$out/table.txt"
exit $failed
