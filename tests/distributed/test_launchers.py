"""The example script as users start it: torchrun and accelerate launch, two processes on CPU."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoModelForSequenceClassification, AutoTokenizer, BertConfig

from peft_fused.cli.demo_train import default_model

SCRIPT = Path(__file__).resolve().parents[2] / "examples" / "finetune.py"
LAUNCHERS = {
    "torchrun": ["torch.distributed.run", "--standalone", "--nproc-per-node", "2"],
    # accelerate launches several processes on CPUs by mpirun, or, told that it need not, as on GPUs.
    "accelerate launch": [
        "accelerate.commands.accelerate_cli", "launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1",
        "--mixed_precision", "no", "--dynamo_backend", "no",
    ],
}  # fmt: skip


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return str(probe.getsockname()[1])


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory):
    """The default encoder's tokenizer on a model a thousand times smaller."""
    folder = tmp_path_factory.mktemp("tiny")
    tokenizer = AutoTokenizer.from_pretrained(default_model())
    config = BertConfig(
        vocab_size=len(tokenizer), hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32
    )
    AutoModelForSequenceClassification.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize(("launcher", "method"), [("torchrun", "rosa"), ("accelerate launch", "adamix")])
def test_the_example_runs_in_two_processes(tmp_path, tiny_model, launcher, method):
    port = ["--main_process_port", free_port()] if launcher == "accelerate launch" else []
    command = [sys.executable, "-m", *LAUNCHERS[launcher], *port, str(SCRIPT), "--method", method, "--steps", "6"]
    command += ["--model", str(tiny_model), "--output", str(tmp_path / "out"), "--max-length", "16"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    (summary,) = (json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"method"'))
    assert summary["method"] == method and summary["processes"] == 2 and 0 < summary["loss"] < 10
    assert (tmp_path / "out" / "adapter_model.safetensors").is_file()
