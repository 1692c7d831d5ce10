"""The asynchronous loop against what went wrong in other systems: lost errors, hangs, orphans, crashes between two
parts of a checkpoint, starving, and work that vanishes."""
import asyncio
import inspect
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch
import zmq
from safetensors.torch import load_file

from moe_rl.config import load_settings
from moe_rl.errors import UserError
from moe_rl.launch import LocalHandle
from moe_rl.data.tokens import byte_tokenizer
from moe_rl.moe.model import Model, init_weights
from moe_rl.records import Finished, Request, decode
from moe_rl.rl import wire, workers
from moe_rl.rl.beside import Beside
from moe_rl.rl.books import State
from moe_rl.rl.buffer import BufferState
from moe_rl.rl.log import RunLog, audit, issued, read_lines
from moe_rl.rl.orchestrator import Orchestrator
from moe_rl.rl.pool import EnginePool, Worker
from moe_rl.rl.run import stop
from moe_rl.rl.supervise import receive, watch
from moe_rl.rl.trainer import model_config
from moe_rl.rl.wire import (
    Beat, Client, Failure, Generate, Generated, Hello, Missing, Server, Stop, Trained, Update, Updated)
from moe_rl.rollout.engine import Engine
from moe_rl.rollout.environments import Environment, Task
from moe_rl.rollout.guard import Guard
from moe_rl.rollout.protocol import Folder
from moe_rl.train import weights
from moe_rl.train.checkpoint import CheckpointError, commit, latest, load_state, stage, verify

TINY = {"model.hidden_size": 32, "model.intermediate_size": 32, "model.moe_intermediate_size": 16,
        "model.num_hidden_layers": 2, "model.num_attention_heads": 2, "model.num_key_value_heads": 1,
        "model.head_dim": 8, "model.num_experts": 4, "model.max_position_embeddings": 256, "tokenizer.kind": "byte",
        "warm_start.steps": 1, "warm_start.tokens_per_step": 256, "warm_start.threads": 1,
        "rl.steps": 4, "rl.groups_per_step": 4, "rl.group_size": 2, "rl.tokens_per_batch": 512, "eval.prompts": 8,
        "engine.kv_tokens": 2048, "engine.max_seqs": 8, "engine.max_tokens": 6,
        "checkpoint.every": 1, "checkpoint.keep": 9, "env": "letters_task:Letters"}

MODULE = '''
import torch
from moe_rl.rl.loss import LossOut, dppo
from moe_rl.rollout.environments import Environment, Task

class Letters(Environment):
    name = 'letters'
    def problem(self, key):
        word = ''.join(chr(97 + (key >> 5*i) % 26) for i in range(3))
        return Task(env=self.name, prompt=f'First of {word}: ', answer=word[0])
    async def score(self, task, turns): return len(set(turns[-1])) / 8

def breaks(logp, logp_old, adv, mask, cu_seqlens): raise ZeroDivisionError('the loss of a user')
'''


# ---- tools

@pytest.fixture(scope="module")
def home(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    (folder / "letters_task.py").write_text(MODULE)
    return folder


@pytest.fixture(autouse=True)
def no_leftovers():
    "Whatever a failing test leaves running is ended with it."
    yield
    for process in Command.started:
        if process.poll() is None:
            process.kill()
            process.wait()
    Command.started.clear()


class Command:
    "`moe-rl run` in processes of its own, watched from outside."
    started = []
    def __init__(self, home, *args, before=None, **settings):
        if settings:
            args = (*args, *(part for k, v in (TINY | {k.replace("__", "."): v for k, v in settings.items()}).items()
                for part in (f"--{k}", str(v))))
        self.folder = home / (settings["dir"] if settings else args[-1])
        self.out = home / f"{self.folder.name}-{time.monotonic_ns()}.txt"
        with self.out.open("wb") as out:
            self.process = subprocess.Popen([sys.executable, "-m", "moe_rl.cli", "run", *map(str, args)], cwd=home,
                stdout=out, stderr=out, env=os.environ | dict(OMP_NUM_THREADS="1"), start_new_session=True,
                preexec_fn=before)
        self.started.append(self.process)

    def workers(self, role=""):
        "Live worker processes, of one role or of all."
        out = []
        for p in psutil.Process(self.process.pid).children(recursive=True):
            try:
                if "moe_rl.rl.workers" in p.cmdline() and role in " ".join(p.cmdline()): out.append(p)
            except psutil.NoSuchProcess: pass
        return out

    def until(self, condition, seconds=120):
        "Wait for a condition; the command must stay alive meanwhile."
        limit = time.monotonic() + seconds
        while not condition():
            assert self.process.poll() is None, f"ended with code {self.process.poll()}: {self.said()}"
            assert time.monotonic() < limit, f"nothing happened in {seconds} s: {self.events()[-600:]}"
            time.sleep(.05)

    def wait(self, seconds=120):
        try: return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            self.process.kill()
            raise AssertionError(f"no end after {seconds} s: {self.events()[-600:]}") from None

    def said(self): return self.out.read_text()
    def events(self): return (self.folder / "events.log").read_text() if (self.folder / "events.log").exists() else ""
    def lines(self, name): return read_lines(self.folder / name)
    def steps(self): return len(self.lines("metrics.jsonl"))


def gone(processes, seconds=10):
    "Whether all of these processes end in time."
    return not psutil.wait_procs(processes, timeout=seconds)[1]


def books(folder):
    "Audit of the last commit: what was issued is trained, dropped with a reason, waiting or being played, once."
    state = load_state(latest(folder) / "orchestrator.msgpack", State)
    buffer = decode(BufferState, state.buffer)
    every = issued(state.next_group, buffer.group_size)
    waiting = {f"{g}-{i}" for g, live in state.live.items() for i in live} | {r.id for rs in buffer.members.values()
        for r in rs} | {r.id for g in buffer.complete for r in g.rollouts}
    ledger = [line for line in read_lines(folder / "ledger.jsonl") if line["step"] <= state.step]
    return audit(ledger, every, waiting)

SOUND = dict(duplicated=[], lost=[], invented=[])


class Letters(Environment):
    "The same task in this process."
    name = "letters"
    def problem(self, key): return Task(env=self.name, prompt=f"Say {key % 1000}: ", answer="x")

class Alive:
    "The handle of a process that lives."
    def poll(self): return None
    def kill(self): pass
    def cpu_seconds(self): return 0.0

class Wire:
    "A server that keeps what is sent, and gives what the test puts in."
    def __init__(self): self.sent, self.inbox = [], asyncio.Queue()
    async def send(self, name, message): self.sent.append((name, message))
    async def receive(self): return await self.inbox.get()

def make_loop(tmp_path, env=None, **settings):
    "An orchestrator with one engine and a trainer that exist in name only."
    s, server = load_settings(overrides=TINY | {k.replace("__", "."): v for k, v in settings.items()}), Wire()
    pool = EnginePool(server)
    pool.engines = {"engine-0.0": Worker("engine-0.0", Alive())}
    return Orchestrator(s, Guard(env or Letters(), timeout=20, width=2), byte_tokenizer(), server, pool,
        Worker("trainer", Alive()), RunLog(tmp_path, tensorboard=False), tmp_path)

def answer(r):
    return Finished(id=r.id, token_ids=[65, 2], logprobs=[-1.0, -1.0], versions=[0, 0], routes=None, stop_reason="stop")


# ---- 27: an error reaches the one who waits

def test_known_failure_27_error_of_a_worker_ends_the_run_by_name(home):
    run = Command(home, dir="breaks", rl__loss="letters_task:breaks")
    assert run.wait() == 2
    last = run.said().strip().splitlines()[-1]
    assert last.startswith(
        "moe-rl: trainer: ZeroDivisionError: the loss of a user; the engines wait for version 1") and "Traceback" not in run.said()
    assert "Traceback" in run.events()                                    # the log has the whole of it
    assert latest(run.folder).name == "step_0"


@pytest.mark.parametrize("bug", [False, True])
def test_known_failure_27_error_of_a_task_reaches_the_loop(tmp_path, monkeypatch, bug):
    "Bug: a task's error is dropped with the task, and the loop waits for ever."
    if bug: monkeypatch.setattr(Beside, "reap", lambda self, task: (self.tasks.discard(task), task.exception()))
    async def breaks(): raise UserError("score is away")
    async def go():
        loop = make_loop(tmp_path)
        loop.spawn(breaks())
        await asyncio.wait_for(loop.until(asyncio.get_running_loop().create_future()), .3)
    with pytest.raises(TimeoutError if bug else UserError): asyncio.run(go())


@pytest.mark.parametrize("bug", [False, True])
def test_known_failure_27_last_words_of_an_engine(tmp_path, monkeypatch, bug):
    """A mistake that no new engine would mend ends the run at once, in the engine's own words.

    Bug: it is started again and again."""
    started = []
    def start_engine(n, replica):
        started.append(n)
        return Worker(f"engine-0.{n}", Alive())
    async def go():
        loop = make_loop(tmp_path)
        loop.pool.engines["engine-0.0"].ready.set()
        _ = loop.spawn(receive(loop)), loop.spawn(watch(loop, start_engine))
        loop.server.inbox.put_nowait(("engine-0.0", Failure("engine-0.0: request too long", "Traceback",
            final=not bug)))
        await asyncio.wait_for(loop.until(asyncio.get_running_loop().create_future()), 1.5)
    with pytest.raises(TimeoutError if bug else UserError, match=None if bug
            else "engine-0.0: request too long; the trainer waits for a batch"):
        asyncio.run(go())
    assert bool(started) == bug


# ---- 28: a crash between two components' checkpoints

@pytest.fixture(scope="module")
def deterministic(home):
    "A finished run under the logical clock, with all its checkpoints."
    run = Command(home, dir="clock", schedule__deterministic="true")
    assert run.wait() == 0, run.said()
    return run.folder

def crashed(folder, name):
    """A copy as a crash in step 3 leaves it: the trainer's part written aside, or renamed and not marked; the
    orchestrator's missing; the logs already ahead."""
    copy = folder.parent / name
    shutil.copytree(folder, copy)
    for n in (3, 4): shutil.rmtree(copy / "checkpoints" / f"step_{n}")
    shutil.rmtree(copy / "model")
    for n in ("finished.json", "end.msgpack"): (copy / n).unlink()
    # of a life that went much further
    for n in range(30, 34): shutil.copytree(copy / "weights" / "v4", copy / "weights" / f"v{n}")
    for half in (".step_4.tmp", "step_3"):
        shutil.copytree(copy / "checkpoints" / "step_2", copy / "checkpoints" / half)
        (copy / "checkpoints" / half / "COMMITTED").unlink()
        (copy / "checkpoints" / half / "orchestrator.msgpack").unlink()
    return copy

def timeless(folder):
    return [{k: v for k, v in row.items() if not k.endswith(("seconds", "per_s", "waits"))}
        for row in read_lines(folder / "metrics.jsonl")]


def test_known_failure_28_resume_after_a_crash_between_two_checkpoints(deterministic, home):
    """The half-written step is not taken for the latest, and the resumed run ends with the bits of the one that was
    never interrupted."""
    folder = crashed(deterministic, "crashed")
    assert latest(folder).name == "step_2"
    run = Command(home, "--resume", folder)
    assert run.wait() == 0, run.said()
    assert "resumed from step_2" in run.events()
    ours = load_file(folder / "model" / "model.safetensors")
    theirs = load_file(deterministic / "model" / "model.safetensors")
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours)
    assert timeless(folder) == timeless(deterministic) and [r["step"] for r in timeless(folder)] == [1, 2, 3, 4]
    assert read_lines(folder / "ledger.jsonl") == read_lines(deterministic / "ledger.jsonl") and books(folder) == SOUND


@pytest.mark.parametrize("bug", [False, True])
def test_what_an_earlier_life_left_is_not_taken_for_ours(tmp_path, bug):
    """A resumed trainer at step 20 publishes v20 and v21 where v30 to v33 lie.

    Bug: the highest numbers are kept, and what was just written goes."""
    def prune(folder, oldest, newest=sys.maxsize):
        if bug: [shutil.rmtree(weights.version_path(folder, v)) for v in weights.versions(folder)[:-4]]
        else: weights.prune(folder, oldest, newest)
    for v in range(30, 34): weights.publish(tmp_path, v, dict(w=torch.zeros(2)))
    prune(tmp_path, 0, 20)
    for v in (20, 21):
        weights.publish(tmp_path, v, dict(w=torch.ones(2)))
        prune(tmp_path, v - 3)
    assert weights.versions(tmp_path) == ([30, 31, 32, 33] if bug else [20, 21])


@pytest.mark.parametrize("bug", [False, True])
def test_an_order_that_waited_is_stale(tmp_path, bug):
    """An engine that loads for long finds three orders, two of versions that are gone.

    Bug: it obeys the first, which ends the run."""
    class Post:
        mail = [Update(83, str(tmp_path)), Generate([]), Update(84, str(tmp_path)), Update(120, str(tmp_path))]
        def poll(self, seconds): return self.mail.pop(0) if self.mail else None
    weights.publish(tmp_path, 120, dict(w=torch.zeros(2)))
    engine = SimpleNamespace(update=lambda version, source: source.load(version)[1])
    mail = Post.mail[:] if bug else workers.inbox(Post(), 1)
    answers = [workers.take(engine, m.version, Folder(m.folder)) for m in mail if isinstance(m, Update)]
    held = weights.read_manifest(tmp_path, 120)
    assert answers == [Missing(83), Missing(84), Updated(120, held)][0 if bug else 2:]


@pytest.mark.parametrize("bug", [False, True])
def test_versions_that_an_engine_was_told_to_take_stay(monkeypatch, bug):
    "Two engines; one confirms, the other loads for long. Bug: the trainer may prune below what the slow one was told."
    if bug: monkeypatch.setattr(EnginePool, "oldest", lambda self: self.latest[0])
    async def go():
        pool = EnginePool(Wire())
        pool.engines = {n: Worker(n, Alive()) for n in ("engine-0.0", "engine-1.0")}
        for e in pool.engines.values(): e.ready.set()
        for v in range(1, 6):
            waits = asyncio.ensure_future(pool.update(v, "weights"))
            await asyncio.sleep(0)
            await pool.took("engine-0.0", v)
            waits.cancel()
        assert pool.oldest() == (5 if bug else 1)
        await pool.took("engine-1.0", 4)
        assert pool.oldest() == 5
        await pool.missing("engine-1.0", 3)                              # told again, of the newest
        assert pool.server.sent[-1] == ("engine-1.0", Update(5, "weights"))
        with pytest.raises(UserError, match="engine-1.0: weights v5 are not in weights"):
            await pool.missing("engine-1.0", 5)
    asyncio.run(go())


def test_a_finished_run_is_finished(deterministic, home):
    "Bugs: resumed, it trains on and replaces its model; killed before the model was written, it decides anew."
    model = deterministic / "model" / "model.safetensors"
    before = model.stat().st_mtime_ns, model.read_bytes()
    run = Command(home, "--resume", deterministic)
    assert run.wait() == 0 and "is finished: rl.steps = 4 are done" in run.said() and "--extend" in run.said(), run.said()
    assert (model.stat().st_mtime_ns, model.read_bytes()) == before
    folder = home / "ended"
    shutil.copytree(deterministic, folder)
    shutil.rmtree(folder / "model")
    (folder / "finished.json").unlink()
    config = folder / "config.toml"
    config.write_text(config.read_text().replace("\nsteps = 4\n", "\nsteps = 9\n"))
    run = Command(home, "--resume", folder)
    assert run.wait() == 0 and len(run.lines("metrics.jsonl")) == 4, run.said()     # its end was decided at step 4
    assert (folder / "model" / "model.safetensors").read_bytes() == before[1] and books(folder) == SOUND
    assert [e["step"] for e in run.lines("evals.jsonl")] == [0, 4]
    run = Command(home, "--extend", folder, "--rl.loss", "gspo")
    assert run.wait() == 2 and "rl.loss may not change" in run.said()
    run = Command(home, "--extend", folder, "--rl.steps", "5")
    run.folder = folder
    assert run.wait() == 0 and [r["step"] for r in run.lines("metrics.jsonl")] == [1, 2, 3, 4, 5], run.said()
    assert (folder / "model" / "model.safetensors").read_bytes() != before[1] and books(folder) == SOUND


def test_known_failure_28_bugs(deterministic):
    "Bugs: the newest folder is the latest; a commit does not ask for every part."
    folder = crashed(deterministic, "crashed-again")
    newest = max((folder / "checkpoints").glob("step_*"), key=lambda p: int(p.name[5:]))
    with pytest.raises(CheckpointError, match="no finished checkpoint"): verify(newest)
    target = stage(folder, 7)
    (target / "model.safetensors").write_bytes(b"x")
    with pytest.raises(CheckpointError, match="orchestrator.msgpack missing"):
        commit(folder, 7, ("model.safetensors", "orchestrator.msgpack"))
    assert latest(folder).name == "step_2"


# ---- 29: an end that ends

def test_known_failure_29_signals_leave_nothing_behind(home):
    """SIGTERM, SIGINT and SIGKILL to the orchestrator, one life after the other: each ends soon, leaves no process,
    and can be resumed."""
    args = None
    for how, code in ((signal.SIGTERM, 130), (signal.SIGINT, 130), (signal.SIGKILL, -9)):
        # what a shell leaves to a command with `&` in a script
        def script(): signal.signal(signal.SIGINT, signal.SIG_IGN)
        run = Command(home, *args) if args else Command(home, before=script, dir="signals", rl__steps=100000,
            checkpoint__keep=2)
        before = run.steps()
        run.until(lambda: run.steps() >= before + 2 and (latest(run.folder) or Path("step_0")).name != "step_0")
        workers = run.workers()
        assert len(workers) == 2
        if how == signal.SIGINT: os.killpg(run.process.pid, how)       # a terminal's Ctrl-C reaches every process
        else: run.process.send_signal(how)
        assert run.wait(30) == code and gone(workers)
        if code > 0:
            assert "committed; `moe-rl run --resume" in run.said() and "goes on from the last checkpoint" in run.said() and "Traceback" not in run.said(), run.said()
        args = "--resume", run.folder
    assert books(run.folder) == SOUND


@pytest.mark.parametrize("bug", [False, True])
def test_known_failure_29_stop_ends_those_who_do_not_listen(bug):
    "Bug: `stop` asks, and waits for ever for a worker that hangs."
    deaf = subprocess.Popen([sys.executable, "-c", "import signal, time; signal.signal(signal.SIGTERM, "
                                                   "signal.SIG_IGN); print(flush=True); time.sleep(60)"],
                                                   stdout=subprocess.PIPE)
    deaf.stdout.readline()
    worker = Worker("engine-0.0", LocalHandle("engine-0.0", deaf))
    worker.ready.set()
    async def polite(server, workers):
        for w in workers: await server.send(w.name, Stop())
        while any(w.process.poll() is None for w in workers): await asyncio.sleep(.05)
    async def go(): await asyncio.wait_for(polite(Wire(), [worker]) if bug else stop(Wire(), [worker], patience=.3), 3)
    if bug:
        with pytest.raises(TimeoutError): asyncio.run(go())
        assert deaf.poll() is None
        deaf.kill()
    else: asyncio.run(go())
    assert deaf.wait(5) is not None


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="asks the Linux kernel")
@pytest.mark.parametrize("bug", [False, True])
def test_known_failure_29_no_orphans(bug):
    "A worker dies with its orchestrator, whatever killed that. Bug: it does not ask the kernel for it."
    child = ('import ctypes, signal, sys, '
             f'time\n{inspect.getsource(wire.die_with_parent)}\n{"" if bug else "die_with_parent()"}\nprint("up", '
             'flush=True); time.sleep(30)')
    parent = (f'import subprocess, sys, time\np = subprocess.Popen([sys.executable, "-c", {child!r}], '
              'stdout=subprocess.PIPE)\np.stdout.readline(); print(p.pid, flush=True); time.sleep(30)')
    process = subprocess.Popen([sys.executable, "-c", parent], stdout=subprocess.PIPE, text=True)
    orphan = psutil.Process(int(process.stdout.readline()))
    process.kill()
    process.wait()
    assert gone([orphan], 1 if bug else 10) != bug
    if bug: orphan.kill()


# ---- 30: the wire drops nothing

class Publisher:
    "The bug: a PUB socket with a high-water mark, as others used."
    def __init__(self):
        self.context = zmq.Context()
        self.socket = self.context.socket(zmq.PUB)
        self.socket.setsockopt(zmq.SNDHWM, 100)
        self.port = self.socket.bind_to_random_port("tcp://127.0.0.1")
    def flood(self, n):
        listener = self.context.socket(zmq.SUB)
        listener.setsockopt(zmq.RCVHWM, 100)
        listener.setsockopt(zmq.SUBSCRIBE, b"")
        listener.connect(f"tcp://127.0.0.1:{self.port}")
        time.sleep(.2)
        for i in range(n): self.socket.send(bytes(2000))
        got = 0
        while listener.poll(300):
            listener.recv()
            got += 1
        self.context.destroy(linger=0)
        return got

@pytest.mark.parametrize("bug", [False, True])
def test_known_failure_30_nothing_is_dropped_without_a_word(bug):
    "A peer that is busy for a while gets every message in the end, in order, both ways."
    N = 3000
    async def flood():
        server = Server()
        client = Client(server.endpoint, "engine-0", server.key)
        assert isinstance((await server.receive())[1], Hello)
        for i in range(N): await server.send("engine-0", Update(i, "x" * 2000))          # nobody reads
        for i in range(N): client.send(Trained(i, {}))                                   # nobody reads here either
        down, up = [client.poll(5).version for _ in range(N)], []
        while len(up) < N:
            if isinstance(m := (await server.receive())[1], Trained): up.append(m.step)
        client.close(), server.close()
        return down == up == list(range(N))
    if bug: assert Publisher().flood(N) < N
    else: assert asyncio.run(asyncio.wait_for(flood(), 30))


@pytest.mark.parametrize("bug", [False, True])
def test_known_failure_30_a_message_to_nobody_is_an_error(bug):
    "Bug: without ROUTER_MANDATORY a message to an unknown worker vanishes."
    async def go():
        server = Server()
        if bug: server.socket.setsockopt(zmq.ROUTER_MANDATORY, 0)
        try: await server.send("engine-7", Stop())
        finally: server.close()
    if bug: asyncio.run(go())
    else:
        with pytest.raises(ConnectionError, match="engine-7 is not connected"): asyncio.run(go())


# ---- 31: no request vanishes

@pytest.mark.parametrize("bug", [False, True])
def test_known_failure_31_requests_of_a_lost_engine_are_sent_again(monkeypatch, bug):
    """Every request has one answer, whatever happens to engines and versions between.

    Bug: what a dead engine had is forgotten."""
    if bug:
        async def lost(self, engine):
            self.engines.pop(engine), self.version.pop(engine), [self.out.pop(id)
                for id, (e, _) in list(self.out.items()) if e == engine]
        monkeypatch.setattr(EnginePool, "lost", lost)
    async def go():
        server = Wire()
        pool = EnginePool(server)
        pool.engines = {n: Worker(n, Alive()) for n in ("engine-0.0", "engine-1.0")}
        pool.version = dict.fromkeys(pool.engines, 0)
        requests = [Request(id=f"0-{i}-0.0", prompt=[1, 2, 3], max_tokens=4) for i in range(10)]
        answers = [asyncio.ensure_future(pool.generate(r)) for r in requests]
        await asyncio.sleep(.05)
        sent = {name: [r for n, m in server.sent if n == name and isinstance(m, Generate) for r in m.requests]
            for name in pool.engines}
        assert [len(v) for v in sent.values()] == [5, 5]                                  # shared out
        await pool.finished("engine-0.0", Generated([answer(sent["engine-0.0"][0])], {}))
        await pool.lost("engine-0.0")
        again = [r for n, m in server.sent[2:] if n == "engine-1.0" for r in m.requests]
        # a voice from the grave
        await pool.finished("engine-0.0", Generated([answer(r) for r in sent["engine-0.0"]], {}))
        await pool.finished("engine-1.0", Generated([answer(r) for r in sent["engine-1.0"] + again], {}))
        got = await asyncio.wait_for(asyncio.gather(*answers), 1)
        assert [g.id for g in got] == [r.id for r in requests] and pool.requeued == 4 and not (pool.out or pool.held
            or pool.waiting)
    if bug:
        with pytest.raises((TimeoutError, asyncio.CancelledError)): asyncio.run(go())
    else: asyncio.run(go())


@pytest.mark.parametrize("bug", ["", "lost", "twice"])
def test_known_failure_31_the_audit_finds_it(deterministic, tmp_path, bug):
    "The ledger of a real run is whole; a rollout taken out of it, or told twice, is found."
    folder = tmp_path / "run"
    shutil.copytree(deterministic, folder)
    assert books(folder) == SOUND
    text = (folder / "ledger.jsonl").read_text()
    first = re.search(r'"trained": \["(\d+-\d+)", "(\d+-\d+)"', text)
    if bug:
        (folder / "ledger.jsonl").write_text(text.replace(f'"{first[1]}", ', "", 1) if bug == "lost"
            else text.replace(f'"{first[1]}"', f'"{first[1]}", "{first[1]}"', 1))
    found = books(folder)
    assert (found["lost"] == [first[1]]) == (bug == "lost") and (found["duplicated"] == [first[1]]) == (bug == "twice")


# ---- 32: evaluation and training share, and neither starves

@pytest.mark.parametrize("bug", [False, True])
def test_known_failure_32_judging_has_threads_of_its_own(tmp_path, bug):
    "Rewards of training that hang must not hold up an evaluation. Bug: both ask the same threads."
    class Slow(Letters):
        def score(self, task, turns):
            if turns == ["train"]: release.wait(20)
            return 1.0
    release = threading.Event()
    async def go():
        loop = make_loop(tmp_path, Slow())
        if bug: loop.exam.guard = loop.guard
        task = Letters().problem(1)
        stuck = [asyncio.ensure_future(loop.guard.score(task, ["train"])) for _ in range(4)]
        await asyncio.sleep(.1)
        try: return await asyncio.wait_for(loop.exam.guard.score(task, ["eval"]), 1)
        finally:
            release.set()
            await asyncio.gather(*stuck)
    if bug:
        with pytest.raises(TimeoutError): asyncio.run(go())
    else: assert asyncio.run(go()) == 1.0


@pytest.mark.parametrize("first, second", [("train", "eval"), ("eval", "train")])
@pytest.mark.parametrize("bug", [False, True])
def test_known_failure_32_both_lanes_get_seats(first, second, bug):
    """A crowd of one kind is in the engine when one request of the other kind comes.

    Bug: one queue for both, first come, first served."""
    s = load_settings(overrides=TINY)
    engine = Engine(init_weights(Model(model_config(s, 64)), 0), kv_tokens=4096, max_seqs=4, eval_share=.25,
        record_routes=False)
    for i in range(40): engine.add(Request(id=f"{first}-{i}", prompt=[1, 2, i], max_tokens=6, lane=first))
    for _ in range(3): engine.step()
    engine.add(Request(id="late", prompt=[7], max_tokens=6, lane=first if bug else second))
    before = []
    while "late" not in before: before += [f.id for f in engine.step()]
    assert (len(before) <= 12) != bug                          # two rounds of seats, not all forty


# ---- dead, silent and replaced

def test_dead_and_silent_components_are_named_and_engines_replaced(home):
    """One run, whose weights go from memory to memory: evaluations beside the training; an engine is killed, its
    successor falls silent, then the trainer does."""
    run = Command(home, dir="trouble", rl__steps=100000, checkpoint__keep=2, eval__every=1, eval__prompts=32,
        schedule__silence_seconds=8, engine__transfer="direct")
    run.until(lambda: len(run.lines("evals.jsonl")) >= 3 and run.steps() >= 6)                       # 32: both go on
    evals, rows = run.lines("evals.jsonl"), run.lines("metrics.jsonl")
    assert any(e["seconds"] - e["eval_seconds"] < r["seconds"] < e["seconds"] for e in evals[1:]
        for r in rows) or len(rows) > len(evals)

    [engine] = run.workers("engine")
    engine.send_signal(signal.SIGKILL)
    run.until(lambda: "engine-0.1 started in place of engine-0.0" in run.events())
    assert re.search(r"engine-0\.0 died \(exit code -9\) while .*; the trainer waits for a batch \(\d+ groups are "
                     r"being played", run.events())
    now = run.steps()
    run.until(lambda: run.steps() >= now + 3 and latest(run.folder).name != "step_0")

    [engine] = run.workers("engine")
    engine.send_signal(signal.SIGSTOP)
    stopped = time.monotonic()
    run.until(lambda: "engine-0.2 started in place of engine-0.1" in run.events())
    assert time.monotonic() - stopped < 8 + 22                         # named within 60 s at the default of 45
    assert re.search(r"engine-0\.1 has been silent for \d+ s while .*; the trainer waits for a batch", run.events())
    now = run.steps()
    run.until(lambda: run.steps() >= now + 3)

    workers = run.workers()
    [trainer] = run.workers("trainer")
    trainer.send_signal(signal.SIGSTOP)
    stopped = time.monotonic()
    assert run.wait(60) == 2 and time.monotonic() - stopped < 8 + 22
    assert re.search(r"^moe-rl: trainer has been silent for \d+ s while .*; the engines wait for version \d+$",
        run.said().strip().splitlines()[-1])
    assert gone(workers) and books(run.folder) == SOUND


@pytest.mark.parametrize("bug", [False, True])
def test_silence_is_noticed_without_a_process_that_died(tmp_path, monkeypatch, bug):
    "Bug: only dead processes are looked for, and a stopped one is waited for for ever."
    if bug:
        monkeypatch.setattr(Worker, "trouble", lambda self, silence, stall: "" if self.process.poll() is None
            else "died")
    async def go():
        loop = make_loop(tmp_path, schedule__silence_seconds=.4)
        for w in (loop.trainer, *loop.pool.engines.values()): w.ready.set()
        _ = loop.spawn(receive(loop)), loop.spawn(watch(loop, None))
        loop.server.inbox.put_nowait(("trainer", Beat("step 3, micro-batch 1 of 2", 1)))
        for _ in range(20):
            loop.server.inbox.put_nowait(("engine-0.0", Beat("sampling", 1)))
            await asyncio.wait([asyncio.ensure_future(asyncio.sleep(.1))])
            if loop.beside.error: raise loop.beside.error
    if bug: asyncio.run(go())
    else:
        with pytest.raises(UserError, match=r"trainer has been silent for . s while step 3, micro-batch 1 of 2 \(no "
                                            r"beat, no CPU time; schedule.silence_seconds = 0.4\); the engines wait "
                                            r"for version 1"):
            asyncio.run(go())
