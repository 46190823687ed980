"""Signals while something is trained."""

import asyncio
import os
import signal
import socket
import time

import pytest

from train.interrupt import Interrupts


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGHUP, signal.SIGTERM])
def test_handlers_of_an_event_loop_are_called_after_training(number: signal.Signals) -> None:
    called = []

    async def train() -> int:
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(number, called.append, number)
        with Interrupts() as interrupts:
            os.kill(os.getpid(), number)
            time.sleep(0.2)  # as training does, this keeps the loop from running
            assert not called
        await asyncio.sleep(0.1)
        assert called == [number]
        os.kill(os.getpid(), number)  # and as before, when nothing is trained
        await asyncio.sleep(0.1)
        return interrupts.received

    received = asyncio.run(train())
    assert called == [number] * 2
    assert received == (number if number == signal.SIGTERM else 0)


def test_a_file_descriptor_of_someone_else_gets_every_signal_and_is_given_back() -> None:
    ours, theirs = socket.socketpair()
    theirs.setblocking(False)
    before = signal.set_wakeup_fd(theirs.fileno())
    handlers = {n: signal.signal(n, lambda *_: None) for n in (signal.SIGUSR1, signal.SIGTERM)}
    try:
        with Interrupts(patient=True) as interrupts:
            for number in handlers:
                os.kill(os.getpid(), number)
                time.sleep(0.1)
        assert ours.recv(10) == bytes([signal.SIGUSR1, signal.SIGTERM])
        assert interrupts.received == signal.SIGTERM
        assert signal.set_wakeup_fd(-1) == theirs.fileno()
    finally:
        signal.set_wakeup_fd(before)
        for number, handler in handlers.items():
            signal.signal(number, handler)
        ours.close(), theirs.close()


def test_a_closed_file_descriptor_does_no_harm() -> None:
    ours, theirs = socket.socketpair()
    theirs.setblocking(False)
    before = signal.set_wakeup_fd(theirs.fileno(), warn_on_full_buffer=False)
    try:
        with Interrupts(patient=True) as interrupts:
            ours.close()
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.1)
            assert interrupts.received == signal.SIGTERM
    finally:
        signal.set_wakeup_fd(before)
        theirs.close()
