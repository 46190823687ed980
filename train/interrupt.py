"""SIGTERM and SIGINT: the first asks a run to save and stop, the second ends it at once."""

import multiprocessing
import os
import signal
import socket
import threading
import time
from contextlib import ExitStack, suppress

SIGNALS = (signal.SIGTERM, signal.SIGINT)
_END = b"\0"  # no signal


class Interrupted(Exception):
    """A run stopped because a signal asked it to, after saving what it had done.

    Attributes:
        signal: Which one.
        message: What is kept, and how to go on.
    """

    def __init__(self, number: int, message: str) -> None:
        super().__init__(number, message)
        self.signal, self.message = number, message

    def __str__(self) -> str:
        return f"stopped by {signal.Signals(self.signal).name}: {self.message}"


class Interrupts:
    """Notes signals instead of ending the process, within a ``with``.

    A thread does so, since Python's own handlers wait for the end of whatever is being computed.
    Signals are passed on to whoever else waits for them, such as handlers of an asyncio event loop.
    Outside the main thread, where Python handles no signals, it does nothing.

    Args:
        patient: Whether a second signal is waited out too: what starts the processes of a run, as
            torchrun does, passes on signals that these may have had already.

    Attributes:
        received: The first signal, 0 where there was none.
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
        """Whether something within another ``with`` of these is still to notice a signal."""
        return self._depth > 1

    def _listen(self) -> ExitStack:
        """Let the thread hear of signals, and return what undoes it."""
        ours, theirs = socket.socketpair()
        theirs.setblocking(False)
        other = signal.set_wakeup_fd(theirs.fileno())
        thread = threading.Thread(target=self._note_all, args=(ours, other), daemon=True)
        thread.start()
        undo = ExitStack()
        undo.callback(ours.close)
        undo.callback(theirs.close)
        undo.callback(thread.join)
        undo.callback(theirs.send, _END)  # its closing would not do: forked processes hold it too
        undo.callback(signal.set_wakeup_fd, other)
        for number in SIGNALS:
            undo.callback(signal.signal, number, signal.signal(number, lambda *_: None))
        return undo

    def _note_all(self, signals: socket.socket, other: int) -> None:
        """Note signals until the end, and write each to the file descriptor ``other``, if any."""
        while (heard := signals.recv(1)) not in (_END, b""):
            number = heard[0]
            if other >= 0:
                with suppress(OSError):  # closed, or full of signals that nobody reads
                    os.write(other, heard)
            if number in SIGNALS and not self.received:
                self.received = number
                if not self._patient:
                    name = signal.Signals(number).name
                    told = f"\n{name}: saving after this step; once more ends it now\n"
                    os.write(2, told.encode())
            elif number in SIGNALS and not self._patient:
                os._exit(128 + number)


def stop_with_parent() -> Interrupts:
    """Return what notes signals for the rest of this process, which ends when its parent does.

    For processes that :mod:`multiprocessing` started. What is being trained is saved first.
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
