"""RL with a trainer of two ranks: the same steps as one, a checkpoint that either takes up, and an end with a name when
a rank is lost."""
import asyncio, sys
from pathlib import Path
from types import SimpleNamespace
import psutil
import pytest
import torch
import torch.distributed as dist
from moe_rl.config import load_settings
from moe_rl.data.batch import micro_batches
from moe_rl.ep.ranks import run_ranks
from moe_rl.errors import UserError
from moe_rl.records import sampling_of
from moe_rl.rl import workers
from moe_rl.rl.log import read_lines
from moe_rl.rl.run import Ranked, check_parallel, extend, run_async
from moe_rl.rl.trainer import Trainer, build_model
from moe_rl.rl.wire import Train
from moe_rl.rl.workers import LEFT, order
from moe_rl.scale.world import Joined, all_come
from moe_rl.train.mesh import World
from moe_rl.train.precision import working

sys.path.insert(0, str(Path(__file__).resolve().parents[1]/"benchmarks"))
from _learning import VOCABULARY, rollouts, settings  # noqa: E402

EP2 = {"parallel.shard": 2, "parallel.experts": 2}


# ---- two ranks are one

class Wire:
    "The orders of a run, as rank 0 gets them."
    def __init__(self, *orders): self.orders, self.doing = list(orders), ""
    def poll(self, seconds): return self.orders.pop(0)
    def beat(self, doing): pass


def steps(s, given, folder, load=None, mistake=None):
    "Two steps of orders, a checkpoint; losses, norms, and the whole model before and after, on every rank."
    world = Joined(dist.get_rank(), s.parallel.ranks) if s.parallel.ranks > 1 else World()
    if mistake: mistake()
    model = build_model(s, VOCABULARY)
    if world.rank: torch.nn.init.normal_(model.lm_head.weight)  # what it starts from is rank 0's
    world.same(model.state_dict())
    work = working(model, s.train.precision, s.train.forward, s.model.experts)
    mesh = world.spread(model, s.parallel, work)
    trainer = Trainer(model, s.rl, s.optim, s.balance, sampling_of(s.engine), mesh=mesh,
        work=work if world.size == 1 else model)
    if load: trainer.load(Path(load))
    before = {n: t.clone() for n, t in trainer.mesh.gather(trainer.state()).items()}
    sent, rows = Wire(*(Train(i, b, 0) for i, b in enumerate(given[s.parallel.data], 1))), []
    for _ in given[s.parallel.data]:
        batches = order(sent, world, s.parallel.context).batches
        rows.append((trainer.step(batches), [len(b) for b in batches]))
    trainer.save(Path(folder))
    return rows, before, trainer.mesh.gather(trainer.state())


def same(got, want):
    for (a, _), (b, _) in zip(got[0], want[0]):
        assert abs(a["loss"]/b["loss"]-1) < 5e-6 and abs(a["grad_norm"]/b["grad_norm"]-1) < 1e-4
        assert a["load"] == b["load"]
    for n, t in want[2].items():
        assert torch.equal(got[1][n], want[1][n]), f"{n}: another start"
        moved = (t-want[1][n]).norm()
        assert (got[2][n]-t).norm() <= .01*moved+1e-12, n


@pytest.fixture(scope="module")
def recorded():
    "Settings, and the batches of two steps for one rank and for two, the second with one rank that has hardly any."
    s = settings(**{"balance.aux_coef": 1e-2, "balance.rate": 1e-2, "rl.tokens_per_batch": 96})
    model = build_model(s, VOCABULARY)
    texts = [rollouts(model, n, n) for n in (12, 3)]
    def plan(ranks, multiple=1):
        return [micro_batches(t, torch.linspace(-1, 1.2, len(t)).tolist(), 96, ranks, pad_multiple=multiple)
            for t in texts]
    return s, {1: plan(1), 2: plan(2), "shared": plan(1, 4)}


def on_two(s): return s.model_copy(update=dict(parallel=s.parallel.model_copy(update=dict(shard=2, experts=2))))


def test_two_ranks_take_the_steps_of_one_and_either_goes_on_from_the_other(recorded, tmp_path):
    s, given = recorded
    for name in ("one", "two", "one more", "two more"): (tmp_path/name).mkdir()
    want = steps(s, given, tmp_path/"one")
    both = run_ranks(steps, 2, on_two(s), given, tmp_path/"two")
    for got in both: same(got, want)
    assert [[n for _, n in got[0]] for got in both] == [[[2, 2], [1, 1]], [[0, 2], [0, 1]]]  # its own micro-batches
    again = steps(s, given, tmp_path/"one more", tmp_path/"two")
    for got in run_ranks(steps, 2, on_two(s), given, tmp_path/"two more", tmp_path/"two"): same(got, again)
    for n, t in again[1].items(): assert torch.equal(t, both[0][2][n]), n


@pytest.mark.parametrize("layout", [dict(shard=2, experts=2), dict(context=2)], ids=["EP 2", "CP 2"])
def test_two_ranks_in_16_bits_are_as_near_to_one_as_32_bits_are(recorded, tmp_path, layout):
    "Experts that lie whole on a rank, and such as are gathered, round float32 weights and keep them."
    s, given = recorded
    short = s.model_copy(update=dict(train=s.train.model_copy(update=dict(precision="bf16", forward="plain"))))
    one, exact = steps(short, given, tmp_path), steps(s, given, tmp_path)
    two = run_ranks(steps, 2, short.model_copy(update=dict(parallel=s.parallel.model_copy(update=layout))),
        given | {1: given["shared"]}, tmp_path)[0]
    move = lambda x: torch.cat([(x[2][n]-x[1][n]).flatten() for n in x[1]])
    near = lambda a: torch.cosine_similarity(move(a), move(one), dim=0)
    assert 1 - near(two) < 3*(1 - near(exact)) and abs(two[0][0][0]["loss"]/one[0][0][0]["loss"]-1) < .02
    assert {t.dtype for t in two[2].values()} == {torch.float32}


def own_starts(): Joined.same = lambda self, tensors: None # every rank starts from its own weights
def everything(): workers.part = lambda message, place: message # every rank is sent the texts of all

@pytest.mark.parametrize("mistake", [own_starts, everything], ids=lambda f: f.__name__)
def test_mistakes_are_seen(recorded, tmp_path, mistake):
    s, given = recorded
    (tmp_path/"one").mkdir(), (tmp_path/"two").mkdir()
    want = steps(s, given, tmp_path/"one")
    with pytest.raises(AssertionError):
        for r, got in enumerate(run_ranks(steps, 2, on_two(s), given, tmp_path/"two", None, mistake)):
            same(got, want)
            assert [n for _, n in got[0]] == ([[0, 2], [0, 1]] if r else [[2, 2], [1, 1]])


# ---- ranks that are lost

def test_a_rank_that_does_not_come_is_named(tmp_path):
    store = dist.FileStore(str(tmp_path/"store"), 3)
    store.set("rank 2", "here")
    with pytest.raises(UserError, match="rank 1 of 3 has not come within 0.2 s"): all_come(store, 0, 3, .2)


LONELY = "trainer: rank 0 of 2 can't go on with 'step 2', because another rank died or stopped (closed by peer)"

@pytest.mark.parametrize("codes, failure, named", [
    ((None, -9), "", "trainer rank 1 died (exit code -9) while step 2 (logs/trainer-1.log has its last words)"),
    ((1, -9), LONELY, "trainer rank 1 died (exit code -9)"),
    ((1, None), LONELY, LONELY),
    ((None, 1), "", "trainer rank 1 died (exit code 1) while step 2: its own error"),
    ((1, LEFT), "trainer: the error of rank 0", "trainer: the error of rank 0"),
    ((1, 1), "trainer: routes: the same mistake on both", "trainer: routes: the same mistake on both"),
    ((-9, LEFT), "", "trainer died (exit code -9) while step 2"),
    ((1, LEFT, -9), "", "trainer rank 2 died (exit code -9)"),
    ((1, LEFT, 1), LONELY, "trainer rank 2 died (exit code 1)"),
    ((None, None), "", "")])
def test_the_rank_to_blame_is_named(codes, failure, named):
    handles = [SimpleNamespace(poll=lambda c=c: c, log=lambda lines: "its own error", cpu_seconds=lambda: 0.)
        for c in codes]
    job = SimpleNamespace(all=handles, poll=lambda: next(filter(None, codes), None), cpu_seconds=lambda: 0.,
        stamp=lambda rank: 1.)
    worker = Ranked("trainer", job)
    worker.doing, worker.failure, worker.final = "step 2", failure, bool(failure)
    said = worker.trouble(45, 900)
    assert said.startswith(named) and bool(said) == bool(named)
    blind = Ranked.__mro__[1]("trainer", job)       # what a worker of one process would say
    blind.doing, blind.failure = "step 2", failure
    if "trainer rank" in named: assert not blind.trouble(45, 900).startswith(named)


@pytest.mark.parametrize("step, named", [(.25, True), (40., False)], ids=["it stops", "this program has stopped"])
def test_a_rank_that_is_stopped_is_named(monkeypatch, step, named):
    "Bug: without the bound of a second, a run that was asleep itself blames a rank."
    clock = [0.]
    monkeypatch.setattr("time.monotonic", lambda: clock[0])
    handle = SimpleNamespace(poll=lambda: None, cpu_seconds=lambda: 0.)
    worker = Ranked("trainer", SimpleNamespace(all=[handle]*2, poll=lambda: None, cpu_seconds=lambda: 0.,
        stamp=lambda rank: 1.))
    worker.ready.set()
    said = ""
    while clock[0] < 80 and not said:
        clock[0] += step
        worker.heard = worker.moved = clock[0]      # the first rank lives
        said = worker.trouble(45, 900)
    assert said.startswith("trainer rank 1 has been silent for 45 s while starting") == named and bool(said) == named


@pytest.mark.parametrize("wrong, line", [({"parallel.experts": 2}, "must divide shard x context = 1"),
    ({"parallel.shard": 3, "parallel.experts": 3}, "must divide the 8 experts"),
    ({"parallel.shard": 2, "launch.kind": "slurm"}, "can't start yet"),
    ({"parallel.context": 2, "rl.tokens_per_batch": 510}, "a multiple of 4")])
def test_ranks_that_cannot_be_are_refused_before_anything_starts(wrong, line):
    s = settings(**wrong)
    with pytest.raises(UserError, match=line) as e: check_parallel(s)
    assert "\n" not in str(e.value)


TINY = {"model.hidden_size": 32, "model.intermediate_size": 32, "model.moe_intermediate_size": 16,
        "model.num_hidden_layers": 2, "model.num_attention_heads": 2, "model.num_key_value_heads": 1,
        "model.head_dim": 8, "model.num_experts": 4, "tokenizer.kind": "byte", "warm_start.steps": 1,
        "warm_start.tokens_per_step": 256, "warm_start.threads": 1, "rl.steps": 4, "rl.groups_per_step": 4,
        "rl.group_size": 2, "eval.prompts": 8, "engine.kv_tokens": 2048, "engine.max_seqs": 8, "engine.max_tokens": 6,
        "checkpoint.every": 1}


def test_a_killed_rank_ends_the_run_with_its_name_and_one_rank_goes_on(tmp_path):
    folder = tmp_path/"run"
    async def kill(loop):
        while loop.state.step < 2: await asyncio.sleep(.01)
        loop.trainer.process.all[1].kill()
    def control(loop): loop.spawn(kill(loop))
    s = load_settings(overrides=TINY | EP2 | {"dir": str(folder), "rl.steps": 10**6})
    with pytest.raises(UserError, match=r"^trainer rank 1 died \(exit code -9\) while ") as e:
        asyncio.run(asyncio.wait_for(run_async(s, control=control), 240))
    assert "\n" not in str(e.value) and psutil.Process().children(recursive=True) == []
    assert not list((folder/"logs").glob(".*"))
    done = len(read_lines(folder/"metrics.jsonl"))
    alone = extend(folder, {"parallel.shard": "1", "parallel.experts": "1", "rl.steps": str(done + 1)})
    last = asyncio.run(asyncio.wait_for(run_async(alone, resume=True), 240))
    assert last["step"] == done + 1 and (folder/"model"/"model.safetensors").exists()
