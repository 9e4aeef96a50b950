"""Signals during a training: the first one lets it save, however long that takes; the second one ends it."""

import os
import signal
import threading
import time

import pytest

from avsi_jax.runtime import signals


@pytest.fixture
def exits(monkeypatch):
    """The codes with which the process would have ended."""
    codes = []
    monkeypatch.setattr(os, "_exit", codes.append)
    return codes


@pytest.fixture
def messages():
    return []


@pytest.fixture
def stop_signals(messages):
    installed = signals.StopSignals(messages.append).install()
    yield installed
    installed.uninstall()


def send_and_wait(messages, count):
    """Sends SIGTERM to this process and waits until `count` messages were logged; pytest's own limit ends a test that hangs."""
    os.kill(os.getpid(), signal.SIGTERM)
    while len(messages) < count:
        time.sleep(0.01)


def test_a_training_may_take_any_time_to_save(exits, messages, stop_signals, monkeypatch):
    """Every timer ends at once here, as if the last step and the save took for ever on a busy machine."""
    started, start = [], threading.Timer.__init__

    def at_once(self, interval, *args, **kwargs):
        started.append(self)
        start(self, 0, *args, **kwargs)

    monkeypatch.setattr(threading.Timer, "__init__", at_once)
    stop_signals.leave_to_loop()
    send_and_wait(messages, 1)
    for timer in started:
        timer.join()
    assert stop_signals.received == signal.SIGTERM and not exits and "saving" in messages[0]


def test_a_second_signal_ends_the_process(exits, messages, stop_signals, monkeypatch):
    monkeypatch.setattr(signals, "ECHO_S", 0.0)
    stop_signals.leave_to_loop()
    send_and_wait(messages, 1)
    send_and_wait(messages, 2)
    while not exits:
        time.sleep(0.01)
    assert exits == [143] and "again" in messages[1]


def test_a_signal_before_the_first_step_ends_the_process(exits, messages, stop_signals):
    send_and_wait(messages, 1)
    while not exits:
        time.sleep(0.01)
    assert exits[0] == 143 and "nothing to save" in messages[0]
