"""The system calls that a program in a sandbox may not make, as a filter for the kernel (seccomp, classic BPF).

What a program for one task never needs: to start processes, to look into others, to make namespaces or sockets, to mount, and
to ask for memory that no limit counts. Where the kernel or the processor is unknown there is no filter, and no sandbox.
"""

from __future__ import annotations

import errno
import platform
import struct

_MACHINES = {"x86_64": (0xC000003E, 0), "aarch64": (0xC00000B7, 1)}
"""The audit architecture, and the column of `_DENIED`."""
_DENIED: dict[str, tuple[int | None, int | None]] = {
    # other processes, and starting them; a thread is a `clone` with a flag
    "fork": (57, None),
    "vfork": (58, None),
    "ptrace": (101, 117),
    "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271),
    "kcmp": (312, 272),
    "pidfd_open": (434, 434),
    "pidfd_getfd": (438, 438),
    # namespaces and file systems
    "unshare": (272, 97),
    "setns": (308, 268),
    "mount": (165, 40),
    "umount2": (166, 39),
    "pivot_root": (155, 41),
    "chroot": (161, 51),
    "open_tree": (428, 428),
    "move_mount": (429, 429),
    "fsopen": (430, 430),
    "fsconfig": (431, 431),
    "fsmount": (432, 432),
    "fspick": (433, 433),
    "mount_setattr": (442, 442),
    "name_to_handle_at": (303, 264),
    "open_by_handle_at": (304, 265),
    "fanotify_init": (300, 262),
    "quotactl": (179, 60),
    "quotactl_fd": (443, 443),
    "swapon": (167, 224),
    "swapoff": (168, 225),
    # the network: its namespace is empty, and nothing else needs a socket either
    "socket": (41, 198),
    # parts of the kernel with a history
    "bpf": (321, 280),
    "perf_event_open": (298, 241),
    "userfaultfd": (323, 282),
    "io_uring_setup": (425, 425),
    "io_uring_enter": (426, 426),
    "io_uring_register": (427, 427),
    "keyctl": (250, 219),
    "add_key": (248, 217),
    "request_key": (249, 218),
    "personality": (135, 92),
    "modify_ldt": (154, None),
    "iopl": (172, None),
    "ioperm": (173, None),
    # the machine
    "kexec_load": (246, 104),
    "kexec_file_load": (320, 294),
    "init_module": (175, 105),
    "finit_module": (313, 273),
    "delete_module": (176, 106),
    "reboot": (169, 142),
    "acct": (163, 89),
    "syslog": (103, 116),
    "settimeofday": (164, 170),
    "clock_settime": (227, 112),
    "adjtimex": (159, 171),
    "clock_adjtime": (305, 266),
    # memory beside the address space, which alone is limited
    "memfd_create": (319, 279),
    "memfd_secret": (447, 447),
    "shmget": (29, 194),
    "msgget": (68, 186),
    "semget": (64, 190),
    "mq_open": (240, 180),
}
_CLONE, _CLONE3 = (56, 220), 435
_CLONE_THREAD = 0x00010000
_X32 = 0x40000000
"""Numbers from here on are those of x86's other table of calls."""

_LOAD, _IS, _FROM, _HAS, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
_ALLOW, _KILL = 0x7FFF0000, 0x80000000
_NUMBER_AT, _ARCH_AT, _FIRST_ARGUMENT_AT = 0, 4, 16


def filter_program(*, threads: bool) -> bytes:
    """The compiled filter for this machine, as `bwrap --seccomp` reads it. Denied calls fail with EPERM.

    `threads`: false denies these too. Raises ValueError for a processor whose calls are not known.
    """
    machine = platform.machine()
    if machine not in _MACHINES:
        raise ValueError(f"the system calls of {machine} are not known here, only those of {' and '.join(_MACHINES)}")
    arch, column = _MACHINES[machine]

    def fail(number: int) -> tuple[int, int, int, int]:
        return (_RETURN, 0, 0, 0x00050000 | number)

    code = [(_LOAD, 0, 0, _ARCH_AT), (_IS, 1, 0, arch), (_RETURN, 0, 0, _KILL), (_LOAD, 0, 0, _NUMBER_AT)]
    code += [(_FROM, 0, 1, _X32), fail(errno.ENOSYS)]
    for numbers in _DENIED.values():
        if (denied := numbers[column]) is not None:
            code += [(_IS, 0, 1, denied), fail(errno.EPERM)]
    # its flags lie in memory, where no filter can read them; the C library then takes `clone`
    code += [(_IS, 0, 1, _CLONE3), fail(errno.ENOSYS)]
    code += [(_IS, 0, 3, _CLONE[column]), (_LOAD, 0, 0, _FIRST_ARGUMENT_AT)]
    code += [(_HAS, int(threads), 0, _CLONE_THREAD), fail(errno.EPERM)]
    code += [(_RETURN, 0, 0, _ALLOW)]
    return b"".join(struct.pack("=HBBI", *instruction) for instruction in code)
