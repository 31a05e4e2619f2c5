import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from accelerate import PartialState

from vit5gen.lab.benchmark.engine import QUICK, fresh
from vit5gen.lab.benchmark.steps import _step_time, step_config
from vit5gen.system.errors import UserError


def joined(value: int) -> tuple[int, int, float]:
    """Return the number of processes, this process, and the sum over all of value + rank."""
    state, total = PartialState(cpu=True), torch.tensor(0.0)
    total += value + state.process_index
    if state.num_processes > 1:
        torch.distributed.all_reduce(total)
    return state.num_processes, os.getpid(), total.item()


def test_processes_are_fresh_and_joined() -> None:
    (one, pid, alone), (two, other, both) = fresh(joined, 3), fresh(joined, 3, count=2)
    assert (one, alone, two, both) == (1, 3, 2, 7)
    assert len({pid, other, os.getpid()}) == 3


def threads_of_a_step() -> int:
    _step_time(step_config(QUICK, precision="fp32", compile=False), QUICK)
    return torch.get_num_threads()


def test_each_of_the_joined_processes_that_are_timed_has_one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the variable accelerate gives joined processes the threads of all cores."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.delenv("OMP_NUM_THREADS")
    assert fresh(threads_of_a_step, count=2) == 1


def interrupt_itself() -> None:
    os.kill(os.getpid(), signal.SIGINT)


def test_an_interrupted_process_ends_without_a_word(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UserError, match="killed, perhaps for lack of memory"):
        fresh(interrupt_itself)
    assert "Traceback" not in capfd.readouterr().err


def tell_and_sleep(file: str) -> None:
    Path(file).write_text(str(os.getpid()))
    time.sleep(600)


def wait_for(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.1)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_killed_benchmark_leaves_no_process_at_work(tmp_path: Path) -> None:
    script, pid = tmp_path / "parent.py", tmp_path / "pid"
    script.write_text(
        "from test_benchmark_processes import fresh, tell_and_sleep\n"
        f"if __name__ == '__main__':\n    fresh(tell_and_sleep, {str(pid)!r})\n"
    )
    tests = Path(__file__).parent
    paths = {"PYTHONPATH": f"{tests.parent}{os.pathsep}{tests}"}
    parent = subprocess.Popen([sys.executable, script], env=os.environ | paths)
    wait_for(lambda: pid.is_file() and pid.read_text() != "")
    state = Path(f"/proc/{pid.read_text()}/stat")
    parent.kill()
    parent.wait()
    wait_for(lambda: not state.exists() or state.read_text().rsplit(")")[1].split()[0] == "Z")
