"""Tests how a command's process ends."""

import subprocess
import sys

from synthetic import ROOT

ENDING = """
import atexit, os, sys, threading, time
from voxquilt.cli.exit_status import prepare_quick_end

class Slow:
    def __del__(self):
        print("taken apart")

leave, slow = prepare_quick_end(), Slow()
atexit.register(print, "handler")

def work():
    time.sleep(0.3)
    print("thread")

threading.Thread(target=work).start()
sys.stdout.write("written, ")
leave(3)
"""


def test_exit_handlers_and_threads_are_finished_but_modules_are_not_taken_apart() -> None:
    """With the status, and everything that was written."""
    done = subprocess.run([sys.executable, "-c", ENDING], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (3, "written, thread\nhandler\n", "")


def test_output_that_nobody_reads_is_reported_as_ever() -> None:
    """By the interpreter."""
    script = "from voxquilt.cli.exit_status import prepare_quick_end\nl = prepare_quick_end(); print('x'); l(0)"
    process = subprocess.Popen([sys.executable, "-c", script], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.close()
    assert b"BrokenPipeError" in process.communicate()[1]
    assert process.returncode not in (0, 2)


def test_an_error_on_the_way_is_pythons() -> None:
    """No status was given."""
    script = "from voxquilt.cli.exit_status import prepare_quick_end\nprepare_quick_end()\nraise KeyboardInterrupt"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode not in (0, 2)
    assert "KeyboardInterrupt" in done.stderr
