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


@pytest.mark.skipif(sys.version_info < (3, 11), reason="Python 3.10 keeps what a look found in the frame")
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


@pytest.mark.parametrize("install", [sys.setprofile, sys.settrace])
def test_a_thread_that_is_debugged_or_profiled_keeps_its_variables(install):
    """While such a function runs, its frame's variables are what stands in `f_locals`, and written back after it."""
    inside, go_on, failed = threading.Event(), threading.Event(), []

    def watch(frame, event, argument):
        if frame.f_code.co_name == "forward" and not inside.is_set():
            inside.set()
            assert go_on.wait(20)

    class Model:
        def forward(self, x):
            y = x + 1
            return self, x, y

    def run():
        install(watch)
        try:
            assert model.forward(1) == (model, 1, 2)
        except BaseException as problem:
            failed.append(problem)
        finally:
            install(None)

    model = Model()
    thread = threading.Thread(target=run)
    thread.start()
    assert inside.wait(20)
    frames = [f for f in stack.others()[thread.ident] if f.f_code.co_name == "forward"]
    assert [stack.first_argument(f) for f in frames] == [model]
    go_on.set()
    thread.join(20)
    assert not failed


def test_variables_that_were_deleted_or_that_a_function_inside_uses():
    def captured(first):
        return (lambda: stack.first_argument(sys._getframe(1)) is first)()

    def deleted(first):
        del first
        return stack.first_argument(sys._getframe())

    assert captured(Thing())
    assert deleted(Thing()) is None


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


def test_looks_at_threads_that_come_and_go():
    """Dropping a tensor lets other threads run: a look that drops one would read a function that has returned."""
    torch = pytest.importorskip("torch")
    stop, wrong = threading.Event(), []

    class Model:
        def forward(self, depth):
            a = torch.empty(30_000)
            b = a + 1
            a = b * 2
            return self.forward(depth - 1) if depth else a

        def run(self):
            while not stop.is_set():
                self.forward(5)

    model = Model()
    threads = [threading.Thread(target=model.run) for _ in range(2)]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(0.0001)
    try:
        for thread in threads:
            thread.start()
        ends = time.monotonic() + 2
        while time.monotonic() < ends:
            for thread in threads:
                for frame in stack.others().get(thread.ident, ()):
                    if frame.f_code.co_name == "forward" and stack.first_argument(frame) not in (model, None):
                        wrong.append(frame)
    finally:
        stop.set()
        for thread in threads:
            thread.join(20)
        sys.setswitchinterval(interval)
    assert not wrong
