"""Environments that misbehave, and answers that are code, against the guard and against whole runs: each costs what it
must and no more, and nothing runs with the run's rights."""
import argparse, asyncio, base64, collections, os, random, shutil, signal, socket, subprocess, sys, tempfile, time
from pathlib import Path
import psutil
from _hostile_env import FINE, KINDS, MAY
from _runs import folders, jobs_option, parts, summed
from moe_rl.bench import repository
from moe_rl.rl.log import read_lines
from moe_rl.rollout.guard import EnvError, Guard, open_envs
from moe_rl.rollout.profile import draw_profile
from moe_rl.rollout.sandbox import isolation

STOCK = ("string_insertion", "countdown", "simple_integration", "polynomial_multiplication", "spiral_matrix",
    "binary_matrix", "n_queens", "puzzle24", "intermediate_integration")
LIMIT = 1.          # seconds of one call
SOON = 90           # a batch of calls that has not come back by then hangs


class Count:
    "Cases, and what became of them."
    def __init__(self): self.cases, self.contained, self.ended_wrongly, self.hangs, self.executed = 0, 0, 0, 0, 0
    def case(self, name, good, hang=False):
        self.cases += 1
        self.contained += good
        self.hangs += hang
        self.ended_wrongly += not good and not hang
        if not good: print(f'  {name}: {"hangs" if hang else "ended wrongly"}', flush=True)


async def batch(guard, task, texts, count, name, good):
    "Score texts side by side; `good` judges the list of ends."
    async def one(text):
        try: return await guard.score(task, [text])
        except EnvError as e: return e.reason
    try: ends = await asyncio.wait_for(asyncio.gather(*(one(t) for t in texts)), SOON)
    except TimeoutError: return count.case(name, False, hang=True)
    except BaseException as e:
        print(f"  {name}: {type(e).__name__}: {e}")
        return count.case(name, False)
    ok = good(ends)
    if not ok: print(f"  {name}: {collections.Counter(ends)}")
    count.case(name, ok)

async def kinds(count, names, hides):
    "Every kind twice among twelve innocent calls, in a guard of training and in one of an evaluation."
    env = open_envs([dict(name="_hostile_env:Kinds")], hides=hides, memory=1 << 30)
    guard = Guard(env, timeout=LIMIT, patience=0)
    task = await guard.sample(0)
    for phase, of in (("training", guard), ("evaluation", guard.beside("score"))):
        for kind in names:
            texts = ["fine", "judged", kind, "own_loop", "judged", "fine", kind, "judged", "fine", "own_loop", "judged",
                "fine", "judged", "fine"]
            innocent = lambda ends: all(e == .5 for e, t in zip(ends, texts) if t != kind)
            right = lambda ends: all(e == .5 if kind in FINE else kind in MAY or isinstance(e, str)
                for e, t in zip(ends, texts) if t == kind)
            began = time.monotonic()
            await batch(of, task, texts, count, f"{phase}, {kind}", lambda ends: innocent(ends) and right(ends))
            if time.monotonic() - began > 15: print(f"  {phase}, {kind}: {time.monotonic() - began:.0f} s")
    guard.close()

def draws(count, names, hides):
    "Every kind in `problem`: in the profile before a run, in a warm start, in training."
    for kind in names:
        env = open_envs([dict(name="_hostile_env:Wild", params=dict(where="problem", rate=.02, kinds=[kind]))],
            hides=hides, memory=1 << 30, limit=LIMIT)
        began = time.monotonic()
        try:
            count.case(f"before the run, {kind}", len(draw_profile(env.parts[0], 16).held_out) == 16)
            count.case(f"warm start, {kind}", 90 < len(env.train_examples(100)) <= 100)
            guard = Guard(env, timeout=LIMIT, patience=0)
            async def sample(i):
                try: return await guard.sample(i)
                except EnvError: return None
            async def many(): return await asyncio.wait_for(asyncio.gather(*map(sample, range(64))), SOON)
            got = asyncio.run(many())
            count.case(f"training, {kind} in problem", sum(t is not None for t in got) >= 48)
        except TimeoutError: count.case(f"draws, {kind}", False, hang=True)
        except Exception as e:
            print(f"  draws, {kind}: {type(e).__name__}: {e}")
            count.case(f"draws, {kind}", False)
        env.host.close()
        if time.monotonic() - began > 20: print(f"  draws, {kind}: {time.monotonic() - began:.0f} s")


class Bait:
    """What an attack is after: a file outside, a token in the environment, a run folder with a secret, a port that
    listens, a process that counts signals."""
    def __init__(self, folder):
        self.folder = Path(folder)
        self.secret, self.signals = "secret-" + base64.b16encode(os.urandom(8)).decode(), 0
        self.calls = 0
        (self.folder/"run").mkdir(parents=True)
        (self.folder/"run"/"config.toml").write_text(self.secret)
        (self.folder/"run"/"logs").mkdir()
        self.token, os.environ["MOE_RL_TOKEN"] = os.environ.get("MOE_RL_TOKEN"), self.secret
        self.socket = socket.create_server(("127.0.0.1", 0))
        self.socket.setblocking(False)
        self.unix = socket.socket(socket.AF_UNIX)
        self.unix.bind(str(self.folder/"run"/"wire"))
        self.unix.listen()
        self.unix.setblocking(False)
        self.before = signal.signal(signal.SIGUSR1, self.hit)
    def hit(self, *args): self.signals += 1
    def code(self):
        "Tries everything, each in turn; what it reads it prints."
        attempts = [f"open({str(self.folder/'touched')!r}, 'w').write('x')",
                    f"open({str(Path.home()/('.hostile-' + self.secret))!r}, 'w').write('x')",
                    "print(os.environ['MOE_RL_TOKEN'])",
                    f"print(open('/proc/{os.getpid()}/environ').read())",
                    "[print(open(f'/proc/{p}/environ').read()) for p in os.listdir('/proc') if p.isdigit() and p != "
                    "'1']",
                    f"print(open({str(self.folder/'run'/'config.toml')!r}).read())",
                    f"socket.create_connection(('127.0.0.1', {self.socket.getsockname()[1]}), 1)",
                    f"socket.socket(socket.AF_UNIX).connect({str(self.folder/'run'/'wire')!r})",
                    f"os.kill({os.getpid()}, 10)", "os.kill(os.getppid(), 10)",
                    f"open({str(self.folder/'run'/'config.toml')!r}, 'w').write('x')",
                    "ctypes.CDLL(None).umount2(b'/', 2)", "os.chroot('/proc/1/root')"]
        return "import os, socket, ctypes\nprint('attack begins', flush=True)\n" + "".join(
            f"try: {a}\nexcept BaseException as e: pass\n" for a in attempts) + "print('attack ends', flush=True)\n"
    def answer(self):
        return f"exec(__import__('base64').b64decode('{base64.b64encode(self.code().encode()).decode()}'))"
    def touched(self):
        "How many of the attempts have worked."
        log = self.folder/"run"/"logs"/"environments.log"
        found = [(self.folder/"touched").exists(), (Path.home()/(".hostile-" + self.secret)).exists(),
                 log.exists() and self.secret in log.read_text(errors="replace"), self.signals > 0,
                 (self.folder/"run"/"config.toml").read_text() != self.secret]
        for s in (self.socket, self.unix):
            try:
                s.accept()
                found.append(True)
            except BlockingIOError: pass
        return sum(found)
    def ran(self):
        log = self.folder/"run"/"logs"/"environments.log"
        return log.read_text(errors="replace").count("attack ends") if log.exists() else 0
    def close(self):
        signal.signal(signal.SIGUSR1, self.before)
        self.socket.close(), self.unix.close()
        del os.environ["MOE_RL_TOKEN"]

async def answers(count, names):
    "Code as the answer to stock tasks, in training and in an evaluation."
    ran = 0
    for name in names:
        with tempfile.TemporaryDirectory() as folder:
            bait = Bait(folder)
            env = open_envs([dict(name=name)], hides=[str(bait.folder/"run")],
                log=str(bait.folder/"run"/"logs"/"environments.log"), memory=1 << 30)
            guard = Guard(env, timeout=30., patience=0)
            task = await guard.sample(0)
            began, right = time.monotonic(), await guard.score(task, [task.answer])
            guard.timeout = max(LIMIT, 3*(time.monotonic() - began))     # the first call imports what it needs
            for phase, of in (("training", guard), ("evaluation", guard.beside("score"))):
                for what, text in dict(attack=bait.answer(), freeze="9**9**9**9", leave="__import__('os')._exit(0)",
                        fill="'x'*10**13", fork="__import__('os').fork()").items():
                    texts = [task.answer]*6 + [text] + [task.answer]*6
                    await batch(of, task, texts, count, f"{phase}, {name}: {what}",
                        lambda ends: all(e == right for e, t in zip(ends, texts) if t is not text)
                        and (isinstance(ends[6], str) or ends[6] < 1))
            await asyncio.sleep(.5)
            ran += bait.ran() > 0
            count.executed += bait.touched()
            guard.close()
            bait.close()
    print(
        f"answers of {len(names)} stock tasks: the code ran inside in {ran} of them, {count.executed} attempts worked",
        flush=True)

def refused(count):
    "Where namespaces are switched off, a task that executes is refused and another one is not."
    code = ("import sys\nfrom moe_rl.rollout.guard import open_envs\nfrom moe_rl.errors import UserError\nsaid = []\n"
            "try: env = open_envs([dict(name=sys.argv[1])], say=said.append)\nexcept UserError as e: print('refused', "
            "e)\nelse: print('open', said, env.sample(0).prompt[:9]); env.host.close()\n")
    for name, word in (("string_insertion", "refused"), ("countdown", "refused"), ("spell_backward", "open")):
        r = subprocess.run(["unshare", "-r", "sh", "-c", 'echo 0 > /proc/sys/user/max_user_namespaces && exec "$@"',
            "sh", sys.executable, "-c", code, name], capture_output=True, text=True, timeout=120)
        count.case(f"no isolation, {name}", r.stdout.startswith(word) and "isolate" in r.stdout)


SMALL = ("--model.hidden_size", "32", "--model.intermediate_size", "64", "--model.moe_intermediate_size", "16",
         "--model.num_hidden_layers", "2", "--model.num_attention_heads", "2", "--model.num_key_value_heads", "1",
         "--model.head_dim", "16", "--model.num_experts", "4", "--tokenizer.kind", "byte", "--warm_start.steps", "2",
         "--warm_start.seconds", "0", "--rl.groups_per_step", "4", "--rl.group_size", "4", "--rl.steps", "30",
         "--engine.max_tokens", "8", "--eval.prompts", "32", "--eval.every", "10", "--schedule.env_timeout", "1",
         "--rl.max_turns", "3")

def whole(count, folder, name, where, rate, kinds_, limit=240):
    "A whole run; its end, and the CPU seconds of its orchestrator."
    import json
    out = folder/name
    args = [sys.executable, "-m", "moe_rl.cli", "run", "--dir", str(out), *SMALL, "--env",
        json.dumps([dict(name="_hostile_env:Wild", params=dict(where=where, rate=rate, kinds=kinds_))])]
    path = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    with open(f"{out}.log", "ab") as log:
        process = subprocess.Popen(args, stdout=log, stderr=log, env=os.environ | dict(PYTHONPATH=path))
    watched, cpu, began = psutil.Process(process.pid), 0., time.monotonic()
    while process.poll() is None and time.monotonic() - began < limit:
        try: cpu = sum(watched.cpu_times()[:2])
        except psutil.NoSuchProcess: pass
        time.sleep(.1)
    hang = process.poll() is None
    if hang:
        process.kill()
        process.wait()
    steps = [r["step"] for r in read_lines(out/"metrics.jsonl")] if out.exists() else []
    lost = sum(v for k, v in (read_lines(out/"metrics.jsonl") or [{}])[-1].items()
        if k.startswith("dropped_")) if steps else 0
    text = Path(f"{out}.log").read_text(errors="replace")
    good = process.returncode == 0 and steps[-1:] == [30] and "Traceback" not in text
    print(f"{name}: code {process.returncode}, {len(steps)} steps, {lost:.0f} rollouts lost, "
          f"{time.monotonic() - began:.0f} s, orchestrator {cpu:.1f} CPU seconds", flush=True)
    if not good: print("  " + " ".join(text.splitlines()[-2:]))
    count.case(f"run, {name}", good, hang)
    return cpu

RUNS = dict(rewards=("score", ["nan", "huge", "huge_int", "text", "true", "nothing", "rude", "many"]),
            raises=("score", ["error", "system_exit", "interrupt", "base", "mute", "recursion", "memory_error"]),
            ends=("score", ["leave", "segfault", "kill_itself", "kill_all", "memory_slow", "fork_hang", "flood"]),
            hangs=("score", ["sleep", "never", "stubborn", "spin", "block_loop", "regex", "power"]),
            problems=("problem", ["error", "int_prompt", "int_answer", "half_emoji", "long_prompt", "endless_prompt",
                "nothing"]), processes=("problem", ["leave", "system_exit", "regex", "sleep"]),
            replies=("reply", ["error", "some_int", "raw", "endless_text", "surrogate", "leave", "never"]))


FIGURES = ("cases", "contained", "ended_wrongly", "hangs", "executed")
DRAWS = ["error", "system_exit", "interrupt", "text", "nothing", "int_prompt", "int_answer", "half_emoji",
    "endless_prompt", "sleep", "regex", "power", "leave", "segfault", "kill_itself", "recursion"]

def rate(name, where): return .06 if name in ("hangs", "ends") else .1 if where != "problem" else .01

def piece(what, names, folder):
    "One part of the whole, in a process of its own."
    count, cpu, began = Count(), {}, time.monotonic()
    match what:
        case "kinds": asyncio.run(kinds(count, names, [str(folder)]))
        case "draws": draws(count, names, [str(folder)])
        case "answers": asyncio.run(answers(count, names))
        case "refused": refused(count)
        case "runs":
            for name in names:
                where, bad = RUNS.get(name, ("score", []))
                cpu[name] = whole(count, folder, name, where, rate(name, where) if bad else 0., bad)
    print(f'{what} {", ".join(names)}: {count.contained} of {count.cases} contained, {time.monotonic() - began:.0f} s')
    return dict(figures={k: getattr(count, k) for k in FIGURES}, orchestrator_seconds=cpu)

def plan(rng, full):
    "The parts: what, and which names."
    some = lambda names, n: sorted(names) if full else rng.sample(sorted(names), n)
    pieces = lambda what, names, n: [(what, names[i:i + n]) for i in range(0, len(names), n)]
    out = pieces("runs", ["clean", *some(RUNS, 3)], 1)      # the longest first
    if isolation(): print("no isolation: the tasks that execute are refused, and not tried")
    else: out += pieces("answers", some(STOCK, 3), 1)
    if shutil.which("unshare"): out += [("refused", [])]
    return out + pieces("kinds", some(KINDS, 24), 6) + pieces("draws", some(DRAWS, 5), 3)


def measure(args):
    p = argparse.ArgumentParser(prog="moe-rl bench hostile")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--full", action="store_true", help="every kind in every phase; otherwise a part chosen by the seed")
    p.add_argument("--only", default="", help="one part: WHAT:NAME,NAME, with kinds, draws, answers, refused or runs")
    jobs_option(p, "parts")
    a = p.parse_args(args)
    if a.only:
        what, _, names = a.only.partition(":")
        return piece(what, [n for n in names.split(",") if n],
            folders(repository(), f'hostile_parts/{what}_{names.split(",")[0]}'))
    began = time.monotonic()
    print(f'isolation: {isolation() or "namespaces"}', flush=True)
    done = parts("hostile", [["--only", f'{what}:{",".join(names)}']
        for what, names in plan(random.Random(a.seed), a.full)], a.jobs)
    cpu = {k: v for r in done for k, v in r["orchestrator_seconds"].items()}
    worst = max(v/cpu["clean"] for v in cpu.values())
    print(f'CPU seconds of the orchestrator: {cpu["clean"]:.1f} clean, at most {worst:.2f} times that')
    return dict(figures=summed(done, FIGURES) | dict(orchestrator_cpu=worst, kinds=len(KINDS),
        isolated=not isolation(), seconds=time.monotonic() - began), orchestrator_seconds=cpu)
