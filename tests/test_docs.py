"""What the documentation shows runs as it stands there."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import nibabel
import numpy as np
import torch
from tiny import SETTINGS, as_words, volumes

from cover import checkpoint, log, pretrain

DOCS = Path(__file__).parent.parent / "docs"


def snippet(page, heading):
    """The first Python example below a heading."""
    return re.search(rf"^## {heading}$.*?^```python\n(.*?)^```$", (DOCS / page).read_text(), re.M | re.S)[1]


def save(path, array):
    path.parent.mkdir(exist_ok=True)
    nibabel.save(nibabel.Nifti1Image(array.astype(np.float32), np.diag([-1, 1, 1, 1])), path)  # from right to left


def test_fine_tuning_learns_to_segment(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for path in sorted(volumes(tmp_path / "arrays", shape=(19, 20, 13)).iterdir()):  # no multiple of the stride
        image = np.load(path)
        save(tmp_path / "scans" / f"{path.stem}.nii.gz", image)
        save(tmp_path / "labels" / f"{path.stem}.nii.gz", np.digitize(image, np.quantile(image, [0.6, 0.9])))
    pretrain("scans", out="runs/first", **SETTINGS)
    names = {}
    exec(snippet("pretraining.md", "Fine-tuning"), names)
    x, y = names["read"](0)
    assert names["segmentation"].shape == y.shape == (1, *x.shape[2:])
    # always naming the commonest class would be right in 60 % of the voxels
    assert (names["segmentation"] == y).float().mean() > 0.8
    assert torch.equal(y.unique(), torch.tensor([0, 1, 2]))


def test_the_slurm_script_has_no_error_of_syntax():
    subprocess.run(["bash", "-n", DOCS / "slurm.sh"], check=True)


# what the script calls, as it is on one machine; each call is noted in a file
FAKES = {
    "scontrol": """echo "scontrol $*" >> "$CALLS"; if [[ $1 == show ]]; then echo 127.0.0.1; fi""",
    "srun": """while [[ $1 == --* ]]; do shift; done; exec "$@" """,
    # as where Slurm signals every process of a step: from torchrun its own then get a second signal
    "scancel": """echo "scancel $*" >> "$CALLS"
        for process in /proc/[0-9]*; do
            if tr '\\0' ' ' < $process/cmdline | grep -q "cover pretrain .*--out $RUN "; then
                kill -USR1 "${process#/proc/}"
            fi
        done""",
}


def slurm(tmp_path, *words):
    """Starts the script as Slurm would on one node with two GPUs; what it asks of Slurm is in the file `calls`."""
    for name, text in FAKES.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{text}\n")
        (tmp_path / name).chmod(0o755)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = os.environ | {
        "PATH": f"{tmp_path}:{Path(sys.executable).parent}:{os.environ['PATH']}",
        "CALLS": str(tmp_path / "calls"),
        "RUN": str(tmp_path / "run"),
        "COVER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
        "SLURM_JOB_ID": "17",
        "SLURM_JOB_NODELIST": "node1",
        "SLURM_JOB_NUM_NODES": "1",
        "SLURM_GPUS_ON_NODE": "2",
    }
    command = ["bash", DOCS / "slurm.sh", *words]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def test_the_slurm_script_saves_before_the_limit_and_goes_on_after_it(tmp_path):
    run = tmp_path / "run"
    settings = as_words(
        SETTINGS | dict(steps=100_000, checkpoint_every=100_000, val_fraction=0, cache=tmp_path / "cache")
    )
    data = str(volumes(tmp_path / "volumes"))
    job = slurm(tmp_path, data, "--out", str(run), *settings)
    while job.poll() is None and not any(path.stat().st_size for path in run.glob("metrics.jsonl")):
        time.sleep(0.1)
    job.send_signal(signal.SIGUSR1)
    output = job.communicate(timeout=300)[0]
    assert job.returncode == 0, output
    assert "death signal, shutting down workers" in output  # torchrun has waited for them
    steps = checkpoint.step_of(checkpoint.find(run))
    assert steps == len(log.read(run, "train")) > 0
    assert (tmp_path / "calls").read_text().splitlines() == [
        "scontrol show hostnames node1",
        "scancel --signal=USR1 17",
        "scontrol requeue 17",
    ]
