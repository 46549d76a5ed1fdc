"""A signal is noted, or obeyed at once where nothing is lost; the second one is not ours."""

import os
import signal
import threading

import pytest

from tunesmith.core.errors import Interrupted
from tunesmith.train.signals import GracefulStop


def send_signal(number: signal.Signals) -> None:
    os.kill(os.getpid(), number)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_is_noted_until_it_is_obeyed(number: signal.Signals, code: int) -> None:
    with GracefulStop("go on with: this") as stop:
        stop.raise_if_requested()
        send_signal(number)
        assert stop.signal_number == number
        with pytest.raises(
            Interrupted, match=rf"stopped by {number.name}( \(Ctrl-C\))?\n  fix: go on with: this"
        ) as stopped:
            stop.raise_if_requested()
    assert stopped.value.exit_code == code


def test_a_signal_that_has_to_wait_is_answered(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "tunesmith.core.progress_log")
    with GracefulStop():
        send_signal(signal.SIGINT)
        assert "finishing this step before stopping" in caplog.text


def test_where_nothing_is_lost_it_is_obeyed_at_once() -> None:
    done: list[str] = []

    def work(stop: GracefulStop) -> None:
        with stop.immediate():
            send_signal(signal.SIGTERM)
            done.append("too much")

    with GracefulStop() as stop, pytest.raises(Interrupted):
        work(stop)
    assert done == []


def test_a_signal_noted_before_is_obeyed_on_entering() -> None:
    with GracefulStop() as stop:
        send_signal(signal.SIGINT)
        with pytest.raises(Interrupted), stop.immediate():
            pytest.fail("nothing is begun any more")


def test_where_other_ranks_wait_it_is_obeyed_at_the_next_chance() -> None:
    with GracefulStop(is_patient=True) as stop:
        stop.is_joint = True
        with stop.immediate():
            send_signal(signal.SIGTERM)
            send_signal(signal.SIGINT)
        with pytest.raises(Interrupted, match="SIGTERM"):
            stop.raise_if_requested()


def test_after_such_a_place_signals_are_only_noted_again() -> None:
    with GracefulStop() as stop:
        with stop.immediate():
            pass
        send_signal(signal.SIGTERM)
        assert stop.signal_number == signal.SIGTERM


def test_the_second_signal_acts_as_without_us() -> None:
    with GracefulStop() as stop:
        send_signal(signal.SIGTERM)
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
        with pytest.raises(KeyboardInterrupt):
            send_signal(signal.SIGINT)
        assert stop.signal_number == signal.SIGTERM


def test_handlers_are_put_back() -> None:
    def custom(*_: object) -> None: ...

    former = signal.signal(signal.SIGTERM, custom)
    try:
        with GracefulStop():
            assert signal.getsignal(signal.SIGTERM) is not custom
        assert signal.getsignal(signal.SIGTERM) is custom
    finally:
        signal.signal(signal.SIGTERM, former)


def test_outside_the_main_thread_nothing_is_caught() -> None:
    actual: list[object] = []

    def work() -> None:
        with GracefulStop() as stop:
            stop.raise_if_requested()
            actual.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert actual == [signal.default_int_handler]
