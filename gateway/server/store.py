"""A validated configuration on its way from the child that compiled it to the workers that run it.

Strategy: pickled into anonymous memory (memfd) whose descriptor is passed around: one copy for all, never a file, and the
pickle never leaves the process tree that made it.
"""

import mmap
import os
import pickle

from gateway.config import Config
from gateway.errors import ConfigError
from gateway.server.channel import Message

MOST = 200  # problems; nobody reads more, and the state is pushed whole at every change


def problems_of(error: ConfigError) -> Message:
    """Return the members of a message that carry a ConfigError to another process; only the first MOST problems."""
    shown = ConfigError(error.problems[:MOST])
    more = len(error.problems) - MOST
    return {
        "problems": [problem.as_dict() for problem in shown.problems],
        "text": shown.render() + (f"\n\nand {more} more" if more > 0 else ""),
    }


def new_store() -> int:
    """Return a descriptor of anonymous memory that can be passed to other processes."""
    return os.memfd_create("crossway-config", os.MFD_CLOEXEC)


def read_config(fd: int) -> Config:
    """Return the configuration in `fd`; the position of the shared descriptor is left alone."""
    size = os.fstat(fd).st_size
    with mmap.mmap(fd, size, prot=mmap.PROT_READ) as view:
        config = pickle.loads(view)
    assert isinstance(config, Config)
    return config
