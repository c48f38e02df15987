# shellcheck shell=bash disable=SC2034  # read by the other scripts
# The only file to edit. LAUNCH_ENV=mine.sh takes another file, as for a second machine.

# TPU VMs
PROJECT=my-project
ZONE=us-west4-a
NAME=${NAME:-mim} # of the queued resource, the TPU VM and the jobs below
ACCELERATOR=v5litepod-32
RUNTIME=v2-alpha-tpuv5-lite
SPOT=true         # cheaper, but can be taken away at any time: use watch.sh
BUCKET=my-bucket  # mounted as bucket/ beside the code on every host; "" for none

# Compiled programs, so that a new machine need not compile; "" for none. Whoever may write
# there can run code on all hosts.
COMPILED=${BUCKET:+bucket/compiled}

# watch.sh
CHECK=true        # check the command here before a TPU is asked for; "" does not
OVER=ask          # the TPU costs until it is deleted. When the run is done, or has failed
                  # for good: delete it, keep it, or ask, if there is a terminal
POLL=60           # seconds between two looks
CRASHES=5         # stops after so many lost runs in a row without a preemption, each soon
                  # or from the same checkpoint as before

# slurm.sh: JAX gives each task one GPU, so ask for as many tasks as GPUs per node
SBATCH=(--nodes=2 --ntasks-per-node=8 --gpus-per-node=8 --cpus-per-task=8 --time=24:00:00)

# gke_jobset.sh
IMAGE=us-docker.pkg.dev/my-project/images/mim_jax:latest  # launch/Dockerfile makes it
GKE_ACCELERATOR=tpu-v5-lite-podslice
GKE_TOPOLOGY=4x8
HOSTS=8           # of that topology
CHIPS=4           # per host
ACCOUNT=default   # Kubernetes service account that may read and write the bucket
