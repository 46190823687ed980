"""SIGTERM and SIGINT: the first signal makes a run save and stop, the second ends it at once."""

import multiprocessing
import os
import signal
import socket
import threading
import time
from contextlib import ExitStack, suppress

SIGNALS = (signal.SIGTERM, signal.SIGINT)
_END = b"\0"  # not the number of a signal


class Interrupted(Exception):
    """A run was stopped by a signal, after it saved its state.

    Attributes:
        signal: Number of the signal.
        message: What was saved, and how to continue.
    """

    def __init__(self, number: int, message: str) -> None:
        super().__init__(number, message)
        self.signal, self.message = number, message

    def __str__(self) -> str:
        return f"stopped by {signal.Signals(self.signal).name}: {self.message}"


class Interrupts:
    """Context manager that records signals instead of ending the process.

    A thread does this, since Python's own handlers run only when the current computation ends.
    Signals are forwarded to other listeners, such as the handlers of an asyncio event loop. Outside
    the main thread, where Python handles no signals, it does nothing.

    Args:
        patient: Whether a second signal does not end the process either: torchrun forwards signals
            to its processes, which may have received them already.

    Attributes:
        received: The first signal, 0 if there was none.
    """

    def __init__(self, patient: bool = False) -> None:
        self.received, self._patient = 0, patient
        self._depth = 0
        self._undo = ExitStack()

    def __enter__(self) -> "Interrupts":
        self._depth += 1
        if self._depth == 1 and threading.current_thread() is threading.main_thread():
            self._undo = self._listen()
        return self

    def __exit__(self, *_: object) -> None:
        self._depth -= 1
        if not self._depth:
            self._undo.close()

    @property
    def busy(self) -> bool:
        """Whether this is entered more than once, so that a run may still react to a signal."""
        return self._depth > 1

    def _listen(self) -> ExitStack:
        """Start the thread that receives signals, and return a stack that undoes this."""
        reader, writer = socket.socketpair()
        writer.setblocking(False)
        previous = signal.set_wakeup_fd(writer.fileno())
        thread = threading.Thread(target=self._record_all, args=(reader, previous), daemon=True)
        thread.start()
        undo = ExitStack()
        undo.callback(reader.close)
        undo.callback(writer.close)
        undo.callback(thread.join)
        undo.callback(writer.send, _END)  # closing is not enough: forked processes hold it open
        undo.callback(signal.set_wakeup_fd, previous)
        for number in SIGNALS:
            undo.callback(signal.signal, number, signal.signal(number, lambda *_: None))
        return undo

    def _record_all(self, signals: socket.socket, previous: int) -> None:
        """Record signals until the end, and forward each to a file descriptor.

        Args:
            signals: Socket to which Python writes the numbers of signals.
            previous: File descriptor that received them before; -1 if there was none.
        """
        while (byte := signals.recv(1)) not in (_END, b""):
            number = byte[0]
            if previous >= 0:
                with suppress(OSError):  # closed, or its buffer is full
                    os.write(previous, byte)
            if number in SIGNALS and not self.received:
                self.received = number
                if not self._patient:
                    name = signal.Signals(number).name
                    message = f"\n{name}: saving after this step; a second signal ends it now\n"
                    os.write(2, message.encode())
            elif number in SIGNALS and not self._patient:
                os._exit(128 + number)


def stop_with_parent() -> Interrupts:
    """Record signals for the rest of this process, and end it when its parent process ends.

    For processes that :mod:`multiprocessing` started. A run in progress is saved first.
    """
    parent, interrupts = multiprocessing.parent_process(), Interrupts(patient=True)
    assert parent is not None
    interrupts.__enter__()

    def watch() -> None:
        parent.join()
        os.kill(os.getpid(), signal.SIGTERM)
        while interrupts.busy:
            time.sleep(0.1)
        os._exit(128 + signal.SIGTERM)

    threading.Thread(target=watch, daemon=True).start()
    return interrupts
