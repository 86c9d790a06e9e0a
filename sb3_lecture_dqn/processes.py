"""Whether a process lives, so that what a dead one has left behind can be told from what a living one is at."""

import contextlib
import os
import socket


def here() -> str:
    """
    Name the place where a process number means the same process.

    :return: The host's name; with the process namespace where there is one, because containers may share their host's name
    """
    with contextlib.suppress(OSError):
        return f"{socket.gethostname()} {os.readlink('/proc/self/ns/pid')}"
    return socket.gethostname()


def is_alive(process_id: int) -> bool:
    """
    Whether there is a process of this number :func:`here`.

    :param process_id: Its number
    :return: Whether it runs, whoever's it is; always ``True`` on Windows, where asking would interrupt it
    """
    if os.name == "nt":
        return True
    try:
        os.kill(process_id, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
