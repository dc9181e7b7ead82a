"""What differs between operating systems: how to read the peak memory of this process, and which errors say that memory has run out.

(Directories are locked with `filelock`.)
"""

import errno
import sys
from pathlib import Path


def peak_host_bytes() -> int:
    """The most memory that this process has held so far, in bytes; 0 where the system does not say."""
    if sys.platform == "win32":
        import psutil

        return int(psutil.Process().memory_info().peak_wset)
    status = Path("/proc/self/status")
    if status.exists():  # VmHWM is of this program alone; ru_maxrss also counts the process before it was replaced by it
        kib = next((line.split()[1] for line in status.read_text().splitlines() if line.startswith("VmHWM:")), None)
        if kib is not None:
            return int(kib) * 1024
    import resource

    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(used) * (1 if sys.platform == "darwin" else 1024)


def out_of_memory(error: BaseException) -> bool:
    """Whether this error says that the host or a device has no memory left."""
    import torch

    if isinstance(error, (MemoryError, torch.OutOfMemoryError)) or (isinstance(error, OSError) and error.errno == errno.ENOMEM):
        return True
    return isinstance(error, RuntimeError) and "allocate memory" in str(error)  # torch's allocator for the CPU raises a plain RuntimeError
