"""Worker processes that heed Ctrl-C through their parent alone, and end with it."""

import contextlib
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from types import FrameType
from typing import Any

from data.machine import end_with

CONTEXT = multiprocessing.get_context("spawn")


@contextlib.contextmanager
def worker_pool(
    number: int, start: Callable[..., None], arguments: tuple[Any, ...], stop: Callable[[], None]
) -> Iterator[Callable[..., set[Future[Any]]]]:
    """Gives a function that takes a function and lists of arguments, and calls the one with each of
    the others in a pool of processes. They are gone after the block, however that is left.

    The first Ctrl-C leaves the block: tasks that have not begun never do, and the pool waits for
    the others. One that comes while it waits kills the workers. Either ends in KeyboardInterrupt.

    Args:
        number: of processes, at most.
        start: is called with `arguments` in each process, before its first task.
        stop: has running tasks end soon; called when the block is left.
    """
    pool = ProcessPoolExecutor(
        number, mp_context=CONTEXT, initializer=_begin, initargs=(os.getpid(), start, arguments)
    )
    interrupts = _Interrupts()

    def submit(function: Callable[..., Any], calls: Iterable[Iterable[Any]]) -> set[Future[Any]]:
        # This starts the processes.
        with interrupts.held_back():
            return {pool.submit(function, *call) for call in calls}

    with interrupts.heeded():
        try:
            try:
                yield submit
            finally:
                interrupts.leaving = True
        finally:
            stop()
            pool.shutdown(cancel_futures=True)
    if interrupts.killed:
        raise KeyboardInterrupt


class _Interrupts:
    """What Ctrl-C does in the parent.

    While the pool ends it must not raise: a thread whose `join` was broken off so counts as
    finished, and Python would then wait for ever for workers that nobody tells to end.
    """

    def __init__(self) -> None:
        self.leaving = False
        self.killed = False
        self._holding = False
        self._held = False

    @contextlib.contextmanager
    def heeded(self) -> Iterator[None]:
        previous = signal.getsignal(signal.SIGINT)
        main = threading.current_thread() is threading.main_thread()
        if not main or previous in (signal.SIG_IGN, None):
            yield  # where signals cannot be handled, or are not to be
            return
        signal.signal(signal.SIGINT, self._on_signal)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, previous)

    @contextlib.contextmanager
    def held_back(self) -> Iterator[None]:
        """Around what starts processes: a Ctrl-C meanwhile comes afterwards, and never to them."""
        # They inherit the mask; a handler of theirs would come seconds too late.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
        # Libraries have threads that take the signal all the same.
        self._holding = True
        try:
            yield
        finally:
            self._holding = False
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        if self._held:
            self.leaving = True
            raise KeyboardInterrupt

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self._holding:
            self._held = True
        elif not self.leaving:
            self.leaving = True
            raise KeyboardInterrupt
        else:
            self.killed = True
            for process in multiprocessing.active_children():
                process.kill()


def _begin(parent: int, start: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])
    # One that waits for a task would not notice: its siblings keep the queue open.
    end_with(parent)
    start(*arguments)
