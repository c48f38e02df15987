#!/usr/bin/env bash
# Submits the command as a Slurm job. The job goes back to the queue when Slurm tells it to
# leave: before its time is up, and when it is preempted.
#   launch/slurm.sh [--dry-run] -- --config=configs/mae.py --workdir=runs/mae
set -euo pipefail
# shellcheck source=launch/common.sh
source "${MIM_LAUNCH:-$(dirname "${BASH_SOURCE[0]}")}/common.sh"
read_arguments "$@"
no_words
need_arguments

if [[ $DRY || -z ${SLURM_JOB_ID-} ]]; then
  export MIM_LAUNCH=$LAUNCH # Slurm runs a copy of this file, from a folder of its own
  run sbatch --job-name="$NAME" --chdir="$ROOT" --output=slurm-%j.log \
    --open-mode=append --requeue --signal=TERM@180 "${SBATCH[@]}" \
    "$LAUNCH/slurm.sh" -- "${ARGS[@]}"
  [[ $DRY ]] || exit 0
fi
note "in the job:"
code=0
# When the first task leaves, the others may still be saving: do not kill them.
run srun --kill-on-bad-exit=0 "$PYTHON" -m mim_jax.main --distributed "${ARGS[@]}" ||
  code=$?
note "after exit code 75:"
if [[ $DRY || $code == 75 ]]; then run scontrol requeue "${SLURM_JOB_ID:-JOB}"; fi
exit "$code"
