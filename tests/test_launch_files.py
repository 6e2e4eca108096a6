"""The launch files of the documentation, with stand-ins for what they start, and one of them for real."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from srum.json_files import read_json
from srum.records import Candidate
from srum.run_dir import read_records

SERVERS = Path(__file__).parents[1] / "docs" / "launch" / "servers.sh"

# A server that listens at once; a launch that notes what it was given, and who listens, and leaves weights.
STAND_INS = {
    "srum": 'echo "gpu $CUDA_VISIBLE_DEVICES: $*" >> calls\nexec "$PYTHON" -m http.server "${@: -1}" 2> /dev/null',
    "torchrun": (
        '(: < "/dev/tcp/127.0.0.1/$PORT")\necho "gpu $CUDA_VISIBLE_DEVICES: $*" >> calls\n'
        'while [ "$1" != --out ]; do shift; done\nmkdir -p "$2/round-000/train/sft/model"'
    ),
}


def launched(folder: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """``servers.sh`` on the only node, in ``folder``, at a port that is free."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    asked = os.environ | {"PYTHON": sys.executable, "PORT": port} | environment
    command = ["bash", SERVERS, "localhost", "1", *arguments]
    return subprocess.run(command, cwd=folder, env=asked, capture_output=True, text=True)


def test_each_round_has_a_server_with_the_weights_of_the_round_before(tmp_path: Path) -> None:
    """On the first GPU, listening before the launch on the others begins; in the end nobody listens."""
    for name, text in STAND_INS.items():
        (tmp_path / name).write_text(f"#!/bin/bash\nset -e\n{text}\n")
        (tmp_path / name).chmod(0o755)
    path = f"{tmp_path}:{os.environ['PATH']}"
    done = launched(tmp_path, "start", "own.yaml", "own", "2", PATH=path, GPUS="4")
    assert done.returncode == 0, done.stderr
    served, trained, *rest = (tmp_path / "calls").read_text().splitlines()
    assert served.startswith("gpu 0: serve start --name draws --port ")
    port = served.split()[-1]
    assert trained.startswith("gpu 1,2,3: --nnodes 1 --nproc-per-node 3 ")
    for asked in ("--out own-0", "model=start", "seed=0", f"rollout.server.url=http://127.0.0.1:{port}/v1"):
        assert asked in trained
    weights = "own-0/round-000/train/sft/model"
    assert rest[0] == f"gpu 0: serve {weights} --name draws --port {port}"
    assert "--out own-1" in rest[1] and f"model={weights}" in rest[1] and "seed=1" in rest[1] and len(rest) == 2
    with socket.socket() as probe, pytest.raises(ConnectionRefusedError):
        probe.connect(("127.0.0.1", int(port)))


def test_a_port_that_is_taken_is_said(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        done = launched(tmp_path, "start", "own.yaml", "own", PORT=port)
    assert done.returncode == 1 and done.stderr == f"port {port} is taken; set PORT to another\n"


@pytest.mark.slow
def test_two_rounds_of_the_embedded_model_by_a_server_each(tmp_path: Path) -> None:
    (tmp_path / "own.yaml").write_text(
        "method: sft\nprompt_count: 2\ncandidates_per_prompt: 2\nrollout: {timesteps: 4, plan: false}\n"
        "train: {steps: 1, batch_size: 4}\neval: {count: 0}\n"
    )
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    done = launched(tmp_path, "srum-tiny", "own.yaml", "own", "2", PATH=path, GPUS="2")
    assert done.returncode == 0, done.stderr
    for round_ in (tmp_path / "own-0" / "round-000", tmp_path / "own-1" / "round-000"):
        assert read_json(round_ / "rollout_counts.json") == {"asked": 4, "drawn": 4, "not_drawn": {}}
        made = read_records(round_ / "candidates.jsonl", Candidate)
        assert all(one.sampling["server"]["model"] == "draws" for one in made)
