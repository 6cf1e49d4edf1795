"""Reasoning Gym's scorers in a process of their own, since some of them evaluate the answer.

An answer can be 7**8**9, exit() or a request for all memory. Scorer, for text_tasks.py, runs this
file with a dataset's name, pickles (answer, entry) into its stdin and reads [score, fault] as JSON
from its stdout: a line at the start and one for each answer.
"""
import json
import math
import os
import pickle
import signal
import subprocess
import sys
import threading
from contextlib import suppress

SECONDS = 5                     # for one answer
MEMORY = 4 * 2**30              # bytes of address space, where the system can limit it


class Scorer:
    """Scores answers to entries of a dataset: 0 if its scorer raises, dies or takes too long."""

    def __init__(self, name):
        self.name, self.child, self.failed, self.fault = name, None, 0, ""

    def score(self, answer, entry):
        if self.child is None:
            # a session of its own: Ctrl-C is not for it, and what it has started dies with it
            self.child = subprocess.Popen([sys.executable, __file__, self.name],
                                          stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                          start_new_session=True)
            self.child.stdout.readline()                # its imports take more than a second
        self.late, timer, reply = False, threading.Timer(SECONDS, self.expire), None
        timer.start()
        try:
            with suppress(OSError, ValueError):         # it has ended
                pickle.dump((answer, entry), self.child.stdin)
                self.child.stdin.flush()
                reply = json.loads(self.child.stdout.readline())
        finally:                        # at Ctrl-C, too: the next answer must not get this reply
            timer.cancel()
            timer.join()
            if self.late or reply is None:
                reply = 0.0, self.stop()
        score, fault = reply
        if fault:
            self.failed, self.fault = self.failed + 1, fault
        return score

    def expire(self):
        self.late = True
        self.kill()

    def kill(self):
        with suppress(OSError):
            os.killpg(self.child.pid, signal.SIGKILL) if os.name == "posix" else self.child.kill()

    def stop(self):
        """End the child, so that the next answer gets a new one. Returns why it had to end."""
        self.kill()
        status = self.child.wait()
        for pipe in (self.child.stdin, self.child.stdout):
            with suppress(OSError):
                pipe.close()
        self.child = None
        return f"it took over {SECONDS} s" if self.late else f"its process ended ({status})"

    def told(self):
        """One line on the answers since the last call that could not be scored, or ""."""
        line = (f"answers scored 0 because Reasoning Gym's scorer failed: {self.failed}, the last "
                f"with: {self.fault}" if self.failed else "")
        self.failed, self.fault = 0, ""
        return line


def serve(name):
    """The child: scores until stdin ends."""
    requests, replies = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "w")
    null = os.open(os.devnull, os.O_RDWR)
    for standard in (0, 1, 2):              # what an answer reads or prints is no message
        os.dup2(null, standard)
    import reasoning_gym
    data, process = reasoning_gym.create_dataset(name, seed=0, size=1), os.getpid()
    with suppress(ImportError, ValueError, OSError):
        import resource
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    alarm = getattr(signal, "alarm", abs)                                   # Windows has none
    print(json.dumps("ready"), file=replies, flush=True)
    while True:
        try:
            answer, entry = pickle.load(requests)
        except EOFError:
            return
        alarm(2 * SECONDS)                  # for a child whose Scorer was killed
        reply = grade(data, answer, entry)
        alarm(0)
        if os.getpid() != process:          # the answer has forked
            os._exit(0)
        print(json.dumps(reply), file=replies, flush=True)


def grade(data, answer, entry):
    try:
        score = float(data.score_answer(answer, entry))
        return (score, "") if math.isfinite(score) else (0.0, f"a score of {score}")
    except BaseException as error:          # exit() raises SystemExit
        return 0.0, type(error).__name__


if __name__ == "__main__":
    serve(sys.argv[1])
