"""What launchers and batch systems leave in the environment is obeyed, or refused in a line that says what to do."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from launch import ROOT, environment
from tiny_run import make_inputs

from vit5gen.system import distributed
from vit5gen.system.distributed import find_fault, processes, start_processes
from vit5gen.system.errors import UserError

PAIR = {"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
LAUNCHED = {"ACCELERATE_MIXED_PRECISION": "no", "ACCELERATE_DYNAMO_BACKEND": "NO", "ACCELERATE_USE_CPU": "False"}
FSDP2 = PAIR | LAUNCHED | {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_OFFLOAD_PARAMS": "false"}


@pytest.mark.parametrize(
    ("given", "num_gpus"),
    [
        ({}, 0),
        (LAUNCHED, 0),
        (PAIR, 2),
        (PAIR | LAUNCHED, 8),
        (PAIR | {"ACCELERATE_USE_CPU": "true"}, 0),
        (PAIR, None),
        (FSDP2, 2),
        (FSDP2 | {"FSDP_ACTIVATION_CHECKPOINTING": "false"}, 2),
        ({"MASTER_ADDR": "node017"}, 0),  # of a batch system
        ({"MASTER_ADDR": "node017", "MASTER_PORT": "29500"}, 1),
        ({"WORLD_SIZE": "1", "RANK": "0", "LOCAL_RANK": "0"}, 0),
        ({"WORLD_SIZE": "1", "RANK": "0", "LOCAL_RANK": "0", "MASTER_ADDR": "node017"}, 1),
        ({"LOCAL_RANK": "0"}, 1),
        ({"PMI_SIZE": "1", "PMI_RANK": "0", "SLURM_NTASKS": "4"}, 1),
        (PAIR | {"PMI_SIZE": "1"}, 2),  # srun around accelerate
        ({"OMPI_COMM_WORLD_SIZE": "2", "ACCELERATE_USE_CPU": "true", "MASTER_ADDR": "node017"}, 0),
    ],
)
def test_what_is_obeyed(given: dict[str, str], num_gpus: int | None) -> None:
    assert find_fault(given, num_gpus) is None


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({"ACCELERATE_MIXED_PRECISION": "bf16"}, "training.precision"),
        ({"ACCELERATE_MIXED_PRECISION": "fp8"}, "--precision"),
        ({"ACCELERATE_DYNAMO_BACKEND": "INDUCTOR"}, "training.compile"),
        ({"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4"}, "training.micro_batch_size"),
        (FSDP2 | {"FSDP_ACTIVATION_CHECKPOINTING": "true"}, "training.gradient_checkpointing"),
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, "fsdp2.yaml"),
        ({"ACCELERATE_USE_MEGATRON_LM": "true"}, "fsdp2.yaml"),
        ({"ACCELERATE_USE_PARALLELISM_CONFIG": "true"}, "fsdp2.yaml"),
        ({"ACCELERATE_USE_SAGEMAKER": "true"}, "accelerate launch"),
        ({"ACCELERATE_USE_CPU": "perhaps"}, "true or false"),
        ({"ACCELERATE_TORCH_DEVICE": "tpu"}, "cpu or cuda"),
        ({"ACCELERATE_TORCH_DEVICE": "cuda"}, "no GPU"),
        (FSDP2 | {"FSDP_VERSION": "1"}, "fsdp2.yaml"),
        ({**FSDP2, "ACCELERATE_USE_CPU": "true"}, "FSDP needs GPUs"),
        ({"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}, "no RANK"),
        ({"WORLD_SIZE": "4"}, "LOCAL_RANK = 0 of WORLD_SIZE = 4: this machine has 0 GPUs"),
        ({"WORLD_SIZE": "4", "ACCELERATE_USE_CPU": "1"}, "no RANK"),
        ({"WORLD_SIZE": "4", "RANK": "0", "LOCAL_RANK": "0", "ACCELERATE_USE_CPU": "1"}, "no MASTER_ADDR"),
        (PAIR, "ACCELERATE_USE_CPU=true"),  # torchrun where there is no GPU: each process would run alone
        (PAIR | {"WORLD_SIZE": "two"}, "'two'"),
        (PAIR | {"RANK": "2"}, "RANK = 2 in the environment is not below WORLD_SIZE = 2"),
        (PAIR | {"LOCAL_RANK": "-1"}, "'-1'"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE = 0"),
        ({"RANK": "3"}, "RANK = 3 in the environment is not below WORLD_SIZE = 1"),
        ({"LOCAL_RANK": ""}, "LOCAL_RANK = ''"),
        ({"OMPI_COMM_WORLD_SIZE": "4"}, "4 processes"),
        ({"PMI_SIZE": "2", "ACCELERATE_USE_CPU": "true"}, "2 processes"),
        ({"MASTER_ADDR": "127.0.0.1", "ACCELERATE_MIXED_PRECISION": "no"}, "starts only one process"),
    ],
)
def test_what_is_refused(given: dict[str, str], named: str) -> None:
    fault = find_fault(given, 0)
    assert fault is not None
    assert named in fault


def test_more_processes_than_gpus_are_refused() -> None:
    assert "this machine has 1 GPUs; start at most 1" in str(find_fault(PAIR, 1))


@pytest.mark.parametrize("start", [processes, start_processes])
def test_one_process_runs_alone(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest, start: object) -> None:
    request.addfinalizer(lambda: AcceleratorState._reset_state(reset_partial_state=True))
    AcceleratorState._reset_state(reset_partial_state=True)
    for name, value in {"WORLD_SIZE": "1", "RANK": "0", "LOCAL_RANK": "0", "ACCELERATE_USE_CPU": "true"}.items():
        monkeypatch.setenv(name, value)
    state = start()
    assert (state.num_processes, state.device.type) == (1, "cpu")
    assert not torch.distributed.is_initialized()
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    with pytest.raises(UserError, match="ACCELERATE_USE_DEEPSPEED = 'true'"):
        start_processes()


def test_a_port_that_is_none_is_one_line(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    request.addfinalizer(lambda: AcceleratorState._reset_state(reset_partial_state=True))
    AcceleratorState._reset_state(reset_partial_state=True)
    for name, value in (PAIR | {"ACCELERATE_USE_CPU": "true", "MASTER_PORT": "many"}).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    with pytest.raises(UserError, match=r"cannot connect at MASTER_ADDR = '127\.0\.0\.1', MASTER_PORT = 'many'"):
        start_processes()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("given", "launcher", "code", "said"),
    [
        ({"WORLD_SIZE": "1", "RANK": "0", "LOCAL_RANK": "0"}, [], 0, "on this machine"),
        ({"MASTER_ADDR": "node017"}, [], 0, "on this machine"),
        ({"WORLD_SIZE": "4"}, [], 2, "WORLD_SIZE = 4"),
        ({}, ["accelerate.commands.launch", "--cpu", "--mixed_precision", "bf16"], 1, "training.precision"),
        ({}, ["accelerate.commands.launch", "--cpu", "--dynamo_backend", "inductor"], 1, "training.compile"),
        ({}, ["accelerate.commands.launch", "--cpu"], 0, "on this machine"),
        ({}, ["torch.distributed.run", "--standalone", "--nproc_per_node", "2"], 1, "ACCELERATE_USE_CPU=true"),
        (
            {"ACCELERATE_USE_CPU": "1"},
            ["torch.distributed.run", "--standalone", "--nproc_per_node", "2"],
            0,
            "on this machine",
        ),
    ],
)
def test_real_launches(given: dict[str, str], launcher: list[str], code: int, said: str, tmp_path: Path) -> None:
    config = make_inputs(tmp_path)
    module = ["-m", *launcher] if launcher else []
    done = subprocess.run(
        [sys.executable, *module, "train.py", str(config), "--dry-run"],
        cwd=ROOT,
        env=environment(**given),
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == code, done.stderr
    assert said in done.stdout + done.stderr
    if code == 2:
        assert len(done.stderr.splitlines()) == 1


def test_a_process_alone_is_the_main_one():
    assert distributed.rank_and_world() == (0, 1)
    assert distributed.is_main()
    assert distributed.gather_objects("a") == ["a"]
    assert distributed.on_main(lambda: 3) == 3
    rows, indices = torch.tensor([[1.0], [0.0]]), torch.tensor([1, 0])
    assert distributed.gather_rows(rows, indices).flatten().tolist() == [0.0, 1.0]


def test_all_processes_get_what_the_main_one_returns_or_raises(monkeypatch):
    sent = []
    monkeypatch.setattr(distributed, "_joined", lambda: True)
    monkeypatch.setattr(distributed, "is_main", lambda: not sent)

    def broadcast(values):  # the first call is the main process's, the second another's
        if sent:
            values[:] = sent[-1]
        sent.append(list(values))

    monkeypatch.setattr(distributed.dist, "broadcast_object_list", broadcast)

    def fail():
        raise UserError("no room")

    assert distributed.on_main(lambda: "mine") == "mine"
    assert distributed.on_main(fail) == "mine"  # which is not called there
    sent.clear()
    for function in (fail, lambda: "mine"):
        with pytest.raises(UserError, match="no room"):
            distributed.on_main(function)
