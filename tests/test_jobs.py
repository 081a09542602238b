"""A process of its own: handed its job, heard to its end, and no reason to fall over when it dies before either."""

import doctest
import os

from helpers import jobs

DIES = "import sys; sys.exit('no such library')"
CUT_OFF = """
from helpers import jobs
import os, sys
channel = os.dup(1)
job, report = jobs.received(jobs.end)
print("a library's word")
report({"heard": job})
report({"said": "é"})
sys.stdout.flush()
os.write(channel, b'{"cut of')
os.kill(os.getpid(), 9)
"""


def module(folder, monkeypatch, text: str) -> str:
    """A module of that text, where a process started from here finds it."""
    (folder / "module_of_a_test.py").write_text(text, encoding="utf-8")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")]))
    return "module_of_a_test"


def test_a_process_that_dies_before_it_reads_its_job_has_a_status_and_last_words(tmp_path, monkeypatch):
    more_than_a_pipe_holds = {"rows": [0] * 100_000}
    process = jobs.start(module(tmp_path, monkeypatch, DIES), more_than_a_pipe_holds, tmp_path / "log")
    with process:
        assert list(jobs.messages(process)) == []
    assert jobs.how_it_ended(process.returncode, tmp_path / "log") == ("status 1", "no such library")


def test_messages_are_heard_until_a_process_is_killed_in_the_middle_of_one(tmp_path, monkeypatch):
    process = jobs.start(module(tmp_path, monkeypatch, CUT_OFF), {"say": "ü"}, tmp_path / "log")
    with process:
        assert list(jobs.messages(process)) == [{"heard": {"say": "ü"}}, {"said": "é"}]
    assert jobs.how_it_ended(process.returncode, tmp_path / "log")[0] == "signal 9"
    assert (tmp_path / "log").read_text() == "a library's word\n"


def test_examples_in_docstrings():
    assert doctest.testmod(jobs).failed == 0
