"""Measuring is exclusive: one thread at a time, nothing changes the model meanwhile, and what else ran is said."""

from __future__ import annotations

import gc
import re
import signal
import sys
import threading
import time
import weakref

import pytest
import torch
from torch import nn

import qnb
from qnb.measure.profile import profile_code
from qnb.measure.token import alone, measuring

SECONDS = 60  # after which a test that waits for another thread fails


class Slow(nn.Module):
    """Its forward says that it has begun and waits until it may go on."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.began, self.go_on = threading.Event(), threading.Event()

    def forward(self, x):
        self.began.set()
        assert self.go_on.wait(SECONDS)
        return self.linear(x)


def in_thread(work) -> tuple[threading.Thread, list]:
    results = []
    thread = threading.Thread(target=lambda: results.append(work()), daemon=True)
    thread.start()
    return thread, results


def wait_until(holds) -> None:
    until = time.monotonic() + SECONDS
    while not holds():
        assert time.monotonic() < until
        time.sleep(0.001)


def is_in(thread: threading.Thread, module: str) -> bool:
    frame = sys._current_frames().get(thread.ident)
    while frame is not None and frame.f_globals.get("__name__") != module:
        frame = frame.f_back
    return frame is not None


def evaluate(model, **kwargs):
    return qnb.evaluate(model, [torch.ones(2, 4)], progress=False, **kwargs)


def profile(model, **kwargs):
    return qnb.profile(model, inputs=torch.ones(2, 4), repeat=1, progress=False, **kwargs)


def notes(result) -> tuple[str, ...]:
    return tuple(result.notes if hasattr(result, "notes") else result.environment.get("notes", ()))


@pytest.mark.parametrize(
    "measure",
    [
        lambda: evaluate(nn.Linear(4, 4)),
        lambda: profile(nn.Linear(4, 4)),
        lambda: profile_code(lambda: None),
    ],
    ids=["evaluate", "profile", "profile_code"],
)
def test_a_second_thread_waits_and_both_results_say_so(measure):
    model = Slow()
    first, first_results = in_thread(lambda: evaluate(model))
    assert model.began.wait(SECONDS)
    assert measuring()
    second, second_results = in_thread(measure)
    wait_until(lambda: is_in(second, "qnb.measure.token"))
    time.sleep(0.1)
    assert not second_results
    model.go_on.set()
    first.join(SECONDS)
    second.join(SECONDS)
    assert not measuring()
    (waited,) = notes(second_results[0])
    assert re.fullmatch(r"waited \d+\.\d s for another measurement", waited)
    (company,) = notes(first_results[0])
    assert company.startswith("meanwhile another thread was in qnb.measure.")
    assert f"note: {waited}" in second_results[0].text() and f"note: {company}" in first_results[0].text()


@pytest.mark.parametrize("scheme", [None, "w8a8"])
def test_another_threads_forward_is_said_whatever_model_it_is_of(scheme):
    model = Slow()
    if scheme:
        qnb.quantize(model, scheme, progress=False)
    thread, results = in_thread(lambda: model(torch.ones(2, 4)))
    assert model.began.wait(SECONDS)
    result = evaluate(nn.Linear(4, 4))
    model.go_on.set()
    thread.join(SECONDS)
    assert results and notes(result) == ("meanwhile another thread was in a forward of Slow",)
    assert notes(evaluate(nn.Linear(4, 4))) == ()


def test_a_thread_measures_again_inside_its_own_measurement():
    def metric(model):
        assert not measuring()  # by somebody else
        return evaluate(nn.Linear(4, 4)).texts

    result = profile(nn.Linear(4, 4), metric=metric)
    assert result.accuracy.metric == 2
    assert notes(result) == notes(result.accuracy) == ()
    assert not measuring()


def test_a_failed_measurement_lets_the_next_thread_in():
    def fails():
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        profile_code(fails)
    thread, results = in_thread(lambda: (measuring(), evaluate(nn.Linear(4, 4))))
    thread.join(SECONDS)
    assert results[0][0] is False


def test_waiting_can_be_interrupted():
    model = Slow()
    first, results = in_thread(lambda: evaluate(model))
    assert model.began.wait(SECONDS)
    main = threading.main_thread()

    def interrupt():
        wait_until(lambda: is_in(main, "qnb.measure.token"))
        signal.pthread_kill(main.ident, signal.SIGINT)

    in_thread(interrupt)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job begins with it ignored
    try:
        with pytest.raises(KeyboardInterrupt):
            evaluate(nn.Linear(4, 4))
    finally:
        signal.signal(signal.SIGINT, before)
        model.go_on.set()
    first.join(SECONDS)
    assert results
    assert evaluate(nn.Linear(4, 4)).notes == ()


@pytest.mark.parametrize(
    "measure",
    [
        lambda changed, metric: evaluate(changed, metric=metric),
        lambda changed, metric: evaluate(nn.Linear(4, 4), reference=changed, metric=metric),
        lambda changed, metric: profile(changed, metric=metric),
    ],
    ids=["evaluate", "evaluate's reference", "profile"],
)
def test_a_change_from_another_thread_waits_until_the_measurement_is_over(measure):
    changed, changer, kinds = nn.Sequential(nn.Linear(4, 4)), [], []

    def metric(measured):
        changer.append(in_thread(lambda: qnb.quantize(changed, "w8a8", progress=False)))
        thread = changer[0][0]
        wait_until(lambda: is_in(thread, "qnb.model.gate") or not thread.is_alive())
        time.sleep(0.05)
        kinds.append(type(changed[0]))
        return 1.0

    result = measure(changed, metric)
    thread, reports = changer[0]
    thread.join(SECONDS)
    assert kinds == [nn.Linear] and reports[0].rows[0].scheme == "w8a8"
    assert qnb.layers(changed).rows[0].scheme == "w8a8"
    assert notes(result) == ("meanwhile another thread was in qnb.model.quantize.quantize",)


def test_looking_at_other_threads_keeps_nothing_of_this_one_alive():
    def measured() -> weakref.ref:
        model = nn.Linear(4, 4)
        with alone() as company:
            company.look()
        return weakref.ref(model)

    gc.disable()  # a cycle through frames would keep the model until the next collection
    try:
        assert measured()() is None
    finally:
        gc.enable()
