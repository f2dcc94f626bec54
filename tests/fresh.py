"""Scripts in a process that has imported PyTorch and Transformers, and nothing of this package.

A new interpreter would take five seconds for these imports each time; here one of a worker does them, and each script has a copy of it.
"""

import multiprocessing
import os
import traceback

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["torch", "torch._dynamo", "transformers"])


def _execute(pipe, script, names, environment):
    os.environ.clear()
    os.environ.update(environment)
    try:
        exec(script, names)
        pipe.send((names.get("found"), None))
    except BaseException:
        pipe.send((None, traceback.format_exc()))


def run_fresh(script, environment=None, **names):
    "Execute `script` with the given names, and `environment` in addition to this process's; return what it calls `found`."
    ours, theirs = CONTEXT.Pipe(duplex=False)
    process = CONTEXT.Process(target=_execute, args=(theirs, script, names, {**os.environ, **(environment or {})}))
    process.start()
    theirs.close()
    found, error = ours.recv()
    process.join()
    assert error is None, error
    return found
