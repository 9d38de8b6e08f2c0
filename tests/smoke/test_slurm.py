"""scripts/slurm without a cluster: srun, scontrol, scancel and torchrun are stand-ins that do what the scripts rely on."""

import os
import re
import shlex
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parents[2] / "scripts/slurm"
STAND_INS = {
    "bin/scontrol": 'if [ "$1" = show ]; then printf "node7\\nnode8\\n"; else echo "$*" >>scontrol.log; fi',
    "bin/srun": 'while [[ "$1" == --* ]]; do shift; done; exec "$@"',
    "bin/scancel": 'echo "$*" >scancel.log; kill -USR1 $(cat torchrun.pid rank.pid)',
    # a torchrun that knows no USR1 and one rank that handles it, then fails or not
    ".venv/bin/torchrun": """echo $$ >torchrun.pid
echo $TORCH_ELASTIC_SHUTDOWN_TIMEOUT >patience
bash -c 'python3 -c "
import os, signal, sys, time
def save(*_):
    open(\\"saved\\", \\"w\\").close()
    sys.exit(int(os.environ[\\"RANK_STATUS\\"]))
signal.signal(signal.SIGUSR1, save)
open(\\"rank.pid\\", \\"w\\").write(str(os.getpid()))
time.sleep(30)
"'""",
}


@pytest.fixture
def cluster(tmp_path):
    """-> (folder, environment) of a submitted job."""
    shutil.copytree(SCRIPTS, tmp_path / "scripts/slurm")
    for name, body in STAND_INS.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"#!/usr/bin/env bash\n{body}\n")
        path.chmod(0o755)
    slurm = {"SUBMIT_DIR": tmp_path, "JOB_ID": 40123, "JOB_NAME": "fastssl", "JOB_NODELIST": "node[7-8]"}
    slurm |= {"JOB_NUM_NODES": 2, "GPUS_ON_NODE": 4, "CPUS_PER_TASK": 64}
    kept = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")}
    env = kept | {f"SLURM_{name}": str(value) for name, value in slurm.items()}
    return tmp_path, env | {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "RANK_STATUS": "0"}


@pytest.mark.parametrize("script", ["one_node.sh", "several_nodes.sh", "launch.sh"])
def test_syntax(script):
    subprocess.run(["bash", "-n", SCRIPTS / script], check=True)


@pytest.mark.parametrize("script", ["one_node.sh", "several_nodes.sh"])
def test_header(script):
    flags = dict(re.findall(r"^#SBATCH --([\w-]+)(?:=(\S+))?$", (SCRIPTS / script).read_text(), re.MULTILINE))
    assert flags["nodes"] == ("1" if script == "one_node.sh" else "2")
    assert flags["ntasks-per-node"] == "1" and flags["gpus-per-node"] == "8"
    assert flags["signal"] == "B:USR1@120" and "requeue" in flags and flags["open-mode"] == "append"


@pytest.mark.parametrize("script", ["one_node.sh", "several_nodes.sh"])
def test_dry_run_prints_the_command(cluster, script):
    folder, env = cluster
    flags = ["--method", "lewel", "--log.name", "with space"]
    out = subprocess.run(
        ["bash", f"scripts/slurm/{script}", *flags], env=env | {"DRY_RUN": "1"}, cwd=folder, check=True, capture_output=True, text=True
    ).stdout
    words = shlex.split(out)
    assert words[0] == "srun" and "--cpus-per-task=64" in words
    torchrun = words[words.index(".venv/bin/torchrun") + 1 : words.index("train.py")]
    options = dict(zip(torchrun[::2], torchrun[1::2], strict=True))
    assert options == {
        "--nnodes": "2",
        "--nproc-per-node": "4",
        "--rdzv-id": "40123",
        "--rdzv-backend": "c10d",
        "--rdzv-endpoint": "node7:20123",
    }
    assert words[words.index("train.py") + 1 :] == ["--train.resume", "auto", "--log.name", "fastssl-40123", *flags]
    assert not (folder / "torchrun.pid").exists()


@pytest.mark.parametrize("rank_status, requeued", [("0", True), ("3", False)])
def test_the_signal_before_the_time_limit_saves_and_requeues(cluster, rank_status, requeued):
    folder, env = cluster
    job = subprocess.Popen(
        ["bash", "scripts/slurm/one_node.sh", "--method", "byol"],
        env=env | {"RANK_STATUS": rank_status},
        cwd=folder,
        stdout=subprocess.DEVNULL,
    )
    try:
        deadline = time.monotonic() + 20
        while not ((folder / "rank.pid").exists() and (folder / "rank.pid").read_text()):
            assert time.monotonic() < deadline and job.poll() is None
            time.sleep(0.05)
        job.send_signal(signal.SIGUSR1)
        assert job.wait(20) == int(rank_status)
    finally:
        job.kill()
    assert (folder / "saved").exists() and (folder / "patience").read_text() == "90\n"
    assert (folder / "scancel.log").read_text() == "--signal=USR1 40123\n"
    requeues = (folder / "scontrol.log").read_text() if (folder / "scontrol.log").exists() else ""
    assert requeues == ("requeue 40123\n" if requeued else "")
