"""Runs under SIGKILL, SIGTERM and SIGSTOP in every phase, one or two processes at a time: each is resumed to its end,
and its ledger and weights are whole."""
import argparse, os, random, signal, subprocess, sys, threading, time
from pathlib import Path
import psutil
from _runs import Lanes, folders
from moe_rl.bench import repository
from moe_rl.records import decode
from moe_rl.rl.buffer import BufferState
from moe_rl.rl.log import audit, issued, read_lines
from moe_rl.rl.run import finished, state_at
from moe_rl.train.checkpoint import latest
from moe_rl.train.weights import fingerprint, load_tensors, version_path

ENV = '''
from moe_rl.rollout.environments import Environment, Task

class Letters(Environment):
    name = 'letters'
    def problem(self, key):
        word = ''.join(chr(97 + (key >> 5*i) % 26) for i in range(3))
        return Task(env=self.name, prompt=f'First of {word}: ', answer=word[0])
    async def score(self, task, turns): return len(set(turns[-1])) / 8
'''
EVERY = 20  # steps between checkpoints
TINY = {"model.hidden_size": 32, "model.intermediate_size": 32, "model.moe_intermediate_size": 16,
        "model.num_hidden_layers": 2, "model.num_attention_heads": 2, "model.num_key_value_heads": 1,
        "model.head_dim": 8, "model.num_experts": 4, "model.max_position_embeddings": 256, "tokenizer.kind": "byte",
        "warm_start.steps": 3, "warm_start.tokens_per_step": 256, "warm_start.threads": 1,
        "rl.groups_per_step": 4, "rl.group_size": 2, "rl.tokens_per_batch": 512, "rl.max_staleness": 2,
        "eval.prompts": 8, "eval.every": 8, "engine.replicas": 2, "engine.kv_tokens": 2048, "engine.max_seqs": 8,
        "engine.max_tokens": 6, "checkpoint.every": EVERY, "checkpoint.keep": 2, "schedule.silence_seconds": 8,
        "schedule.engine_restarts": 100, "env": "letters_task:Letters"}
# stop points; `start` and `far` are moments of their own
POINTS = ("warm_start", "evaluation", "publication", "saving", "commit", "end")
PLANS = (("start", "far", "evaluation", "commit", "far"), ("warm_start", "publication", "far", "saving", "end"),
    ("far", "publication", "evaluation", "far", "end"), ("start", "warm_start", "far", "commit", "end"))
print_lock = threading.Lock()


class Story:
    "One run through all its lives."
    def __init__(self, folder: Path, plan: tuple, seed: int, loading: float, patience: float):
        self.folder, self.plan, self.rng, self.patience = folder, plan, random.Random(seed), patience
        self.marks, self.process, self.kills = folder.with_name(f"{folder.name}.points"), None, 0
        self.hangs, self.unresumable, self.phases = 0, 0, []
        self.marks.mkdir(parents=True)
        hooks = str(Path(__file__).with_name("_chaos"))
        self.environ = os.environ | dict(MOE_CHAOS=str(self.marks), MOE_CHAOS_LOADING=str(loading), OMP_NUM_THREADS="1",
            PYTHONPATH=os.pathsep.join([hooks, str(repository()), os.environ.get("PYTHONPATH", "")]))

    def say(self, text):
        with print_lock: print(f"{self.folder.name}: {text}", flush=True)

    def start(self):
        "A new life."
        self.born = time.time()
        known = ("--resume", str(self.folder)) if (self.folder / "config.toml").exists() else \
            [part for k, v in (TINY | {"rl.steps": 30 * (len(self.plan) + 1), "dir": self.folder}).items()
                for part in (f"--{k}", str(v))]
        with self.folder.with_suffix(".log").open("ab") as out:
            self.process = subprocess.Popen([sys.executable, "-m", "moe_rl.cli", "run", *known], cwd=self.folder.parent,
                env=self.environ, stdout=out, stderr=out, start_new_session=True)

    def workers(self, role: str = "") -> list[psutil.Process]:
        "Live worker processes, of one role or of both."
        out = []
        try: children = psutil.Process(self.process.pid).children(recursive=True)
        except psutil.NoSuchProcess: return out
        for p in children:
            try:
                line = p.cmdline()
                if "moe_rl.rl.workers" in line and (not role or role in line): out.append(p)
            except psutil.NoSuchProcess: pass
        return out

    def steps(self) -> int: return len(read_lines(self.folder / "metrics.jsonl"))
    def over(self) -> bool: return self.process.poll() is not None

    def until(self, what, condition, seconds=None) -> bool:
        "Whether the condition came, before the run ended or patience did; the latter is a hang."
        limit = time.monotonic() + (seconds or self.patience)
        while not condition():
            if self.over(): return False
            if time.monotonic() > limit:
                self.hangs += 1
                self.say(f"HANG: no {what} in {seconds or self.patience:.0f} s")
                return False
            time.sleep(0.02)
        return True

    def approach(self, phase: str) -> bool:
        "Wait for the moment at which to strike."
        if phase == "start":
            time.sleep(self.rng.uniform(0.3, 6))
            return not self.over()
        if phase == "far":
            ahead = self.rng.randint(5, EVERY - 3)
            def there(): # in this life: what lies there from the one before is cut when it has come up
                log = self.folder / "metrics.jsonl"
                return log.exists() and log.stat().st_mtime > self.born and self.steps() >= int((latest(self.folder)
                    or Path("step_0")).name[5:]) + ahead
            return self.until("step far from a checkpoint", there)
        for old in self.marks.glob("*"): old.unlink()
        if phase == "warm_start" and latest(self.folder): return False      # it is over
        (self.marks / f"arm.{phase}").touch()
        return self.until(f"point {phase}", (self.marks / f"reached.{phase}").exists)

    def victims(self) -> list[tuple[str, psutil.Process]]:
        "One or two processes."
        crew = [("orchestrator", psutil.Process(self.process.pid)), *(("trainer", p) for p in self.workers("trainer")),
            *(("engine", p) for p in self.workers("engine"))]
        return self.rng.sample(crew, min(len(crew), self.rng.choice((1, 1, 2))))

    def strike(self, phase: str):
        "Signals, and what must follow: the run goes on, or it ends and is resumed."
        how, victims = self.rng.choice((signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGSTOP)), self.victims()
        # what has not come up may be silent for longer
        if how == signal.SIGSTOP and phase in ("start", "warm_start"): how = signal.SIGKILL
        before, names = self.steps(), [n for n, _ in victims]
        for _, p in victims:
            try: p.send_signal(how)
            except psutil.NoSuchProcess: pass
        self.kills, self.phases = self.kills + 1, [*self.phases, phase]
        self.say(f'{how.name} to {" and ".join(names)} in {phase}, {before} steps in the log, checkpoint '
                 f'{(latest(self.folder) or Path("none")).name}')
        if "orchestrator" in names and how == signal.SIGSTOP:
            time.sleep(self.rng.uniform(2, 6))
            victims[names.index("orchestrator")][1].send_signal(signal.SIGCONT)
        ends = "orchestrator" in names and how != signal.SIGSTOP or "trainer" in names and how != signal.SIGTERM
        if ends: self.until("end of the life", self.over)
        if self.hangs: self.process.kill()

    def well(self) -> bool:
        "A life that was not struck ends well or not at all."
        if not (code := self.process.wait()): return True
        self.unresumable += 1
        self.say(f'UNRESUMABLE: code {code}: {self.folder.with_suffix(".log").read_text()[-500:]}')
        return False

    def stays(self):
        """A finished run is resumed once more, with a higher limit in its settings: it says that it is finished, and
        nothing is trained."""
        config, model = self.folder / "config.toml", self.folder / "model" / "model.safetensors"
        steps, before = self.steps(), (model.stat().st_mtime_ns, model.read_bytes())
        config.write_text(config.read_text().replace(f"\nsteps = {30 * (len(self.plan) + 1)}\n", "\nsteps = 100000\n"))
        self.start()
        while not self.over() and self.steps() == steps: time.sleep(0.05)
        if not self.over() or (self.steps(), (model.stat().st_mtime_ns, model.read_bytes())) != (steps, before):
            self.unresumable += 1
            self.say(f"TRAINS ON: {self.steps()} steps instead of {steps} after the run was finished")

    def live(self):
        "All lives, up to the end of the run."
        try:
            self.start()
            for phase in self.plan:
                if self.over() and not finished(self.folder): self.start()
                if self.approach(phase): self.strike(phase)
                elif self.hangs or self.over() and not self.well(): return self
            if self.over() and not finished(self.folder): self.start()
            self.until("end of the run", self.over, 2 * self.patience)
            if not self.hangs and self.well() and finished(self.folder): self.stays()
        finally: self.process.kill()
        return self


def books(folder: Path) -> dict:
    """Audit of a run that is over: every rollout ever issued is trained, dropped with a reason, waiting, or being
    played; once. And the weights are those of the last step."""
    state = state_at(folder, latest(folder))
    buffer = decode(BufferState, state.buffer)
    every = issued(state.next_group, buffer.group_size)
    waiting = {f"{g}-{i}" for g, indices in state.live.items() for i in indices}
    waiting |= {r.id for rs in buffer.members.values() for r in rs} | {r.id for g in buffer.complete
        for r in g.rollouts}
    ledger = read_lines(folder / "ledger.jsonl")
    found = audit(ledger, every, waiting)
    if [line["step"] for line in ledger] != list(range(1, state.step + 1)): found["lost"].append("steps of the ledger")
    if [line["step"] for line in read_lines(folder / "metrics.jsonl")] != list(range(1, state.step + 1)):
        found["lost"].append("steps of the metrics")
    trained, published = (fingerprint(load_tensors(p / "model.safetensors"))
        for p in (latest(folder), version_path(folder / "weights", state.step)))
    if trained != published or latest(folder).name != f"step_{state.step}" or not (folder / "model"
            / "model.safetensors").exists():
        found["lost"].append("weights")
    print(f'{folder.name}: {state.step} steps, {len(every)} rollouts issued, '
          f'{sum(len(line["trained"]) for line in ledger)} trained, {len(waiting)} waiting')
    return found


def measure(args):
    p = argparse.ArgumentParser(prog="moe-rl bench chaos")
    p.add_argument("--full", action="store_true", help="some 65 strikes; without it some 15")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--loading", type=float, default=10, help="seconds that an engine needs to load")
    p.add_argument("--beside", type=int, default=3, help="runs at a time")
    p.add_argument("--patience", type=float, default=180, help="seconds after which a run hangs")
    p.add_argument("--runs", type=int, default=0, help="0: 14 with --full, else 3")
    a = p.parse_args(args)
    out = folders(repository(), "chaos")
    (out / "letters_task.py").write_text(ENV)
    stories = [Story(out / f"run_{i}", PLANS[i % len(PLANS)], 1000*a.seed + i, a.loading, a.patience)
        for i in range(a.runs or (14 if a.full else 3))]
    with Lanes(a.beside) as pool: done = list(pool.map(Story.live, stories))
    lost = duplicated = 0
    for s in done:
        if not finished(s.folder): continue
        found = books(s.folder)
        for key, ids in found.items():
            if ids: print(f"{s.folder.name}: {key}: {ids[:10]}")
        lost, duplicated = lost + len(found["lost"]), duplicated + len(found["duplicated"]) + len(found["invented"])
    phases = {p: sum(s.phases.count(p) for s in done) for p in ("start", "far", *POINTS)}
    figures = dict(kills=sum(s.kills for s in done), lost=lost, duplicated=duplicated, hangs=sum(s.hangs for s in done),
        unresumable=sum(s.unresumable or not finished(s.folder) for s in done))
    if any(figures[k] for k in ("lost", "duplicated", "hangs", "unresumable")): print("NOT SOUND", flush=True)
    return dict(figures=figures | dict(phases=sum(map(bool, phases.values()))), phases=phases, runs=len(done))
