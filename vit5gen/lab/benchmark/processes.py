"""Fresh interpreters for what must not meet the past of this one: peak memory, and processes joined by gloo."""

import os
import signal
import socket
import threading
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context, parent_process
from multiprocessing.connection import wait
from typing import Any, TypeVar

from accelerate import PartialState

from vit5gen.system.errors import UserError

T = TypeVar("T")


def fresh(function: Callable[..., T], *arguments: Any, count: int = 1) -> T:
    """Call a module's function in ``count`` fresh processes that train together; return the result of the first.

    Raises what the function raises, and `UserError` when a process is killed.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    end_silently = (signal.signal, (signal.SIGINT, signal.SIG_DFL))  # Ctrl-C comes to all; one tells of it
    with ProcessPoolExecutor(count, get_context("spawn"), *end_silently) as pool:
        calls = [pool.submit(_call, rank, count, port, function, arguments) for rank in range(count)]
        try:
            results = [call.result() for call in calls]
        except BrokenProcessPool as error:
            raise UserError("a measuring process was killed, perhaps because memory was short; make room") from error
    return results[0]


def _call(rank: int, count: int, port: int, function: Callable[..., T], arguments: tuple[Any, ...]) -> T:
    threading.Thread(target=_end_with_parent, daemon=True).start()
    if count > 1:
        joined = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "MASTER_PORT": port}
        os.environ.update({name: str(value) for name, value in joined.items()}, MASTER_ADDR="127.0.0.1")
    try:
        return function(*arguments)
    finally:
        PartialState().destroy_process_group()


def _end_with_parent() -> None:
    """Leave no process at work when the one that started it is killed."""
    parent = parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os._exit(1)
