"""Imported by a notebook's kernel: runs code in forks of its namespace, which stays as it is."""

import io
import json
import os
import select
import signal
import sys
import warnings

from IPython import get_ipython
from IPython.display import publish_display_data

JSON = "application/json"


def try_all(namespace, jobs, limit):
    """Each job's outcome, into the output of the cell that calls this."""
    publish_display_data({JSON: [in_a_fork(namespace, steps, limit) for steps in jobs]})


def in_a_fork(namespace, steps, limit):
    """What becomes of `steps`, pieces of code that run in a row, within `limit` seconds."""
    reader, writer = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the kernel's other threads, which the child lacks
        child = os.fork()
    if child == 0:
        try:
            os.setpgid(0, 0)
            os.write(writer, json.dumps(run(namespace, steps)).encode())
        finally:
            os._exit(0)

    os.close(writer)
    in_time = select.select([reader], [], [], limit)[0]
    answer = os.read(reader, 4096) if in_time else b""
    os.close(reader)
    os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    if in_time:
        return json.loads(answer or '{"error": "crash", "message": "the process died"}')
    return {"error": "timeout", "message": f"not done after {limit} s"}


def run(namespace, steps):
    """The error at which the steps end: its step, and its line there if it was raised there."""
    silence()
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(1)  # a fork has lost the pool's threads
    for number, source in enumerate(steps):
        name = f"<step {number}>"
        try:
            exec(compile(get_ipython().transform_cell(source), name, "exec"), namespace)
        except BaseException as error:
            frame = error.__traceback__
            while frame.tb_next:
                frame = frame.tb_next
            return {
                "step": number,
                "error": type(error).__name__,
                "message": str(error)[:200],
                "line": frame.tb_lineno if frame.tb_frame.f_code.co_filename == name else None,
            }
    return {"error": None}


def silence():
    """What a fork prints and shows goes nowhere."""
    sys.stdout = sys.stderr = io.StringIO()
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.dup2(nowhere, 2)
    get_ipython().display_pub.publish = lambda *arguments, **options: None
