"""What a run meets without a process that dies: nothing to learn, limits, interruptions, late weights, foreign
peers, damaged folders. A loop with an engine and a trainer that answer at once."""
import asyncio, os, signal, time
from pathlib import Path
from types import SimpleNamespace
import msgspec
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings, strategies as st
from moe_rl.config import load_settings
from moe_rl.data.tokens import TextTokenizer, byte_tokenizer, says
from moe_rl.errors import StorageError, UserError
from moe_rl.rl import ask, run, supervise, workers
from moe_rl.rl.ask import EVAL, PROBE, TRAIN, answers, build_engine
from moe_rl.rl.log import RunLog, read_lines
from moe_rl.rl.books import END, State
from moe_rl.rl.ending import Ending, Interrupted
from moe_rl.rl.orchestrator import Orchestrator
from moe_rl.rl.playing import Asking, Playing
from moe_rl.rl.pool import EnginePool, Worker
from moe_rl.rl.rows import Note
from moe_rl.rl.supervise import answer, watch
from moe_rl.rollout.protocol import Embedded, Folder
from moe_rl.train.weights import describe
from moe_rl.rl.wire import Abort, Generate, Generated, Save, Train, Update
from moe_rl.rollout.engine import Finished
from moe_rl.rollout.environments import Calculator, Environment, Task
from moe_rl.rollout.guard import Guard
from moe_rl.train.checkpoint import commit, latest, save_state, stage, step_path

TINY = {"model.hidden_size": 32, "model.intermediate_size": 32, "model.moe_intermediate_size": 16,
        "model.num_hidden_layers": 2, "model.num_attention_heads": 2, "model.num_key_value_heads": 1,
        "model.head_dim": 8, "model.num_experts": 4, "model.max_position_embeddings": 256, "tokenizer.kind": "byte",
        "rl.steps": 4, "rl.groups_per_step": 2, "rl.group_size": 2, "rl.tokens_per_batch": 512,
        "eval.prompts": 8, "engine.kv_tokens": 2048, "engine.max_seqs": 8, "engine.max_tokens": 6,
        "checkpoint.every": 10**5, "schedule.env_timeout": 10.0}


class Letters(Environment):
    "Two rollouts of a group differ, unless `same`."
    name = "letters"
    def __init__(self, same=False, answer="x", points=1.):
        self.same, self.answer, self.points, self.count = same, answer, points, 0
    def problem(self, key): return Task(env=self.name, prompt=f"Say {key % 1000}: ", answer=self.answer)
    def score(self, task, turns):
        self.count += 1
        return self.points * (1. if self.same else self.count % 2)


class Alive:
    "The handle of a process that lives."
    def poll(self): return None
    def kill(self): pass
    def cpu_seconds(self): return 0.0


class Puppet:
    """An engine and a trainer behind the wire that do at once what they are told; `says` is what the engine answers
    to everything."""
    def __init__(self, says="A"): self.sent, self.says, self.loop, self.slow, self.version = [], says, None, 0., 0
    def spawn(self, work): self.loop.spawn(work)
    async def send(self, name, message):
        self.sent.append((name, message))
        match message:
            case Generate(requests=requests): self.spawn(self.finish(name, requests))
            case Update(version=version): self.spawn(self.take(name, version))
            case Train(checkpoint=target): self.spawn(self.done(target, dict(tokens=10., step_seconds=0.)))
            case Save(folder=target): self.spawn(self.done(target, target))
    async def finish(self, name, requests):
        await asyncio.sleep(self.slow)
        ids = [*self.loop.tokenizer.encode(self.says), self.loop.tokenizer.eos_id]
        got = [Finished(id=r.id, token_ids=ids, logprobs=[-1.]*len(ids), versions=[self.version]*len(ids), routes=None,
            stop_reason="stop") for r in requests]
        await self.loop.pool.finished(name, Generated(got, dict(seconds=1., idle_seconds=.5)))
    async def take(self, name, version):
        self.version = version
        await self.loop.pool.took(name, version)
        await self.loop.pool.flush()
        self.loop.changed.set()
    async def done(self, target, what):
        if target:
            for n in ("model.safetensors", "optimizer.safetensors", "trainer.json"): (Path(target)/n).write_bytes(b"x")
        answer(self.loop, what)


def make_loop(folder, env=None, says="A", show=lambda row: None, **settings):
    "A loop at step 0 whose engine has version 0."
    s, server = load_settings(overrides=TINY | {k.replace("__", "."): v for k, v in settings.items()}), Puppet(says)
    pool, env = EnginePool(server), env or Letters()
    pool.engines = {"engine-0.0": Worker("engine-0.0", Alive())}
    pool.engines["engine-0.0"].ready.set()
    held = [env.problem(i) for i in range(s.eval.prompts)]
    server.loop = Orchestrator(s, Guard(env, timeout=20), byte_tokenizer(), server, pool, Worker("trainer", Alive()),
        RunLog(folder, tensorboard=False), folder, show, held_out=held)
    return server.loop

async def begin(loop):
    await loop.pool.update(0, "weights")
    stage(loop.folder, 0)
    await loop.server.done(str(loop.folder/"checkpoints"/".step_0.tmp"), None)
    loop.commit()

def play(folder, *args, seconds=20, during=None, **kwargs):
    "A whole run; the loop that made it and the last evaluation."
    async def go():
        loop = make_loop(folder, *args, **kwargs)
        await begin(loop)
        if during: loop.spawn(during(loop))
        return loop, await asyncio.wait_for(loop.run(), seconds)
    return asyncio.run(go())


# ---- runs that never end, or end at nothing

def test_a_plain_run(tmp_path):
    loop, last = play(tmp_path, says="x")
    rows = read_lines(tmp_path/"metrics.jsonl")
    assert [r["step"] for r in rows] == [1, 2, 3,
        4] and last["exact"] == 1. and loop.state.ended == "rl.steps = 4 are done"
    assert all(r["exact"] == 1. and (r["score"] is None or 0 <= r["score"] <= 1)
        for r in rows) and all(r["engine_waits"] in (0., .5) for r in rows)
    assert latest(tmp_path).name == "step_4" and (tmp_path/END).exists()


@pytest.mark.parametrize("bug", [False, True])
@pytest.mark.parametrize("says, why", [("x", "the task is solved"), ("A", "every score of a group is the same")])
def test_a_run_without_a_group_to_train_on_ends_by_name(tmp_path, monkeypatch, says, why, bug):
    "Bug: limits are asked between steps alone, and there is no step."
    if bug:
        monkeypatch.setattr(Ending, "over", lambda self: "" if self.books.state.step < self.rl.steps
            and not self.books.state.ended else self.books.state.ended or "steps")
    said = []
    def go():
        return play(tmp_path, Letters(same=True), says, said.append, seconds=1.5 if bug else 20,
            rl__zero_variance="filter", rl__patience=20)
    if bug:
        with pytest.raises(TimeoutError): go()
        return
    loop, last = go()
    assert loop.state.step == 0 and loop.state.ended.startswith(
        "nothing to learn: ") and why in loop.state.ended and "zero_variance" in loop.state.ended
    assert any(isinstance(row, Note) and "groups dropped since the last step (zero_variance" in row.text
        for row in said) and latest(tmp_path).name == "step_0" and last["prompts"] == 8


@pytest.mark.parametrize("limit", [dict(rl__seconds=.5), dict(rl__stop_solved=.9)])
def test_limits_are_asked_while_a_batch_is_awaited(tmp_path, limit):
    loop, _ = play(tmp_path, Letters(same=True), "x", rl__zero_variance="filter", rl__patience=10**6, **limit)
    assert loop.state.step == 0 and next(iter(limit)).replace("__", ".") in loop.state.ended


def test_the_clock_of_rl_runs_during_rl(tmp_path):
    "Bug: it starts with the process, and start-up and warm start use it up."
    async def go():
        loop = make_loop(tmp_path, rl__seconds=.3, rl__steps=10**6)
        await asyncio.sleep(.5)                     # a warm start
        await begin(loop)
        await loop.run()
        return loop
    loop = asyncio.run(asyncio.wait_for(go(), 20))
    assert loop.state.step > 0 and .3 <= loop.state.seconds < 2


# ---- evaluations

def test_an_evaluation_says_which_versions_answered(tmp_path):
    loop, last = play(tmp_path, rl__steps=30, eval__every=5)
    rows = read_lines(tmp_path/"evals.jsonl")
    assert rows[0]["step"] == rows[0]["newest"] == 0 and last["step"] == last["newest"] == 30
    assert all(r["step"] <= r["newest"] for r in rows) and [r["step"] for r in rows] == sorted(r["step"] for r in rows)


def test_an_evaluation_that_is_due_is_never_skipped_without_a_line(tmp_path):
    "Engines that are slow for the first evaluation: the second one waits, a third is joined with it."
    said = []
    async def slow(loop):
        while loop.state.step < 2: await asyncio.sleep(0)
        real = loop.exam.answer
        async def late(*a):
            await asyncio.sleep(.3)
            return await real(*a)
        loop.exam.answer = late
    play(tmp_path, show=said.append, during=slow, rl__steps=60, eval__every=4)
    notes = [r.text for r in said if isinstance(r, Note)]
    assert any("waits for the one that is running" in n for n in notes) and any("joined with the one that waits" in n
        for n in notes)


def test_scores_without_reference_answers(tmp_path):
    """Rewards of 0 and 10, no answers: there is no share of exact ones, and nothing takes the square root of a
    negative number."""
    loop, last = play(tmp_path, Letters(answer=None, points=10.))
    assert last["exact"] is None and last["interval"] is None and last["pass_at_k"] == {} and 0 <= last["score"] <= 10
    assert last["score_interval"][0] < last["score"] < last["score_interval"][1]
    assert all(r["exact"] is None for r in read_lines(tmp_path/"metrics.jsonl"))
    assert run.idle_goals(load_settings(overrides={"rl.stop_at": .5}),
        [Task(env="a", prompt="b")])[0].startswith("rl.stop_at is a share of exact answers")
    assert run.idle_goals(load_settings(overrides={"rl.stop_at": .5}), [Task(env="a", prompt="b", answer="c")]) == []


def test_exact_is_of_all_that_was_played(tmp_path):
    "Half the groups are filtered. Bug: the share is taken over what is left."
    class Half(Letters):
        def problem(self, key):
            return Task(env=self.name, prompt=f"Say {key % 1000}: ", answer="A" if key % 2 else "x", data=key % 2)
        # the right ones are all alike
        def score(self, task, turns): return float(task.data) if task.data else super().score(task, turns)
    loop, _ = play(tmp_path, Half(), rl__steps=20, rl__zero_variance="filter")
    exact = np.mean([r["exact"] for r in read_lines(tmp_path/"metrics.jsonl")])
    assert .2 < exact < .8


# ---- interruptions

@pytest.mark.parametrize("bug", [False, True])
def test_an_interruption_saves_and_says_so(tmp_path, monkeypatch, bug):
    "Bug: the loop leaves as it is, and the steps since the last checkpoint are lost."
    if bug: monkeypatch.setattr(Orchestrator, "leave", lambda self: (_ for _ in ()).throw(Interrupted("interrupted")))
    async def stop(loop):
        while loop.state.step < 7: await asyncio.sleep(0)
        loop.interrupt("SIGTERM")
    with pytest.raises(Interrupted) as e: play(tmp_path, during=stop, rl__steps=10**6, checkpoint__every=10**5)
    steps = len(read_lines(tmp_path/"metrics.jsonl"))
    assert (latest(tmp_path).name == f"step_{steps}" and str(e.value)
        == f"interrupted by SIGTERM: checkpoint of step {steps} committed") != bug and steps >= 7


def test_an_interruption_that_cannot_save_says_what_is_lost(tmp_path):
    "The trainer is in the middle of a long step."
    async def stop(loop):
        while loop.state.step < 3: await asyncio.sleep(0)
        async def never(target, what): await asyncio.sleep(60)
        loop.server.done = never
        await asyncio.sleep(.1)
        loop.interrupt("SIGTERM", patience=.2)
    with pytest.raises(Interrupted, match="interrupted by SIGTERM: no checkpoint within 0.2 s; the last checkpoint is "
                                          "that of step 0, what came after it is lost"):
        play(tmp_path, during=stop, rl__steps=10**6, checkpoint__every=10**5)


def test_signals_are_heard_whatever_the_shell_left(monkeypatch):
    """SIGINT is ignored, as in a command that a script started with `&`; the first SIGTERM asks, the second one does
    not wait, and all is as before afterwards."""
    asked, before = [], signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with pytest.raises(KeyboardInterrupt):
            with run.signals(asked.append):
                os.kill(os.getpid(), signal.SIGTERM)
                time.sleep(.01)
                os.kill(os.getpid(), signal.SIGINT)
                time.sleep(.01)
        assert asked == ["SIGTERM"] and signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    finally: signal.signal(signal.SIGINT, before)


# ---- rollouts that nobody waits for

@pytest.mark.parametrize("bug", [False, True])
def test_a_group_that_is_too_old_is_stopped(tmp_path, monkeypatch, bug):
    "One rollout of a group has come and is stale, the other is being written. Bug: it is written to its end."
    if bug:
        async def expire(self, step): self.buffer.expire(step)
        monkeypatch.setattr(Playing, "expire", expire)
    async def go():
        loop = make_loop(tmp_path, rl__max_staleness=0)
        await loop.pool.update(0, "weights")
        loop.server.slow = 60
        loop.playing.issue(0, [0, 1])
        while len(loop.pool.out) < 2: await asyncio.sleep(0)
        first = min(loop.pool.out)
        await loop.pool.finished("engine-0.0", Generated([Finished(id=first, token_ids=[65, 2], logprobs=[-1., -1.],
            versions=[0, 0], routes=None, stop_reason="stop")], {}))
        while not loop.buffer.members: await asyncio.sleep(.01)
        await loop.playing.expire(5)
        told = [m.ids for _, m in loop.server.sent if isinstance(m, Abort)]
        for t in list(loop.beside.tasks): t.cancel()
        return told
    assert asyncio.run(asyncio.wait_for(go(), 10)) == ([] if bug else [["0-0-1.0"]])


def test_one_problem_that_cannot_be_drawn_is_one_failure(tmp_path):
    class Away(Letters):
        def sample(self, i): raise ConnectionError("the database is away")
    async def go():
        loop = make_loop(tmp_path, Away(), rl__group_size=8)
        await loop.pool.update(0, "weights")
        loop.playing.issue(0, list(range(8)))
        while loop.state.live: await loop.wait(1)
        return loop.failures.count
    assert asyncio.run(asyncio.wait_for(go(), 60)) == 1


# ---- those who come and go

@pytest.mark.parametrize("bug", [False, True])
def test_an_engine_that_dies_while_it_is_told_ends_nothing(tmp_path, monkeypatch, bug):
    "Its socket is gone, its process not yet reaped. Bug: the error of the wire ends the run."
    if bug:
        async def tell(self, engine): await self.server.send(engine, Update(*self.latest))
        monkeypatch.setattr(EnginePool, "tell", tell)
    class Gone(Puppet):
        async def send(self, name, message): raise ConnectionError(f"{name} is not connected")
    async def go():
        loop = make_loop(tmp_path)
        loop.pool.server = Gone()
        update = loop.spawn(loop.pool.update(1, "weights"))
        await asyncio.sleep(.05)
        ended = isinstance(loop.beside.error, ConnectionError)
        update.cancel()
        return ended
    assert asyncio.run(go()) == bug


def test_a_worker_that_comes_up_during_the_end_is_told():
    "Bug: only those who are up when the end begins are told, and the others are waited for in vain."
    class Late:
        code = None
        def poll(self): return self.code
        def kill(self): raise AssertionError("was not told")
        def wait(self): return self.code
    process = Late()
    worker = Worker("engine-0.1", process)
    class Post:
        async def send(self, name, message): process.code = 0
    async def go():
        ending = asyncio.ensure_future(run.stop(Post(), [worker], patience=5))
        await asyncio.sleep(.2)
        worker.ready.set()
        await asyncio.wait_for(ending, 2)
    asyncio.run(go())


def test_an_end_without_a_model_is_no_end(tmp_path):
    "Code of a user ends the trainer with exit code 0. Bug: the code alone is looked at."
    class Left(Alive):
        returncode = 0
        def poll(self): return 0
        def wait(self): return 0
    async def go():
        loop = make_loop(tmp_path)
        async def said(): return dict(exact=1.)
        loop.run = said
        async def nothing(loop_, state): return {}
        async def silent(*a): await asyncio.sleep(60)
        crew = SimpleNamespace(pool=loop.pool, trainer=Worker("trainer", Left()), all=[], engine=None)
        real, run.first_version = run.first_version, nothing
        loop.server.listen, loop.server.receive = silent, silent
        try: await run.drive(loop, crew, None)
        finally: run.first_version = real
    with pytest.raises(UserError, match="the model was not saved: the trainer ended with code 0; --resume tries again"):
        asyncio.run(go())
    assert not (tmp_path/run.DONE).exists()


def test_large_answers_travel_in_parts():
    """The wire refuses a message beyond its size; an engine divides what it has finished, and every part holds
    something."""
    done = [Finished(id=str(i), token_ids=[1]*10, logprobs=np.zeros(10, np.float32), versions=np.zeros(10, np.int32),
        routes=np.zeros((10, 4, 25), np.uint8), stop_reason="stop") for i in range(7)]
    parts = workers.letters(done, most=2500)
    assert [len(p) for p in parts] == [2, 2, 2, 1] and [f.id for p in parts
        for f in p] == list("0123456") and workers.letters([]) == [[]] and len(workers.letters(done, most=1)) == 7


# ---- one distribution for all who ask

TALK = [dict(role="system", content="Use the calculator."), dict(role="user", content="Hi"),
    dict(role="assistant", content="Yes?")]
CHATML = ("{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}{% if "
          "add_generation_prompt %}<|im_start|>assistant\n{% endif %}")


class Recorder:
    "An engine that notes what it is asked, calculates in its first turn and answers in its second."
    def __init__(self, tokenizer): self.tokenizer, self.heard, self.waiting = tokenizer, [], []
    def finish(self, r):
        self.heard.append(r)
        ids = self.tokenizer.encode("42" if r.id.endswith(".1") else "= 40+2") + [self.tokenizer.eos_id]
        return Finished(id=r.id, token_ids=ids, logprobs=[-1.]*len(ids), versions=[0]*len(ids), routes=None,
            stop_reason="stop")
    async def ask(self, r): return self.finish(r)
    async def generate(self, requests):
        for r in requests: yield self.finish(r)
    def add(self, r): self.waiting.append(r)
    @property
    def has_work(self): return bool(self.waiting)
    def step(self): return [self.finish(self.waiting.pop())]


def roads(s, tokenizer, task, monkeypatch):
    "The requests of one conversation by training, evaluation in a run, `moe-rl eval`, probe, and a cell of the tour."
    guard, out = Guard(Calculator()), {}
    def fresh(name):
        out[name] = Recorder(tokenizer)
        return out[name]
    def asking(name): return Asking(s, tokenizer, SimpleNamespace(generate=fresh(name).ask), 512)
    asyncio.run(asking("train")(guard, task, TRAIN, 3, 1))
    asyncio.run(asking("run")(guard, task, EVAL, 0, 0, name=7))
    model = SimpleNamespace(max_position_embeddings=512, to=lambda device: None)
    with monkeypatch.context() as m:
        m.setattr(run, "check_pretrained", lambda folder: None)
        m.setattr(run, "tokenizer_at", lambda folder: tokenizer)
        m.setattr(run, "make_ready", lambda s, **_: (s, guard.env, tokenizer, model, [task]))
        m.setattr(run, "build_model", lambda *_: model)
        m.setattr(run, "build_engine", lambda *_: fresh("eval"))
        m.setattr(run, "guard_of", lambda *_: guard)
        asyncio.run(run.evaluate_async(s, "folder"))
        for name, lane, number in (("probe", PROBE, 1), ("tour", EVAL, 0)):
            m.setattr(ask, "build_engine", lambda *_: fresh(name))
            ask.answers(s, model, tokenizer, [task.opening]*4, lane, number)
    return {k: sorted(r.heard, key=lambda r: r.id) for k, r in out.items()}


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(0, 30), st.floats(.2, 1), st.floats(.1, 2), st.integers(1, 50), st.floats(0, 2), st.integers(0, 99),
    st.booleans(), st.booleans())
def test_all_roads_ask_the_same(monkeypatch, top_k, top_p, warm, max_tokens, exam, seed, template, system):
    """Run, evaluation, probe and tour differ in temperature and noise alone, turn by turn; evaluations share their
    noise."""
    s = load_settings(overrides={"engine.top_k": top_k, "engine.top_p": top_p, "engine.temperature": warm,
                                 "engine.dtype": "float32",
                                 "engine.max_tokens": max_tokens, "engine.kv_tokens": 1024, "rl.tokens_per_batch": 1024,
                                 "eval.temperature": exam, "seed": seed, "schedule.env_timeout": 10.0})
    core = byte_tokenizer().core
    core.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    tokenizer = TextTokenizer(core, dict(eos_token="<|im_end|>"), CHATML) if template else byte_tokenizer()
    task = Task(env="calculator", prompt="40+2: ", answer="42", replies="tool", before=tuple(TALK if system else ()))
    asked = roads(s, tokenizer, task, monkeypatch)
    same = lambda r: (r.prompt, r.max_tokens, r.stop_ids)
    assert [len(asked[k]) for k in ("train", "run", "eval", "probe", "tour")] == [2, 2, 2, 4, 4]
    for one, two, three in zip(asked["train"], asked["run"], asked["eval"]):
        assert same(one) == same(two) == same(three) and one.seed != two.seed == three.seed
        assert (one.temperature, one.top_k, one.top_p, one.lane) == (warm, top_k, top_p, "train")
        assert (two.temperature, two.top_k, two.top_p, two.lane) == (three.temperature, three.top_k, three.top_p,
            three.lane)
        assert (two.temperature, two.lane) == (exam, "eval")
        assert (two.top_k, two.top_p) == ((top_k, top_p) if exam else (0, 1.0))
    opened = asked["train"][0]
    assert all(same(r) == same(opened) for r in asked["probe"] + asked["tour"])
    assert all((r.temperature, r.top_k, r.top_p) == (warm, top_k, top_p) for r in asked["probe"])
    assert asked["tour"][0] == msgspec.structs.replace(asked["eval"][0], id="1-0-0.0")
    assert len({r.seed for r in asked["probe"]}) == 4
    turn = asked["train"][1].prompt
    assert turn[:len(opened.prompt)] == opened.prompt and tokenizer.encode("= 40+2") == turn[
        len(opened.prompt):len(opened.prompt) + 6]
    assert tokenizer.decode(turn).count("42") == 1


def test_the_probe_leaves_a_model_in_training_as_it_is():
    "With an engine of 16 bits too, which casts what it is made around."
    s, tokenizer = load_settings(overrides=TINY | {"engine.dtype": "bfloat16"}), byte_tokenizer()
    from moe_rl.rl.trainer import build_model
    model = build_model(s, tokenizer.vocab_size)
    before = {n: t.clone() for n, t in model.state_dict().items()}
    assert len(answers(s, model, tokenizer, [says("a"), says("b")], PROBE)) == 2
    assert all(torch.equal(before[n], t) and before[n].dtype == t.dtype for n, t in model.state_dict().items())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_fingerprint_that_an_engine_says_is_compared(tmp_path, dtype):
    "What the trainer says is what an engine of this dtype computes with; one that says something else is named."
    s, tokenizer = load_settings(overrides=TINY | {"engine.dtype": dtype}), byte_tokenizer()
    from moe_rl.rl.trainer import build_model
    model = build_model(s, tokenizer.vocab_size)
    said = workers.publisher_of(s, model, tmp_path).publish(3, model.state_dict())
    engine = Embedded(build_engine(s, build_model(s, tokenizer.vocab_size)))
    updated = workers.take(engine, 3, Folder(tmp_path/"weights"))
    other = describe(engine.engine.model.state_dict() | {"norm.weight": torch.zeros_like(model.norm.weight)}, 3)
    async def go():
        pool = EnginePool(None)
        pool.published(said)
        await pool.took("engine-0.0", updated.version, updated.held)
        with pytest.raises(UserError, match="engine-0.0: says that it took weights v3, but computes with others: "
                "norm.weight has other contents: look"):
            await pool.took("engine-0.0", 3, other)
    asyncio.run(go())


# ---- folders

def saved(folder, step):
    "A committed checkpoint, and the files that belong to it."
    log = RunLog(folder, tensorboard=False)
    log.ledger(step, [f"{step}-0"], {})
    target = stage(folder, step)
    for n in ("model.safetensors", "optimizer.safetensors", "trainer.json"): (target/n).write_bytes(b"some bytes")
    save_state(target/"orchestrator.msgpack", State(step=step, sizes=log.sizes()))
    log.close()
    return commit(folder, step)


@pytest.mark.parametrize("damage", ["bytes", "truncated", "state", "ledger"])
def test_an_older_checkpoint_is_taken_when_the_newest_cannot_be_trusted(tmp_path, damage):
    saved(tmp_path, 20), saved(tmp_path, 40)
    newest, told = step_path(tmp_path, 40), []
    if damage == "bytes": (newest/"model.safetensors").write_bytes(b"same bytes")
    if damage == "truncated": (newest/"optimizer.safetensors").write_bytes(b"some")
    if damage == "state": (newest/"orchestrator.msgpack").write_bytes(b"")
    if damage == "ledger": os.truncate(tmp_path/"ledger.jsonl", (tmp_path/"ledger.jsonl").stat().st_size - 1)
    path, state = run.choose(tmp_path, tell=told.append)
    assert (path.name, state.step) == ("step_20", 20) and told[0].startswith("checkpoint of step 40 cannot be used: ")
    run.set_aside(tmp_path, 20, told.append)
    assert not newest.exists() and (newest.parent/"given_up_40").exists()     # the new life may come to step 40 again
    saved(tmp_path, 40)


def test_a_step_can_be_chosen(tmp_path):
    saved(tmp_path, 20), saved(tmp_path, 40)
    assert run.choose(tmp_path, 20)[1].step == 20 and run.choose(tmp_path)[1].step == 40
    with pytest.raises(UserError, match=r"has no checkpoint of step 30; it has \[20, 40\]"): run.choose(tmp_path, 30)
    for n in (20, 40): (step_path(tmp_path, n)/"trainer.json").unlink()
    with pytest.raises(StorageError, match="lacks trainer.json"): run.choose(tmp_path)
    assert run.choose(tmp_path/"nothing") is None


def test_a_tokenizer_is_there_whole_or_not_at_all(tmp_path):
    class Killed(Exception): pass
    class Half:
        def save(self, folder):
            Path(folder).mkdir()
            (Path(folder)/"tokenizer.json").write_text("{")
            raise Killed("power cut")
    with pytest.raises(UserError, match="power cut"): run.keep_tokenizer(Half(), tmp_path/"tokenizer")
    assert not (tmp_path/"tokenizer").exists()
    run.keep_tokenizer(byte_tokenizer(), tmp_path/"tokenizer")
    assert run.tokenizer_at(tmp_path/"tokenizer").vocab_size == byte_tokenizer().vocab_size


def test_a_crash_before_the_settings_were_written_has_a_way_on(tmp_path):
    from moe_rl.rl.log import claim
    folder = tmp_path/"run"
    folder.mkdir()
    (folder/"lock").touch(), (folder/".config.toml.tmp").write_text("seed = ")
    claim(folder, load_settings(), resume=False).close()
    assert load_settings(folder/"config.toml") == load_settings()


# ---- frozen ourselves

def test_a_freeze_of_this_process_is_not_blamed_on_others(tmp_path, monkeypatch):
    "The orchestrator was stopped for a while, a laptop closed say: nobody has been silent."
    async def go():
        loop = make_loop(tmp_path, schedule__silence_seconds=2.)
        for w in (loop.trainer, *loop.pool.engines.values()):
            w.ready.set()
            w.heard -= 60
            w.moved -= 60
        clock = [time.monotonic() - 60]
        monkeypatch.setattr(supervise.time, "monotonic", lambda real=time.monotonic: clock.pop() if clock
            else real())
        watching = loop.spawn(watch(loop, None))
        await asyncio.sleep(.8)
        watching.cancel()
        return loop.beside.error
    assert asyncio.run(go()) is None


# ---- weights from memory to memory

@pytest.mark.parametrize("gpus, more, says", [
    (1, {}, "NCCL wants a GPU for each of 2 processes, and this machine has 1"),
    (2, {"engine.replicas": 2}, "each of 3 processes"), (8, {"launch.kind": "slurm"}, "must be on one machine"),
    (2, {}, ""), (0, {"schedule.device": "cpu"}, "")])
def test_a_transfer_that_cannot_be_is_refused_before_anything_starts(monkeypatch, gpus, more, says):
    from moe_rl.rl import run
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(run, "device_of", lambda s: torch.device("cpu" if s.schedule.device == "cpu" else "cuda"))
    s = load_settings(overrides=TINY | {"engine.transfer": "direct"} | more)
    if not says: return run.check_transfer(s)
    with pytest.raises(UserError, match=f'engine.transfer = "direct": .*{says}.*: use engine.transfer = "files"'):
        run.check_transfer(s)
