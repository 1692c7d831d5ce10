"""The pool and its router in virtual time: conversations of many turns, engines that die and come back, versions in
between. Each request is answered once, a dead engine's requests are sent again once, each goes where it costs least."""
import asyncio, random, selectors
from collections import Counter

import numpy as np, pytest
from hypothesis import given, settings, strategies as st

from moe_rl.records import Finished, Request
from moe_rl.rl.pool import EnginePool, Worker
from moe_rl.rl.wire import Generate, Generated
from moe_rl.rollout.router import READ, Router, session_of


class Jumping(asyncio.SelectorEventLoop):
    "A loop whose clock jumps to the next thing to do."
    def __init__(self):
        loop = self
        class Selector(selectors.DefaultSelector):
            def select(self, timeout=None):
                loop.now += timeout or 0.
                return super().select(0)
        self.now = 0.
        super().__init__(Selector())
    def time(self): return self.now


def jump(work, seconds):
    "Run a coroutine to its end; `TimeoutError` after so many virtual seconds."
    with asyncio.Runner(loop_factory=Jumping) as runner: return runner.run(asyncio.wait_for(work, seconds))


class Alive:
    def poll(self): return None
    def cpu_seconds(self): return 0.


class Engines:
    "A server and the engines behind it: each token takes its time, read or written; what is in an engine dies with it."
    def __init__(self, seed, delay):
        self.rng, self.delay, self.pool = random.Random(seed), delay, None
        self.live, self.sent, self.accepted, self.texts = {}, Counter(), Counter(), {}
        self.read = self.out_at_death = 0

    def later(self, seconds, work):
        async def do():
            await asyncio.sleep(seconds)
            await work()
        return asyncio.ensure_future(do())

    async def send(self, name, message):
        if not isinstance(message, Generate): return
        self.sent.update(r.id for r in message.requests)
        if name not in self.live: raise ConnectionError
        for r in message.requests:
            version, known = self.pool.version[name], self.texts.get((name, session_of(r.id)), (-1, 0))
            unread = len(r.prompt) - (known[1] if known[0] == version else 0)
            self.read += unread
            n = self.rng.randint(1, r.max_tokens)
            f = Finished(id=r.id, token_ids=[7]*n, logprobs=np.zeros(n, np.float32),
                versions=np.full(n, version, np.int32), routes=None, stop_reason="length")
            self.live[name][r.id] = self.later(.001*unread + .01*n + self.rng.random()*self.delay,
                lambda f=f, r=r: self.answer(name, version, r, f))

    async def answer(self, name, version, r, f):
        self.live[name].pop(r.id)
        self.texts[name, session_of(r.id)] = version, len(r.prompt)+len(f.token_ids)-1
        stats = dict(running=len(self.live[name]), kv_used=50*len(self.live[name]))
        # on its way when the engine may die: it comes, or never does, or comes too late
        await asyncio.sleep(self.rng.random()*self.delay)
        if self.pool.out.get(f.id, ("",))[0] == name: self.accepted[f.id] += 1
        await self.pool.finished(name, Generated([f], stats))

    async def up(self, name):
        self.live[name] = {}
        await self.pool.took(name, self.pool.latest[0])
        await self.pool.flush()

    async def die(self, name, successor):
        "SIGKILL; found out a little later, and replaced later still."
        for task in self.live.pop(name).values(): task.cancel()
        await asyncio.sleep(self.rng.random())
        self.out_at_death += sum(e == name for e, _ in self.pool.out.values())
        await self.pool.lost(name)
        self.pool.engines[successor] = Worker(successor, Alive())
        await asyncio.sleep(self.rng.random()*5)
        await self.up(successor)


async def world(seed, engines, sessions, deaths, delay):
    "A life; what is known of it at its end."
    rng, server = random.Random(seed), Engines(seed, delay)
    pool = server.pool = EnginePool(server)
    pool.latest, got = (0, "weights"), {}
    for i in range(engines):
        pool.engines[f"engine-{i}.0"] = Worker(f"engine-{i}.0", Alive())
        await server.up(f"engine-{i}.0")
    async def talk(i):
        await asyncio.sleep(rng.random()*8)
        text = [3]*rng.randint(1, 300)
        for turn in range(rng.randint(1, 6)):
            f = got[f"0-{i}-0.{turn}"] = await pool.generate(Request(id=f"0-{i}-0.{turn}", prompt=text,
                max_tokens=rng.choice((5, 20, 200))))
            assert f.id == f"0-{i}-0.{turn}"
            text = text + f.token_ids + [4]*5
    async def chaos():
        for n in range(1, deaths+1):
            await asyncio.sleep(rng.random()*3)
            if server.live: await server.die(rng.choice(sorted(server.live)), f"engine-0.{n}")
    async def versions():
        for v in range(1, 8):
            await asyncio.sleep(2)
            pool.latest = v, "weights"
            for name in list(server.live): await pool.took(name, v)
    await asyncio.gather(chaos(), versions(), *map(talk, range(sessions)))
    return pool, server, got


def sound(pool, server, got):
    assert set(server.accepted) == set(got) and set(server.accepted.values()) == {1}         # one answer each
    assert not (pool.out or pool.held or pool.waiting)                                       # nothing is left over
    assert pool.requeued == server.out_at_death == sum(server.sent.values()) - len(got)      # sent again once a death
    assert {h.engine for h in pool.router.homes.values()} <= set(pool.version)
    assert set(pool.router.reports) <= set(pool.version)


@settings(max_examples=60)
@given(st.integers(0, 10**6), st.integers(1, 5), st.integers(1, 60), st.integers(0, 12), st.sampled_from([0., .3, 3.]))
def test_each_request_is_answered_once(seed, engines, sessions, deaths, delay):
    sound(*jump(world(seed, engines, sessions, deaths, delay), 10_000))


@pytest.mark.parametrize("bug", ["forgotten", "kept", "any voice"])
def test_the_bugs_are_found(monkeypatch, bug):
    lost, finished = EnginePool.lost, EnginePool.finished
    async def forgets(self, engine):
        for id, (e, _) in list(self.out.items()):
            if e == engine: del self.out[id]
        await lost(self, engine)
    async def keeps(self, engine):
        before = dict(self.router.homes)
        await lost(self, engine)
        self.router.homes.update(before)
    async def believes(self, engine, message):
        for f in message.finished:
            if f.id in self.out and self.out[f.id][0] != engine:
                self.out[f.id] = engine, self.out[f.id][1]
                self.version.setdefault(engine, self.latest[0])
        await finished(self, engine, message)
    name, mutant = {"forgotten": ("lost", forgets), "kept": ("lost", keeps), "any voice": ("finished", believes)}[bug]
    monkeypatch.setattr(EnginePool, name, mutant)
    with pytest.raises((AssertionError, TimeoutError, KeyError)):
        for seed in range(8): sound(*jump(world(seed, 3, 60, 10, 3.), 10_000))


def test_a_conversation_stays_where_its_text_lies():
    "Without homes more is read, in the same world."
    def read(homes):
        async def go():
            if not homes: Router.answered, kept = lambda *args: None, Router.answered
            try: return (await world(1, 4, 40, 0, .1))[1]
            finally:
                if not homes: Router.answered = kept
        server = jump(go(), 10_000)
        return server.read
    assert read(True) < .75*read(False)


@settings(max_examples=200)
@given(st.data())
def test_each_goes_where_it_costs_least(data):
    """Of all engines that are up none has less to do and to read, whatever has been reported; load is in tokens: no two
    engines are further apart than the largest request and the weight of the largest text."""
    draw = data.draw
    router = Router(draw(st.sampled_from([0, 1, READ])), measured=draw(st.booleans()))
    names = [f"engine-{i}.0" for i in range(draw(st.integers(1, 5)))]
    versions = {n: draw(st.integers(0, 2)) for n in names}
    def request(i):
        return Request(id=f"0-{i}-0.0", prompt=[5]*draw(st.integers(1, 400)), max_tokens=draw(st.integers(1, 900)))
    for i in range(draw(st.integers(0, 12))):
        n = draw(st.integers(1, 50))
        f = Finished(id="x", token_ids=[7]*n, logprobs=np.zeros(n, np.float32),
            versions=np.full(n, draw(st.integers(0, 2)), np.int32), routes=None, stop_reason="length")
        router.answered(draw(st.sampled_from(names)), draw(st.integers(0, 2)), request(i), f)
    requests, out = [request(i) for i in range(draw(st.integers(1, 20)))], []
    for r in requests:
        [(engine, [placed])] = router.place([r], out, versions).items()
        cost = {e: router.load(e, [x for at, x in out if at == e]) + router.reading*router.unread(r, e, versions[e])
            for e in names}
        assert placed is r and cost[engine] == min(cost.values())
        out.append((engine, r))
    load = [router.load(e, [x for at, x in out if at == e]) for e in names]
    assert max(load)-min(load) <= max(map(router.size, requests)) + router.reading*max(len(r.prompt) for r in requests)
    together = router.place(requests, [], versions)
    assert [(e, r.id) for e, rs in together.items() for r in rs] and sorted(out, key=lambda x: x[1].id) == sorted(
        ((e, r) for e, rs in together.items() for r in rs), key=lambda x: x[1].id)          # one by one or all at once
