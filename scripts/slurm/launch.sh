# Sourced by the two job scripts: torchrun on every node, and what happens two minutes before the time limit.
nodes=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
first_node=${nodes%%$'\n'*}
port=$((20000 + SLURM_JOB_ID % 20000))
# Seconds that torchrun gives ranks to save after a SIGTERM; before torch 2.12 always 30.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT="${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-90}"

# The signal that ends the ranks in good order would kill torchrun, which knows no USR1: torchrun ignores it, and the ranks,
# which inherit that, set a handler of their own.
command=(
    srun --kill-on-bad-exit=1 --cpus-per-task="${SLURM_CPUS_PER_TASK:-1}"
    bash -c 'trap "" USR1; exec "$@"' ranks
    .venv/bin/torchrun --nnodes "$SLURM_JOB_NUM_NODES" --nproc-per-node "${SLURM_GPUS_ON_NODE:-8}"
    --rdzv-id "$SLURM_JOB_ID" --rdzv-backend c10d --rdzv-endpoint "$first_node:$port"
    # a name of its own: a later job of the same preset must not resume this one's run
    train.py --train.resume auto --log.name "${SLURM_JOB_NAME:-fastssl}-$SLURM_JOB_ID" "$@"
)
printf '%q ' "${command[@]}"
echo
if [ -n "${DRY_RUN:-}" ]; then exit 0; fi

# Slurm tells this shell (B:); all processes of the job's steps are told from here, save a checkpoint and end with status 0.
cut_short=""
trap 'cut_short=1; scancel --signal=USR1 "$SLURM_JOB_ID"' USR1
"${command[@]}" &
step=$!
status=0
wait "$step" || status=$?
while [ "$status" -gt 128 ] && kill -0 "$step" 2>/dev/null; do # the trap interrupted the wait
    status=0
    wait "$step" || status=$?
done
if [ -n "$cut_short" ] && [ "$status" -eq 0 ]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
