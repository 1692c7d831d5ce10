"""Engine replicas behind the run's own pool and supervision, killed and replaced while they answer and while versions
come: every request is answered once, and every token by the weights that it is stamped with."""
import argparse, asyncio, random, shutil, signal, time
from collections import Counter, defaultdict
from pathlib import Path
from types import SimpleNamespace
import msgspec, numpy as np
import torch
from _witness import audit
from _runs import folders
from moe_rl.bench import NeedsHardware, repository
from moe_rl.config import Settings, load_settings, to_toml
from moe_rl.data.tokens import byte_tokenizer
from moe_rl.errors import UserError
from moe_rl.moe.model import Model
from moe_rl.records import Finished, Request
from moe_rl.rl.beside import Beside
from moe_rl.rl.pool import EnginePool, Worker
from moe_rl.rl.run import end, job_of, keep_tokenizer, launcher_of
from moe_rl.rl.supervise import receive, watch
from moe_rl.rl.trainer import build_model
from moe_rl.rl.wire import Server
from moe_rl.rollout.protocol import engine_maker
from moe_rl.train.precision import working
from moe_rl.train.weights import prune, publish

TINY = {"model.hidden_size": 32, "model.intermediate_size": 48, "model.moe_intermediate_size": 16,
    "model.num_hidden_layers": 2, "model.num_attention_heads": 2, "model.num_key_value_heads": 1, "model.head_dim": 16,
    "model.num_experts": 8, "model.max_position_embeddings": 1024, "tokenizer.kind": "byte", "engine.kv_tokens": 6144,
    "engine.max_seqs": 16, "engine.max_tokens": 160, "engine.kv": "recompute", "schedule.device": "cpu"}
EXACT = {"train.forward": "exact"}
TURNS = (1, 1, 2, 3, 4) # of a rollout, as likely as they stand here


class Watched(EnginePool):
    "The pool of a run, and what it takes to check it: who confirmed which version, and how often each id was answered."
    def __init__(self, server):
        super().__init__(server)
        self.confirmed, self.answers, self.unheld = defaultdict(set), Counter(), set()

    async def took(self, engine, version, held=None):
        self.confirmed[engine].add(version)
        await super().took(engine, version, held)

    async def finished(self, engine, message):
        for f in message.finished:
            if self.out.get(f.id, ("",))[0] != engine: continue
            self.answers[f.id] += 1
            if not set(f.versions.tolist()) <= self.confirmed[engine]: self.unheld.add(f.id)
        await super().finished(engine, message)


class Alive: # in the trainer's place
    def poll(self): return None
    def cpu_seconds(self): return time.monotonic()


class Versions:
    "A policy that moves a little with every version; all of its versions stay in memory."
    def __init__(self, s: Settings, folder: Path):
        self.model, self.folder, self.states = build_model(s, byte_tokenizer().vocab_size), folder, []
        self.model.requires_grad_(False)
        self.gen = torch.Generator().manual_seed(s.seed)

    def publish(self) -> int:
        for p in self.model.parameters():
            if p.ndim > 1: p += .03 * torch.randn(p.shape, generator=self.gen)
        self.states.append({n: t.clone() for n, t in self.model.state_dict().items()})
        publish(self.folder, len(self.states) - 1, self.states[-1])
        return len(self.states) - 1

    def __call__(self, version: int) -> Model:
        self.model.load_state_dict(self.states[version])
        return self.model


class Chaos:
    "Rollouts, updates and kills beside one another."
    def __init__(self, a, s: Settings, folder: Path):
        self.a, self.s, self.folder, self.rng = a, s, folder, random.Random(a.seed)
        self.launcher, self.beside, self.versions = launcher_of(s), Beside(), Versions(s, folder / "weights")
        self.server, self.all, self.played = Server(), [], {}
        self.pool = Watched(self.server)
        self.issued = self.kills = self.restarts = self.struck = 0

    def engine(self, generation: int, i: int = 0) -> Worker:
        name = f"engine-{i}.{generation}"
        self.restarts = max(self.restarts, generation)
        self.all.append(Worker(name, self.launcher.start(job_of("engine", name, self.folder, self.server))))
        return self.all[-1]

    def loop(self) -> SimpleNamespace:
        "What supervision knows of an orchestrator."
        log = SimpleNamespace(event=lambda line: print(f"  {line}", flush=True))
        show = lambda row: None
        show.last = float("inf")
        return SimpleNamespace(s=self.s, pool=self.pool, server=self.server, trainer=Worker("trainer", Alive()),
            log=log, show=show, spawn=self.beside.spawn, changed=self.beside.changed, books=SimpleNamespace(began=None),
            state=SimpleNamespace(step=0, live={}), buffer=SimpleNamespace(complete={}))

    async def ask(self, request: Request) -> Finished:
        "Traffic and kills keep step with one another: there is as much before as after each."
        while self.issued > self.a.requests * (self.kills + 1) / (self.a.kills + 1): await asyncio.sleep(.05)
        self.issued += 1
        self.played[request.id] = request, None
        done = await self.pool.generate(request)
        self.played[request.id] = request, done
        return done

    async def rollout(self, number: int, turns: int, rng: random.Random, open_: asyncio.Semaphore):
        "A conversation: what was said so far, and a few tokens more."
        async with open_:
            text = [rng.randrange(3, 259) for _ in range(rng.randint(4, 40))]
            for turn in range(turns):
                n = rng.randint(20, self.s.engine.max_tokens)
                f = await self.ask(Request(id=f"0-{number}-0.{turn}", prompt=text, max_tokens=n,
                    seed=rng.randrange(2**40)))
                text = text + f.token_ids + [rng.randrange(3, 259) for _ in range(4)]

    def rollouts(self) -> list:
        "As many as make the requests that are wanted."
        left, out, open_ = self.a.requests, [], asyncio.Semaphore(self.a.open)
        while left:
            turns = min(left, self.rng.choice(TURNS))
            out.append(self.rollout(len(out), turns, random.Random(self.rng.randrange(2**40)), open_))
            left -= turns
        return out

    async def update(self):
        "A version every so many seconds; those that nobody may read any more go."
        while True:
            await asyncio.sleep(self.a.every)
            version = self.versions.publish()
            self.beside.spawn(self.pool.update(version, str(self.folder / "weights")))
            prune(self.folder / "weights", min(self.pool.oldest(), version - 1))

    def busy(self, any_: bool) -> list[Worker]:
        "Engines that live and have requests, or any that live."
        have = {e for e, _ in self.pool.out.values()}
        return sorted((w for w in self.pool.engines.values() if w.process.poll() is None and (any_ or w.name in have)),
            key=lambda w: w.name)

    async def kill(self):
        "SIGKILL at seeded moments, mostly to one that has requests."
        for _ in range(self.a.kills):
            await asyncio.sleep(self.rng.uniform(3, 8))
            while self.issued < self.a.requests * self.kills / (self.a.kills + 1): await asyncio.sleep(.05)
            any_, limit = self.rng.random() < .2, time.monotonic() + 30
            while not (victims := self.busy(any_ or time.monotonic() > limit)): await asyncio.sleep(.05)
            victim = self.rng.choice(victims)
            out = sum(e == victim.name for e, _ in self.pool.out.values())
            self.struck += out > 0
            victim.process.process.send_signal(signal.SIGKILL)
            self.kills += 1
            print(f"kill {self.kills}: {victim.name}, which has {out} requests; {self.issued} asked so far", flush=True)

    async def run(self) -> float: # seconds
        self.pool.engines = {e.name: e for e in (self.engine(0, i) for i in range(self.a.replicas))}
        loop, started = self.loop(), time.monotonic()
        beside = [self.beside.spawn(receive(loop)), self.beside.spawn(watch(loop, self.engine))]
        for e in self.pool.engines.values(): self.beside.spawn(self.pool.introduce(e))
        try:
            await self.beside.until(self.pool.update(self.versions.publish(), str(self.folder / "weights")))
            beside += [self.beside.spawn(self.update()), killing := self.beside.spawn(self.kill())]
            await self.beside.until(asyncio.wait_for(asyncio.gather(*self.rollouts()), self.a.patience))
            await self.beside.until(killing)
        except TimeoutError: print(f"NO END after {self.a.patience:.0f} s", flush=True)
        finally:
            for task in [*beside, *self.beside.tasks]: task.cancel()
            end(self.all)
            self.launcher.close()
            self.server.close()
        return time.monotonic() - started


def measure(args):
    p = argparse.ArgumentParser(prog="moe-rl bench replica_chaos")
    p.add_argument("--kind", default="embedded", help="of the engines; embedded ones are exact, and held to every bit")
    p.add_argument("--replicas", type=int, default=3)
    p.add_argument("--requests", type=int, default=500)
    p.add_argument("--kills", type=int, default=10)
    p.add_argument("--every", type=float, default=2, help="seconds between versions")
    p.add_argument("--open", type=int, default=40, help="rollouts at a time")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--patience", type=float, default=900, help="seconds after which a request counts as lost")
    a = p.parse_args(args)
    torch.set_num_threads(1)
    exact = a.kind == "embedded"
    folder = folders(repository(), "replica_chaos")
    s = load_settings(overrides=TINY | (EXACT if exact else {}) | {"engine.kind": a.kind, "engine.replicas": a.replicas,
        "schedule.engine_restarts": a.kills + 5, "seed": a.seed, "dir": str(folder)})
    try: engine_maker(s.engine.kind, s.engine.params)
    except UserError as e: raise NeedsHardware(str(e)) from None
    keep_tokenizer(byte_tokenizer(), folder / "tokenizer")
    (folder / "config.toml").write_text(to_toml(s))
    chaos = Chaos(a, s, folder)
    seconds = asyncio.run(chaos.run())
    played = [(r, f) for r, f in chaos.played.values() if f is not None]
    work_of = lambda model: working(model, "float32", "exact" if exact else "plain", "auto")
    off, slack = audit(played, chaos.versions, work_of), 0. if exact else 1e-4
    wrong = {f.id for (_, f), o in zip(played, off) if o > slack} | chaos.pool.unheld
    # what the check would say of stamps that are off by one
    some = [(r, f) for r, f in played if f.versions.min() > 0][:50]
    shifted = [(r, msgspec.structs.replace(f, versions=f.versions - 1)) for r, f in some]
    noticed = np.mean([o > slack for o in audit(shifted, chaos.versions, work_of)])
    mixed = sum(len(set(f.versions.tolist())) > 1 for _, f in played)
    shutil.rmtree(folder, ignore_errors=True)
    return dict(figures=dict(lost=a.requests - len(played), duplicated=sum(n > 1 for n in chaos.pool.answers.values()),
        wrong_version=len(wrong), requests=chaos.issued, kills=chaos.kills, kills_with_requests=chaos.struck,
        restarts=chaos.restarts, requeued=chaos.pool.requeued, versions=len(chaos.versions.states), mixed=mixed,
        worst=max(off), wrong_stamps_noticed=float(noticed), seconds=seconds), kind=a.kind)
