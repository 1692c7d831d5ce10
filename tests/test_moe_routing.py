"""Routing, balance and experts: properties over drawn sizes, and bugs that shipped elsewhere put in to see them
caught."""
import inspect
import textwrap

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import nn

import moe_rl.moe.experts as experts
from moe_rl.moe.balance import max_vio, router_z_loss, sequence_aux_loss, sign_update, smebu_update
from moe_rl.moe.experts import (auto_experts, choose_experts, experts_loop, grouped_experts, inplace_experts,
                                small_experts, sorted_experts,
                                torch_grouped_mm)
from moe_rl.moe.routing import count_tokens, route, unroute
from moe_rl.routes import RouteError, check_routes, narrow_routes, route_dtype

few = settings(max_examples=40, deadline=None)
FAST = [grouped_experts, small_experts, sorted_experts, inplace_experts, auto_experts]


def mutant(fn, old, new, **names):
    "`fn` with one piece of its source replaced: a bug put in where it would really be."
    source = textwrap.dedent(inspect.getsource(fn))
    assert source.count(old) == 1, f"{fn.__name__} no longer contains {old!r} exactly once"
    scope = dict(vars(inspect.getmodule(fn)), **names)
    exec(compile(source.replace(old, new), f"<mutant of {fn.__name__}>", "exec"), scope)
    return scope[fn.__name__]


def caught(check, *args):
    with pytest.raises(AssertionError): check(*args)


# ------------------------------------------------------------------------------------------------------------------
# routing
@st.composite
def router(draw):
    "Logits and the settings of a router that fits them."
    groups = draw(st.sampled_from([1, 2, 4]))
    per = draw(st.integers(1, 6))
    top = draw(st.integers(1, groups))
    k = draw(st.integers(1, top*per))
    g = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    T = draw(st.integers(0, 20))
    logits = torch.randn(T, groups*per, generator=g)*draw(st.sampled_from([.1, 1., 4.]))
    bias = torch.randn(groups*per, generator=g)*.1
    kw = dict(score_func=draw(st.sampled_from(["sigmoid", "softmax"])), route_norm=draw(st.booleans()),
        route_scale=draw(st.sampled_from([1., 2.826])))
    return logits, k, bias, groups, top, kw, g


def plain_route(row, k, bias, n_group, topk_group, score_func, route_norm, route_scale):
    "One token in plain Python floats."
    ex = [np.exp(v - max(row)) for v in row]
    s = [1/(1+np.exp(-v)) for v in row] if score_func == "sigmoid" else [e/sum(ex) for e in ex]
    sel, per = [a+b for a, b in zip(s, bias)], len(row)//n_group
    worth = [sum(sorted(sel[g*per:(g+1)*per])[-2:]) if score_func == "sigmoid" else max(sel[g*per:(g+1)*per])
        for g in range(n_group)]
    open_ = sorted(range(n_group), key=lambda g: -worth[g])[:topk_group]
    S = sorted((i for i in range(len(row)) if i//per in open_), key=lambda i: -sel[i])[:k]
    total = sum(s[i] for i in S) if route_norm else 1.
    return S, [route_scale*s[i]/total for i in S]


@few
@given(router())
def test_route_equals_the_definition(case):
    logits, k, bias, n_group, topk_group, kw, _ = case
    r = route(logits, k, bias, n_group=n_group, topk_group=topk_group, **kw)
    check_routes(r.idx[:, None].numpy(), len(logits), 1, k, logits.shape[1])
    assert r.idx.shape == r.weights.shape == (len(logits),
        k) and r.weights.dtype == r.scores.dtype == r.logits.dtype == torch.float32
    for i, row in enumerate(logits.double().tolist()):
        S, w = plain_route(row, k, bias.double().tolist(), n_group, topk_group, **kw)
        assert r.idx[i].tolist() == S
        np.testing.assert_allclose(r.weights[i].numpy(), w, rtol=1e-4)


@few
@given(router())
def test_route_is_a_function_of_the_token_alone(case):
    logits, k, bias, n_group, topk_group, kw, g = case
    full = route(logits, k, bias, n_group=n_group, topk_group=topk_group, **kw)
    perm = torch.randperm(len(logits), generator=g)
    some = route(logits[perm[:5]], k, bias, n_group=n_group, topk_group=topk_group, **kw)
    assert torch.equal(some.idx, full.idx[perm[:5]]) and torch.allclose(some.weights, full.weights[perm[:5]], rtol=1e-6,
        atol=0)


@few
@given(router(), st.integers(0, 2**31))
def test_counts_add_up_and_skip_fillers(case, seed):
    logits, k, bias, *_ = case
    E = logits.shape[1]
    mask = torch.rand(len(logits), generator=torch.Generator().manual_seed(seed)) < .6
    r = route(logits, k, bias)
    n = count_tokens(unroute(r, mask).idx, E)
    assert n.shape == (E,) and n.sum() == mask.sum()*k
    assert torch.equal(n, count_tokens(r.idx, E, mask)) and torch.equal(n,
        torch.bincount(r.idx[mask].flatten(), minlength=E))


# -------------------------------------------------------------------------------------------------------------------
# replay
def replay_case(T=40, E=16, k=4):
    g = torch.Generator().manual_seed(3)
    logits = torch.randn(T, E, generator=g).requires_grad_()
    replay = torch.rand(T, E, generator=g).topk(k).indices # a choice that the live router wouldn't make
    replay[::5] = -1
    return logits, replay


def check_replay(fn):
    """Replayed ids are used, weights are the live scores of exactly those ids, and the gradient reaches exactly
    their logits."""
    logits, replay = replay_case()
    k, on = replay.shape[1], replay[:,0] >= 0
    for norm in (True, False):
        r = fn(logits, k, route_norm=norm, route_scale=2., replay=replay)
        assert torch.equal(r.idx[on], replay[on]) and torch.equal(r.idx[~on], route(logits, k).idx[~on])
        picked = logits.detach().sigmoid().gather(1, r.idx)
        assert torch.allclose(r.weights.detach(), 2*picked/(picked.sum(1, keepdim=True) if norm else 1.),
            atol=1e-6), "weights are not those of the ids"
        assert r.weights.requires_grad, "no gradient to the router"
        cotangent = torch.linspace(.1, 1, k)
        (grad,) = torch.autograd.grad((r.weights*cotangent).sum(), logits)
        hit = torch.zeros_like(logits, dtype=torch.bool).scatter(1, r.idx, True)
        assert torch.equal(grad != 0, hit), "the gradient misses replayed experts or reaches others"
        h = 1e-3 # one derivative by finite differences: the weights follow the live logits
        with torch.no_grad():
            up, dn = (fn(logits + s*h*torch.nn.functional.one_hot(r.idx[:,0], logits.shape[1]), k, route_norm=norm,
                route_scale=2., replay=replay)
                      for s in (1, -1))
        fd = ((up.weights - dn.weights)*cotangent).sum(1)/(2*h)
        assert torch.allclose(fd[on], grad.gather(1, r.idx[:,:1])[:,0][on],
            atol=2e-3), "the gate does not follow the live logits"


def test_replay_is_right(): check_replay(route)


def test_known_failure_07_index_drifts_from_gathered_score():
    live_gather = mutant(route, "weights = scores.gather(-1, idx)",
        "weights = scores.gather(-1, select(scores, k, bias))")
    shifted = mutant(route, "weights = scores.gather(-1, idx)", "weights = scores.gather(-1, idx.roll(1, 0))")
    for bug in (live_gather, shifted): caught(check_replay, bug)


def test_known_failure_08_frozen_gate_values():
    detached = mutant(route, "weights = scores.gather(-1, idx)", "weights = scores.detach().gather(-1, idx)")
    caught(check_replay, detached)
    # the engine's gate values replayed along with its choice
    recorded = torch.rand(40, 4, generator=torch.Generator().manual_seed(0))
    frozen = mutant(route, "weights = scores.gather(-1, idx)", "weights = RECORDED + 0*scores.gather(-1, idx)",
        RECORDED=recorded)
    caught(check_replay, frozen)
    frozen_with_right_values = mutant(route, "weights = scores.gather(-1, idx)",
        "weights = scores.detach().gather(-1, idx) + 0*scores.gather(-1, idx)")
    caught(check_replay, frozen_with_right_values)


def check_fillers(unroute_fn, count_fn):
    "Fillers are counted nowhere, computed nowhere, and change no other token."
    g = torch.Generator().manual_seed(0)
    logits, mask = torch.randn(24, 8, generator=g), torch.arange(24) < 17
    logits[~mask] = 0. # identical fillers
    r = unroute_fn(route(logits, 2), mask)
    assert torch.equal(count_fn(r.idx, 8), count_fn(route(logits[mask], 2).idx, 8)), "fillers counted as load"
    assert torch.equal(count_tokens(route(logits, 2).idx, 8, mask),
        torch.bincount(route(logits[mask], 2).idx.flatten(), minlength=8))
    x, gu, dn = torch.randn(24, 8, generator=g), torch.randn(8, 16, 8, generator=g), torch.randn(8, 8, 8, generator=g)
    for f in [experts_loop, *FAST]:
        y = f(x, r.idx, r.weights, gu, dn)
        assert (y[~mask] == 0).all(), "fillers computed"
        assert torch.allclose(y[mask], experts_loop(x[mask], r.idx[mask], r.weights[mask], gu, dn), atol=1e-4)


def test_fillers(): check_fillers(unroute, count_tokens)


def test_known_failure_06_padding_as_expert_0():
    as_zero = mutant(unroute, "masked_fill(off, -1)", "masked_fill(off, 0)")
    caught(check_fillers, as_zero, count_tokens)
    kept = mutant(unroute, "off = ~token_mask[:,None]", "off = torch.zeros_like(token_mask)[:,None]")
    caught(check_fillers, kept, count_tokens)
    clamped = mutant(count_tokens, "at = idx.reshape(-1)+1", "at = idx.reshape(-1).clamp(min=0)+1")
    caught(check_fillers, unroute, clamped)


def check_order(fn):
    "A replay in any order of its slots gives the same mixture: each weight belongs to its id, not to its place."
    logits, replay = replay_case()
    a, b = fn(logits, 4, replay=replay), fn(logits, 4, replay=replay.flip(1))
    dense = [torch.zeros(40, 16).scatter(1, r.idx, r.weights.detach()) for r in (a, b)]
    assert torch.allclose(*dense, atol=1e-6), "the weights depend on the order of the slots"


def test_known_failure_10_order_and_duplicates():
    check_order(route)
    sorted_gates = mutant(route, "return Routing(idx, weights*route_scale",
        "weights = weights.sort(-1, descending=True).values\n    return Routing(idx, weights*route_scale")
    caught(check_order, sorted_gates)
    good = np.array([[[3, 1]], [[0, 2]]])
    check_routes(good, 2, 1, 2, 4)
    for bad, word in (([2, 2], "same expert twice"), ([3, -1], "the model has 0 to 3"),
            ([0, 4], "the model has 0 to 3")):
        with pytest.raises(RouteError, match=word): check_routes(np.concatenate([good, [[bad]]]), 3, 1, 2, 4)


def check_travel(pack):
    for E in (8, 256, 257, 512, 1024):
        ids = np.arange(E)[:, None]
        assert np.array_equal(pack(ids, E).astype(np.int64), ids), f"ids of {E} experts changed on the way"


def test_known_failure_11_uint8_overflow():
    check_travel(narrow_routes)
    caught(check_travel, mutant(narrow_routes, "astype(dtype)", "astype(np.uint8)"))
    caught(check_travel, mutant(narrow_routes, "return", "return",
        route_dtype=lambda n: np.dtype(np.uint8 if n <= 257 else np.uint16)))
    for E, ids in ((256, [[256]]), (8, [[-1]]), (512, [[700]])):
        with pytest.raises(ValueError, match=f"only 0 to {E-1} can be stored"): narrow_routes(np.array(ids), E)
    assert route_dtype(256) == np.uint8 and route_dtype(65536) == np.uint16
    with pytest.raises(ValueError): route_dtype(65537)


def test_route_refuses_what_cannot_be():
    logits = torch.randn(4, 8)
    for kw, word in ((dict(k=9), "k=9"), (dict(k=2, n_group=3), "n_group=3"), (dict(k=2, score_func="tanh"), "tanh"),
                     (dict(k=2, replay=torch.zeros(4, 3).long()), r"replay has shape \(4, 3\)"),
                     (dict(k=2, replay=torch.zeros(3, 2).long()), r"needs \(4, 2\)")):
        with pytest.raises(ValueError, match=word): route(logits, **kw)


# ------------------------------------------------------------------------------------------------------------------
# balance
counts_ = st.lists(st.integers(0, 10**6), min_size=2, max_size=64).filter(lambda n: sum(n) > 0)


@few
@given(st.lists(counts_, min_size=1, max_size=5), st.floats(1e-5, .1), st.floats(0, .95), st.floats(.1, 10))
def test_smebu_properties(steps, rate, beta, kappa):
    E = len(steps[0])
    b, m = torch.zeros(E), torch.zeros(E)
    vb, vm = np.zeros(E), np.zeros(E)
    for n in steps:
        n = (n*E)[:E]
        smebu_update(b, m, torch.tensor(n), rate, beta, kappa)
        v = 1 - np.array(n)/np.mean(n)
        d = rate*np.tanh(kappa*v)
        d -= d.mean()
        vm = beta*vm + (1-beta)*d
        vb += vm
        assert abs(b.sum()) <= 1e-6*E and m.abs().max() <= 2*rate*(1+1e-5)
    np.testing.assert_allclose(b.numpy(), vb, atol=1e-5*rate*1e2)


@few
@given(counts_, st.floats(1e-5, .1))
def test_sign_properties(n, rate):
    b = torch.zeros(len(n))
    sign_update(b, torch.tensor(n), rate)
    d = np.sign(np.mean(np.array(n, dtype=np.float32)) - np.array(n))
    d = rate*(d - d.mean())
    np.testing.assert_allclose(b.numpy(), d, atol=1e-6)


def test_smebu_reference_vector():
    b, m = torch.zeros(4), torch.zeros(4)
    smebu_update(b, m, torch.tensor([4, 3, 1, 8]), rate=.1)
    np.testing.assert_allclose(b.numpy(), [-.0050, .0181, .0402, -.0532], atol=6e-5)


class Moe(nn.Module):
    "Where a model keeps the two tensors."
    def __init__(self, persistent=True):
        super().__init__()
        self.register_buffer("expert_bias", torch.zeros(8), persistent=persistent)
        self.register_buffer("bias_momentum", torch.zeros(8), persistent=persistent)


def check_bias_lives(update, make=Moe):
    "The update changes the registered buffers themselves, and a checkpoint carries both on."
    m, counts = make(), torch.arange(8)
    for _ in range(3): update(m.expert_bias, m.bias_momentum, counts)
    assert m.expert_bias.abs().max() > 0 and m.bias_momentum.abs().max() > 0, "never updated"
    again = make()
    again.load_state_dict(m.state_dict())
    for x in (m, again): update(x.expert_bias, x.bias_momentum, counts.flip(0))
    assert torch.equal(m.expert_bias, again.expert_bias), "not in the checkpoint"


def test_known_failure_24_bias_not_updated_or_not_saved():
    check_bias_lives(smebu_update)
    caught(check_bias_lives, mutant(smebu_update, "bias += momentum", "bias = bias + momentum"))
    caught(check_bias_lives, mutant(smebu_update, "momentum.mul_(beta).add_(delta, alpha=1-beta)",
        "momentum = momentum*beta + delta*(1-beta)"))
    caught(check_bias_lives, smebu_update, lambda: Moe(persistent=False))


def test_update_refuses():
    with pytest.raises(ValueError, match="counted no tokens"):
        smebu_update(torch.zeros(2, 4), torch.zeros(2, 4), torch.tensor([[1, 1, 1, 1], [0, 0, 0, 0]]))
    with pytest.raises(TypeError, match="keep it in float32"):
        smebu_update(torch.zeros(4).bfloat16(), torch.zeros(4), torch.ones(4))


@few
@given(st.lists(st.integers(1, 12), min_size=1, max_size=6), st.integers(2, 12), st.integers(0, 2**31), st.booleans())
def test_sequence_aux_loss(lengths, E, seed, fillers):
    g = torch.Generator().manual_seed(seed)
    T = sum(lengths)
    k = min(2, E)
    r = route(torch.randn(T, E, generator=g), k)
    mask = torch.rand(T, generator=g) < .7 if fillers else torch.ones(T, dtype=torch.bool)
    idx = unroute(r, mask).idx
    cu = torch.tensor([0, *np.cumsum(lengths)])
    s = r.scores.clone().requires_grad_()
    loss, want = sequence_aux_loss(s, idx, cu, alpha=.5), 0.
    for lo, hi in zip(cu[:-1], cu[1:]):
        on = mask[lo:hi]
        n = int(on.sum())
        if not n: continue
        f = count_tokens(idx[lo:hi], E)*E/(k*n)
        P = (s[lo:hi][on]/s[lo:hi][on].sum(1, keepdim=True)).mean(0)
        want = want + n/int(mask.sum())*.5*(f*P).sum()
    if not mask.any():
        assert loss == 0
        return
    assert torch.allclose(loss, want, atol=1e-6)
    a, b = torch.autograd.grad(loss, s, retain_graph=True)[0], torch.autograd.grad(want, s)[0]
    assert torch.allclose(a, b, atol=1e-6) and (a[~mask] == 0).all()


def test_max_vio_and_z_loss():
    assert max_vio(torch.tensor([[4, 4], [8, 0]])).tolist() == [0., 1.]
    logits, mask = torch.randn(9, 5), torch.arange(9) % 3 > 0
    assert torch.allclose(router_z_loss(logits, mask), logits[mask].logsumexp(-1).square().mean())
    assert router_z_loss(logits, torch.zeros(9, dtype=torch.bool)) == 0


# ------------------------------------------------------------------------------------------------------------------
# experts
def value_and_grads(f, x, idx, weights, gate_up, down):
    ts = [t.detach().clone().requires_grad_() for t in (x, weights, gate_up, down)]
    y = f(ts[0], idx, *ts[1:])
    return [y.detach(), *torch.autograd.grad(y, ts, torch.randn(y.shape, generator=torch.Generator().manual_seed(1)))]


def check_experts(f, args, tol=1e-5):
    for name, a, b in zip(("y", "dx", "dweights", "dgate_up", "ddown"), value_and_grads(f, *args),
            value_and_grads(experts_loop, *args)):
        assert a.shape == b.shape and torch.isfinite(a).all(), f"{name} is not finite"
        assert (a-b).abs().max() <= tol*max(1., b.abs().max()) if a.numel() else True, f"{name} differs from the loop"


def make(T, E, k, D, I, seed, skew=0., holes=0.):
    g = torch.Generator().manual_seed(seed)
    x, gu = torch.randn(T, D, generator=g), torch.randn(E, 2*I, D, generator=g)/D**.5
    dn = torch.randn(E, D, I, generator=g)/I**.5
    r = route(torch.randn(T, E, generator=g) + skew*torch.arange(E), k)
    r = unroute(r, torch.rand(T, generator=g) >= holes)
    return x, r.idx, r.weights, gu, dn


@few
@given(st.sampled_from(FAST), st.sampled_from([0, 1, 2, 7, 33, 100]), st.integers(1, 9), st.integers(1, 4),
       st.sampled_from([4, 8, 20]),
       st.sampled_from([4, 12, 16]), st.integers(0, 2**31), st.sampled_from([0., 5.]), st.sampled_from([0., .4, 1.]))
def test_fast_experts_equal_the_loop(f, T, E, k, D, I, seed, skew, holes):
    check_experts(f, make(T, E, min(k, E), D, I, seed, skew, holes))


@pytest.mark.parametrize("D,I", [(5, 3), (8, 6), (6, 8)])
def test_odd_widths(D, I):
    args = make(40, 4, 2, D, I, 0, holes=.2)
    for f in (small_experts, inplace_experts, auto_experts): check_experts(f, args)
    with pytest.raises(ValueError, match="multiples of 4"): grouped_experts(*args)


@pytest.mark.parametrize("T,k,E,D,I,choice", [(8, 2, 8, 128, 128, small_experts), (64, 2, 8, 128, 128, sorted_experts),
                                              (2000, 2, 8, 96, 64, sorted_experts),
                                              (3000, 2, 8, 128, 128, inplace_experts)])
def test_auto_experts(T, k, E, D, I, choice):
    args = make(T, E, k, D, I, 0, holes=.1)
    assert choose_experts(T, k, args[3]) is choice
    check_experts(auto_experts, args, tol=2e-5)
    with torch.inference_mode(): assert torch.allclose(auto_experts(*args), experts_loop(*args), atol=1e-4)


def test_bfloat16():
    x, idx, w, gu, dn = make(64, 8, 2, 32, 16, 0, holes=.2)
    want, got = experts_loop(x, idx, w, gu, dn), auto_experts(x.bfloat16(), idx, w, gu.bfloat16(), dn.bfloat16())
    assert got.dtype == torch.bfloat16 and (got-want).abs().max() < .05*want.abs().max()
    with pytest.raises(TypeError, match="bfloat16"): inplace_experts(x.bfloat16(), idx, w, gu.bfloat16(), dn.bfloat16())


class NanTail(torch.autograd.Function):
    "A grouped product that leaves NaN in every row its contract calls undefined, forward and backward."
    @staticmethod
    def forward(ctx, x, w, offsets):
        ctx.save_for_backward(x, w, offsets)
        return torch_grouped_mm(x, w, offsets).index_fill(0, torch.arange(int(offsets[-1]), len(x)), torch.nan)

    @staticmethod
    def backward(ctx, g):
        x, w, offsets = ctx.saved_tensors
        if not len(x): return torch.zeros_like(x), torch.zeros_like(w), None
        gx = torch._grouped_mm(g, w, offs=offsets).index_fill(0, torch.arange(int(offsets[-1]), len(x)), torch.nan)
        return gx, torch._grouped_mm(g.T.contiguous(), x, offs=offsets), None


def test_known_failure_23_nan_in_tail_rows():
    args = make(40, 6, 2, 16, 8, 0, holes=.5)

    def check(grouped): check_experts(lambda *a: grouped(*a, grouped_mm=NanTail.apply), args)
    check(grouped_experts)
    caught(check, mutant(grouped_experts, "rows = x.index_select(0, tok).where(live, 0.)",
        "rows = x.index_select(0, tok)"))
    caught(check, mutant(grouped_experts, "down, offsets).where(live, 0.)", "down, offsets)"))
    caught(check, mutant(grouped_experts, "down, offsets).where(live, 0.)", "down, offsets)*live")) # 0*NaN


def test_backward_by_hand_is_checked():
    "Bugs in the handwritten backward are caught by the comparison with the loop."
    args = make(60, 4, 2, 16, 8, 0, holes=.2)
    for old, new in (("gact.mul_(w)", "gact"), ("act.mul_(w), out=grad_down", "act, out=grad_down"),
            ("out=gup", "out=ggate")):
        bad = mutant(experts.expert_backward, old, new)
        fn = mutant(experts.InplaceExperts, "@once_differentiable", "@once_differentiable", expert_backward=bad)
        caught(check_experts, fn.apply, args)


def test_experts_are_batch_invariant_enough():
    "One token alone and among thousands: the engine decodes what the trainer packs."
    args = make(3000, 8, 2, 64, 32, 0)
    full = auto_experts(*args)
    for n in (1, 5, 40): assert torch.allclose(auto_experts(*(a[:n] for a in args[:3]), *args[3:]), full[:n], atol=1e-5)
