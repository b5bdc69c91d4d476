#!/usr/bin/env bash
# Athena on every worker of a TPU pod, through gcloud; TPU_SETUP.md lists what must exist first.
set -euo pipefail

usage() {
    cat <<'END'
usage: scripts/tpu_pod.sh --tpu NAME --zone ZONE [options] COMMAND

commands, on all workers at once:
  setup              send the last commit of this checkout, install requirements-tpu.txt
  check              ask every worker for its TPU; each prints TPU and the cores of the whole pod
  run KEY=VALUE ...  start `pretrain.py device_type=tpu KEY=VALUE ...` in the background
  logs               show what worker 0 wrote, and follow it until Ctrl-C (the run continues)
  status             say on which workers a run is alive
  stop               SIGTERM: the run saves a checkpoint and ends; the same `run` resumes later
  kill               end it at once, for a run that hangs

options:
  --tpu NAME         the TPU VM (or $TPU_NAME)
  --zone ZONE        its zone (or $TPU_ZONE)
  --project PROJECT  its project (default: gcloud's own)
  --folder FOLDER    where Athena lies on the workers, from their home folder (default: athena)
  --python PYTHON    interpreter for the environment, 3.11 or newer (default: python3.11)
  --dry-run          print the gcloud commands instead of running them
END
}

fail() {
    echo "error: $1" >&2
    exit 2
}

tpu=${TPU_NAME:-} zone=${TPU_ZONE:-} project="" folder=athena python=python3.11 dry_run=""
while (($#)); do
    case $1 in
    --help | -h)
        usage
        exit
        ;;
    --dry-run) dry_run=1 ;;
    --tpu | --zone | --project | --folder | --python)
        (($# > 1)) || fail "$1 needs a value"
        printf -v "${1#--}" %s "$2"
        shift
        ;;
    -*) fail "unknown option $1: see --help" ;;
    *) break ;;
    esac
    shift
done
(($#)) || fail "which command? see --help"
command=$1
shift
[[ $command == run || $# == 0 ]] || fail "$command takes no arguments, but got: $*"
[[ -n $tpu ]] || fail "which TPU? give --tpu NAME or set TPU_NAME"
[[ -n $zone ]] || fail "in which zone? give --zone ZONE or set TPU_ZONE"

# gcloud <verb> <arguments>: prints the command in a dry run, as it could be typed.
tpu_vm() {
    local verb=$1
    shift
    local line=(gcloud compute tpus tpu-vm "$verb" "$@" "--zone=$zone")
    [[ -z $project ]] || line+=("--project=$project")
    if [[ -n $dry_run ]]; then
        printf '%q ' "${line[@]}"
        echo
    else
        "${line[@]}"
    fi
}

on() { # <worker> <shell command>
    tpu_vm ssh "$tpu" "--worker=$1" "--command=$2"
}

here=$(printf %q "$folder")
alive="test -f tpu_run.pid && kill -0 -- -\$(cat tpu_run.pid) 2> /dev/null"

case $command in
setup)
    root=$(git -C "$(dirname "$0")" rev-parse --show-toplevel)
    archive=$(mktemp -d)
    trap 'rm -rf "$archive"' EXIT
    git -C "$root" archive --format=tar.gz --output="$archive/athena.tar.gz" HEAD
    tpu_vm scp "$archive/athena.tar.gz" "$tpu:athena.tar.gz" --worker=all
    on all "set -e; mkdir -p $here; tar -xzf athena.tar.gz -C $here; cd $here
if ! command -v $python > /dev/null; then
    sudo apt-get update -q; sudo apt-get install -qy $python $python-venv
fi
[ -x .venv-tpu/bin/python ] || $python -m venv .venv-tpu
.venv-tpu/bin/python -m pip install --quiet -r requirements-tpu.txt -c constraints-xla.txt
echo \"\$(hostname): ready\""
    ;;
check)
    on all "cd $here && PJRT_DEVICE=TPU timeout 120 .venv-tpu/bin/python -c \
'import torch_xla.runtime as xr; n = xr.global_runtime_device_count(); print(xr.device_type(), n)'"
    ;;
run)
    arguments=$(printf '%q ' "$@")
    on all "cd $here || exit 1
if $alive; then echo \"\$(hostname): a run is alive already; stop it first\"; exit 1; fi
PJRT_DEVICE=TPU setsid nohup .venv-tpu/bin/python pretrain.py device_type=tpu $arguments\
> tpu_run.log 2>&1 < /dev/null & echo \$! > tpu_run.pid; echo \"\$(hostname): started\""
    ;;
logs) on 0 "tail -n 40 -F $here/tpu_run.log" ;;
status)
    on all "cd $here && if $alive; then echo \"\$(hostname): alive\"; \
else echo \"\$(hostname): no run\"; tail -n 1 tpu_run.log; fi"
    ;;
stop) on all "cd $here && if $alive; then kill -TERM \$(cat tpu_run.pid); fi" ;;
kill) on all "cd $here && if $alive; then kill -KILL -- -\$(cat tpu_run.pid); fi" ;;
*) fail "unknown command $command: see --help" ;;
esac
