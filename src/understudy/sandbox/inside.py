"""Runs inside a sandbox: a program, or the tests that call its functions from a process of their own.

The text of this file is handed to `python -c` there, so it imports nothing of the package, and little else: each import
costs every program milliseconds. A program and its tests never share a process. The tests ask for values by a format of
builtin types only, so that no object of the program, with an `__eq__` of its own, is ever compared.
"""

from __future__ import annotations

import os
import sys
from os import _exit as end_now

TYPE_CHECKING = False
if TYPE_CHECKING:
    # these two take longer than all else of a short program
    from collections.abc import Iterator
    from typing import Any

MAX_MESSAGE_BYTES = 64 * 2**20
"""Longer messages from the program end its tests."""
MAX_NOTE_CHARS = 300
STARTED = b"started\n"
"""First on the channel of what runs here; without it, the sandbox did not work."""
TAGGED: dict[type[Any], bytes] = {list: b"l", tuple: b"t", set: b"S", frozenset: b"Z"}
TYPES: tuple[type[Any], ...] = (bool, int, float, str, bytes, tuple, list, dict, set, frozenset, complex)
MIN_PACKED = 32
"""Numbers in a list from which on they are packed."""
MADE: dict[int, type[Any]] = {tag[0]: kind for kind, tag in TAGGED.items()}


class Ended(BaseException):
    """The other side is gone."""


def encode(value: Any, handle: Any = None) -> bytes:
    """A value of builtin types as bytes. `handle(value)`: a number that stands for any other. Raises TypeError without one."""
    parts = list[bytes]()
    _encode(value, handle, parts)
    return b"".join(parts)


def framed(data: bytes) -> bytes:
    """A message as a channel carries it."""
    return _sized(b"", data)


def _sized(tag: bytes, content: bytes) -> bytes:
    return tag + len(content).to_bytes(4, "big") + content


def _encode(value: Any, handle: Any, parts: list[bytes]) -> None:
    kind = type(value)
    if value is None:
        parts.append(b"N")
    elif kind is bool:
        parts.append(b"T" if value else b"F")
    elif kind is int:
        parts.append(_sized(b"i", value.to_bytes(value.bit_length() // 8 + 1, "big", signed=True)))
    elif kind is float:
        parts.append(_sized(b"f", value.hex().encode()))
    elif kind is str:
        parts.append(_sized(b"s", value.encode("utf-8", "surrogatepass")))
    elif kind is bytes:
        parts.append(_sized(b"b", value))
    elif (kind is list or kind is tuple) and len(value) >= MIN_PACKED and (packed := _packed(value)):
        parts.append(packed)
    elif kind in TAGGED:
        parts.append(TAGGED[kind] + len(value).to_bytes(4, "big"))
        for item in value:
            _encode(item, handle, parts)
    elif kind is dict:
        parts.append(b"d" + len(value).to_bytes(4, "big"))
        for key, item in value.items():
            _encode(key, handle, parts)
            _encode(item, handle, parts)
    elif kind is complex:
        parts.append(b"c")
        _encode(value.real, handle, parts)
        _encode(value.imag, handle, parts)
    elif kind is type and value in TYPES:
        _encode({_OTHER: ("type", value.__name__)}, handle, parts)
    elif kind is Remote:
        parts.append(_sized(b"h", str(value._number).encode()))
    elif (plain := _plain(value)) is not value:
        _encode(plain, handle, parts)
    elif handle is None:
        raise TypeError(f"tests can hand over data only, not {kind.__name__}")
    else:
        parts.append(_sized(b"h", str(handle(value)).encode()))


def _packed(value: Any) -> bytes:
    """Many numbers of one type at once, which is a hundred times faster; empty where they are not."""
    code = {int: "q", float: "d"}.get(next(iter(kinds))) if len(kinds := set(map(type, value))) == 1 else None
    if code is None:
        return b""
    from array import array

    try:
        numbers = array(code, value).tobytes()
    except OverflowError:
        return b""
    return _sized(b"P", TAGGED[type(value)] + code.encode() + numbers)


def _plain(value: Any) -> Any:
    """The builtin value in a subclass of its type, or in a number of the standard library or numpy; else the value itself."""
    for kind in TYPES:
        if isinstance(value, kind):
            return kind(value)
    if isinstance(value, bytearray):
        return bytes(value)
    home = type(value).__module__
    if home in ("decimal", "fractions") and type(value).__name__ in ("Decimal", "Fraction"):
        return {_OTHER: (type(value).__name__, str(value))}
    if home == "collections" and type(value).__name__ == "deque":
        return list(value)
    return value.tolist() if home == "numpy" and hasattr(value, "tolist") else value


_OTHER = "\0other"
"""The key of a dictionary that stands for a Decimal, a Fraction or a builtin type."""


def decode(data: bytes, find: Any = None) -> Any:
    """The value in bytes that `encode` wrote. `find(number)`: what a handle stands for. Raises ValueError for other bytes."""
    try:
        value, end = _decode(data, 0, find)
    except Exception as error:  # whatever the program wrote
        raise ValueError(f"a malformed value: {error}") from None
    if end != len(data):
        raise ValueError("a malformed value: something follows it")
    return value


def _decode(data: bytes, at: int, find: Any) -> tuple[Any, int]:
    tag = data[at]
    at += 1
    if tag == 78:  # N
        return None, at
    if tag in (84, 70):  # T, F
        return tag == 84, at
    if tag == 99:  # c
        real, at = _decode(data, at, find)
        imag, at = _decode(data, at, find)
        return complex(real, imag), at
    size = int.from_bytes(data[at : at + 4], "big")
    at += 4
    if size > len(data) - at:
        raise ValueError("a malformed value: it is cut off")
    if tag in MADE:
        items = []
        for _ in range(size):
            item, at = _decode(data, at, find)
            items.append(item)
        return (items if tag == 108 else MADE[tag](items)), at
    if tag == 100:  # d
        made = {}
        for _ in range(size):
            key, at = _decode(data, at, find)
            made[key], at = _decode(data, at, find)
        return (_other(*made[_OTHER]) if list(made) == [_OTHER] else made), at
    content = data[at : at + size]
    at += size
    if tag == 80:  # P
        from array import array

        numbers = array(chr(content[1]))
        numbers.frombytes(content[2:])
        return MADE[content[0]](numbers), at
    if tag == 105:  # i
        return int.from_bytes(content, "big", signed=True), at
    if tag == 102:  # f
        return float.fromhex(content.decode("ascii")), at
    if tag == 115:  # s
        return content.decode("utf-8", "surrogatepass"), at
    if tag == 98:  # b
        return content, at
    if tag == 104 and find is not None:  # h
        return find(int(content)), at
    raise ValueError(f"a malformed value: no type {tag}")


def _other(kind: str, text: str) -> Any:
    if kind == "type":
        return {made.__name__: made for made in TYPES}[text]
    if kind == "Decimal":
        from decimal import Decimal

        return Decimal(text)
    from fractions import Fraction

    return Fraction(text)


class Channel:
    """Messages over a socket."""

    def __init__(self, number: int) -> None:
        self.number = number

    def send(self, data: bytes) -> None:
        """Raises Ended."""
        left = memoryview(framed(data))
        try:
            while left:
                left = left[os.write(self.number, left) :]
        except OSError:
            raise Ended from None

    def receive(self) -> bytes:
        """Raises Ended, also for a message that is too long."""
        size = int.from_bytes(self._read(4), "big")
        if size > MAX_MESSAGE_BYTES:
            raise Ended
        return self._read(size)

    def _read(self, size: int) -> bytes:
        parts = []
        while size:
            try:
                part = os.read(self.number, min(size, 2**20))
            except OSError:
                part = b""
            if not part:
                raise Ended
            parts.append(part)
            size -= len(part)
        return b"".join(parts)


def limit(limits: dict[str, int]) -> None:
    """Sets hard limits, which a program cannot raise; one below 0 is none."""
    import resource

    cpu_s = limits["cpu_s"]
    for name, soft, hard in (
        # a program may handle the signal at the first, not the one at the second
        ("CPU", cpu_s, cpu_s + 1),
        ("AS", limits["memory"], limits["memory"]),
        ("FSIZE", limits["file"], limits["file"]),
        ("NPROC", limits["processes"], limits["processes"]),
        ("NOFILE", 64, 64),
        ("CORE", 0, 0),
        ("MEMLOCK", 0, 0),
        ("MSGQUEUE", 0, 0),
    ):
        if hard < 0:
            continue
        number = getattr(resource, f"RLIMIT_{name}")
        top = resource.getrlimit(number)[1]
        if top != resource.RLIM_INFINITY:
            soft, hard = min(soft, top), min(hard, top)
        resource.setrlimit(number, (soft, hard))


def module(name: str) -> dict[str, Any]:
    """The namespace of a new module: dataclasses and pickle look for it by its name."""
    made = type(sys)(name)
    sys.modules[name] = made
    return made.__dict__


def serve(code: str, channel: Channel) -> None:
    """Runs a program, then answers for what it has defined until nobody asks any more."""
    channel.send(STARTED)
    objects: list[Any] = []
    numbers: dict[int, int] = {}

    def handle(value: Any) -> int:
        if id(value) not in numbers:
            numbers[id(value)] = len(objects)
            objects.append(value)
        return numbers[id(value)]

    names: dict[str, Any] = {}
    try:
        names = module("solution")
        exec(compile(code, "program.py", "exec"), names)  # noqa: S102 (what this process is for)
        reply = encode(("ok", None))
    except BaseException as error:
        reply = failure(error)
    channel.send(reply)
    while True:
        try:
            verb, *given = decode(channel.receive(), objects.__getitem__)
        except Ended:
            end_now(0)
        try:
            reply = encode(("ok", answer(verb, given, names)), handle)
        except BaseException as error:
            reply = failure(error)
        channel.send(reply)


def answer(verb: str, given: list[Any], names: dict[str, Any]) -> Any:
    """One operation that a test asks of an object of the program."""
    if verb == "get":
        return names[given[0]]
    if verb == "call":
        return given[0](*given[1], **given[2])
    if verb == "attribute":
        return getattr(given[0], given[1])
    if verb == "set attribute":
        setattr(*given)
        return None
    if verb == "set item":
        given[0][given[1]] = given[2]
        return None
    if verb == "item":
        return given[0][given[1]]
    plain: dict[str, Any] = {"length": len, "iterate": iter, "next": next, "text": str, "name": repr, "truth": bool}
    return plain[verb](given[0])


def failure(error: BaseException) -> bytes:
    """An exception as a reply: the names of its classes, and what it says."""
    try:
        said = str(error)[:MAX_NOTE_CHARS]
    except BaseException:
        said = ""
    return encode(("error", [kind.__name__ for kind in type(error).__mro__], said))


class Remote:
    """An object of the program, as its tests see it. It equals itself only: a program does not say what is equal."""

    _number: int
    _ask: Any

    def __init__(self, number: int, ask: Any) -> None:
        object.__setattr__(self, "_number", number)
        object.__setattr__(self, "_ask", ask)

    def __call__(self, *args: Any, **named: Any) -> Any:
        return self._ask("call", self, args, named)

    def __getattr__(self, name: str) -> Any:
        return self._ask("attribute", self, name)

    def __setattr__(self, name: str, value: Any) -> None:
        self._ask("set attribute", self, name, value)

    def __getitem__(self, key: Any) -> Any:
        return self._ask("item", self, key)

    def __setitem__(self, key: Any, value: Any) -> None:
        self._ask("set item", self, key, value)

    def __len__(self) -> int:
        return int(self._ask("length", self))

    def __iter__(self) -> Iterator[Any]:
        iterator = self._ask("iterate", self)
        while True:
            try:
                yield self._ask("next", iterator)
            except Exhausted:
                return

    def __next__(self) -> Any:
        try:
            return self._ask("next", self)
        except Exhausted:
            raise StopIteration from None

    def __bool__(self) -> bool:
        return self._ask("truth", self) is True

    def __str__(self) -> str:
        return str(self._ask("text", self))

    def __repr__(self) -> str:
        return str(self._ask("name", self))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Remote) and other._number == self._number

    def __hash__(self) -> int:
        return self._number


class Exhausted(Exception):  # noqa: N818 (as StopIteration)
    """The end of an iterator. A StopIteration of the program's own would end the loops of its tests early."""


class ProgramError(Exception):
    """An exception of the program that is none of Python's."""


def judge(tests: str, names: list[str], channel: Channel, report: Channel) -> None:
    """Runs tests against the program at the other end, and reports once whether all of them passed."""
    report.send(STARTED)
    remotes = dict[int, Remote]()

    def find(number: int) -> Remote:
        return remotes.setdefault(number, Remote(number, ask))

    def ask(verb: str, *given: Any) -> Any:
        channel.send(encode((verb, *given)))
        return read(verb)

    def read(verb: str = "") -> Any:
        reply = decode(channel.receive(), find)
        if type(reply) is not tuple or len(reply) not in (2, 3):
            raise ValueError("a malformed reply")
        if reply[0] == "ok":
            return reply[1]
        kinds, said = reply[1:]
        if verb == "next" and "StopIteration" in kinds:
            raise Exhausted
        for name in kinds:
            kind = vars(builtins).get(name)
            if isinstance(kind, type) and issubclass(kind, Exception) and name not in _LOOPS_END:
                # not the constructor of those that want several arguments
                error = kind.__new__(kind)
                error.args = (said,)
                raise error
        raise ProgramError(f"{kinds[0] if kinds else '?'}: {said}")

    import builtins

    outcome, note, source = "passed", "", tests.splitlines()
    try:
        if channel.receive() != STARTED:
            raise ValueError("a malformed reply")
        stage = "the program failed"
        try:
            read()
            namespace = module("tests")
            for name in names:
                try:
                    namespace[name] = ask("get", name)
                except KeyError:
                    # a test that uses it fails
                    continue
            stage = "a test failed"
            exec(compile(tests, "tests.py", "exec"), namespace)  # noqa: S102 (what this process is for)
            # a test may catch everything: whoever ended the program in it has passed nothing
            ask("truth", None)
        except Ended:
            outcome, note = "ended", "the program ended before its tests"
        except BaseException as error:
            outcome = "memory" if isinstance(error, MemoryError) else "failed"
            lines, trace = list[int](), error.__traceback__
            while trace is not None:
                if trace.tb_frame.f_code.co_filename == "tests.py":
                    lines.append(trace.tb_lineno)
                trace = trace.tb_next
            shown = source[lines[-1] - 1].strip() if lines else ""
            said = f"{type(error).__name__}: {str(error)[:MAX_NOTE_CHARS]}".removesuffix(": ")
            note = f"{stage}: {shown[:MAX_NOTE_CHARS]}" + ("" if type(error) is AssertionError else f" ({said})")
    except Ended:
        outcome, note = "not started", "the program's process did not start"
    report.send(encode((outcome, note)))


_LOOPS_END = ("StopIteration", "StopAsyncIteration", "Exception")


def main() -> None:
    """The arguments are the role, and the descriptors of the job and of two channels."""
    role, job, channel, report = sys.argv[1], *map(Channel, map(int, sys.argv[2:5]))
    told = decode(job.receive())
    os.close(job.number)
    limit(told["limits"])
    sys.path += told["packages"]
    # as the program itself would find it
    sys.argv[1:] = []
    sys.setrecursionlimit(max(sys.getrecursionlimit(), 3000))
    if hasattr(sys, "set_int_max_str_digits"):
        sys.set_int_max_str_digits(0)
    if role == "serve":
        serve(told["code"], channel)
    elif role == "judge":
        judge(told["tests"], told["names"], channel, report)
        end_now(0)
    else:
        report.send(STARTED)
        os.close(report.number)
        # a module of its own takes the place of this one
        try:
            exec(compile(told["code"], "program.py", "exec"), module("__main__"))  # noqa: S102 (what this process is for)
        except SystemExit:
            raise
        except BaseException as error:
            # without the line above
            shown = error.with_traceback(error.__traceback__ and error.__traceback__.tb_next)
            sys.excepthook(type(error), shown, shown.__traceback__)
            sys.exit(1)


if __name__ == "__main__" and len(sys.argv) == 5:
    main()
