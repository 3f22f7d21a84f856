"""Progress bars: Ctrl-C at any moment inside one leaves no lock behind that another thread's bar would wait for.

Whoever shows progress in another way hears of it, and can stop the work.
"""

from __future__ import annotations

import random
import signal
import threading
import time

import pytest

from qnb.progress import part, progress_bar, told


def bar() -> None:
    with progress_bar(3, "test", False) as shown:
        shown.update()


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="needs POSIX timers")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # an interrupt inside tqdm's __del__
def test_an_interrupt_inside_a_bar_keeps_no_other_thread_waiting():
    rng = random.Random(0)
    bar()
    start = time.perf_counter()
    for _ in range(100):
        bar()
    usual, interrupts = (time.perf_counter() - start) / 100, 0

    def interrupt(*_):
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        for _ in range(4000):
            try:
                signal.setitimer(signal.ITIMER_REAL, max(1e-6, rng.random() * usual * 1.2))
                bar()
                signal.setitimer(signal.ITIMER_REAL, 0)
            except KeyboardInterrupt:
                interrupts += 1
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert interrupts > 100
    other = threading.Thread(target=bar, daemon=True)
    other.start()
    other.join(20)
    assert not other.is_alive(), "the interrupted thread still holds the lock of the bars"


def test_progress_is_told_instead_of_shown(capsys):
    heard, elsewhere = [], []
    with told(lambda *step: heard.append(step)):
        with part("larger"):
            bar()
        other = threading.Thread(target=lambda: elsewhere.append(progress_bar(3, "test", False)))
        other.start()
        other.join()
    assert heard == [("larger: test", 0, 3), ("larger: test", 1, 3)] and isinstance(
        elsewhere[0], type(progress_bar(3, "test", False))
    )
    with pytest.raises(InterruptedError), told(stop):
        bar()
    assert capsys.readouterr() == ("", "")


def stop(*_: object) -> None:
    raise InterruptedError
