"""Start N processes that form one JAX runtime on this machine: a template for clusters and pods.

    python benchmarks/launch.py --processes 2 --devices 2 script.py [arguments]

Every process runs `script.py`, which calls `launch.join()` before it touches a device. On a cluster
the scheduler starts the processes instead, and `jax.distributed.initialize()` finds out the rest
(Slurm, Open MPI, Cloud TPU), so that `join()` does no more than call it.

If one process ends with an error or is killed, the others are stopped within `GRACE` seconds, and
the message says which one it was: a process that waits for a dead one would wait for ever.
"""

import argparse
import os
import signal
import socket
import subprocess
import sys
import time

import jax

GRACE = 10.0
NAMES = ("COORDINATOR_ADDRESS", "NUM_PROCESSES", "PROCESS_ID")


def join() -> None:
    """Join the runtime that `launch` started, or the one that a cluster's scheduler did."""
    address, number, index = (os.environ.get(f"LAUNCH_{name}") for name in NAMES)
    if address is None:
        jax.distributed.initialize()
        return
    assert number is not None and index is not None
    jax.distributed.initialize(address, int(number), int(index))


def free_port() -> int:
    """Return a port of the loopback address that nobody listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def launch(command: list[str], processes: int, devices: int) -> int:
    """Run a command in many processes; return 0, or the exit status of the first that failed."""
    address = f"127.0.0.1:{free_port()}"
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices}"
    workers = []
    for index in range(processes):
        named = dict(zip(NAMES, (address, str(processes), str(index)), strict=True))
        env = os.environ | {f"LAUNCH_{name}": value for name, value in named.items()}
        if devices:
            env |= {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
        workers.append(subprocess.Popen([sys.executable, *command], env=env))
    status = 0
    try:
        while any(worker.poll() is None for worker in workers) and not status:
            for index, worker in enumerate(workers):
                if worker.poll():
                    status = worker.returncode
                    how = (
                        f"was killed by {signal.Signals(-status).name}" if status < 0 else "failed"
                    )
                    print(
                        f"launch: process {index} of {processes} {how}; stopping the others",
                        file=sys.stderr,
                    )
                    break
            time.sleep(0.1)
        for worker in workers:
            status = status or worker.poll() or 0
    finally:
        stop(workers)
    return status


def stop(workers: list[subprocess.Popen]) -> None:
    """Ask processes to end, and kill those that have not after half of `GRACE`."""
    for worker in workers:
        if worker.poll() is None:
            worker.terminate()
    deadline = time.monotonic() + GRACE / 2
    for worker in workers:
        try:
            worker.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            worker.kill()
            worker.wait()


def main() -> int:
    """Parse the command line and launch."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--processes", type=int, default=2, help="how many (2)")
    parser.add_argument("--devices", type=int, default=1, help="CPU devices each; 0: what there is")
    parser.add_argument("command", nargs=argparse.REMAINDER, help="script and its arguments")
    args = parser.parse_args()
    if not args.command or args.processes < 1:
        parser.error("a script and at least one process are needed")
    return abs(launch(args.command, args.processes, args.devices))


if __name__ == "__main__":
    sys.exit(main())
