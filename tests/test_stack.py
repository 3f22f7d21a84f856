"""Reading the stacks of threads that run on."""

import gc
import sys
import threading
import time
import weakref

import pytest

from qnb.model import stack


class Thing:
    """Can be referred to weakly."""


class Reader:
    """A thread in a function `forward`, whose variables change each time that it is let go on."""

    def __init__(self):
        self.arrived, self.go_on = threading.Semaphore(0), threading.Semaphore(0)
        self.things, self.kept = [], None
        self.thread = threading.Thread(target=self.forward, daemon=True)
        self.thread.start()
        assert self.arrived.acquire(timeout=20)

    def forward(self, keep=False):
        for _ in range(3):
            thing = Thing()
            self.things.append(weakref.ref(thing))
            if keep:
                self.kept = locals()
            self.arrived.release()
            assert self.go_on.acquire(timeout=20)

    def next(self):
        self.go_on.release()
        assert self.arrived.acquire(timeout=20)

    def frame(self):
        return next(f for f in stack.others()[self.thread.ident] if f.f_code.co_name == "forward")

    def end(self):
        for _ in range(3):
            self.go_on.release()
        self.thread.join(20)


@pytest.fixture
def reader():
    reader = Reader()
    yield reader
    reader.end()


def test_the_object_that_a_method_runs_on_is_found(reader):
    assert stack.first_argument(reader.frame()) is reader


def test_a_function_without_arguments_has_no_first():
    def look():
        return stack.first_argument(sys._getframe())

    assert look() is None


def test_a_look_keeps_nothing_alive_that_the_thread_lets_go(reader):
    frame = reader.frame()
    assert stack.first_argument(frame) is reader
    reader.next()
    assert reader.things[0]() is None
    assert reader.things[1]() is not None


def test_somebodys_own_look_at_variables_is_left_alone(monkeypatch):
    monkeypatch.setattr(Reader.forward, "__defaults__", (True,))
    reader = Reader()
    try:
        assert stack.first_argument(reader.frame()) is reader
        assert reader.kept["self"] is reader
        assert isinstance(reader.kept["thing"], Thing)
    finally:
        reader.end()


def test_this_thread_is_not_among_the_others(reader):
    found = stack.others()
    assert threading.get_ident() not in found
    assert reader.thread.ident in found


@pytest.mark.parametrize("collects", [True, False])
def test_the_garbage_collector_stays_as_it_was(reader, collects):
    before = gc.isenabled()
    try:
        (gc.enable if collects else gc.disable)()
        stack.first_argument(reader.frame())
        assert gc.isenabled() is collects
    finally:
        (gc.enable if before else gc.disable)()


def test_the_thread_stands_still_while_its_variables_are_read():
    """Dropping a tensor lets other threads run; a frame that ends in the middle of being read crashes the process."""
    torch = pytest.importorskip("torch")
    stop, count = threading.Event(), [0]

    class Model:
        def forward(self):
            for _ in range(50):
                kept = torch.empty(300_000)
                count[0] += 1
                kept = kept + 1

        def run(self):
            while not stop.is_set():
                self.forward()

    model, moved, looks = Model(), 0, 0
    thread = threading.Thread(target=model.run)
    interval = sys.getswitchinterval()
    sys.setswitchinterval(0.0005)
    thread.start()
    try:
        while looks < 3000:
            for frame in stack.others().get(thread.ident, ()):
                if frame.f_code.co_name == "forward":
                    stack.first_argument(frame)
                    time.sleep(0.0003)  # until other tensors stand there
                    before, _, after = stack._uncollected(lambda f=frame: (count[0], len(f.f_locals), count[0]))
                    moved += before != after
                    looks += 1
    finally:
        stop.set()
        thread.join(20)
        sys.setswitchinterval(interval)
    assert not moved
