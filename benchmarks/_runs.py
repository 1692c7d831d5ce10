"""Runs of the program as a user starts them, watched from outside: time, memory, figures of their files. And several
side by side, each on cores of its own."""
import argparse, json, os, queue, signal, subprocess, sys, threading, time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
import psutil
from moe_rl.rl.log import read_lines

GOAL = .9 # held-out share of exact answers
# Until a run is there: evaluations are near enough to tell 1.3 x the steps from 1, and no clock ends a run on
# a machine that others use, too.
UNTIL = ("--rl.stop_at", str(GOAL), "--rl.seconds", "0", "--eval.every", "25")


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
        out = self.folder.with_suffix(".log").open("ab")
        self.process = subprocess.Popen([sys.executable, "-m", "moe_rl.cli", "run", *self.args], stdout=out, stderr=out)
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
            raise RuntimeError(f"{self.folder}: no end after {timeout:.0f} s") from None
        self.seconds = time.monotonic() - self.began
        return code

    def kill(self):
        "SIGKILL to the command; its workers notice by themselves."
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()

    def lines(self, name: str) -> list[dict]: return read_lines(self.folder / name)
    @property
    def evals(self): return self.lines("evals.jsonl")
    @property
    def metrics(self): return self.lines("metrics.jsonl")


def finish(run: Run, timeout: float) -> Run:
    "Start, wait, and raise with the log's end when it failed."
    code = run.start().wait(timeout)
    if code:
        raise RuntimeError(f"{run.folder} ended with code {code}: " + run.folder.with_suffix(".log").read_text()[-600:])
    if run.echo:
        e = run.evals
        print(f'{run.folder.name}: {e[0]["exact"]:.3f} -> {e[-1]["exact"]:.3f} in {run.seconds/60:.2f} min, '
              f'{len(run.metrics)} steps, peak {run.peak/2**30:.2f} GiB', flush=True)
    return run


def folders(root: Path, name: str) -> Path:
    "A fresh folder below runs/ for a bench."
    import shutil
    path = root / "runs" / "bench" / name
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir(parents=True)
    return path


class Lanes(ThreadPoolExecutor):
    "So many threads, each on cores of its own where there are enough; what a thread starts stays on them."
    def __init__(self, jobs: int, cores: int = 2):
        mine, sets = sorted(os.sched_getaffinity(0)), queue.SimpleQueue()
        for i in range(jobs): sets.put(mine[i*cores:(i + 1)*cores] if jobs*cores <= len(mine) else mine)
        super().__init__(jobs, initializer=lambda: os.sched_setaffinity(0, sets.get()))


def jobs_option(p: argparse.ArgumentParser, what: str):
    "The option of a bench that can do several things side by side."
    p.add_argument("--jobs", type=int, default=1, help=f"{what} side by side, each on two cores of its own")


def parts(name: str, each: list[list[str]], jobs: int, cores: int = 2) -> list[dict]:
    """The records of `moe-rl bench NAME` with each of these arguments, side by side; their other lines are shown as
    they come. Raises `RuntimeError` for one that fails."""
    def one(args):
        p = subprocess.Popen([sys.executable, "-m", "moe_rl.cli", "bench", name, *args], stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, text=True)
        last = ""
        for line in p.stdout:
            if last: print(last, flush=True)
            last = line.rstrip()
        if p.wait(): raise RuntimeError(f'bench {name} {" ".join(args)} ended with code {p.returncode}: {last}')
        return json.loads(last)
    with Lanes(jobs, cores) as pool: return list(pool.map(one, each))


def summed(records: list[dict], keys: tuple[str, ...]) -> dict:
    "Figures that add up over parts."
    return {k: sum(r["figures"][k] for r in records) for k in keys}
