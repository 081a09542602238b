"""Silence for the model libraries: of the thread that asks for it, and of no other."""

import sys
import threading

from helpers.models.quiet import quiet


def test_what_a_library_prints_meanwhile_is_not_seen(capsys):
    with quiet():
        print("a banner")
        print("a bar", file=sys.stderr)
    print("the result")
    assert capsys.readouterr() == ("the result\n", "")


def test_another_thread_that_is_quiet_does_not_silence_this_one(capsys):
    inside, done = threading.Event(), threading.Event()

    def opens_a_model():
        with quiet():
            inside.set()
            done.wait(60)

    thread = threading.Thread(target=opens_a_model)
    thread.start()
    assert inside.wait(60)
    print("a cell's words")
    done.set()
    thread.join()
    assert capsys.readouterr().out == "a cell's words\n"
