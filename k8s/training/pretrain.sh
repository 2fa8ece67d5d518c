#!/bin/bash
# One node of a run over several nodes: pretrain.sh RUN.JSON. Kubeflow Trainer sets PET_*, Kubernetes the pod's index.
# Leaves with the code that `train` would have had: torchrun's own is 1 for everything, so mistakes are looked for before
# it starts, and what ended the run is read from the logbook that rank 0 keeps.
set -euo pipefail
run=$1

train pretrain --config "$run" --dry-run > /dev/null  # 2: a mistake in the run or its data, said in one line

out=$(python -c 'import json, sys; print(json.load(open(sys.argv[1]))["out"])' "$run")
# Later lines are this start's: rank 0 writes none before all nodes have come.
n_before=$({ cat "$out/logbook.jsonl" 2> /dev/null || true; } | wc -l)

# Index 0 keeps the meeting point. The c10d rendezvous is the one that starts all nodes' ranks again after one has died.
# Two lines for that case. torchrun counts a restart on the node that failed only, while `training.distributed` takes the
# count for the name of the ranks' meeting: 1 here and 0 there never meet (tried). So every attempt gets a store of its
# own, on a new port, and the count stays 0.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
is_host=$([ "${JOB_COMPLETION_INDEX:-0}" = 0 ] && echo true || echo false)
torchrun \
  --nnodes="$PET_NNODES" --nproc-per-node="$PET_NPROC_PER_NODE" --max-restarts=3 \
  --rdzv-backend=c10d --rdzv-endpoint="$PET_MASTER_ADDR:$PET_MASTER_PORT" \
  --rdzv-id="$PET_MASTER_ADDR" --rdzv-conf="is_host=$is_host" \
  --no-python env TORCHELASTIC_RESTART_COUNT=0 python -m training.launch "$run" &
torchrun=$!
# bash does not pass a signal on by itself; the ranks save and leave.
trap 'kill -TERM "$torchrun" 2> /dev/null || true' TERM INT
code=0
wait "$torchrun" || code=$?
if kill -0 "$torchrun" 2> /dev/null; then  # the first wait ended with the signal, torchrun is still saving
  code=0
  wait "$torchrun" || code=$?
fi

if [ -f "$out/model/manifest.json" ]; then exit 0; fi
ended=$({ tail -n "+$((n_before + 1))" "$out/logbook.jsonl" 2> /dev/null || true; } | grep -o '"exit_code": [0-9]*' | tail -n 1 || true)
if [ -n "$ended" ]; then exit "${ended##* }"; fi  # 75: told to stop, and saved; 2, 3, 4: nothing a restart would cure
exit $((code == 0 ? 5 : code))  # a crash: the set starts again
