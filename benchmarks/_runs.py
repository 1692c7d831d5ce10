"""Runs of the program as a user starts them, watched from outside: time, memory, figures of their files."""
import signal, subprocess, sys, threading, time
from pathlib import Path
import psutil
from moe_rl.rl.log import read_lines


def pss(process: psutil.Process) -> int:
    "Proportional set size of a process and its descendants, in bytes: shared pages are counted once."
    total = 0
    for p in [process, *process.children(recursive=True)]:
        try: total += p.memory_full_info().pss
        except (psutil.NoSuchProcess, psutil.AccessDenied): pass
    return total


class Run:
    "One `moe-rl run`, with the peak of its memory."
    def __init__(self, folder: Path, *args: str, echo: bool = True):
        self.folder, self.args, self.echo = Path(folder), args, echo

    def start(self):
        "Start the command; its output goes to FOLDER.log."
        self.began, self.peak = time.monotonic(), 0
        self.folder.parent.mkdir(parents=True, exist_ok=True)
        out = self.folder.with_suffix('.log').open('ab')
        self.process = subprocess.Popen([sys.executable, '-m', 'moe_rl.cli', 'run', *self.args], stdout=out, stderr=out)
        out.close()
        threading.Thread(target=self.watch, daemon=True).start()
        return self

    def watch(self):
        process = psutil.Process(self.process.pid)
        while self.process.poll() is None:
            try: self.peak = max(self.peak, pss(process))
            except psutil.NoSuchProcess: return
            time.sleep(1)

    def wait(self, timeout: float | None = None) -> int:
        "Exit code; kills the command and raises when it takes longer than `timeout`."
        try: code = self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            self.kill()
            raise RuntimeError(f'{self.folder}: no end after {timeout:.0f} s') from None
        self.seconds = time.monotonic() - self.began
        return code

    def kill(self):
        "SIGKILL to the command; its workers notice by themselves."
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()

    def lines(self, name: str) -> list[dict]: return read_lines(self.folder / name)
    @property
    def evals(self): return self.lines('evals.jsonl')
    @property
    def metrics(self): return self.lines('metrics.jsonl')


def finish(run: Run, timeout: float) -> Run:
    "Start, wait, and raise with the log's end when it failed."
    code = run.start().wait(timeout)
    if code:
        raise RuntimeError(f'{run.folder} ended with code {code}: ' + run.folder.with_suffix('.log').read_text()[-600:])
    if run.echo:
        e = run.evals
        print(f'{run.folder.name}: {e[0]["exact"]:.3f} -> {e[-1]["exact"]:.3f} in {run.seconds/60:.2f} min, '
              f'{len(run.metrics)} steps, peak {run.peak/2**30:.2f} GiB', flush=True)
    return run


def folders(root: Path, name: str) -> Path:
    "A fresh folder below runs/ for a bench."
    import shutil
    path = root / 'runs' / 'bench' / name
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir(parents=True)
    return path
