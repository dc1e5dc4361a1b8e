"""Standard streams that the caller closed, or that nobody reads."""

import subprocess
import sys

CLOSED = """
import os, sys
from raytrain_adv.streams import open_closed_streams
open_closed_streams()
print("nobody hears this")
print("nor this", file=sys.stderr)
found = [os.readlink(f"/proc/self/fd/{number}") for number in range(3)]
with open(sys.argv[1], "w") as file:
    file.write(" ".join([*found, str(sys.stdout.isatty())]))
"""
UNREAD = """
import sys, time
from raytrain_adv.streams import outlast_the_reader
outlast_the_reader()
for line in range(5):
    print("line", line, flush=True)
    time.sleep(0.1)
print("ends", file=sys.stderr)
"""


def test_streams_that_the_caller_closed_are_open_to_nothing(tmp_path):
    """A run with >&- ended in a traceback of its console, and its folder was taken."""
    command = [sys.executable, "-c", CLOSED, str(tmp_path / "found")]
    subprocess.run(["sh", "-c", 'exec "$@" <&- >&- 2>&-', "sh", *command], check=True)
    assert (tmp_path / "found").read_text() == "/dev/null /dev/null /dev/null False"


def test_a_run_goes_on_when_nobody_reads_what_it_prints(tmp_path):
    """A run piped into head ended with exit code 1 after its training, a twin's before it."""
    script = tmp_path / "script.py"
    script.write_text(UNREAD)
    command = f"{sys.executable} {script} | head -n 1; echo ${{PIPESTATUS[0]}}"
    ran = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=True)
    assert ran.stdout.split("\n") == ["line 0", "0", ""]
    assert ran.stderr == "ends\n"
