"""Tasks that end their worker, apart from the tests: each worker in the place of a dead one repeats its imports."""

import os
import signal


def end_process(how, _):
    if how == "exit":
        os._exit(7)
    os.kill(os.getpid(), signal.SIGKILL)
