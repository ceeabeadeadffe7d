"""Programs that mean harm, in a sandbox: none gets out, and none is graded as passed that does not solve its task."""

from __future__ import annotations

import json
import os
import platform
import shutil
import socket
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any, ClassVar

import pytest

from tests.leaks import nothing_left
from tests.loopback import Loopback
from tests.sandboxes import need_sandbox
from understudy import config
from understudy.errors import EngineError, RecipeError
from understudy.sandbox import SANDBOXES, Bubblewrap, Process, Program, Remote, Result, Sandbox, inside, local
from understudy.sandbox.seccomp import filter_program

pytestmark = pytest.mark.slow

TESTS = "assert square(3) == 9\nassert square(-2) == 4\nassert [square(n) for n in (0, 5)] == [0, 25]"
RIGHT = "def square(n):\n    return n * n\n"
SECRET = "correct-horse-battery-staple"


@pytest.fixture(scope="module")
def box() -> Bubblewrap:
    return need_sandbox()


@pytest.fixture
def short(box: Bubblewrap) -> Bubblewrap:
    return replace(box, cpu_s=1, wall_s=4)


def script(code: str, stdin: str = "") -> Program:
    return Program(textwrap.dedent(code), stdin)


def graded(code: str, tests: str = TESTS, names: tuple[str, ...] = ("square",)) -> Program:
    return Program(textwrap.dedent(code), tests=textwrap.dedent(tests), names=names)


# what programs may do


def test_a_program_reads_and_writes(box: Bubblewrap) -> None:
    result = box.run(script("import sys\nprint(input() * 2)\nprint('told', file=sys.stderr)", "ab\n"))
    assert (result.outcome, result.stdout, result.stderr, result.note) == ("passed", "abab\n", "told\n", "")
    assert result.seconds > 0


def test_a_failure_is_told_as_python_tells_it(box: Bubblewrap) -> None:
    result = box.run(script("def f():\n    return 1 / 0\nf()\n"))
    assert (result.outcome, result.note) == ("failed", "ZeroDivisionError: division by zero")
    assert [line.strip() for line in result.stderr.splitlines()[1:3]] == [
        'File "program.py", line 3, in <module>',
        'File "program.py", line 2, in f',
    ]
    assert "SyntaxError" in box.run(script("def")).note
    assert box.run(script("import sys; sys.exit(3)")).note == "it ended with status 3"


@pytest.mark.parametrize(
    "code",
    [
        "import threading\nt = threading.Thread(target=print)\nt.start()\nt.join()",
        "open('/tmp/a', 'w').write('a'); print(open('a').read())",
        "import random, math, re, json, collections, itertools, heapq, functools, datetime, decimal, bisect, string",
        "from dataclasses import dataclass\n@dataclass\nclass A:\n    x: int\nimport pickle\npickle.loads(pickle.dumps(A(1)))",
        "assert __name__ == '__main__'",
        "print('ä', '\\u4e2d')",
        "import os\nos._exit(0)",
    ],
)
def test_what_a_program_needs_is_there(box: Bubblewrap, code: str) -> None:
    """Threads are there but where a trainer that is root cannot run programs as nobody, who may not see its interpreter."""
    result = box.run(script(code))
    assert result.passed == (local._setup().threads or "threading" not in code), result


@pytest.mark.parametrize(
    ("value", "same"),
    [
        ("[1, -2, 10**400, True, None, 'ä\\ud800', b'x']", "=="),
        ("(1.5, float('inf'), 2j, -0.0)", "=="),
        ("list(range(-50, 50))", "=="),
        ("tuple(n / 7 for n in range(50))", "=="),
        ("[2**70, *range(50)]", "=="),
        ("[True, *range(50)]", "=="),
        ("[[*range(40)], [tuple(range(40))] * 40]", "=="),
        ("{'a': {1, 2}, (1, 2): frozenset({3}), 4: {}}", "=="),
        ("[[[]], [()], ['']]", "=="),
        ("Decimal('1.10')", "=="),
        ("Fraction(1, 3)", "=="),
        ("Counter('abca')", "== dict"),
        ("range(3)", "list"),
        ("(n for n in range(3))", "list"),
        ("map(str, [1, 2])", "list"),
        ("{'a': 1}.keys()", "list"),
        ("deque([1, 2])", "list"),
    ],
)
def test_values_arrive_as_they_are(box: Bubblewrap, value: str, same: str) -> None:
    """With their types, and back again."""
    imports = "from decimal import Decimal\nfrom fractions import Fraction\nfrom collections import Counter, deque\n"
    tests = f"wanted = {value}\nfound = make()\n"
    tests += "assert list(found) == list(wanted)" if same == "list" else "assert found == wanted\nassert same(found)"
    if same == "==":
        tests += "\nassert type(found) is type(wanted)"
    code = f"{imports}def make():\n    return {value}\ndef same(given):\n    return given == make()"
    result = box.run(graded(code, imports + tests, ("make", "same")))
    assert result.passed, result


def test_tests_may_use_objects_and_errors_of_the_program(box: Bubblewrap) -> None:
    code = """
        class Node:
            def __init__(self, value, *, left=None):
                self.value, self.left = value, left
            def __len__(self):
                return 1 + (len(self.left) if self.left else 0)
        class Odd(ValueError): pass
        LIMIT = 3
        def total(node):
            return node.value + (total(node.left) if node.left else 0)
        def even(n):
            if n % 2: raise Odd(f'{n} is odd')
            return {n: n}[n]
        def items():
            return {'nodes': [Node(1), Node(2)]}
    """
    tests = """
        root = Node(1, left=Node(2))
        root.left.left = Node(4)
        assert total(root) == 7 and len(root) == 3 and root.left.value == 2 and LIMIT == 3
        assert [node.value for node in items()['nodes']] == [1, 2]
        assert even(2) == 2
        try:
            even(3)
        except ValueError as error:
            assert str(error) == '3 is odd'
        else:
            assert False
    """
    result = box.run(graded(code, tests, ("Node", "total", "LIMIT", "even", "items")))
    assert result.passed, result


def test_tests_may_use_numpy_and_programs_may_not(box: Bubblewrap) -> None:
    tests = "import numpy\nassert numpy.allclose(square(3), 9)"
    assert box.run(graded(RIGHT, tests)).passed
    assert not box.run(graded("import numpy\n" + RIGHT, tests)).passed
    assert replace(box, packages=True, memory_mb=1024).run(graded("import numpy\n" + RIGHT, tests)).passed


def test_what_failed_is_told(box: Bubblewrap) -> None:
    notes = [
        (RIGHT.replace("* n", "+ n"), "a test failed: assert square(3) == 9"),
        ("x = 1", "a test failed: assert square(3) == 9 (NameError: name 'square' is not defined)"),
        ("import nowhere", "the program failed:  (ModuleNotFoundError: No module named 'nowhere')"),
        ("def square(n): return n + '1'", "a test failed: assert square(3) == 9 (TypeError: unsupported operand"),
        ("import os; os._exit(7)", "the program ended before its tests, with status 7"),
    ]
    for code, note in notes:
        result = box.run(graded(code))
        assert result.outcome == "failed"
        assert result.note.startswith(note), result.note


# what they may not do

OUTSIDE = {
    "fork bomb": "import os\nwhile True:\n    os.fork()",
    "one process": "import os\nif os.fork() == 0: os._exit(0)",
    "subprocess": "import subprocess\nsubprocess.run(['/bin/sh', '-c', 'id'], check=True)",
    "posix_spawn": "import os\nos.posix_spawn('/usr/bin/env', ['env'], {})",
    "multiprocessing": "import multiprocessing\np = multiprocessing.Process(target=print)\np.start()\np.join()",
    "memory": "a = []\nwhile True:\n    a.append(bytearray(2**20))",
    "one large object": "'x' * 10**10",
    "mmap": "import mmap\na = [mmap.mmap(-1, 2**30)]",
    "files in memory": "import os\nos.memfd_create('a')",
    "shared memory": "from multiprocessing import shared_memory\nshared_memory.SharedMemory(create=True, size=2**20)",
    "large file": "open('/tmp/a', 'wb').write(bytes(20 * 2**20))",
    "many files": "for n in range(100):\n    open(f'/tmp/{n}', 'wb').write(bytes(2**20))",
    "stack": "import sys\nsys.setrecursionlimit(10**9)\ndef f(n): return f(n + 1) + 1\nf(0)",
    "threads": """
        import threading, time
        for _ in range(500):
            threading.Thread(target=time.sleep, args=(1,), daemon=True).start()
    """,
    "home": "import os\nassert [f for _, _, files in os.walk(os.path.expanduser('~')) for f in files]",
    "root": "open('/x', 'w')",
    "library": "import os\nopen(os.__file__, 'a')",
    "devices": "open('/dev/shm/x', 'w')",
    "passwd": "open('/etc/passwd')",
    "shadow": "open('/etc/shadow')",
    "symlink": "import os\nos.symlink('/etc/passwd', '/tmp/a')\nopen('/tmp/a')",
    "symlink up": "import os\nos.symlink('../../../../etc/passwd', '/tmp/a')\nopen('/tmp/a')",
    "hard link": "import os\nos.link('/usr/lib/os-release', '/tmp/a')",
    "proc": "open('/proc/self/environ')",
    "proc of the parent": "import os\nopen(f'/proc/{os.getppid()}/mem')",
    "mount proc": "import ctypes\nassert ctypes.CDLL(None, use_errno=True).mount(b'proc', b'/tmp', b'proc', 0, None) == 0",
    "chroot": "import os\nos.chroot('/tmp')",
    "user namespace": "import ctypes\nassert ctypes.CDLL(None).unshare(0x10000000) == 0",
    "ptrace": "import ctypes\nassert ctypes.CDLL(None).ptrace(16, 1, 0, 0) == 0",
    "keys": """
        import ctypes, platform
        number = 250 if platform.machine() == 'x86_64' else 219
        assert ctypes.CDLL(None).syscall(number, 0, -3, 1) >= 0
    """,
    "io_uring": "import ctypes\nassert ctypes.CDLL(None).syscall(425, 8, bytes(120)) >= 0",
    "bpf": "import ctypes\nassert ctypes.CDLL(None).syscall(321, 0, bytes(128), 128) >= 0",
    "internet": "import socket\nsocket.create_connection(('1.1.1.1', 53), 2)",
    "udp": "import socket\nsocket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b'x', ('1.1.1.1', 53))",
    "unix socket": "import socket\nsocket.socket(socket.AF_UNIX).connect('/var/run/docker.sock')",
    "raise limits": "import resource\nresource.setrlimit(resource.RLIMIT_AS, (2**40, 2**40))",
    "become root": "import os\nos.setuid(0)",
    "set the clock": "import time\ntime.clock_settime(time.CLOCK_REALTIME, 0)",
    "hostname": "import socket\nsocket.sethostname('x')",
    "nice": "import os\nos.nice(-10)",
    "packages": "import numpy",
    "trainer": "import understudy",
}


@pytest.mark.parametrize("code", OUTSIDE.values(), ids=OUTSIDE)
def test_a_program_gets_nothing_that_is_not_its_own(box: Bubblewrap, code: str) -> None:
    with nothing_left():
        result = box.run(script(code))
    assert not result.passed, result
    if code in (OUTSIDE["memory"], OUTSIDE["one large object"]):
        assert result.outcome == "out of memory", result


def test_endless_programs_end(short: Bubblewrap) -> None:
    endless = {
        "while True: pass": "timed out",
        "import time; time.sleep(10**6)": "timed out",
        "import signal\nsignal.signal(signal.SIGXCPU, signal.SIG_IGN)\nwhile True: pass": "timed out",
        "import signal\nfor n in range(1, 32):\n    try: signal.signal(n, signal.SIG_IGN)\n    except OSError: pass\n"
        "while True: pass": "timed out",
        "9 ** 9 ** 9 ** 9": "timed out",
        "import re\nre.match('(a+)+b', 'a' * 60)": "timed out",
        "while True: print('x' * 1000)": "failed",
        "import os\nwhile True: os.write(2, b'x' * 1000)": "failed",
        "import atexit, time\natexit.register(time.sleep, 10**6)": "timed out",
        "import threading, time\nthreading.Thread(target=time.sleep, args=(10**6,)).start()": (
            "timed out" if local._setup().threads else "failed"
        ),
        "import os, time\nos.close(1)\nos.close(2)\ntime.sleep(10**6)": "timed out",
    }
    with nothing_left():
        results = short.run_many([script(code) for code in endless])
        # inside of a function that tests call: computing, waiting, printing, and waiting with its output closed
        called = [code for code in endless if code.startswith(("while", "import time", "import os, time"))]
        assert len(called) == 4
        calls = short.run_many([graded(f"def square(n):\n{textwrap.indent(code, '    ')}") for code in called])
    for code, result in zip(endless, results, strict=True):
        assert result.outcome == endless[code], (code, result)
        assert len(result.stdout) <= short.output_kb * 1024
    assert {result.outcome for result in calls} <= {"timed out", "failed"}, list(zip(called, calls, strict=True))


def test_the_environment_and_files_of_the_trainer_are_not_there(
    box: Bubblewrap, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("API_KEY", SECRET)
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "key").write_text(SECRET)
    (tmp_path / "key").chmod(0o644)
    code = f"""
        import os, sys
        print(dict(os.environ), sys.argv, sys.path, os.getcwd(), os.listdir('/'), os.listdir('/dev'))
        for path in ({str(tmp_path / "key")!r}, os.path.expanduser('~/key'), 'key', {__file__!r}):
            try: print(open(path).read())
            except OSError as error: print(type(error).__name__)
    """
    result = box.run(script(code))
    assert result.passed, result
    assert SECRET not in result.stdout + result.stderr
    assert str(tmp_path) not in result.stdout
    assert "FileNotFoundError\n" * 4 in result.stdout
    assert "'proc'" not in result.stdout


def test_no_descriptor_of_the_trainer_is_there(box: Bubblewrap, tmp_path: Path) -> None:
    (tmp_path / "key").write_text(SECRET)
    with open(tmp_path / "key") as left_open:
        os.set_inheritable(left_open.fileno(), True)
        code = """
            import os
            for number in range(3, 64):
                try: print(number, os.read(number, 10**6))
                except OSError: pass
        """
        for program in (script(code), graded(code + "\n" + RIGHT)):
            result = box.run(program)
            assert SECRET not in result.stdout
    assert box.run(script(code)).stdout == ""


def test_nobody_outside_can_be_reached(box: Bubblewrap) -> None:
    """Neither a server of this machine, nor the trainer's process by a signal."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        code = f"import socket\nsocket.create_connection(('127.0.0.1', {port}), 2)"
        assert not box.run(script(code)).passed
    for victim in (str(os.getpid()), "os.getppid()", "1", "-1", "0"):
        result = box.run(
            script(f"import os, signal\nos.kill({victim}, signal.SIGTERM)\nos.kill({victim}, signal.SIGKILL)")
        )
        assert isinstance(result, Result)
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as other:
        box.run(script(f"import os\nos.kill({other.pid}, 9)"))
        assert other.poll() is None
        other.kill()


def test_a_pool_takes_hundreds(short: Bubblewrap) -> None:
    """Each gets its own result, and one that hangs holds up no other for longer than its deadline."""
    programs = [script(f"print({n})") for n in range(120)]
    programs[7], programs[50] = script("while True: pass"), script("import ctypes; ctypes.string_at(0)")
    programs[60:80] = [graded(RIGHT if n % 2 else RIGHT.replace("*", "+")) for n in range(20)]
    with nothing_left():
        results = short.run_many(programs)
    for number, result in enumerate(results):
        if number == 7:
            assert result.outcome == "timed out"
        elif number == 50:
            assert result.outcome == "failed"
        elif 60 <= number < 80:
            assert result.passed == bool(number % 2), result
        else:
            assert result.stdout == f"{number}\n"
    assert short.run_many([]) == []


def test_no_orphan_is_left_to_be_adopted(box: Bubblewrap) -> None:
    """In a container where the trainer is the first process, it would be its own for good."""
    code = f"""
        import ctypes, os
        from understudy.sandbox import *
        ctypes.CDLL(None).prctl(36, 1, 0, 0, 0)  # orphans come to this process
        box = Bubblewrap(wall_s=2)
        graded = Program({RIGHT!r}, tests={TESTS!r}, names=("square",))
        for program in (graded, Program("1"), Program("import time; time.sleep(100)"), Program("while True: print(1)")):
            box.run(program)
        try:
            print(os.waitpid(-1, os.WNOHANG))
        except ChildProcessError:
            print("none")
    """
    run = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=True)
    assert run.stdout == "none\n"


def test_refused_programs(box: Bubblewrap) -> None:
    for code in ("x = 1\0", "x = '\ud800'", "x" * 2_000_000):
        result = box.run(Program(code))
        assert result.outcome == "refused"
        assert result.note


# how a grade could be forged

FORGERIES = {
    "nothing": "",
    "exit at once": "import os\nos._exit(0)",
    "exit when called": "import os\ndef square(n): os._exit(0)",
    "SystemExit": "raise SystemExit(0)",
    "SystemExit when called": "def square(n): raise SystemExit(0)",
    "KeyboardInterrupt": "def square(n): raise KeyboardInterrupt",
    "GeneratorExit": "def square(n): raise GeneratorExit",
    "StopIteration": "def square(n): raise StopIteration",
    "AssertionError": "def square(n): raise AssertionError('passed')",
    "prints passed": "print('passed'); print('OK'); import os; os.write(1, b'passed'); os.write(2, b'passed')",
    "atexit": "import atexit, os\natexit.register(os._exit, 0)",
    "thread": """
        import threading, os
        threading.Timer(0.01, os._exit, (0,)).start()
        def square(n):
            while True: pass
    """,
    "equal to all": """
        class Equal:
            __eq__ = __ge__ = __le__ = lambda *_: True
            __ne__ = lambda *_: False
            __hash__ = lambda _: 9
        def square(n): return Equal()
    """,
    "number equal to all": """
        class Equal(int):
            __eq__ = lambda *_: True
        def square(n): return Equal(1)
    """,
    "list equal to all": """
        class Equal(list):
            __eq__ = lambda *_: True
        def square(n): return Equal()
    """,
    "equal class": """
        class Meta(type):
            __eq__ = lambda *_: True
            __hash__ = type.__hash__
        class Equal(metaclass=Meta): pass
        def square(n): return Equal
    """,
    "mock": "from unittest import mock\nsquare = mock.ANY",
    "mock when called": "from unittest import mock\ndef square(n): return mock.ANY",
    "builtins": """
        import builtins
        builtins.AssertionError = type('AssertionError', (BaseException,), {'__new__': lambda *_: None})
        for name in ('assert', 'compile', 'exec', 'isinstance', 'issubclass', 'vars', 'type', 'str', 'len'):
            setattr(builtins, name, lambda *_, **__: True)
        def square(n): return True
    """,
    "names of the tests": """
        class Always:
            __eq__ = lambda *_: True
        def sorted(*_): return Always()
        def abs(*_): return 0
        same = list = len = all = isinstance = sorted
        def square(n): return 1
    """,
    "frames": """
        import sys
        def square(n):
            frame = sys._getframe()
            while frame:
                for name in list(frame.f_locals): frame.f_locals[name] = True
                for name in list(frame.f_globals):
                    if not name.startswith('__'): frame.f_globals[name] = lambda *_: ('passed', '')
                frame = frame.f_back
            return 1
    """,
    "gc": """
        import gc
        def square(n):
            for found in gc.get_objects():
                if isinstance(found, dict) and ('tests' in found or 'outcome' in found):
                    found.clear()
            return 1
    """,
    "reads the tests": """
        import gc
        # backwards, so that it does not find itself
        def square(n, back=-1):
            for found in gc.get_objects():
                if isinstance(found, (dict, list, tuple)) and ')3(erauqs tressa'[::back] in repr(found)[:10**5]:
                    return n * n
            return 1
    """,
    "tracing": """
        import sys
        def trace(frame, event, arg):
            if event == 'exception': return None
            return trace
        sys.settrace(trace)
        sys.excepthook = lambda *_: None
        def square(n): return 1
    """,
    "forges a report": """
        import os
        def sized(data): return len(data).to_bytes(4, 'big') + data
        said = b't' + (2).to_bytes(4, 'big') + b's' + sized(b'passed') + b's' + sized(b'')
        for number in range(64):
            for text in (sized(b'started\\n') + sized(said), sized(said), b'passed'):
                try: os.write(number, text)
                except OSError: pass
        os._exit(0)
    """,
    "floods the channel": """
        import os
        while True:
            for number in range(3, 9):
                try: os.write(number, b'\\xff' * 2**16)
                except OSError: pass
    """,
    "claims a long message": """
        import os
        for number in range(3, 9):
            try: os.write(number, b'\\xff' * 4)
            except OSError: pass
    """,
    "nests deeply": """
        def square(n):
            found = []
            for _ in range(900): found = [found]
            return found
    """,
    "closes everything": "import os\nos.closerange(0, 64)",
    "rewrites the tests": """
        import os
        for folder, _, files in os.walk('/'):
            for file in files:
                try: open(os.path.join(folder, file), 'w').write('')
                except OSError: pass
        for path in ('tests.py', 'inside.py', 'program.py'): open('/tmp/' + path, 'w').write('')
        def square(n): return 1
    """,
    "modules": """
        import sys
        for name in list(sys.modules):
            if name not in ('sys', 'builtins'): sys.modules[name] = None
        sys.modules['tests'] = sys.modules['__main__'] = sys
        def square(n): return 1
    """,
    "dunder main": "if __name__ == '__main__':\n    def square(n): return n * n",
    "kills the judge": """
        import os, signal
        for n in range(1, 50):
            try: os.kill(n, signal.SIGKILL)
            except OSError: pass
        def square(n): return 1
    """,
    "a string": "square = 'passed'",
    "a generator": "def square(n):\n    yield n * n",
    "recursion": "def square(n): return square(n)",
    "memory": "def square(n): return bytearray(2**31)",
    "long answer": "def square(n): return 'x' * (100 * 2**20)",
}


@pytest.mark.parametrize("code", FORGERIES.values(), ids=FORGERIES)
def test_no_forgery_is_graded_as_passed(short: Bubblewrap, code: str) -> None:
    with nothing_left():
        result = short.run(graded(code, f"{TESTS}\nassert sorted([square(2)]) == sorted([4])"))
    assert not result.passed, result
    assert result.outcome != "refused"


@pytest.mark.parametrize("error", ["StopIteration", "StopAsyncIteration", "IndexError", "GeneratorExit", "KeyError"])
def test_an_exception_ends_no_loop_of_the_tests(short: Bubblewrap, error: str) -> None:
    """Each of these tests would pass without having looked at anything."""
    tests = [
        "assert all(map(lambda pair: pair[0] == pair[1], zip(map(square, [3, 4]), [9, 16])))",
        "for found, wanted in zip(map(square, [3, 4]), [9, 16]):\n    assert found == wanted",
        "for found in square(3):\n    assert found == 9",
        "assert not [1 for found in map(square, [3]) if found != 9]",
    ]
    for test in tests:
        assert not short.run(graded(f"def square(n): raise {error}", test)).passed, test


def test_who_ends_the_program_inside_a_test_that_catches_everything_has_not_passed(short: Bubblewrap) -> None:
    tests = "try:\n    square(3)\nexcept BaseException:\n    pass\n"
    assert not short.run(graded("import os\ndef square(n): os._exit(0)", tests)).passed
    assert short.run(graded("def square(n): raise ValueError", tests)).passed


def test_a_right_program_passes_whatever_else_it_does(short: Bubblewrap) -> None:
    noise = "import sys, atexit\nprint('x' * 10**6)\nsys.stderr.write('y' * 10**6)\natexit.register(print, 1)\n"
    assert short.run(graded(noise + RIGHT)).passed


def test_a_message_of_the_wrong_form_is_refused() -> None:
    wrong = [
        b"",
        b"?",
        b"i\xff\xff\xff\xff",
        b"l\x00\x00\x00\x02N",
        b"s\x00\x00\x00\x01\xff",
        b"f\x00\x00\x00\x01x",
        b"NN",
        b"S\x00\x00\x00\x01l\x00\x00\x00\x00",
        b"c",
        b"cNN",
        b"h\x00\x00\x00\x011",
        b"l\x00\x00\x00\x01" * 100_000,
        inside.encode({"\0other": ("type", "eval")}),
        inside.encode({"\0other": 3}),
        b"P\x00\x00\x00\x03lq1",
        b"P\x00\x00\x00\x0alz12345678",
        inside.encode({"\0other": ("Decimal", "x")}),
    ]
    for data in wrong:
        with pytest.raises(ValueError, match="malformed"):
            inside.decode(data)
    with pytest.raises(TypeError, match="data only"):
        inside.encode([object()])


def test_what_runs_inside_imports_little() -> None:
    """Each import costs every program milliseconds."""
    text = Path(inside.__file__).read_text(encoding="utf-8")
    command = [sys.executable, "-I", "-S", "-c", f"{text}\nprint(*sys.modules)"]
    loaded = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    assert not {"typing", "collections", "re", "json", "enum", "functools"} & set(loaded)


# where a sandbox cannot be had


def fresh_setup(monkeypatch: pytest.MonkeyPatch) -> None:
    local._setup.cache_clear()
    monkeypatch.setattr(local, "_setup", local._setup.__wrapped__)


def test_without_bubblewrap_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    fresh_setup(monkeypatch)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    for ask in (Bubblewrap().check, lambda: Bubblewrap().run(Program("1"))):
        with pytest.raises(RecipeError, match="apt-get install bubblewrap.*type: remote"):
            ask()


def test_closed_namespaces_are_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fresh_setup(monkeypatch)
    fake = tmp_path / "bwrap"
    monkeypatch.setattr(shutil, "which", lambda name: str(fake) if name == "bwrap" else None)
    fake.write_text(
        "#!/bin/sh\n[ $1 = --help ] && echo --size && exit\necho bwrap: No permissions to create new namespace >&2\nexit 1\n"
    )
    fake.chmod(0o755)
    with pytest.raises(RecipeError, match=r"No permissions.*max_user_namespaces"):
        Bubblewrap().check()
    fake.write_text("#!/bin/sh\necho --seccomp\n")
    with pytest.raises(RecipeError, match="too old"):
        Bubblewrap().check()


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, who sees what nobody may not")
def test_where_nobody_sees_nothing_root_has_no_threads(
    box: Bubblewrap, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """As in a container whose interpreter lies in the home of root."""
    tmp_path.chmod(0o700)
    (tmp_path / "packages").mkdir()
    monkeypatch.setattr(local, "_package_folders", lambda: [str(tmp_path / "packages")])
    setup = local._setup.__wrapped__()
    assert (setup.prefix, setup.threads) == ((), False)
    monkeypatch.setattr(local, "_setup", lambda: setup)
    assert box.run(graded(RIGHT)).passed


def test_an_unknown_processor_has_no_sandbox(box: Bubblewrap, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "machine", lambda: "s390x")
    with pytest.raises(RecipeError, match="s390x"):
        box.run(Program("1"))


def test_the_filter_is_made_for_both_processors(monkeypatch: pytest.MonkeyPatch) -> None:
    for machine in ("x86_64", "aarch64"):
        monkeypatch.setattr(platform, "machine", lambda machine=machine: machine)
        with_threads, without = filter_program(threads=True), filter_program(threads=False)
        assert len(with_threads) == len(without)
        assert len(with_threads) % 8 == 0
        assert len(with_threads) // 8 < 4096  # the kernel's limit


def test_without_threads_there_is_one(box: Bubblewrap, monkeypatch: pytest.MonkeyPatch) -> None:
    """The setup of a machine where only root can be had, for whom the kernel counts no threads."""
    setup = replace(local._setup(), threads=False)
    monkeypatch.setattr(local, "_setup", lambda: setup)
    assert box.run(graded(RIGHT)).passed
    result = box.run(script("import threading\nthreading.Thread(target=print).start()"))
    assert "can't start new thread" in result.note


@pytest.mark.skipif(os.geteuid() != 0 or shutil.which("setpriv") is None, reason="needs root, to become another user")
def test_an_unprivileged_user_has_the_same_sandbox(box: Bubblewrap) -> None:
    code = "from understudy.sandbox import *; b = Bubblewrap(); print(b.check())"
    code += "; print(b.run(Program('import os; os.fork()')).outcome)"
    code += f"; print(b.run(Program({RIGHT!r}, tests={TESTS!r}, names=('square',))).outcome)"
    command = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", sys.executable, "-c", code]
    run = subprocess.run(
        command, capture_output=True, text=True, env=os.environ | {"HOME": "/nonexistent"}, check=False
    )
    unseen = ("ModuleNotFoundError: No module named 'understudy'", "Permission denied", "execvp")
    if any(said in run.stderr for said in unseen):
        pytest.skip("another user cannot read this checkout, or its interpreter")
    assert run.stdout.startswith("sandbox: bubblewrap, "), run
    assert "nobody" not in run.stdout
    assert run.stdout.split()[-2:] == ["failed", "passed"]


def test_sections_say_what_is_wrong_with_them() -> None:
    chosen = config.Choice(SANDBOXES, {}, optional=False)

    def section(**values: Any) -> Sandbox:
        found: Sandbox = config.parse_choice(chosen, values, "task.sandbox")
        return found

    assert section(type="bubblewrap") == Bubblewrap()
    assert section(type="process", unsafe=True) == Process(unsafe=True)
    wrong = [
        ({"type": "process"}, "unsafe: true"),
        ({"type": "docker"}, "bubblewrap, process, remote"),
        ({"type": "bubblewrap", "cpu_s": 0}, "cpu_s is 0"),
        ({"type": "bubblewrap", "memory_mb": 1}, "memory_mb is 1"),
        ({"type": "bubblewrap", "unsafe": True}, "unsafe: unknown key"),
        ({"type": "remote"}, "url is missing"),
        ({"type": "remote", "url": "box:80"}, "write it as"),
        ({"type": "remote", "url": "http://user:word@box"}, "environment variable"),
    ]
    for values, said in wrong:
        with pytest.raises(RecipeError, match=said):
            section(**values)


def test_a_process_is_limited_at_least(tmp_path: Path) -> None:
    box = Process(unsafe=True, cpu_s=1, wall_s=5, memory_mb=256, output_kb=64)
    assert "NONE" in box.check()
    with nothing_left():
        assert box.run(graded(RIGHT)).passed
        assert box.run(script("while True: pass")).outcome == "timed out"
        assert box.run(script("bytearray(2**31)")).outcome == "out of memory"
        assert box.run(script("while True: print('x' * 1000)")).outcome == "failed"
        assert box.run(script("import os\nos.fork()\nwhile True: pass")).outcome == "timed out"
        assert not box.run(graded(FORGERIES["forges a report"])).passed
    assert box.run(script("import os; print(*sorted(os.environ), os.listdir())")).stdout == (
        "LC_CTYPE OMP_NUM_THREADS OPENBLAS_NUM_THREADS []\n"
    )


# a sandbox behind a URL


class Fusion(BaseHTTPRequestHandler):
    """SandboxFusion's `POST /run_code`, as its source says it, without a sandbox."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    replies: ClassVar[list[tuple[int, Any]]] = []
    """Wrong replies that come first."""
    asked: ClassVar[list[dict[str, Any]]] = []

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.asked.append(body)
        status, reply = self.replies.pop(0) if self.replies else (200, self.run_code(body))
        content = json.dumps(reply).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def run_code(self, body: dict[str, Any]) -> dict[str, Any]:
        assert self.path == "/run_code"
        file = Path(self.server.folder) / f"{len(self.asked)}.py"  # type: ignore[attr-defined]
        file.write_text(body["code"])
        ran: dict[str, Any] = {"status": "Finished", "execution_time": 0.1}
        try:
            run = subprocess.run(
                [sys.executable, str(file)],
                input=body["stdin"] or "",
                capture_output=True,
                text=True,
                timeout=body["run_timeout"],
                check=False,
            )
            ran |= {"return_code": run.returncode, "stdout": run.stdout, "stderr": run.stderr}
        except subprocess.TimeoutExpired:
            ran |= {"status": "TimeLimitExceeded", "return_code": None, "stdout": "", "stderr": ""}
        passed = ran["status"] == "Finished" and ran["return_code"] == 0
        return {"status": "Success" if passed else "Failed", "message": "", "compile_result": None, "run_result": ran}

    def log_message(self, *_: object) -> None:
        """Silent."""


@pytest.fixture
def fusion(tmp_path: Path) -> Iterator[str]:
    server = Loopback(Fusion)
    server.folder = tmp_path  # type: ignore[attr-defined]
    Fusion.replies, Fusion.asked = [], []
    server.start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.close()


def test_a_remote_sandbox_runs_programs(fusion: str) -> None:
    box = Remote(url=fusion, cpu_s=2, wall_s=5)
    with nothing_left():
        assert fusion in box.check()
        assert box.run(script("print(input())", "ab")).stdout == "ab\n"
        assert Fusion.asked[-1].items() >= {"language": "python", "stdin": "ab", "memory_limit_MB": 1024}.items()
        assert box.run(script("1 / 0")).note == "ZeroDivisionError: division by zero"
        assert box.run(script("import time; time.sleep(100)")).outcome == "timed out"
        assert [result.passed for result in box.run_many([graded(RIGHT), graded("def square(n): return 1")])] == [
            True,
            False,
        ]
        assert "assert square(3) == 9" in box.run(graded("def square(n): return 1")).note


@pytest.mark.parametrize(
    "name",
    ["exit at once", "exit when called", "prints passed", "equal to all", "builtins", "frames", "forges a report"],
)
def test_no_forgery_passes_remotely(fusion: str, name: str) -> None:
    assert not Remote(url=fusion, cpu_s=2, wall_s=10).run(graded(FORGERIES[name])).passed


def test_a_program_does_not_find_the_secret_of_its_grade(fusion: str, tmp_path: Path) -> None:
    code = f"import glob\nfound = [open(path).read() for path in glob.glob({str(tmp_path / '*')!r})]\n"
    code += "def square(n):\n    return len(found)"
    result = Remote(url=fusion, wall_s=10).run(graded(code, "assert square(1) == 0"))
    assert result.passed, result


def test_a_server_that_fails_is_asked_again_and_then_named(fusion: str) -> None:
    failed = (200, {"status": "SandboxError", "message": "no pod", "run_result": None})
    box = Remote(url=fusion, max_retries=1)
    Fusion.replies = [failed]
    assert box.run(script("print(1)")).passed
    Fusion.replies = [failed, failed]
    with pytest.raises(EngineError, match="no pod"):
        box.run(script("print(1)"))
    Fusion.replies = [(422, {"detail": "code is too long"})]
    assert box.run(script("print(1)")).outcome == "refused"
    Fusion.replies = [(401, {"error": "who are you"})]
    with pytest.raises(EngineError, match="who are you"):
        box.run(script("print(1)"))
    Fusion.replies = [(200, {"hello": "world"})] * 2
    with pytest.raises(EngineError, match="no reply of SandboxFusion"):
        box.check()
