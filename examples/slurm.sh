#!/bin/bash
# SLURM end to end: see the batch, write the job's files, submit, wait, and find the model.
#
# As it stands, 2 nodes of 4 GPUs under ZeRO-2. The variables make it smaller: NODES=1 GPUS=2.
# Before the time limit, and when the job is preempted, the training saves and the job goes back into
# the queue; its next start continues the same run.
set -euo pipefail

nodes=${NODES:-2} gpus=${GPUS:-4} engine=${ENGINE:-zero2} partition=${PARTITION:-gpu}
data=${DATA:-rows.jsonl} model=${MODEL:-tiny}
batch=(--batch-size 4 --global-batch-size 64)
[ -f "$data" ] || for number in {1..200}; do
    printf '{"prompt": "%d + 1 = ", "completion": "%d"}\n' "$number" $((number + 1))
done > "$data"

# What one update will see, on this many processes.
accum-trainer plan "${batch[@]}" --processes $((nodes * gpus)) --num-samples "$(wc -l < "$data")" --epochs 1

# job.yaml for accelerate, job.json for DeepSpeed (with ZeRO) and job.sbatch for SLURM.
accum-trainer config create multi-gpu --engine "$engine" --nodes "$nodes" --gpus-per-node "$gpus" \
    "${batch[@]}" --slurm --partition "$partition" --time 01:00:00 --signal USR1@120 --force \
    ${CPU:+--cpu} -o job.yaml

# Arguments of the script go to `train`. --wait returns when the job is done.
job=$(sbatch --parsable --wait job.sbatch --model "$model" --dataset-file "$data" --epochs 1)

# The run directory is named after the job.
run=runs/job-${job%%;*}
tail -n 1 "$run/metrics.jsonl"
echo "trained; for from_pretrained: $run/model"
