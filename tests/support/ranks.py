"""Starts a script on some ranks of this host and waits: `ranks.py <ranks> <script> <arguments>`.

It does what tests need of torchrun, without the seconds that importing it takes. When a rank fails, the others are
ended, and so are all of them when this process is told to end; the status is that of the first one that failed.
"""

import os
import signal
import socket
import subprocess
import sys
import time


def main() -> int:
    """Returns the status."""
    ranks, *command = sys.argv[1:]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    group = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks}
    processes = [
        subprocess.Popen([sys.executable, *command], env={**os.environ, **group, "RANK": rank, "LOCAL_RANK": rank})
        for rank in map(str, range(int(ranks)))
    ]
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    try:
        while any(process.poll() is None for process in processes) and not any(p.returncode for p in processes):
            time.sleep(0.02)
        return next((process.returncode for process in processes if process.returncode), 0)
    finally:
        for process in processes:
            process.kill()
            process.wait()


if __name__ == "__main__":
    sys.exit(main())
