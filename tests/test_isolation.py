"""Work in threads apart: what interrupts the caller, what traces at the same time, and what a fork leaves behind."""

import os
import signal
import threading
import time
from typing import Any

import pytest
import torch
from stress.interrupts import be_interruptible, interrupted_after
from stress.models import network, samples, wrong

import pcr_fx
from pcr_fx.body import isolation
from pcr_fx.body.isolation import apart, isolated, stop_if_abandoned, tracing
from pcr_fx.targets.cpp import threads

be_interruptible()


def test_an_interrupt_waits_for_what_cannot_stop() -> None:
    seen: list[str] = []

    @apart
    def work() -> None:
        time.sleep(0.5)
        seen.append("ended")

    with pytest.raises(KeyboardInterrupt), interrupted_after(0.1):
        work()
    assert seen == ["ended"]


def test_what_can_stop_does_also_in_threads_of_threads() -> None:
    ended = threading.Event()

    @apart
    def inner() -> None:
        try:
            while True:
                stop_if_abandoned()
                time.sleep(0.01)
        finally:
            ended.set()

    with pytest.raises(KeyboardInterrupt), interrupted_after(0.1):
        apart(inner)()
    assert ended.is_set()
    stop_if_abandoned()  # nobody waits for this thread, and nobody stopped


def test_several_interrupts_wait_as_one_does() -> None:
    seen: list[str] = []

    @apart
    def work() -> None:
        for _ in range(3):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.1)
        seen.append("ended")

    with pytest.raises(KeyboardInterrupt):
        work()
    assert seen == ["ended"]


def test_tracing_is_not_interrupted_but_by_a_second_interrupt() -> None:
    seen: list[str] = []
    with pytest.raises(KeyboardInterrupt), tracing():
        with tracing():
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.01)
            seen.append("inside")
        seen.append("outside")
    with pytest.raises(KeyboardInterrupt), tracing():
        for name in ("waits", "does not"):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.01)
            seen.append(name)
    assert seen == ["inside", "outside", "waits"]
    with pytest.raises(ZeroDivisionError), tracing():
        1 / 0  # noqa: B018
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.parametrize("handler", [signal.SIG_IGN, lambda *_: None])
def test_who_handles_interrupts_otherwise_still_does(handler: Any) -> None:
    before = signal.signal(signal.SIGINT, handler)
    try:
        with tracing():
            os.kill(os.getpid(), signal.SIGINT)
        assert signal.getsignal(signal.SIGINT) is handler
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_thread_that_cannot_be_started_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []

    class Interrupted(threading.Thread):
        def start(self) -> None:
            raise KeyboardInterrupt

    class Late(threading.Thread):
        def start(self) -> None:
            super().start()
            raise KeyboardInterrupt

    for kind in (Interrupted, Late):
        with monkeypatch.context() as patch:
            patch.setattr(isolation.threading, "Thread", kind)
            with pytest.raises(KeyboardInterrupt):
                apart(lambda: seen.append("began"))()
        before = list(seen)
        time.sleep(0.05)
        assert seen == before, "it began after its caller had gone"


def test_results_and_errors_come_back() -> None:
    assert apart(lambda *args, **kwargs: (args, kwargs))(1, a=2) == ((1,), {"a": 2})
    with pytest.raises(ZeroDivisionError):
        isolated(lambda: 1 / 0)()


def test_one_thread_traces_at_a_time_and_may_call_others() -> None:
    at_once, most = [0], [0]

    @isolated
    def inner() -> None:
        time.sleep(0.01)

    def count() -> None:
        at_once[0] += 1
        most[0] = max(most[0], at_once[0])
        inner()
        at_once[0] -= 1

    def read() -> None:
        with tracing(), tracing():
            count()

    calls = [isolated(count), isolated(isolated(count)), read] * 4
    every = [threading.Thread(target=call) for call in calls]
    for thread in every:
        thread.start()
    for thread in every:
        thread.join(timeout=60)
    assert most == [1] and at_once == [0]


def test_settings_of_pytorch_are_those_of_the_caller() -> None:
    from torch._inductor import config

    with config.patch({"cpp.cxx": (None, "another")}), torch.no_grad():
        assert apart(lambda: (config.cpp.cxx, torch.is_grad_enabled()))() == ((None, "another"), True)


# --- forks --------------------------------------------------------------------------------------------------------------

needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="processes cannot be forked here")


def ends_well(work: Any) -> bool:
    """Whether `work` ends without an error in a fork of this process, in a minute."""
    child = os.fork()
    if child == 0:
        try:
            signal.alarm(60)
            work()
            os._exit(0)
        finally:
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def gradients_survive_a_fork() -> bool:
    """Whether PyTorch takes gradients in a fork after some were taken here: its builds for GPUs refuse."""
    x = torch.ones(1, requires_grad=True)
    x.sum().backward()
    return ends_well(lambda: (2 * x).sum().backward())


@needs_fork
@pytest.mark.usefixtures("kernel_cache")
def test_a_fork_is_right_and_does_not_wait_for_threads_that_are_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of native code, and the one that traces meanwhile."""
    monkeypatch.setattr("pcr_fx.targets.cpp.kernel._OPERATIONS_A_THREAD", 1)
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        model, x = network(12, 4), torch.randn(64, 4)
        fast = pcr_fx.transform(model, x, options={"solver": "sequential"})
        assert not wrong(fast, model, x)
        inside, over = threading.Event(), threading.Event()

        @isolated
        def trace() -> None:
            inside.set()
            over.wait()

        thread = threading.Thread(target=trace)
        thread.start()
        inside.wait()

        with_gradients = gradients_survive_a_fork()

        def check(fast: Any, model: Any, x: Any) -> None:
            if with_gradients:
                assert not wrong(fast, model, x)
            else:
                torch.testing.assert_close(fast(x), model(x))

        def call() -> None:
            assert threads.available_threads() == 1
            with torch.set_grad_enabled(with_gradients):
                given = x.clone().requires_grad_()
                result = fast(given).sum()
                if with_gradients:
                    torch.autograd.grad(result, given)
                torch.set_num_threads(1)  # for eager, which would wait
                check(fast, model, x)
                other, y = network(13, 4), samples(4)
                check(pcr_fx.transform(other, y, options={"solver": "sequential"}), other, y)

        try:
            assert ends_well(call)
        finally:
            over.set()
            thread.join()
    finally:
        torch.set_num_threads(before)
    assert threads.available_threads() == before


@needs_fork
def test_a_fork_does_not_delete_its_parents_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    from pcr_fx import disk

    monkeypatch.setenv("PCR_FX_CACHE_DIR", "/dev/null")
    folder = disk.cache_directory()

    def look() -> None:
        import atexit

        assert disk.cache_directory() != folder
        atexit._run_exitfuncs()

    assert ends_well(look) and folder.is_dir()
