"""Kernels of the experts and the router against their plain versions, in Triton's interpreter where there is no GPU."""
import subprocess
import sys
from functools import partial
from importlib.util import find_spec

import pytest
import moe_rl.gpu.kernels as kernels  # before anything else imports triton
import torch
from hypothesis import given, settings, strategies as st

from moe_rl.gpu import experts as G, fused as FU
from moe_rl.moe.experts import experts_loop
from moe_rl.gpu.router import bf16_pieces, gate_logits, gpu_route
from moe_rl.moe.routing import route

DEVICE = "cpu" if kernels.INTERPRETED else "cuda"
HOPPER = DEVICE == "cuda" and torch.cuda.get_device_capability()[0] == 9 and find_spec("quack") is not None
plain = partial(FU.fused_experts, backend="plain")
few = settings(max_examples=6, deadline=None, derandomize=True)


def routes(T, E, k, unrouted, seed):
    g = torch.Generator().manual_seed(seed)
    idx = torch.rand(T, E, generator=g).topk(k, -1).indices
    return torch.where(torch.rand(T, 1, generator=g) < unrouted, -1, idx).to(DEVICE)


def case(T=24, E=5, k=2, D=16, I=12, seed=0, unrouted=.2):
    g = torch.Generator().manual_seed(seed)
    r = lambda *s: torch.randn(*s, generator=g).to(DEVICE)
    return r(T, D), routes(T, E, k, unrouted, seed), torch.rand(T, k, generator=g).to(DEVICE), r(E, 2*I, D)*.3, r(E, D,
        I)*.3


def outputs(f, x, idx, w, gate_up, down):
    "Output and the gradients of x, weights, gate_up and down."
    a = [t.clone().requires_grad_() for t in (x, w, gate_up, down)]
    y = f(a[0], idx, *a[1:])
    return [y.detach(), *torch.autograd.grad((y*y.detach().cos()).sum(), a)]


def close(a, b, eps=2e-5):
    assert a.isfinite().all() and (a-b).abs().max() <= eps*b.abs().max().clamp(min=1e-6)


@few
@given(T=st.integers(1, 70), E=st.integers(1, 9), k=st.integers(1, 4), align=st.sampled_from([1, 4, 128]),
    unrouted=st.sampled_from([0., .5, 1.]), seed=st.integers(0, 99))
def test_layout_is_the_sort(T, E, k, align, unrouted, seed):
    idx = routes(T, E, min(k, E), unrouted, seed)
    for lay, n in zip(G.layouts(idx, E, align, 1), (align, 1)):
        want = G.layout_plain(idx, E, n)
        for a, b in zip(lay, want): assert torch.equal(a, b)
        live = lay.rows[lay.rows >= 0].long()
        assert live.unique().numel() == live.numel() == (idx >= 0).sum()               # no two pairs share a row
        assert (lay.pairs[live] == (idx >= 0).flatten().nonzero().flatten()).all()     # and rows know their pairs
        assert (lay.ends % n == 0).all() and lay.ends[-1] <= len(lay.pairs)


both = pytest.mark.parametrize("experts", [G.gpu_experts, plain], ids=["triton", "plain fused"])


@both
@few
@given(T=st.integers(1, 30), E=st.integers(2, 6), D=st.sampled_from([8, 20]), seed=st.integers(0, 99))
def test_experts_and_gradients(experts, T, E, D, seed):
    c = case(T=T, E=E, D=D, seed=seed)
    for a, b in zip(outputs(experts, *c), outputs(experts_loop, *c)): close(a, b)


@both
def test_everything_unrouted(experts):
    x, idx, w, gate_up, down = case()
    for t in outputs(experts, x, torch.full_like(idx, -1), w, gate_up, down): assert (t == 0).all()


@both
def test_one_expert_takes_all(experts):
    x, _, w, gate_up, down = case(k=1)
    c = (x, torch.full((24, 1), 3, device=DEVICE), w[:,:1].contiguous(), gate_up, down)
    for a, b in zip(outputs(experts, *c), outputs(experts_loop, *c)): close(a, b)


def test_gate_values_weigh_the_gradient_of_down(monkeypatch):
    "The product that goes backwards through down hands on the weighted h. The bug: it hands on h."
    c, plain_products = case(), FU.PRODUCTS["plain"]
    def unweighted(dout, w, gu, rows):
        dgu, h, dw = plain_products.down_backward(dout, w, gu, rows)
        return dgu, h/rows.weight[:,None].clamp(min=1e-9), dw
    monkeypatch.setitem(FU.PRODUCTS, "plain", plain_products._replace(down_backward=unweighted))
    with pytest.raises(AssertionError): close(outputs(plain, *c)[4], outputs(experts_loop, *c)[4])


def test_fused_experts_say_what_they_cannot_take():
    c = case()
    with pytest.raises(ValueError, match="use one of plain, quack"): FU.fused_experts(*c, backend="magic")
    with pytest.raises(ValueError, match="cast them to one dtype"):
        FU.fused_experts(c[0].bfloat16(), *c[1:], backend="plain")
    if DEVICE == "cpu":
        with pytest.raises(ValueError, match="use backend='plain'"): FU.fused_experts(*c)


@pytest.mark.skipif(not HOPPER, reason="needs a Hopper GPU and quack-kernels")
@pytest.mark.parametrize("T,E,k,D,I,unrouted", [(1000, 16, 4, 512, 384, .2), (300, 128, 8, 256, 128, 0.),
    (64, 128, 1, 128, 64, .5), (5, 4, 2, 64, 40, 0.), (700, 3, 2, 1024, 8, .9), (200, 8, 2, 256, 128, 1.)])
def test_fused_products_are_the_plain_ones(T, E, k, D, I, unrouted):
    """Experts without rows, tails of rows that no pair owns, widths that no tile divides; twice the same to the bit,
    and never waiting for the device."""
    c = [t.bfloat16() if i in (0, 3, 4) else t for i, t in enumerate(case(T=T, E=E, k=k, D=D, I=I, unrouted=unrouted))]
    up = torch.randn(T, D, generator=torch.Generator().manual_seed(1)).to(DEVICE, torch.bfloat16)
    def run(f):
        a = [t.clone().requires_grad_() if t.is_floating_point() else t for t in c]
        y = f(*a)
        y.backward(up)
        return y.detach(), *[t.grad for t in a if t.is_floating_point()]
    got, want = run(FU.fused_experts), run(plain)
    for a, b in zip(got, want):
        assert a.isfinite().all() and (a.float()-b.float()).norm() <= 1e-2*b.float().norm().clamp(min=1e-6)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try: again = run(FU.fused_experts)
    finally: torch.cuda.set_sync_debug_mode("default")
    for a, b in zip(got, again): assert torch.equal(a, b)


@pytest.mark.skipif(not HOPPER, reason="needs a Hopper GPU and quack-kernels")
def test_fused_products_start_in_any_thread():
    "In a fresh process the thread of autograd has no CUDA context before its first call, and CuTe asks for one."
    code = """import torch
from moe_rl.gpu.fused import fused_experts
x = torch.randn(8, 64, device="cuda").bfloat16().requires_grad_()
w = [torch.randn(4, *s, device="cuda").bfloat16() for s in ((64, 64), (64, 32))]
y = fused_experts(x, torch.arange(8, device="cuda")[:,None]%4, torch.ones(8, 1, device="cuda"), *w)
y.backward(y)
print(x.grad.isfinite().all().item())"""
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert out.stdout.strip() == "True", out.stderr[-800:]


@pytest.fixture
def poisoned(monkeypatch):
    "Memory that nobody has written is NaN, as it may be on a GPU."
    def poison(make):
        def f(*args, **kwargs):
            t = make(*args, **kwargs)
            return t.fill_(float("nan")) if t.is_floating_point() and t.dtype != torch.float8_e4m3fn else t
        return f
    for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
        monkeypatch.setattr(owner, name, poison(getattr(owner, name)))
    real = torch._grouped_mm
    def grouped(a, b, *, offs):
        if b.dim() == 3: # rows after the last end are undefined
            y = real(a.nan_to_num(0.), b, offs=offs)
            y[offs[-1]:] = float("nan")
            return y
        ends = [0, *offs.tolist()] # a sum over rows takes those of the groups only
        return torch.stack([a[:,i:j]@b[i:j] for i, j in zip(ends, ends[1:])])
    monkeypatch.setattr(torch, "_grouped_mm", grouped)


def test_known_failure_23_undefined_tail_rows(poisoned, monkeypatch):
    "Rows that no pair owns hold NaN in every buffer; none may reach an output or a gradient."
    c = case(unrouted=.5)
    want = outputs(experts_loop, *c)
    for experts in (G.gpu_experts, plain):
        for a, b in zip(outputs(experts, *c), want): close(a, b)
    # the bug: combining by adding every row to the token it says, the tail included
    def combine_all(y, lay):
        k, pairs = lay.rows.shape[1], lay.pairs.long().clamp(min=0)
        return torch.zeros(len(lay.rows), y.shape[1], device=y.device).index_add(0, pairs//k, y)
    monkeypatch.setattr(G, "combine", combine_all)
    assert not outputs(G.gpu_experts, *c)[0].isfinite().all()


def test_known_failure_07_replayed_gates_are_live():
    "With replayed experts the gates come from the live scores of those experts, and their gradient reaches the logits."
    g = torch.Generator().manual_seed(0)
    logits, replay = torch.randn(30, 8, generator=g).to(DEVICE), routes(30, 8, 3, .3, 1)
    up = torch.randn(30, 3, generator=g).to(DEVICE)
    def run(f, index_of=lambda r: r.idx):
        z = logits.clone().requires_grad_()
        r = f(z, 3, replay=replay)
        return r.idx, r.weights.detach(), torch.autograd.grad((r.weights*up).sum(), z)[0]
    a, b = run(gpu_route), run(route)
    assert torch.equal(a[0], b[0]) and torch.equal(a[0][replay[:,0] >= 0], replay[replay[:,0] >= 0])
    close(a[1], b[1])
    close(a[2], b[2])
    # the bug: gates gathered at the live choice while the replayed experts are used
    live = route(logits, 3)
    assert (live.weights-a[1]).abs().max() > 1e-2


@few
@given(T=st.integers(1, 40), E=st.integers(2, 20), k=st.integers(1, 4), softmax=st.booleans(), norm=st.booleans(),
    seed=st.integers(0, 99))
def test_route_kernel(T, E, k, softmax, norm, seed):
    g = torch.Generator().manual_seed(seed)
    logits, bias, k = torch.randn(T, E, generator=g).to(DEVICE)*3, torch.randn(E, generator=g).to(DEVICE), min(k, E)
    up, us = torch.randn(T, k, generator=g).to(DEVICE), torch.randn(T, E, generator=g).to(DEVICE)
    def run(f):
        z = logits.clone().requires_grad_()
        r = f(z, k, bias, "softmax" if softmax else "sigmoid", route_norm=norm, route_scale=1.7)
        return r.idx, r.weights.detach(), r.scores.detach(), torch.autograd.grad(
            (r.weights*up).sum()+(r.scores*us).sum(), z)[0]
    a, b = run(gpu_route), run(route)
    assert torch.equal(a[0], b[0])
    for u, v in zip(a[1:], b[1:]): close(u, v, 1e-4)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_route_stays_in_range(value):
    logits = torch.zeros(3, 6, device=DEVICE)
    logits[1] = value
    logits[2,4] = value
    idx = gpu_route(logits, 3).idx
    assert idx.min() >= 0 and idx.max() < 6 and all(len(set(r)) == 3 for r in idx.tolist())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("T, E", [(1, 3), (37, 128), (70, 20)])
def test_gradients_of_logits_and_of_x_handed_on(T, E, dtype):
    "Whatever is used of the two results, x gets the sum of the gradients that came back, to the accuracy of bf16."
    g = torch.Generator().manual_seed(T)
    x, w = torch.randn(T, 64, generator=g).bfloat16().to(DEVICE), torch.randn(E, 64, generator=g).to(dtype).to(DEVICE)
    dz, dx = torch.randn(T, E, generator=g).to(DEVICE), torch.randn(T, 64, generator=g).bfloat16().to(DEVICE)
    for used in ((True, True), (True, False), (False, True)):
        a, b = x.clone().requires_grad_(), w.clone().requires_grad_()
        outs, ups = zip(*[(o, u) for o, u, on in zip(gate_logits(a, b), (dz, dx), used) if on])
        ga, gb = torch.autograd.grad(outs, (a, b), ups, allow_unused=True)
        want = used[0]*(dz.double()@w.double()) + used[1]*dx.double()
        assert (ga.double()-want).norm() <= 4e-3*want.norm() and (ga.double()-want).abs().max() <= 1e-2*want.abs().max()
        if used[0]:
            assert (gb.double()-dz.double().T@x.double()).norm() <= (2e-5 if dtype == torch.float32
                else 4e-3)*gb.double().norm()
        else: assert gb is None


def test_layer_through_the_x_handed_on():
    "Experts that take the x of `gate_logits`: the gradients of a layer in which x goes both ways by itself."
    g = torch.Generator().manual_seed(0)
    r = lambda *s: (torch.randn(*s, generator=g)*.3).bfloat16().to(DEVICE)
    x, up, params = r(30, 32), r(30, 32), (r(6, 32), r(6, 32, 32), r(6, 32, 16))
    def run(handed_on):
        a, router, gate_up, down = [t.clone().requires_grad_() for t in (x, *params)]
        logits, b = gate_logits(a, router)
        q = gpu_route(logits, 2, route_scale=2.)
        y = G.gpu_experts(b if handed_on else a, q.idx, q.weights, gate_up, down)
        return y, *torch.autograd.grad(y, (a, router, gate_up, down), up)
    for a, b in zip(run(True), run(False)): close(a.float(), b.float(), 1e-2)


def test_pieces_are_exact():
    w = torch.randn(4096, generator=torch.Generator().manual_seed(0))*torch.randn(4096,
        generator=torch.Generator().manual_seed(1)).exp()**3
    assert torch.equal(sum(p.double() for p in bf16_pieces(w)), w.double())
    assert len(bf16_pieces(w.bfloat16())) == 1


def test_bad_input_is_one_clear_line():
    x, idx, w, gate_up, down = case()
    with pytest.raises(ValueError, match="cast them to one dtype"): G.gpu_experts(x.bfloat16(), idx, w, gate_up, down)
    with pytest.raises(ValueError, match="impossible with 6 experts"): gpu_route(torch.zeros(2, 6, device=DEVICE), 7)
    with pytest.raises(ValueError, match="splits w for bf16 tokens"): gate_logits(x, gate_up[0])
    with pytest.raises(ValueError, match="kernels here run on"): G.permute(x.to("meta"), G.layout(idx, 5))
