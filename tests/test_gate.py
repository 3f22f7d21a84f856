"""A change of several layers lands between two passes, whoever makes it and whatever runs."""

import copy
import gc
import random
import threading
import time
import weakref

import pytest
import torch
from torch import nn

import qnb
from qnb.model import gate, variants
from qnb.model.linear import quantized_layers


@pytest.fixture(scope="module")
def demo():
    return qnb.demo_lm()


def hold(model, entered, release):
    """Lets a forward through `model` stop in its middle, until `release` is set."""

    def stop(*_):
        entered.set()
        assert release.wait(20)

    return list(model.children())[-1].register_forward_pre_hook(stop)


def test_a_change_waits_for_the_pass_of_another_thread():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Identity())
    qnb.quantize(model, "w8a8")
    entered, release, seen = threading.Event(), threading.Event(), []
    handle = hold(model, entered, release)
    x = torch.randn(1, 8)
    reader = threading.Thread(target=lambda: seen.append(model(x)))
    writer = threading.Thread(target=lambda: qnb.restore(model))
    reader.start()
    assert entered.wait(20)
    writer.start()
    writer.join(0.05)
    assert writer.is_alive()
    assert len(quantized_layers(model)) == 2
    release.set()
    writer.join(20)
    reader.join(20)
    assert not quantized_layers(model)
    handle.remove()


def test_a_waiting_change_goes_before_the_next_pass():
    model = nn.Sequential(nn.Linear(8, 8), nn.Identity())
    x = torch.randn(1, 8)
    exact = model(x)
    qnb.quantize(model, "w8a8")
    entered, release, seen = threading.Event(), threading.Event(), []
    handle = hold(model, entered, release)
    threads = [threading.Thread(target=lambda: seen.append(model(x)))]
    threads[0].start()
    assert entered.wait(20)
    handle.remove()
    threads.append(threading.Thread(target=lambda: qnb.restore(model)))
    threads[1].start()
    deadline = time.monotonic() + 20
    while not gate._changes:
        assert time.monotonic() < deadline
        time.sleep(0.001)
    threads.append(threading.Thread(target=lambda: seen.append(model(x))))
    threads[2].start()
    threads[2].join(0.05)
    assert threads[2].is_alive(), "a new pass went before the waiting change"
    release.set()
    for thread in threads:
        thread.join(20)
    assert sorted(torch.equal(y, exact) for y in seen) == [False, True]


@pytest.mark.parametrize("quantized_before", [False, True])
@pytest.mark.parametrize("through", ["the model", "a wrapper", "a part"])
def test_whichever_door_a_pass_came_in_by(through, quantized_before):
    model = nn.Sequential(nn.Linear(8, 8), nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Identity()))
    if quantized_before:
        qnb.quantize(model, "w8a8")
    runs = {"the model": model, "a wrapper": nn.Sequential(model), "a part": model[1]}[through]
    entered, release = threading.Event(), threading.Event()
    handle = hold(model[1], entered, release)
    reader = threading.Thread(target=lambda: runs(torch.randn(1, 8)))
    writer = threading.Thread(target=lambda: qnb.quantize(model, "w8a16"))
    reader.start()
    assert entered.wait(20)
    writer.start()
    writer.join(0.05)
    assert writer.is_alive()
    assert all(q.scheme == "w8a8" for q in quantized_layers(model).values())
    release.set()
    writer.join(20)
    reader.join(20)
    assert [q.scheme for q in quantized_layers(model).values()] == ["w8a16"] * 3
    handle.remove()


def test_a_model_of_its_own_is_not_waited_for():
    model, other = nn.Sequential(nn.Linear(8, 8), nn.Identity()), nn.Sequential(nn.Linear(8, 8))
    entered, release = threading.Event(), threading.Event()
    handle = hold(model, entered, release)
    reader = threading.Thread(target=lambda: model(torch.randn(1, 8)))
    reader.start()
    assert entered.wait(20)
    qnb.quantize(other, "w8a8")
    assert len(quantized_layers(other)) == 1
    release.set()
    reader.join(20)
    handle.remove()


def test_a_change_made_on_an_outdated_plan_is_planned_again(monkeypatch):
    """One thread restores while another is still rounding: what is reported last is what stands."""
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    qnb.quantize(model, "w8a8")
    rounding, go_on, reports = threading.Event(), threading.Event(), []
    real = variants._variant

    def slow(*args):
        if threading.current_thread() is writer and not rounding.is_set():
            rounding.set()
            assert go_on.wait(20)
        return real(*args)

    monkeypatch.setattr(variants, "_variant", slow)
    writer = threading.Thread(target=lambda: reports.append(qnb.quantize(model, "w8a16")))
    writer.start()
    assert rounding.wait(20)
    qnb.restore(model)
    go_on.set()
    writer.join(20)
    assert [r.scheme for r in reports[0].rows] == ["w8a16", "w8a16"]
    assert [q.scheme for q in quantized_layers(model).values()] == ["w8a16", "w8a16"]
    qnb.restore(model)


def test_a_held_model_changes_for_its_holder_and_others_when_it_is_let_go():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    qnb.quantize(model, "w8a8")
    writer = threading.Thread(target=lambda: qnb.quantize(model, "w8a16"))
    with gate.held(model):
        writer.start()
        writer.join(0.05)
        model(torch.randn(1, 8))  # the holder's own passes go on
        assert writer.is_alive()
        assert "when the present pass" in qnb.quantize(model, "none", layers="1").title
        assert [q.scheme for q in quantized_layers(model).values()] == ["w8a8", "w8a8"]
    writer.join(20)
    model(torch.randn(1, 8))
    assert not gate._held


def test_a_change_from_inside_a_pass_lands_when_it_ends():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    qnb.quantize(model, "w8a8")
    reports, during = [], []

    def change(*_):
        reports.append(qnb.restore(model))
        during.append(len(quantized_layers(model)))

    handle = model[0].register_forward_hook(change)
    model(torch.randn(1, 8))
    handle.remove()
    model(torch.randn(1, 8))
    assert during == [2]
    assert "when the present pass" in reports[0].title
    assert not quantized_layers(model)


def test_a_model_can_be_held_in_a_pass_that_a_change_waits_for():
    model, done = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)), []

    def change(*_):
        handle.remove()
        qnb.quantize(model, "w8a8")
        with gate.held(model):
            done.append(model(torch.randn(1, 8)))

    handle = model[0].register_forward_hook(change)
    reader = threading.Thread(target=lambda: model(torch.randn(1, 8)), daemon=True)
    reader.start()
    reader.join(20)
    assert done
    model(torch.randn(1, 8))
    assert len(quantized_layers(model)) == 2


def test_a_change_keeps_no_model_alive():
    model = nn.Sequential(nn.Linear(8, 8))
    gone = weakref.ref(model)
    gc.collect()
    gc.disable()
    try:
        qnb.quantize(model, "w8a8")
        qnb.restore(model)
        del model
        assert gone() is None
    finally:
        gc.enable()


def test_an_interrupted_pass_counts_as_over():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    qnb.quantize(model, "w8a8")

    def interrupt(*_):
        raise KeyboardInterrupt

    handle = model[1].register_forward_pre_hook(interrupt)
    for error in (KeyboardInterrupt, KeyboardInterrupt):
        with pytest.raises(error):
            model(torch.randn(1, 8))
    handle.remove()
    other = threading.Thread(target=lambda: qnb.restore(model), daemon=True)
    other.start()
    other.join(20)
    assert not quantized_layers(model)


def test_a_change_that_an_interrupt_left_behind_keeps_nobody_out():
    model = nn.Sequential(nn.Linear(8, 8))

    def announce():
        gate._changes.append(gate._Change(model))

    announce()
    handle = torch.nn.modules.module.register_module_forward_pre_hook(gate._door)
    other = threading.Thread(target=lambda: model(torch.randn(1, 8)), daemon=True)
    other.start()
    other.join(20)
    assert not other.is_alive()
    assert not gate._changes
    assert handle.id not in torch.nn.modules.module._global_forward_pre_hooks


def test_nothing_is_left_on_a_model():
    model = nn.Sequential(nn.Linear(8, 8))
    before = sorted(model.__dict__), list(torch.nn.modules.module._global_forward_pre_hooks)
    qnb.quantize(model, "w8a8")
    qnb.restore(model)
    assert (sorted(model.__dict__), list(torch.nn.modules.module._global_forward_pre_hooks)) == before
    assert not model._forward_pre_hooks
    assert not gate._changes


def test_a_copy_has_a_gate_of_its_own():
    model = nn.Sequential(nn.Linear(8, 8), nn.Identity())
    qnb.quantize(model, "w8a8")
    twin = copy.deepcopy(model)
    entered, release = threading.Event(), threading.Event()
    handle = hold(model, entered, release)
    reader = threading.Thread(target=lambda: model(torch.randn(1, 8)))
    reader.start()
    assert entered.wait(20)
    qnb.restore(twin)
    assert not quantized_layers(twin)
    release.set()
    reader.join(20)
    handle.remove()


def test_swaps_against_a_generating_thread_never_tear(demo):
    """Random changes while another thread generates: all the logits of an answer are those of one recorded state."""
    model, tokenizer = demo
    names = [f"model.layers.{i}.mlp.down_proj" for i in range(8)]
    states = [("w8a8", None), ("w8a16", None), ("w8a8", names), ("none", names)]
    prompt = tokenizer("def main():\n    import", return_tensors="pt")
    originals = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear)}

    def become(state):
        scheme, layers = state
        qnb.quantize(model, scheme if layers is None else "w8a16", progress=False)
        if layers is not None:
            qnb.quantize(model, scheme, layers=layers, progress=False)

    def answer():
        with torch.no_grad():
            tokens = model.generate(
                **prompt, max_new_tokens=4, do_sample=False, return_dict_in_generate=True, output_logits=True
            )
            return torch.stack(tokens.logits)

    # The recorded states: the two whole schemes, and each reached by two changes, of which the first is one of them.
    known = []
    for state in states:
        become(state)
        known.append(answer())
    rng, stop, bad, answers = random.Random(0), threading.Event(), [], 0

    def read():
        nonlocal answers
        while not stop.is_set():
            got = answer()
            answers += 1
            if not any(torch.equal(got, k) for k in known):
                bad.append(got)

    reader = threading.Thread(target=read)
    reader.start()
    try:
        for _ in range(40):
            become(rng.choice(states))
    finally:
        stop.set()
        reader.join(60)
    assert answers > 5
    assert not bad
    qnb.restore(model)
    assert all(m is originals[n] for n, m in model.named_modules() if n in originals)
