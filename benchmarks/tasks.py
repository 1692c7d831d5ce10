"""Any stock task of reasoning-gym by `--env NAME` alone: which of them reach a first step, and what twelve drawn ones
learn in three minutes of RL; who learns nothing says why."""
import argparse, random, resource, subprocess, sys, threading, time
from pathlib import Path
from _runs import Lanes, folders, jobs_option
from moe_rl.bench import repository
from moe_rl.rl.log import read_lines

TINY = {"model.hidden_size": 32, "model.intermediate_size": 32, "model.moe_intermediate_size": 16,
        "model.num_hidden_layers": 2, "model.head_dim": 8, "warm_start.steps": 2,
        "warm_start.tokens_per_step": 1024, "warm_start.threads": 1, "eval.prompts": 4, "rl.groups_per_step": 2,
        "rl.group_size": 2, "rl.steps": 1, "rl.zero_variance": "keep", "schedule.threads": 1}


class Watched:
    "One `moe-rl run` whose output is read as it comes: its lines, its exit code, its longest silence."
    def __init__(self, args: list[str], limit: float):
        self.lines, self.silence, self.began = [], 0.0, time.monotonic()
        last = self.began
        process = subprocess.Popen([sys.executable, "-m", "moe_rl.cli", "run", *args], stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, text=True)
        clock = threading.Timer(limit, process.terminate)
        clock.start()
        for line in process.stdout:
            now = time.monotonic()
            self.silence, last = max(self.silence, now - last), now
            self.lines.append(line.rstrip())
        self.code = process.wait()
        self.late = not clock.is_alive()
        clock.cancel()
        self.silence, self.seconds = max(self.silence, time.monotonic() - last), time.monotonic() - self.began

    def traceback(self) -> bool: return any(l.startswith("Traceback") for l in self.lines)
    def word(self) -> str:
        "Its last line."
        return self.lines[-1] if self.lines else "no line"


def first_step(name: str, out: Path, config: str) -> dict:
    "Whether a tiny model makes a step on a task."
    more = [part for k, v in TINY.items() for part in (f"--{k}", str(v))]
    run = Watched(["--config", config, "--dir", str(out / name), "--env", name, *more], 400)
    started = run.code == 0 and len(read_lines(out / name / "metrics.jsonl")) == 1
    row = dict(name=name, started=started, refused=run.code == 2 and not run.traceback(), seconds=round(run.seconds, 1),
        silence=round(run.silence, 1), line="" if started else run.word())
    print(f'{name:28} {"first step" if started else "refused" if row["refused"] else "FAILED":10} {run.seconds:6.1f} '
          f's  {row["line"][:160]}', flush=True)
    return row


def learn(name: str, out: Path, config: str, seconds: float) -> dict:
    "What a task learns in `seconds` of RL with the settings of the main job."
    run = Watched(["--config", config, "--dir", str(out / f"learn_{name}"), "--env", name, "--rl.seconds",
        str(seconds)], 420 + 2*seconds)
    said = [l for l in run.lines if f" {name}: learned: " in l or f" {name}: not learned: " in l]
    line = said[-1].split(": ", 2)[-1] if said else run.word()
    row = dict(name=name, learned=bool(said) and ": learned: " in said[-1],
               named=bool(said) or run.code == 2 and not run.traceback(), traceback=run.traceback(),
               silence=round(run.silence, 1),
               seconds=round(run.seconds), line=line)
    end = "learned" if row["learned"] else "not learned" if said else "refused" if row["named"] else "FAILED"
    print(f"{name:28} {end:11} {run.seconds:5.0f} s, silent for {run.silence:.0f} s at most: {line}", flush=True)
    return row


def measure(args):
    from reasoning_gym.factory import DATASETS
    p = argparse.ArgumentParser(prog="moe-rl bench tasks")
    p.add_argument("--only", choices=["start", "learn"], default="")
    p.add_argument("--tasks", default="",
        help="names with commas, instead of all (start) and of the drawn ones (learn)")
    p.add_argument("--seed", type=int, default=0, help="draws the tasks that are to be learned")
    p.add_argument("--count", type=int, default=12)
    p.add_argument("--seconds", type=float, default=180, help="of RL")
    p.add_argument("--cores", type=int, default=2, help="of each")
    jobs_option(p, "tasks")
    a = p.parse_args(args)
    root = repository()
    out, config = folders(root, "tasks"), str(root / "configs" / "main_job.toml")
    names = a.tasks.split(",") if a.tasks else sorted(DATASETS)
    figures, rows = {}, {}
    if a.only in ("", "start"):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        with Lanes(a.jobs, a.cores) as pool: rows["start"] = list(pool.map(lambda n: first_step(n, out, config), names))
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        figures |= dict(startable=sum(r["started"] for r in rows["start"]), stock=len(names),
            refused=sum(r["refused"] for r in rows["start"]), cpu_seconds_each=cpu / len(names))
    if a.only in ("", "learn"):
        drawn = names if a.tasks else random.Random(a.seed).sample(names, a.count)
        print(f"seed {a.seed}: {', '.join(drawn)}", flush=True)
        with Lanes(a.jobs, a.cores) as pool:
            rows["learn"] = list(pool.map(lambda n: learn(n, out, config, a.seconds), drawn))
        failed = [r for r in rows["learn"] if not r["learned"]]
        figures |= dict(tried=len(drawn), learned=len(drawn) - len(failed), named=sum(r["named"] for r in failed),
                        tracebacks=sum(r["traceback"] for r in rows["learn"]),
                        longest_silence=max(r["silence"] for r in rows["learn"]), seed=a.seed)
    return dict(figures=figures, rows=rows)
