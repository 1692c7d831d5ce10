"""Which lines of the package a command executes, in every process that it starts.

A tool that keeps its findings until a process ends has none of a process that is killed, and can't write where a
sandbox shows a read-only view: so end most processes of environments. Here a line is written once, when it is first
executed, to a file that was opened before the sandbox closed."""
import importlib.util, os, subprocess, sys
from pathlib import Path
from types import CodeType

TRACER = '''
import os, sys, threading
ROOT, left, kept = {root!r}, {{}}, []
FILE = os.open(f"{folder}/{{os.getpid()}}", os.O_WRONLY | os.O_CREAT | os.O_APPEND)

def note(code, line):
    left[id(code)].discard(line)
    try: os.write(FILE, f"{{code.co_filename[len(ROOT):]}}:{{line}}\\n".encode())
    except OSError: pass        # a process that has closed all files and waits for its end

def inside(frame, event, arg):
    lines = left.get(id(frame.f_code))
    if event == "line" and frame.f_lineno in lines: note(frame.f_code, frame.f_lineno)
    return inside if lines else None

def enter(frame, event, arg):
    code = frame.f_code
    if not code.co_filename.startswith(ROOT): return None
    if id(code) not in left:
        kept.append(code)       # its id stays its own
        left[id(code)] = {{line for *_, line in code.co_lines() if line}}
        note(code, code.co_firstlineno)
    return inside if left[id(code)] else None

sys.settrace(enter)
threading.settrace(enter)
'''


def lines_of(path: Path) -> set[int]:
    "All lines of a module that can be executed, as the compiler counts them."
    found, todo = set(), [compile(path.read_text(), str(path), "exec")]
    while todo:
        code = todo.pop()
        found |= {line for *_, line in code.co_lines() if line}
        todo += [c for c in code.co_consts if isinstance(c, CodeType)]
    return found


class Watch:
    "Runs commands of the program and knows which lines of the package they have executed."
    def __init__(self, folder: Path):
        self.folder, self.package = folder, Path(importlib.util.find_spec("moe_rl").origin).parent
        for part in ("trace", "lines"): (folder / part).mkdir()
        text = TRACER.format(root=f"{self.package}/", folder=folder / "lines")
        (folder / "trace" / "sitecustomize.py").write_text(text)

    def start(self, *args: str) -> subprocess.Popen:
        places = [self.folder / "trace", self.package.parent, os.environ.get("PYTHONPATH", "")]
        env = os.environ | dict(PYTHONPATH=os.pathsep.join(str(p) for p in places if str(p)), OMP_NUM_THREADS="1")
        return subprocess.Popen([sys.executable, "-m", "moe_rl.cli", *args], cwd=self.folder, env=env, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT)

    def executed(self) -> dict[str, set[int]]: # file below the package -> lines
        "What was seen so far."
        found = {}
        for path in (self.folder / "lines").iterdir():
            for row in path.read_text().splitlines():
                name, _, line = row.rpartition(":")
                found.setdefault(name, set()).add(int(line))
        return found
