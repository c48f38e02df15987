# SPDX-License-Identifier: Apache-2.0
"""A signal asks once and insists the second time."""

import os
import signal
import subprocess
import sys
import time

import pytest

from mim_jax.run.interrupt import Interrupted, Interrupts


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_sets_the_flag_and_says_so(capfd, number):
    with Interrupts() as interrupts:
        assert not interrupts.asked(1)
        os.kill(os.getpid(), number)
        assert interrupts.asked(1)
    assert f"{number.name}: saving and leaving" in capfd.readouterr().err


def test_the_handlers_of_before_come_back():
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with Interrupts():
        assert signal.getsignal(signal.SIGINT) not in before
    assert before == (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM))


def test_patience_gives_the_result_or_the_error():
    with Interrupts() as interrupts:
        assert interrupts.patiently(lambda: 7) == 7
        with pytest.raises(ZeroDivisionError):
            interrupts.patiently(lambda: 1 / 0)
        with pytest.raises(TimeoutError):  # not taken for an empty wait
            interrupts.patiently(lambda: (_ for _ in ()).throw(TimeoutError()))


def test_patience_ends_soon_after_a_signal(capfd):
    with Interrupts() as interrupts:
        before = time.monotonic()
        with pytest.raises(Interrupted):
            interrupts.patiently(
                lambda: (os.kill(os.getpid(), signal.SIGTERM), time.sleep(2))
            )
        assert time.monotonic() - before < 1.5


TWICE = """
import os, signal, time
from mim_jax.run.interrupt import Interrupts
with Interrupts():
    os.kill(os.getpid(), signal.{first})
    os.kill(os.getpid(), signal.{second})
    time.sleep(30)
"""


@pytest.mark.parametrize(
    "first, second, code", [("SIGTERM", "SIGTERM", 143), ("SIGTERM", "SIGINT", 130)]
)
def test_a_second_signal_leaves_at_once(first, second, code):
    program = TWICE.format(first=first, second=second)
    done = subprocess.run([sys.executable, "-c", program], stderr=subprocess.PIPE)
    assert done.returncode == code
    assert b"Traceback" not in done.stderr
