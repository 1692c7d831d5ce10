"Advantages, losses, router replay and the buffer."
import asyncio, copy, math, time
from collections import Counter
import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from hypothesis.extra.numpy import arrays
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule
import moe_rl.rl.loss as loss_module
from moe_rl.config import load_settings
from moe_rl.errors import UserError
from moe_rl.data.batch import micro_batch, micro_batches, to_torch
from moe_rl.moe.attention import packed_attend
from moe_rl.moe.families import new_afmoe
from moe_rl.moe.checkpoint import save_pretrained
from moe_rl.moe.model import Model, init_weights, lower_precision, moe_modules
from moe_rl.records import Request, Rollout, replace, sampling_of
from moe_rl.rl import advantage
from moe_rl.rl.buffer import Buffer, BufferBroken
from moe_rl.rl.loss import BOUND, LOSSES, LossOut, Ratio, loss_means, loss_sums, policy_loss
from moe_rl.rl.replay import check_plausible, disagreement, live_choice, replay_of, require_routes, verify_replay
from moe_rl.routes import RouteError, check_routes
from moe_rl.rl.ask import build_engine
from moe_rl.rl.trainer import Trainer, build_model, rl_loss
from moe_rl.train.weights import fingerprint
from moe_rl.rollout.engine import Engine
from moe_rl.train.objective import global_mean, token_logprobs

finite = st.floats(-50, 50, width=32)
wild = st.floats(allow_nan=True, allow_infinity=True, width=32)
rewards = st.lists(st.floats(-100, 100), min_size=2, max_size=16)


# ---- advantages

@given(rewards)
def test_advantages_are_finite_and_sum_to_zero(r):
    for name, f in advantage.ADVANTAGES.items():
        a = f(r)
        assert a.shape == (len(r),) and a.dtype == np.float32 and np.isfinite(a).all()
        if name != "maxrl": assert abs(a.astype(float).sum()) <= 1e-3*max(1, np.abs(a).max())

@given(rewards, st.randoms())
def test_advantages_do_not_depend_on_the_order_of_the_group(r, random):
    order = list(range(len(r)))
    random.shuffle(order)
    for f in advantage.ADVANTAGES.values():
        np.testing.assert_allclose(f(r)[order], f([r[i] for i in order]), rtol=1e-4, atol=1e-4)

@given(st.floats(-10, 10), st.integers(2, 16))
def test_equal_rewards_teach_nothing(r, n):
    # exactly: the trainer asks whether anything is to be learned
    for f in advantage.ADVANTAGES.values(): assert not f([r]*n).any()

@pytest.mark.parametrize("bad", [[float("nan"), 1.], [], [[1.], [2.]], [float("inf"), 0.]])
def test_bad_rewards_are_errors(bad):
    for f in advantage.ADVANTAGES.values():
        with pytest.raises(ValueError, match="rewards"): f(bad)

def test_advantage_by_import_path(tmp_path, monkeypatch):
    (tmp_path/"my_adv.py").write_text('def best(r): return [1. if x == max(r) else 0. for x in r]\ndef broken(r): '
                                      'return [float("nan")]*len(r)\n')
    monkeypatch.syspath_prepend(tmp_path)
    assert advantage.resolve("my_adv:best")([0, 2, 1]).tolist() == [0, 1, 0]
    with pytest.raises(UserError, match="my_adv:broken"): advantage.resolve("my_adv:broken")([1, 2])


# ---- losses

def run(name, logp, old, adv, mask, cu, **settings):
    "Loss and gradient of the log-probabilities."
    logp = torch.as_tensor(logp).clone().requires_grad_()
    out = policy_loss(name, logp, torch.as_tensor(old), torch.as_tensor(adv), torch.as_tensor(mask),
        torch.as_tensor(cu), **settings)
    out.per_token.sum().backward()
    return out, logp.grad

@st.composite
def batches(draw, values=finite, adv=finite):
    lengths = draw(st.lists(st.integers(1, 8), min_size=1, max_size=4))
    n = sum(lengths)
    array = lambda elements, dtype=np.float32: draw(arrays(dtype, n, elements=elements))
    return array(values), array(values), array(adv), array(st.booleans(),
        bool), np.cumsum([0] + lengths).astype(np.int32)

def check_finite(batch):
    for name in LOSSES:
        out, grad = run(name, *batch, logp_ref=torch.as_tensor(batch[1]), kl_coef=0.1)
        assert out.per_token.isfinite().all() and grad.isfinite().all(), name
        mask = torch.as_tensor(batch[3])
        assert not out.per_token[~mask].any() and not grad[~mask].any() and not (out.masked
            & ~mask).any() and not (out.invalid & ~mask).any()

@settings(max_examples=40, deadline=None)
@given(batches(values=wild, adv=st.one_of(finite, st.sampled_from([np.nan, np.inf, 1e20, -1e20, 3e38,
    -3e38])).map(np.float32)))
def test_losses_and_gradients_are_finite_for_any_input(batch): check_finite(batch)

@settings(max_examples=40, deadline=None)
@given(batches(values=st.floats(-8, 0, width=32)), st.sampled_from(list(LOSSES)), arrays(np.float32, 32, elements=wild))
def test_what_is_outside_the_mask_changes_nothing(batch, name, rubbish):
    logp, old, adv, mask, cu = batch
    dirty = [np.where(mask, x, rubbish[:len(x)]) for x in (logp, old, adv)]
    a, b = run(name, *batch), run(name, *dirty, mask, cu)
    assert torch.equal(a[0].per_token, b[0].per_token) and torch.equal(a[1], b[1]) and torch.equal(a[0].masked,
        b[0].masked)

def extreme_batch():
    "One good token, one that would overflow, one outside the loss that holds rubbish."
    return (np.float32([-1, 0, np.inf, -2]), np.float32([-1.5, -300, np.nan, -2]), np.float32([1, -1, 1, 0.5]),
        np.array([True, True, False, True]), np.int32([0, 2, 4]))

def test_known_failure_20_unbounded_log_ratio(monkeypatch):
    check_finite(extreme_batch())
    def multiply_by_the_mask(logp, old, adv, mask): # exp of anything, masked by a product: 0*inf
        lr = (logp.float() - old.float())*mask
        return Ratio(lr, logp.float()*mask, old.float()*mask, mask)
    def where_after_exp(logp, old, adv, mask): # the value is masked, the gradient of the dropped branch is not
        lr = logp.float() - old.float()
        return Ratio(torch.where(mask, lr, 0.), logp.float(), old.float(), mask)
    for bug in (multiply_by_the_mask, where_after_exp):
        monkeypatch.setattr(loss_module, "make_ratio", bug)
        with pytest.raises(AssertionError): check_finite(extreme_batch())

def split_gradients(reduce):
    "Gradient of one batch as a whole, and of the same batch in two micro-batches of 2 and 6 tokens."
    g = torch.Generator().manual_seed(0)
    logp, old, adv = -torch.rand(8, generator=g), -torch.rand(8, generator=g), torch.randn(8, generator=g)
    mask, out = torch.ones(8, dtype=torch.bool), []
    for parts in ([slice(0, 8)], [slice(0, 2), slice(2, 8)]):
        x = logp.clone().requires_grad_()
        for p in parts:
            reduce(policy_loss("dppo", x[p], old[p], adv[p], mask[p], torch.tensor([0, len(mask[p])])).per_token,
                mask[p], len(parts)).backward()
        out.append(x.grad)
    return out

def test_known_failure_21_micro_batches_of_different_sizes():
    whole, split = split_gradients(lambda per_token, mask, parts: global_mean(per_token, mask, tokens=8))
    torch.testing.assert_close(whole, split)
    whole, split = split_gradients(lambda per_token, mask, parts: per_token[mask].mean()/parts)
    assert not torch.allclose(whole, split)

@settings(max_examples=30, deadline=None)
@given(batches(values=st.floats(-8, 0, width=32)))
def test_on_policy_every_loss_is_the_policy_gradient(batch):
    logp, _, adv, mask, cu = batch
    lengths = np.add.reduceat(mask, cu[:-1]).astype(float)
    # gspo: every sequence weighs the same
    weight = np.repeat(mask.sum()/max(1, (lengths > 0).sum())/np.maximum(lengths, 1), np.diff(cu))
    for name in LOSSES:
        want = torch.as_tensor(-adv*mask*(weight if name == "gspo" else 1), dtype=torch.float32)
        torch.testing.assert_close(run(name, logp, logp, adv, mask, cu)[1], want, rtol=1e-4, atol=1e-4)

def plain_gspo(logp, old, adv, mask, cu, low=3e-4, high=4e-4):
    """The paper's objective in float64, as verl computes it: mean over sequences of the mean over their tokens, one
    ratio per sequence."""
    x, losses = logp.double().clone().requires_grad_(), []
    for a, b in zip(cu[:-1], cu[1:]):
        at = [i for i in range(a, b) if mask[i]]
        if not at: continue
        s = (sum(x[i] - old[i].double() for i in at)/len(at)).exp()
        losses.append(sum(-torch.minimum(s*adv[i].double(), s.clamp(1-low, 1+high)*adv[i].double())
            for i in at)/len(at))
    (sum(losses)/len(losses)).backward()
    return x.grad

@pytest.mark.parametrize("cuts", [[], [2], [1, 3]])
def test_gspo_is_the_papers(cuts):
    "Very uneven sequences, one advantage each, packed into one micro-batch or several."
    g = torch.Generator().manual_seed(3)
    lengths = [2, 40, 7, 90]
    cu, n = np.cumsum([0, *lengths]), sum(lengths)
    old, mask = -3*torch.rand(n, generator=g), torch.rand(n, generator=g) < .8
    logp = old + 2e-4*torch.randn(n, generator=g)                                  # some sequences clipped, some not
    adv = torch.tensor([1., -.5, .7, -1.]).repeat_interleave(torch.tensor(lengths))
    whole, grads = loss_module.mean_length(mask, torch.as_tensor(cu)), []
    for a, b in zip([0, *cuts], [*cuts, len(lengths)]):
        rows, x = slice(cu[a], cu[b]), logp[cu[a]:cu[b]].clone().requires_grad_()
        out = policy_loss("gspo", x, old[rows], adv[rows], mask[rows], torch.as_tensor(cu[a:b+1] - cu[a]), length=whole)
        (out.per_token.sum()/mask.sum()).backward()
        grads.append(x.grad)
    got, want = torch.cat(grads).double(), plain_gspo(logp, old, adv, mask, cu)
    assert torch.cosine_similarity(got, want, dim=0) > .99999 and (got - want).abs().max() < 1e-4*want.abs().max()
    # the bug: weighed by tokens
    by_tokens = policy_loss("gspo", x := logp.clone().requires_grad_(), old, adv, mask, torch.as_tensor(cu)).per_token
    (by_tokens*loss_module.sequence_lengths(mask,
        torch.as_tensor(cu)).repeat_interleave(torch.tensor(lengths))).sum().backward()
    assert torch.cosine_similarity(x.grad.double(), want, dim=0) < .98

@given(st.lists(st.floats(allow_nan=False, allow_infinity=False), min_size=2, max_size=8))
def test_no_finite_reward_makes_an_advantage_that_is_not(r):
    for f in advantage.ADVANTAGES.values(): assert np.abs(f(r)).max() <= advantage.LIMIT

@settings(max_examples=30, deadline=None)
@given(batches(values=st.floats(-8, 0, width=32)), st.sampled_from(["dppo", "ipo", "icepop", "grpo"]))
def test_a_masked_token_has_no_policy_gradient(batch, name):
    out, grad = run(name, *batch, **({"kl_tau": 0.} if name in ("dppo", "ipo") else {}))
    assert not grad[out.masked].any()
    # less, and the product is 0
    free = torch.as_tensor(batch[3]) & ~out.masked & (torch.as_tensor(batch[2]).abs() > 1e-30)
    assert (grad[free] != 0).all()

@settings(max_examples=20, deadline=None)
@given(batches(values=st.floats(-8, 0, width=32)), st.sampled_from(["dppo", "ipo", "icepop", "grpo"]))
def test_gradients_agree_with_finite_differences(batch, name):
    logp, old, adv, mask, cu = batch
    out, grad = run(name, logp, old, adv, mask, cu)
    for i in np.flatnonzero(mask)[:2]:
        eps = 1e-3
        up, down = [run(name, np.where(np.arange(len(logp)) == i, logp + s*eps, logp), old, adv, mask, cu)[0]
            for s in (1, -1)]
        if not (torch.equal(up.masked, out.masked) and torch.equal(down.masked, out.masked)): continue
        slope = float(up.per_token[i].detach().double() - down.per_token[i].detach().double())/(2*eps)
        assert abs(slope - float(grad[i])) <= 2e-2*max(1., abs(slope))

@pytest.mark.parametrize("name, masked", [
    ("dppo", "1001000"), ("ipo", "1111000"), ("icepop", "0011110"), ("grpo", "1001100"), ("tis", "0000000"),
    ("cispo", "0000000")])
def test_which_tokens_are_masked(name, masked):
    "p engine -> p trainer, A: up for +, up for -, down for +, down for -, rare up for +, rare down for +, unchanged"
    old, new = torch.tensor([.5, .5, .5, .5, 1e-4, 1e-2, .3]), torch.tensor([.8, .8, .2, .2, 1e-2, 1e-4, .3])
    adv, n = torch.tensor([1., -1, 1, -1, 1, 1, 1]), 7
    out = policy_loss(name, new.log(), old.log(), adv, torch.ones(n, dtype=torch.bool), torch.arange(n+1))
    assert "".join(str(int(m)) for m in out.masked) == masked

def test_sums_add_up_to_means():
    g = torch.Generator().manual_seed(1)
    logp, old, mask = -torch.rand(20, generator=g), -torch.rand(20, generator=g), torch.rand(20, generator=g) < 0.6
    out = policy_loss("ipo", logp, old, torch.ones(20), mask, torch.tensor([0, 20]))
    n = int(mask.sum())
    whole = loss_means(loss_sums(out, logp, old, mask), n)
    halves = [loss_sums(LossOut(*(t[s] for t in out[:3])), logp[s], old[s], mask[s])
        for s in (slice(0, 7), slice(7, 20))]
    assert loss_means({k: halves[0][k] + halves[1][k] for k in halves[0]}, n) == pytest.approx(whole)
    lr = (logp - old)[mask].double()
    assert whole["mismatch_kl"] == pytest.approx(float((lr.exp() - lr - 1).mean()), rel=1e-4)

def test_unknown_losses_and_settings_are_user_errors():
    with pytest.raises(UserError, match="rl.loss"): loss_module.resolve("ppo2")
    with pytest.raises(UserError, match="no setting 'clip'"): loss_module.resolve("dppo", clip=1)
    batch = [torch.zeros(2), torch.zeros(2), torch.ones(2), torch.ones(2, dtype=torch.bool), torch.tensor([0, 2])]
    assert policy_loss("icepop", *batch, low=0.9,
        high=1.1).masked.sum() == 0 and BOUND < math.log(torch.finfo(torch.float32).max)


# ---- replay

CFG = new_afmoe(vocab_size=40, hidden_size=32, intermediate_size=48, moe_intermediate_size=16, num_hidden_layers=4,
                  num_dense_layers=1, num_attention_heads=2,
                  num_key_value_heads=1, head_dim=16, num_experts=16, num_experts_per_tok=2, sliding_window=16,
                  max_position_embeddings=128)

def tiny_model(seed=0):
    model = init_weights(Model(CFG), seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if ".experts." in name or "lm_head" in name: p.mul_(6.)
    return model

def engine_rollouts(model, n=4, record_routes=True, dtype=None):
    engine, out = Engine(copy.deepcopy(model), kv_tokens=1024, record_routes=record_routes, dtype=dtype), []
    prompts = [[1 + i, 5, 7 + i, 3] for i in range(n)]
    for i, p in enumerate(prompts): engine.add(Request(id=str(i), prompt=p, max_tokens=12, seed=i))
    while engine.has_work: out += engine.step()
    return [Rollout(token_ids=prompts[int(f.id)] + f.token_ids, loss_mask=[0]*4 + [1]*len(f.token_ids),
                    logprobs=[0.]*4 + f.logprobs.tolist(), versions=[-1]*4 + [0]*len(f.token_ids),
                    routes=f.routes, reward=0., group=int(f.id), index=0, env="tiny", stop_reason=f.stop_reason)
                    for f in sorted(out, key=lambda f: int(f.id))]

def trainer_forward(model, rollouts, replay=True):
    "What a trainer does with routes: ask for them, replay them, verify."
    require_routes(rollouts, model.spec) if replay else None
    b = to_torch(micro_batch(rollouts, [1.]*len(rollouts), pad_multiple=8))
    out = model(b.token_ids, b.positions, packed_attend(b.cu_seqlens), replay=replay_of(b, replay),
        token_mask=b.token_mask)
    if replay: verify_replay(out.routes, b.routes, b.token_mask)
    return b, out

def test_replay_of_a_bf16_engine_is_exact_and_nearer():
    model = tiny_model()
    rollouts = engine_rollouts(model, 12, dtype=torch.bfloat16)
    kl = {}
    for replay in (False, True):
        b, out = trainer_forward(model, rollouts, replay)
        logp = token_logprobs(out.hidden, model.lm_head.weight, b.targets)[0]
        kl[replay] = float(loss_module.k3(logp.detach() - b.logprobs)[b.loss_mask].mean())
    assert torch.equal(out.routes[b.token_mask], b.routes[b.token_mask]) and kl[True] <= kl[False]
    (-logp[b.loss_mask].mean()).backward()
    assert all(m.router.weight.grad.norm() > 0 for m in moe_modules(model))

def test_known_failure_12_a_path_without_routes_is_an_error_by_name(monkeypatch):
    model = tiny_model()
    silent = engine_rollouts(model, record_routes=False)
    with pytest.raises(RouteError, match=r"rollout 0-0 \(tiny\): has no routes, but replay is on"):
        trainer_forward(model, silent)
    monkeypatch.setattr(__import__("sys").modules[__name__], "require_routes", lambda *a: None) # the bug: nobody asks
    # the second line of defence
    with pytest.raises(RouteError, match="batch of rollouts 0-0, .*has no routes"): trainer_forward(model, silent)
    # and nobody asks there
    monkeypatch.setattr(__import__("sys").modules[__name__], "replay_of", lambda b, on: b.routes)
    monkeypatch.setattr(__import__("sys").modules[__name__], "verify_replay", lambda *a: None)
    b, out = trainer_forward(model, silent) # this is what would go unnoticed: a step without replay
    assert b.routes is None and (out.routes[b.token_mask] >= 0).all()

def test_known_failure_10_order_within_a_row_means_nothing_and_duplicates_are_refused():
    model = tiny_model()
    rollouts = engine_rollouts(model)
    swapped = [Rollout(**{f: getattr(r, f) for f in r.__struct_fields__ if f != "routes"},
        routes=r.routes[..., ::-1].copy()) for r in rollouts]
    (b, a), (_, c) = trainer_forward(model, rollouts), trainer_forward(model, swapped)
    torch.testing.assert_close(a.hidden, c.hidden)
    valid = b.token_mask
    assert disagreement(a.routes, c.routes, valid).slots == 0
    sorted_assumed = (a.routes != c.routes)[valid].any(-1).float().mean() # the bug: compare place by place
    assert sorted_assumed == 1
    padded = rollouts[0].routes.copy()
    padded[3] = 0                    # the bug: padding taken for a route
    with pytest.raises(RouteError, match="token 3, MoE layer 0 is routed to the same expert twice"):
        check_routes(padded, *padded.shape, 16)

def test_known_failure_13_routes_of_other_weights_or_tokens_are_implausible():
    model, other = tiny_model(0), tiny_model(1)
    rollouts = engine_rollouts(model, 8)
    def judged(model, change):
        b = to_torch(micro_batch(rollouts, [1.]*8))
        routes = change(b.routes)
        out = model(b.token_ids, b.positions, packed_attend(b.cu_seqlens), replay=routes)
        return check_plausible(routes, live_choice(model, out), b.token_mask, 16)
    assert judged(model, lambda r: r) < 0.02
    for bug in (lambda r: r.roll(1, 0), lambda r: r.roll(1, 1), lambda r: r.flip(0)):
        with pytest.raises(RouteError, match="belong to other tokens, layers or weights"): judged(model, bug)
    # kept over a weight update
    with pytest.raises(RouteError, match="belong to other tokens, layers or weights"): judged(other, lambda r: r)

@settings(max_examples=50, deadline=None)
@given(st.integers(1, 12), st.integers(1, 4), st.integers(1, 4), st.integers(0, 2**31), st.data())
def test_check_routes_accepts_what_a_router_makes_and_nothing_else(rows, layers, k, seed, data):
    E = 8
    routes = np.argsort(np.random.default_rng(seed).random((rows, layers, E)), -1)[..., :k].astype(np.uint8)
    check_routes(routes, rows, layers, k, E)
    broken = routes.copy()
    t, l = data.draw(st.integers(0, rows-1)), data.draw(st.integers(0, layers-1))
    if k > 1 and data.draw(st.booleans()): broken[t, l, 0] = broken[t, l, 1]
    else: broken[t, l, 0] = E
    for bad in (broken, routes[1:], routes.astype(np.float32)):
        with pytest.raises(RouteError): check_routes(bad, rows, layers, k, E)

@given(st.integers(0, 2**31))
def test_disagreement_is_symmetric_in_slots_and_bounded(seed):
    g = torch.Generator().manual_seed(seed)
    a, b = [torch.rand(20, 3, 8, generator=g).argsort(-1)[..., :3] for _ in range(2)]
    d, e = disagreement(a, b), disagreement(b, a)
    assert d.slots == e.slots and 0 <= d.slots <= d.routers <= d.tokens <= 1 and disagreement(a, a).tokens == 0


# ---- buffer

def rollout(group, index, reward=1., version=0, stop="stop", oldest=None):
    oldest = version if oldest is None else oldest
    return Rollout(token_ids=[1, 2, 3], loss_mask=[0, 1, 1], logprobs=[0., -.5, -.5], versions=[-1, oldest, version],
        reward=reward, group=group, index=index, env="t", stop_reason=stop)

class BufferMachine(RuleBasedStateMachine):
    "Any order of events; a dictionary remembers what must be true."
    G, S = 3, 2
    def __init__(self):
        super().__init__()
        self.buffer, self.step, self.entered, self.taken, self.logged = self.make(), 1, {}, [], []
    def make(self): return Buffer(self.G, self.S, zero_variance="filter", overlong="mask")

    @rule(group=st.integers(0, 12), index=st.integers(0, 2), reward=st.sampled_from([0., 0.5, 1.]),
        age=st.integers(0, 3), stop=st.sampled_from(["stop", "stop", "length"]))
    def add(self, group, index, reward, age, stop):
        version = max(0, self.step - 1 - age)
        fate = self.buffer.add(rollout(group, index, reward, self.step - 1, stop, version))
        assert (fate == "duplicate") == ((group, index) in self.entered)
        self.entered.setdefault((group, index), version)
    @rule(group=st.integers(0, 12), index=st.integers(0, 2), reason=st.sampled_from(["env_error", "aborted"]))
    def lose(self, group, index, reason):
        fate = self.buffer.lose(group, index, reason)
        assert fate == ("duplicate" if (group, index) in self.entered else reason)
        self.entered.setdefault((group, index), None)
    @rule(n=st.integers(1, 2))
    def train(self, n):
        if not self.buffer.ready(n, self.step): return
        groups = self.buffer.take(n, self.step)
        assert len(groups) == n
        for g in groups:
            assert np.ptp(g.rewards) > 0 and len(g.rewards) >= 2 and len(g.advantages(advantage.grpo)) == len(
                g.rollouts) >= 1
            for r in g.rollouts:
                assert self.step - 1 - self.entered[r.group, r.index] <= self.S and r.stop_reason == "stop"
                self.taken.append(r.id)
        self.step += 1
    @rule()
    def time_passes(self):
        self.step += 1
        self.buffer.expire(self.step)
    @rule()
    def crash(self):
        again = self.make()
        again.restore(self.buffer.state())
        assert again.state() == self.buffer.state()
        self.buffer = again
    @rule()
    def log(self): self.logged += [i for ids in self.buffer.pop_dropped().values() for i in ids]

    @invariant()
    def everything_has_exactly_one_fate(self):
        check_conservation(self.buffer, self.entered)
        assert Counter(self.taken) == Counter(self.buffer.ids("taken"))
    def teardown(self):
        self.log()
        assert Counter(self.logged) == Counter(i for reason in self.buffer.drops for i in self.buffer.ids(reason))

def check_conservation(b, entered):
    "Whoever entered is pending, taken or dropped, and pending ones are really there."
    counts = b.counts()
    held = sorted([r.id for m in b.members.values() for r in m]
        + [r.id for g in b.complete.values() for r in g.rollouts])
    assert held == sorted(b.ids("pending")) and sum(n for k, n in counts.items() if k != "in flight") == len(entered)
    assert counts.get("pending", 0) + counts.get("taken", 0) + sum(b.drops.values()) == len(entered)

TestBuffer = BufferMachine.TestCase
TestBuffer.settings = settings(max_examples=40, stateful_step_count=40, deadline=None)

def fill(b, groups=40):
    "Enter complete groups; returns what entered."
    for g in range(groups):
        for i in range(3): b.add(rollout(g, i, float(i == 0)))
    return {(g, i): 0 for g in range(groups) for i in range(3)}

def test_known_failure_30_nothing_is_lost_without_a_count(monkeypatch):
    b = Buffer(3, 2)
    check_conservation(b, fill(b))
    class HighWaterMark(dict): # the bug: a queue that forgets what is beyond its size
        def __setitem__(self, k, v):
            if len(self) < 10: super().__setitem__(k, v)
    b = Buffer(3, 2)
    b.complete = HighWaterMark()
    entered = fill(b)
    with pytest.raises(AssertionError): check_conservation(b, entered)

async def waiter(b, fail):
    waiting = asyncio.create_task(b.wait(1, 1))
    await asyncio.sleep(0)
    fail(b, ConnectionError("engine 1 is gone"))
    await asyncio.wait_for(waiting, 0.5)

def test_known_failure_27_a_producers_error_reaches_the_consumer():
    with pytest.raises(BufferBroken, match="ConnectionError: engine 1 is gone"):
        asyncio.run(waiter(Buffer(3, 2), Buffer.fail))
    def forgets_to_wake(b, error): b.error = error
    # the bug: the consumer waits for ever
    with pytest.raises(TimeoutError): asyncio.run(waiter(Buffer(3, 2), forgets_to_wake))
    b = Buffer(3, 2)
    b.fail(ValueError("x"))
    for use in (lambda: b.ready(1, 1), lambda: b.take(1, 1), lambda: b.add(rollout(0, 0)), lambda: b.lose(0, 0, "r")):
        with pytest.raises(BufferBroken): use()

def test_exactly_once_check_catches_a_duplicate(monkeypatch):
    b = Buffer(2, 2)
    for i in (0, 1): b.add(rollout(0, i, float(i)))
    assert b.add(rollout(0, 1)) == "duplicate" and b.duplicates == 1
    assert [r.id for g in b.take(1, 1) for r in g.rollouts] == ["0-0", "0-1"]
    # the bug: requeued rollouts are taken twice
    monkeypatch.setattr(Buffer, "_expected", lambda self, g, i: self.ledger.row(g))
    with pytest.raises(ValueError, match="rollout 0-1: is taken, cannot become pending"): b.add(rollout(0, 1))

def test_staleness_bound_catches_an_off_by_one(monkeypatch):
    def oldest_taken(S):
        b = Buffer(2, S)
        for g in range(6):
            for i in (0, 1): b.add(rollout(g, i, float(i), version=g))
        taken = b.take(1, step=7)
        return 7 - 1 - min(g.oldest for g in taken)
    assert [oldest_taken(S) for S in (1, 2, 4)] == [1, 2, 4]
    with pytest.raises(ValueError, match="0 groups are ready"): oldest_taken(0)

def test_late_members_of_a_stale_group_and_versions_from_the_future():
    b = Buffer(2, 1)
    b.add(rollout(0, 0, version=0))
    assert b.expire(3) == [0] and b.add(rollout(0, 1, version=2)) == "stale" and b.counts() == {"stale": 2}
    for i in (0, 1): b.add(rollout(1, i, float(i), version=5))
    with pytest.raises(ValueError, match="step 5 trains version 4, but a rollout was sampled by version 5"):
        b.take(1, 5)
    assert len(b.take(1, 6)) == 1

@pytest.mark.parametrize("overlong, rewards, trained", [("keep", [1, 0, 1], 3), ("mask", [1, 0, 1], 2),
    ("penalise", [1, 0, 0.5], 3)])
def test_overlong_rules(overlong, rewards, trained):
    b = Buffer(3, 2, overlong=overlong)
    for i, stop in enumerate(("stop", "stop", "length")): b.add(rollout(0, i, [1., 0., 1.][i], stop=stop))
    [g] = b.take(1, 1)
    assert g.rewards == rewards and len(g.rollouts) == trained and b.drops == ({"overlong": 1} if overlong == "mask"
        else {})

def test_zero_variance_rules():
    for setting, ready in (("keep", True), ("filter", False)):
        b = Buffer(2, 2, zero_variance=setting)
        for i in (0, 1): b.add(rollout(0, i, 0.5))
        assert b.ready(1, 1) == ready and b.drops == ({} if ready else {"zero_variance": 2})

def test_hundreds_of_groups_a_second():
    ready = [[rollout(g, i, float(i % 2)) for i in range(8)] for g in range(500)]
    b, start = Buffer(8, 2), time.process_time()
    for g, members in enumerate(ready):
        for r in members:
            b.add(r)
            b.ready(32, 1)
        if b.ready(32, 1): b.take(32, 1)
    assert time.process_time() - start < 2.5 # 200 groups/s on a slow, shared core


# ---- the trainer's step

def rl_settings(**more):
    sizes = dict(hidden_size=32, intermediate_size=48, moe_intermediate_size=16, num_hidden_layers=4,
                 num_dense_layers=1, num_attention_heads=2, num_key_value_heads=1,
                 head_dim=16, num_experts=16, num_experts_per_tok=2, sliding_window=16, max_position_embeddings=128)
    return load_settings(overrides={f"model.{k}": v for k, v in sizes.items()}
        | {"optim.warmup_steps": 0, "rl.tokens_per_batch": 512} | more)

def trainer_of(model=None, **more):
    s = rl_settings(**more)
    return Trainer(copy.deepcopy(model) if model else tiny_model(), s.rl, s.optim, s.balance, sampling_of(s.engine))

def full_state(t): return fingerprint(t.model.state_dict() | t.optimizers.state_dict())

def played(n=8, advantages=None, model=None, ranks=1, **change):
    "A step of rollouts that an engine made with this very model."
    rollouts = engine_rollouts(model or tiny_model(), n)
    batches = micro_batches(rollouts, [1., -1.]*(n//2) if advantages is None else advantages, 512, ranks)
    return [[replace(b, **{k: f(b) for k, f in change.items()}) for b in rank] for rank in batches]

def test_steps_without_signal_keep_every_bit():
    t = trainer_of()
    t.step(played())
    before, silent = full_state(t), played(advantages=[0.]*8)
    for _ in range(6): row = t.step(silent)
    assert full_state(t) == before and (row["idle"], row["skipped"], row["signal"], row["informative"]) == (6, 0, 0,
        0) and t.step_number == 7
    assert row["entropy"] > 0 and row["loss_aux"] == 0
    t.step(played())
    assert full_state(t) != before

def test_tokens_that_the_loss_does_not_believe_are_no_signal():
    # masked by every rule: moved far in the direction of the advantage
    far = played(logprobs=lambda b: np.where(b.loss_mask, -30., 0.).astype(np.float32), advantages=[1.]*8)
    t = trainer_of(**{"rl.loss": "icepop", "rl.replay": False})
    before = full_state(t)
    row = t.step(far)
    assert row["masked"] == 1 and row["idle"] == 1 and full_state(t) == before

@pytest.mark.parametrize("loss, reward", [("dppo", 1e30), ("gspo", 1e300), ("tis", -1e308)])
def test_a_huge_reward_is_a_step_like_another(loss, reward):
    t = trainer_of(**{"rl.loss": loss})
    a = advantage.grpo([reward] + [0.]*7)
    for batches in [played(advantages=list(a))]*3: row = t.step(batches)
    assert row["skipped"] == 0 and math.isfinite(row["loss"]) and math.isfinite(row["grad_norm"])
    assert all(v.isfinite().all() for v in t.model.state_dict().values())

def test_a_broken_model_is_not_taken_for_an_idle_one():
    t = trainer_of(**{"balance.aux_coef": 0, "balance.head_z_coef": 0, "rl.replay": False})
    with torch.no_grad(): t.model.norm.weight.fill_(math.nan)
    for advantages in ([1., -1.]*4, [0.]*8):
        t.counted.skipped_in_a_row = 0
        for _ in range(2): assert t.step(played(advantages=advantages))["idle"] == 0
        with pytest.raises(UserError, match="not finite in 3 steps in a row"): t.step(played(advantages=advantages))

def test_misaligned_routes_end_by_name():
    t = trainer_of()
    assert t.step(played(12))["route_disagreement"] < .01
    for axis, by, said in ((0, 1, "the token before"), (0, -1, "the token after"), (1, 1, "the layer before"),
            (1, -1, "the layer after")):
        with pytest.raises(UserError, match=f"those of {said}"):
            trainer_of().step(played(12, routes=lambda b: np.roll(b.routes, by, axis)))
    with pytest.raises(UserError, match="belong to other tokens, layers or weights"):
        trainer_of(tiny_model(1)).step(played(12))

@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_ranks_share_one_loss(ranks):
    "Every part of the loss, and the gradient, added up over ranks."
    t = trainer_of(**{"balance.aux_coef": .1, "balance.z_coef": .1, "balance.head_z_coef": .1, "rl.loss": "gspo"})
    model = t.model
    got = [rl_loss(model, to_torch(b), t.how) for rank in played(ranks=ranks) for b in rank]
    parts = {k: sum(float(p.parts[k].detach()) for p in got) for k in got[0].parts}
    sum(sum(p.parts.values()) for p in got).backward()
    grad = torch.cat([p.grad.flatten() for p in model.parameters()])
    if ranks == 1: test_ranks_share_one_loss.whole = parts, grad
    else:
        for k, v in parts.items():
            assert v == pytest.approx(test_ranks_share_one_loss.whole[0][k], rel=1e-4, abs=1e-6), k
        assert torch.cosine_similarity(grad, test_ranks_share_one_loss.whole[1], dim=0) > .999


def test_sizes_are_judged_by_one_rule():
    """What the settings let pass the model takes, and the other way round, for one and two sizes that are odd, huge,
    none or negative."""
    base = dict(hidden_size=32, intermediate_size=48, moe_intermediate_size=16, num_hidden_layers=3, num_dense_layers=1,
                num_attention_heads=4, num_key_value_heads=2, head_dim=8, num_experts=8,
                num_experts_per_tok=2, num_shared_experts=1, route_scale=1., global_attn_every_n_layers=4,
                sliding_window=16, max_position_embeddings=128)
    rng, refused = np.random.default_rng(0), 0
    for _ in range(300):
        odd = {k: int(rng.choice([0, 1, 2, 3, 7, 9, 64, 256, 10_001, 65_535, 65_536, 65_537, -1, 10**6]))
            for k in rng.choice(list(base), rng.integers(1, 3), replace=False)}
        sizes, said = base | odd, []
        for judge in (lambda: load_settings(overrides={f"model.{k}": v for k, v in sizes.items()}),
                lambda: new_afmoe(vocab_size=64, **sizes)):
            try:
                judge()
                said.append("")
            except (UserError, ValueError) as e: said.append(str(e))
        assert bool(said[0]) == bool(said[1]), f"{odd}: {said}"
        refused += bool(said[0])
    assert 50 < refused < 250

def test_a_bf16_folder_is_float32_for_trainer_and_engine(tmp_path):
    stored = lower_precision(tiny_model(), torch.bfloat16)
    save_pretrained(stored, tmp_path/"m")
    s = rl_settings(**{"model.checkpoint": str(tmp_path/"m"), "engine.kv_tokens": 512, "optim.muon_lr": 4e-6,
        "optim.adamw_lr": 1e-6})
    t = Trainer(build_model(s, 40), s.rl, s.optim, s.balance, sampling_of(s.engine))
    before = {k: v.detach().clone() for k, v in t.model.named_parameters()}
    for b in [played(model=stored)]*3: t.step(b)
    assert {v.dtype for v in (t.model.state_dict() | t.optimizers.state_dict()).values()} == {torch.float32}
    moved = sum(int((v != before[k]).sum()) for k, v in t.model.named_parameters())/sum(v.numel()
        for v in before.values())
    # of 16-bit weights one in a hundred moves
    assert moved > .8
    assert {p.dtype for p in build_engine(s, build_model(s, 40)).model.parameters()} == {torch.float32}
    s.engine.dtype = "bfloat16"
    assert torch.bfloat16 in {p.dtype for p in build_engine(s, build_model(s, 40)).model.parameters()}
