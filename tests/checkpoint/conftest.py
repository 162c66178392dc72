"""Run a call as a user without privileges: root may read what nobody else may."""

import os
import shutil
import tempfile
from pathlib import Path

import pytest

from ckptdiff.errors import CkptdiffError

_NOBODY = 65534


@pytest.fixture
def public_dir():
    """A folder that every user can reach; pytest's own are closed to all but their owner."""
    path = Path(tempfile.mkdtemp(prefix="ckptdiff-test-"))
    path.chmod(0o755)
    yield path
    for folder, _, _ in os.walk(path):
        Path(folder).chmod(0o755)
    shutil.rmtree(path)


@pytest.fixture
def error_of_nobody():
    """A function that makes a call in a child process without privileges and returns its error's text."""
    return _error_of_nobody


def _error_of_nobody(call):
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        status, text = 0, ""
        try:
            if os.geteuid() == 0:
                os.setgroups([])
                os.setgid(_NOBODY)
                os.setuid(_NOBODY)
            call()
        except CkptdiffError as error:
            text = f"{type(error).__name__}: {error}"
        except OSError as error:
            status, text = 77, str(error)
        finally:
            os.write(writing, text.encode())
            os._exit(status)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        text = pipe.read()
    if os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 77:
        pytest.skip(f"privileges cannot be dropped here: {text}")
    return text
