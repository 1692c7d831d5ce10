"""A run as a job of a real Slurm: two nodes on loopback. The default job to its end, one that its time limit cuts in
two, and one that is cancelled.

    moe-rl bench slurm [--steps N]     with --steps the first is a short one"""
import re, subprocess, sys, tempfile, time
from pathlib import Path

import psutil
from _slurm_host import missing, slurm

from moe_rl.bench import NeedsHardware
from moe_rl.rl.log import read_lines

ROOT = Path(__file__).resolve().parents[1]
SHORT = ("--rl.seconds", "0", "--rl.stop_at", "0", "--rl.stop_solved", "0", "--eval.every", "0", "--eval.prompts", "8",
    "--rl.groups_per_step", "4", "--warm_start.seconds", "8", "--checkpoint.every", "10")


def submit(folder: Path, *settings: str) -> str:
    "`moe-rl run ... --slurm` on both nodes, trainer on the one and engine on the other; the job's number."
    words = ("run", "--slurm", "--config", "configs/main_job.toml", "--dir", str(folder), "--launch.params.nodes", "2",
        "--launch.params.interface", "lo", *settings)
    r = subprocess.run([sys.executable, "-m", "moe_rl.cli", *words], cwd=ROOT, capture_output=True, text=True)
    if r.returncode: raise RuntimeError(r.stderr)
    return re.search(r"job (\d+)", r.stdout)[1]


def asked(*words: str) -> str: return subprocess.run(words, capture_output=True, text=True).stdout


def field(job: str, name: str) -> str:
    "What Slurm knows of a job."
    return re.search(rf"\b{name}=(\S+)", asked("scontrol", "show", "job", job))[1]


def follow(job: str, seconds: float) -> set:
    "Wait until a job is over; which steps ran where."
    limit, seen = time.monotonic() + seconds, set()
    while field(job, "JobState") in ("PENDING", "RUNNING", "COMPLETING", "REQUEUED"):
        seen |= {tuple(r.split()) for r in asked("squeue", "-h", "-s", f"--job={job}", "--format=%j %N").splitlines()}
        if time.monotonic() > limit: raise RuntimeError(f"job {job} is not over after {seconds:.0f} s")
        time.sleep(1)
    return seen


def left(folder: Path) -> list[str]:
    "Processes that belong to a run's folder."
    out = []
    for p in psutil.process_iter(["cmdline"]):
        if any(str(folder) in word for word in p.info["cmdline"] or ()): out.append(" ".join(p.info["cmdline"])[:120])
    return out


def completed(folder: Path, settings: tuple) -> bool:
    "The job runs to its end, trainer and engine on different nodes, and has the run's exit code."
    job = submit(folder, "--launch.params.minutes", "60", *settings)
    where = dict(follow(job, 1800))
    print("completed:", field(job, "JobState"), field(job, "ExitCode"), where, read_lines(folder/"evals.jsonl")[-1:])
    well = (field(job, "JobState"), field(job, "ExitCode")) == ("COMPLETED", "0:0")
    return well and (folder/"finished.json").is_file() and where["trainer"] != where["engine-0.0"]


def requeued(folder: Path) -> bool:
    "A job that its time limit cuts goes on in a second life, and no step is done twice."
    job = submit(folder, "--launch.params.minutes", "4", "--launch.params.notice", "90", *SHORT, "--rl.steps", "100000")
    limit = time.monotonic() + 400
    while field(job, "Restarts") == "0" and time.monotonic() < limit: time.sleep(1)
    steps = len(read_lines(folder/"metrics.jsonl"))
    # the rest is short: the run's own limit, in the settings that its next life reads
    config = folder/"config.toml"
    config.write_text(re.sub(r"(?m)^steps = 100000$", f"steps = {steps + 5}", config.read_text()))
    follow(job, 600)
    numbers = [r["step"] for r in read_lines(folder/"metrics.jsonl")]
    state, lives = field(job, "JobState"), int(field(job, "Restarts"))
    print("requeued:", state, field(job, "ExitCode"), "restarts", lives, "steps", len(numbers))
    return state == "COMPLETED" and lives > 0 and numbers == list(range(1, steps + 6))


def cancelled(folder: Path) -> int:
    "Processes that are left of a job that was cancelled in the middle of its work."
    job, limit = submit(folder, "--launch.params.minutes", "30", *SHORT, "--rl.steps", "100000"), time.monotonic() + 300
    while len(read_lines(folder/"metrics.jsonl")) < 3:
        if time.monotonic() > limit: raise RuntimeError(f"no steps: {(folder/'logs'/'slurm.log').read_text()[-2000:]}")
        time.sleep(1)
    before = left(folder)
    asked("scancel", job)
    follow(job, 120)
    print("cancelled:", field(job, "JobState"), len(before), "processes before, after:", left(folder))
    if len(before) < 3: raise RuntimeError(f"the run had only {before}")
    return len(left(folder))


def measure(args: list[str]) -> dict:
    if why := missing(): raise NeedsHardware(f"Slurm: {why}")
    if args and args[0] != "--steps": raise SystemExit(f"slurm takes --steps N or nothing, not {args}")
    first = (*SHORT, "--rl.steps", args[1]) if args else ()
    out = Path(tempfile.mkdtemp(prefix="moe_rl_slurm"))
    with slurm(out/"host"):
        return dict(figures=dict(completed=completed(out/"whole", first), requeued=requeued(out/"cut"),
            left_behind=cancelled(out/"ended")), details=dict(job="short" if first else "configs/main_job.toml"))
