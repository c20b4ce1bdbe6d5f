"""How does memory that was freed go back to the system, instead of staying with this process's allocator?"""

import ctypes

# mallopt's parameter, see mallopt(3).
_M_MMAP_THRESHOLD = -3
# Activations and weights are larger, what Python allocates is smaller.
RETURNED_BYTES = 2**20


def return_freed_blocks(smallest_bytes: int = RETURNED_BYTES) -> bool:
    """Let blocks of host memory from ``smallest_bytes`` on go back to the system as soon as they are freed.

    glibc raises that size by itself, up to 32 MiB, after the first larger blocks were freed. Activations and gathered
    weights, which come and go in changing sizes, then leave holes that stay with the process. Each block that
    goes back costs page faults when it comes again. What is on a GPU has an allocator of its own.

    Returns:
        Whether the C library knows the setting (glibc does).
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return False
    return bool(mallopt(_M_MMAP_THRESHOLD, smallest_bytes))
