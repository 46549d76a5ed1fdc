"""A signal is noted, or obeyed at once where nothing is lost; the second one is not ours."""

import os
import signal
import threading

import pytest

from tunesmith.core.errors import Interrupted
from tunesmith.train.signals import StopWish


def send(number: signal.Signals) -> None:
    os.kill(os.getpid(), number)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_is_noted_until_it_is_obeyed(number: signal.Signals, code: int) -> None:
    with StopWish("go on with: this") as wish:
        wish.obey()
        send(number)
        assert wish.signal == number
        with pytest.raises(Interrupted, match=rf"stopped by {number.name}\n  fix: go on with: this") as stopped:
            wish.obey()
    assert stopped.value.exit_code == code


def test_where_nothing_is_lost_it_is_obeyed_at_once() -> None:
    done: list[str] = []

    def work(wish: StopWish) -> None:
        with wish.at_once():
            send(signal.SIGTERM)
            done.append("too much")

    with StopWish() as wish, pytest.raises(Interrupted):
        work(wish)
    assert done == []


def test_a_signal_noted_before_is_obeyed_on_entering() -> None:
    with StopWish() as wish:
        send(signal.SIGINT)
        with pytest.raises(Interrupted), wish.at_once():
            pytest.fail("nothing is begun any more")


def test_after_such_a_place_signals_are_only_noted_again() -> None:
    with StopWish() as wish:
        with wish.at_once():
            pass
        send(signal.SIGTERM)
        assert wish.signal == signal.SIGTERM


def test_the_second_signal_acts_as_without_us() -> None:
    with StopWish() as wish:
        send(signal.SIGTERM)
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
        with pytest.raises(KeyboardInterrupt):
            send(signal.SIGINT)
        assert wish.signal == signal.SIGTERM


def test_handlers_are_put_back() -> None:
    def own(*_: object) -> None: ...

    former = signal.signal(signal.SIGTERM, own)
    try:
        with StopWish():
            assert signal.getsignal(signal.SIGTERM) is not own
        assert signal.getsignal(signal.SIGTERM) is own
    finally:
        signal.signal(signal.SIGTERM, former)


def test_outside_the_main_thread_nothing_is_caught() -> None:
    found: list[object] = []

    def work() -> None:
        with StopWish() as wish:
            wish.obey()
            found.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [signal.default_int_handler]
