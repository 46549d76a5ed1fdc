"""A signal is noted, or obeyed at once where nothing is lost; the second one is not ours."""

import os
import signal
import threading

import pytest

from tunesmith.core.errors import Interrupted
from tunesmith.train.signals import GracefulStop


def send(number: signal.Signals) -> None:
    os.kill(os.getpid(), number)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_is_noted_until_it_is_obeyed(number: signal.Signals, code: int) -> None:
    with GracefulStop("go on with: this") as wish:
        wish.raise_if_requested()
        send(number)
        assert wish.signal_number == number
        with pytest.raises(
            Interrupted, match=rf"stopped by {number.name}\n  fix: go on with: this"
        ) as stopped:
            wish.raise_if_requested()
    assert stopped.value.exit_code == code


def test_where_nothing_is_lost_it_is_obeyed_at_once() -> None:
    done: list[str] = []

    def work(wish: GracefulStop) -> None:
        with wish.immediate():
            send(signal.SIGTERM)
            done.append("too much")

    with GracefulStop() as wish, pytest.raises(Interrupted):
        work(wish)
    assert done == []


def test_a_signal_noted_before_is_obeyed_on_entering() -> None:
    with GracefulStop() as wish:
        send(signal.SIGINT)
        with pytest.raises(Interrupted), wish.immediate():
            pytest.fail("nothing is begun any more")


def test_after_such_a_place_signals_are_only_noted_again() -> None:
    with GracefulStop() as wish:
        with wish.immediate():
            pass
        send(signal.SIGTERM)
        assert wish.signal_number == signal.SIGTERM


def test_the_second_signal_acts_as_without_us() -> None:
    with GracefulStop() as wish:
        send(signal.SIGTERM)
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
        with pytest.raises(KeyboardInterrupt):
            send(signal.SIGINT)
        assert wish.signal_number == signal.SIGTERM


def test_handlers_are_put_back() -> None:
    def own(*_: object) -> None: ...

    former = signal.signal(signal.SIGTERM, own)
    try:
        with GracefulStop():
            assert signal.getsignal(signal.SIGTERM) is not own
        assert signal.getsignal(signal.SIGTERM) is own
    finally:
        signal.signal(signal.SIGTERM, former)


def test_outside_the_main_thread_nothing_is_caught() -> None:
    found: list[object] = []

    def work() -> None:
        with GracefulStop() as wish:
            wish.raise_if_requested()
            found.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [signal.default_int_handler]
