"""One GPU call: are the kernels right, and which variant is fastest? Prints tables; JSON to $OUT/fp8_check.json.
usage: python benchmarks/_gpu_fp8_check.py [section ...]   sections: casts rows gemm kgroup layer fp8layer prof"""
import json, os, sys, time, traceback, tempfile, importlib.util
os.environ.setdefault("PYTHONUNBUFFERED", "1")
import torch, triton, triton.language as tl
sys.path.insert(0, os.getcwd())
T0 = time.time()
OUT, R = os.environ.get("OUT", "/tmp"), {}
dev = "cuda"
torch.manual_seed(0)
def say(*a): print(f"[{time.time()-T0:5.0f}s]", *a, flush=True)
def save(): json.dump(R, open(f"{OUT}/fp8_check.json", "w"), indent=1)
def ms(f, n=10, warm=3):
    for _ in range(warm): f()
    ev = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(n)]
    for a, b in ev: a.record(); f(); b.record()
    torch.cuda.synchronize()
    return sorted(a.elapsed_time(b) for a, b in ev)[n//2]
def nb(*ts): return sum(t.numel()*t.element_size() for t in ts)

from moe_rl.fp8 import kernels as K, quant as Q, experts as FE
from moe_rl.fp8.gemm import gemm, calc_diff, by_group
from moe_rl.moe import experts_gpu as G, router_gpu as RG
from moe_rl.moe.experts import experts_loop

def same(a, b):
    if a.dtype == Q.E4M3:
        a, b = a.view(torch.uint8), b.view(torch.uint8)
        a, b = torch.where(a & 127 == 127, 127, a), torch.where(b & 127 == 127, 127, b)
        return int((a != b).sum())
    return int((a.nan_to_num(-1.) != b.nan_to_num(-1.)).sum())

def copy_bw():
    x = torch.randn(1 << 28, device=dev, dtype=torch.float32).bfloat16(); y = torch.empty_like(x)
    t = ms(lambda: y.copy_(x), 20); return nb(x, y)/t/1e6
def corners(M, Kd):
    x = torch.randn(M, Kd, device=dev)*torch.randn(M, Kd, device=dev).exp()**2
    x[0] = 0; x[1] *= 1e-40; x[2, Kd//2] = 3e4; x[3, 1] = float("inf"); x[4, Kd-1] = float("nan"); x[5] *= 1e-5
    return x.bfloat16()
def full_layout(M, T):  # every row has a pair, one expert
    z = torch.arange(M, device=dev, dtype=torch.int32)
    return G.Layout(z.view(T, -1), z, torch.tensor([M], device=dev, dtype=torch.int32), torch.tensor([M], device=dev, dtype=torch.int32))

def casts():
    bw = copy_bw(); R["copy_GBs"] = bw; say(f"copy {bw:.0f} GB/s")
    for shape in ((300, 640), (256, 200)):
        for u in (False, True):
            x = corners(*shape); a, b = K.cast_rows(x, u), Q.quantise(x, ue8m0=u)
            say("cast_rows", shape, u, "bad", same(a.q, b.q), same(a.scale, b.scale))
        x = corners(*shape); (a, at) = K.cast_both(x); b = Q.quantise(x); bt = Q.quantise(torch.nn.functional.pad(x, (0, 0, 0, -shape[0] % 128)).T.contiguous())
        say("cast_both", "bad", same(a.q, b.q), same(a.scale, b.scale), same(at.q, bt.q), same(at.scale, bt.scale))
        w = torch.stack([corners(*shape)]*2); (a, at), b = K.cast_blocks(w, transpose=True), Q.quantise(w, (128, 128)); bt = Q.quantise(w.mT.contiguous(), (128, 128))
        say("cast_blocks", "bad", same(a.q, b.q), same(a.scale, b.scale), same(at.q, bt.q), same(at.scale, bt.scale))
    x = torch.randn(65536, 4096, device=dev).bfloat16()
    def row(name, f, bytes_):
        try: t = ms(f); R[name] = dict(ms=t, share=bytes_/t/1e6/bw); say(f"{name:38s} {t:7.3f} ms  {bytes_/t/1e6:6.0f} GB/s  share {bytes_/t/1e6/bw:.3f}")
        except Exception as e: say(name, "FAILED", repr(e)[:200])
    q = K.cast_rows(x); b1 = nb(x, q.q, q.scale)
    for BM in (16, 32, 64, 128):
        for w in (4, 8): row(f"cast_rows BM{BM} w{w}", lambda: K.cast_rows(x, BM=BM, num_warps=w), b1)
    q, qt = K.cast_both(x); b2 = nb(x, q.q, q.scale, qt.q, qt.scale)
    import _gpu_variants as V
    a, at = V.cast_both2(x); say("cast_both2 same", same(a.q, q.q), same(at.q, qt.q), same(at.scale, qt.scale)); del a, at
    for w in (8, 16): row(f"cast_both w{w}", lambda: K.cast_both(x, num_warps=w), b2)
    for C, w, r in ((32, 4, None), (32, 4, 128), (32, 4, 96), (64, 8, None), (64, 8, 128), (64, 8, 96), (32, 8, None), (64, 16, None)): row(f"cast_both2 C{C} w{w} r{r}", lambda: V.cast_both2(x, CHUNK=C, num_warps=w, maxnreg=r), b2)
    W = x.view(32, 2048, 4096); q = K.cast_blocks(W); b3 = nb(x, q.q, q.scale)
    for C, w, r in ((32, 4, None), (64, 8, None), (32, 8, None), (64, 4, 96)):
        row(f"cast_blocks2 C{C} w{w} r{r}", lambda: V.cast_blocks2(W, CHUNK=C, num_warps=w, maxnreg=r), b3)
        row(f"cast_blocks2+T C{C} w{w} r{r}", lambda: V.cast_blocks2(W, transpose=True, CHUNK=C, num_warps=w, maxnreg=r), b3+q.q.numel())
    for w in (8, 16):
        row(f"cast_blocks w{w}", lambda: K.cast_blocks(W, num_warps=w), b3)
        row(f"cast_blocks+T w{w}", lambda: K.cast_blocks(W, transpose=True, num_warps=w), b3+q.q.numel())
    lay = full_layout(65536, 8192); wt = torch.rand(8192, 8, device=dev)
    q = K.swiglu_cast(x, wt, lay); b4 = nb(x, q.q, q.scale, wt, lay.pairs)
    ref = lambda: (torch.nn.functional.silu(x[:, :2048].float())*x[:, 2048:].float()*wt.view(-1, 1)).bfloat16()
    h = ref(); say("swiglu_cast vs torch: h", same(G.weighted_swiglu(x, wt, lay), h), "q", same(q.q, Q.quantise(h).q), "scale", same(q.scale, Q.quantise(h).scale), "of", h.numel())
    a = K.cast_rows(G.weighted_swiglu(x, wt, lay)); say("swiglu_cast vs unfused:", same(q.q, a.q), same(q.scale, a.scale)); del a
    for BM in (8, 16, 32, 64):
        for w in (4, 8): row(f"swiglu_cast BM{BM} w{w}", lambda: K.swiglu_cast(x, wt, lay, BM=BM, num_warps=w), b4)
    src = open(K.__file__).read().replace("from .quant", "from moe_rl.fp8.quant").replace("from ..moe", "from moe_rl.moe").replace("import Layout, _sigmoid", "import Layout")
    src = src.replace("MIN_AMAX_BITS = ", "from triton.language.extra import libdevice\n@triton.jit\ndef _sigmoid(x): return tl.div_rn(1., 1+libdevice.exp(-x))\nMIN_AMAX_BITS = ")
    path = tempfile.mktemp(suffix=".py"); open(path, "w").write(src)
    try:
        spec = importlib.util.spec_from_file_location("kx", path); KX = importlib.util.module_from_spec(spec); spec.loader.exec_module(KX)
        qx = KX.swiglu_cast(x, wt, lay); s = torch.sigmoid(x[:, :2048].float()); h2 = (x[:, :2048].float()*s*x[:, 2048:].float()*wt.view(-1, 1)).bfloat16()
        say("exact swiglu_cast vs torch g*sigmoid(g): q", same(qx.q, Q.quantise(h2).q), "scale", same(qx.scale, Q.quantise(h2).scale), "| vs silu: q", same(qx.q, Q.quantise(h).q), same(qx.scale, Q.quantise(h).scale))
        for BM in (16, 32): row(f"exact swiglu_cast BM{BM} w4", lambda: KX.swiglu_cast(x, wt, lay, BM=BM, num_warps=4), b4)
    except Exception as e: say("exact variant FAILED", repr(e)[:300])
    del h
    dh = torch.randn(65536, 2048, device=dev).bfloat16()
    hh, dgu, qd, dw = K.swiglu_backward_cast(x, dh, wt, lay); b5 = nb(x, dh, hh, dgu, qd.q, qd.scale)
    dgu_, dw_ = G.weighted_swiglu_backward(x, dh, wt, lay); a = K.cast_rows(dgu_)
    say("swiglu_backward_cast vs unfused: dgu", same(dgu, dgu_), "q", same(qd.q, a.q), "dw", ((dw-dw_).abs().max()/dw_.abs().max()).item())
    for BM in (4, 8, 16, 32):
        for w in (4, 8): row(f"swiglu_backward_cast BM{BM} w{w}", lambda: K.swiglu_backward_cast(x, dh, wt, lay, BM=BM, num_warps=w), b5)

T_, D_, E_, K_ = 16384, 2048, 128, 8
def routes(T=T_, E=E_, k=K_): return torch.rand(T, E, device=dev).topk(k, -1).indices

@triton.jit
def _gather(x_ptr, out_ptr, pairs_ptr, D, K:tl.constexpr, BLOCK:tl.constexpr):
    row = tl.program_id(0).to(tl.int64); pair = tl.load(pairs_ptr+row)
    if pair >= 0:
        d = tl.arange(0, BLOCK)
        tl.store(out_ptr + row*D + d, tl.load(x_ptr + (pair//K).to(tl.int64)*D + d, mask=d < D), mask=d < D)

def rows():
    idx = routes(); bw = R.get("copy_GBs") or copy_bw(); R["copy_GBs"] = bw; x = torch.randn(T_, D_, device=dev).bfloat16()
    for align in (1, 128):
        a, b = G.layout(idx, E_, align), G.layout_plain(idx, E_, align)
        say("layout equal", [torch.equal(u, v) for u, v in zip(a, b)])
    e5 = idx.clone(); e5[5:40] = -1; e5[e5 == 7] = 8
    say("layout equal, unrouted and empty", [torch.equal(u, v) for u, v in zip(G.layout(e5, E_, 128), G.layout_plain(e5, E_, 128))])
    def t(name, f, bytes_=None):
        try: v = ms(f, 20); R[name] = v; say(f"{name:38s} {v*1e3:8.1f} us" + (f"  {bytes_/v/1e6:6.0f} GB/s share {bytes_/v/1e6/bw:.3f}" if bytes_ else ""))
        except Exception as e: say(name, "FAILED", repr(e)[:200])
    t("layout align1", lambda: G.layout(idx, E_)); t("layout align128", lambda: G.layout(idx, E_, 128)); t("torch.sort", lambda: idx.flatten().sort(stable=True))
    lay, l128 = G.layout(idx, E_), G.layout(idx, E_, 128)
    y = G.permute(x, lay); M = len(y); BL = 2048
    for w in (2, 4, 8): t(f"permute tokens w{w}", lambda: G._permute[(T_,)](x, y, lay.rows, D_, K=K_, BLOCK=BL, num_warps=w), nb(x, y))
    for w in (2, 4, 8): t(f"permute rows w{w}", lambda: _gather[(M,)](x, y, lay.pairs, D_, K=K_, BLOCK=BL, num_warps=w), nb(x, y))
    t("permute128", lambda: G.permute(x, l128)); t("permute128 zero", lambda: G.permute(x, l128, zero_padding=True))
    out = torch.empty_like(x)
    for w in (2, 4, 8): t(f"combine w{w}", lambda: G._combine[(T_,)](y, out, lay.rows, D_, K=K_, BLOCK=BL, num_warps=w), nb(x, y))
    for I in (1024, 768):
        gu, dh, wt = torch.randn(M, 2*I, device=dev).bfloat16(), torch.randn(M, I, device=dev).bfloat16(), torch.rand(T_, K_, device=dev)
        h, dgu, dw = torch.empty_like(dh), torch.empty_like(gu), torch.zeros_like(wt)
        for w in (2, 4, 8):
            t(f"swiglu I{I} w{w}", lambda: G._swiglu[(M,)](gu, wt, lay.pairs, h, I, BLOCK=1024, num_warps=w), nb(gu, h))
            t(f"swiglu_backward I{I} w{w}", lambda: G._swiglu_backward[(M,)](gu, dh, wt, lay.pairs, dgu, dw, I, BLOCK=1024, num_warps=w), nb(gu, dh, dgu))
        g8, d8 = torch.randn(len(l128.pairs), 2*I, device=dev).bfloat16(), torch.randn(len(l128.pairs), I, device=dev).bfloat16()
        t(f"swiglu_cast I{I}", lambda: K.swiglu_cast(g8, wt, l128)); t(f"swiglu_backward_cast I{I}", lambda: K.swiglu_backward_cast(g8, d8, wt, l128))
        for BM in (4, 8, 32): t(f"swiglu_backward_cast I{I} BM{BM}", lambda: K.swiglu_backward_cast(g8, d8, wt, l128, BM=BM))
    xq = K.cast_rows(x); t("cast_rows T", lambda: K.cast_rows(x)); t("groups", lambda: FE.groups_of_rows(l128))
    for BM in (2, 4, 8, 16):
        for w in (4, 8): t(f"permute_quantised BM{BM} w{w}", lambda: K.permute_quantised(xq, l128, BM=BM, num_warps=w), nb(xq.q)*9)
    for wd in (torch.float32, torch.bfloat16):
        w = (torch.randn(E_, D_, device=dev)*.02).to(wd); bias = torch.zeros(E_, device=dev)
        x_ = x.clone().requires_grad_(); w_ = w.clone().requires_grad_()
        z = RG.gate_logits(x_, w_); d = torch.randn_like(z)
        z64 = x.double()@w.double().T; say(f"logits {wd} error", ((z-z64).abs().max()/z64.abs().max()).item())
        gx, gw = torch.autograd.grad(z, (x_, w_), d); dw64 = d.double().T@x.double(); dx64 = d.double()@w.double()
        say("  dw error", ((gw-dw64).abs().max()/dw64.abs().max()).item(), "dx", ((gx-dx64).abs().max()/dx64.abs().max()).item())
        t(f"gate_logits fwd {wd}", lambda: RG.gate_logits(x, w)); t(f"gate_logits fwd+bwd {wd}", lambda: torch.autograd.grad(RG.gate_logits(x_, w_), (x_, w_), d))
    t("fp32 gate fwd (plain)", lambda: x.float()@w.float().T)
    z = z.detach().requires_grad_(); r = RG.gpu_route(z, K_, bias, route_scale=2.5); dwt = torch.randn_like(r.weights)
    from moe_rl.moe.routing import route
    r2 = route(z, K_, bias, route_scale=2.5); say("route: same idx", (r.idx == r2.idx).float().mean().item(), "w", (r.weights-r2.weights).abs().max().item())
    a, b = torch.autograd.grad(r.weights, z, dwt)[0], torch.autograd.grad(r2.weights, z, dwt)[0]; say("route grad", ((a-b).abs().max()/b.abs().max()).item())
    t("gpu_route fwd", lambda: RG.gpu_route(z, K_, bias, route_scale=2.5)); t("gpu_route fwd+bwd", lambda: torch.autograd.grad(RG.gpu_route(z, K_, bias, route_scale=2.5).weights, z, dwt))
    t("route fwd (plain)", lambda: route(z, K_, bias, route_scale=2.5))

def gemms():
    import deep_gemm as dg
    idx = routes(); lay, l8 = G.layout(idx, E_), G.layout(idx, E_, 128); M, M8 = len(lay.pairs), len(l8.pairs)
    groups = FE.groups_of_rows(l8); g1, g8 = lay.ends, l8.ends
    rnd = lambda *s: (torch.randn(*s, device=dev, dtype=torch.bfloat16)*.05)
    def t(name, f, flops):
        try: v = ms(f, 10, 2); R[name] = dict(ms=v, tflops=flops/v/1e9); say(f"{name:46s} {v:7.3f} ms {flops/v/1e9:6.0f} TFLOPS")
        except Exception as e: say(name, "FAILED", repr(e)[:300])
    for I in (1024, 768):
        gate_up, down = rnd(E_, 2*I, D_), rnd(E_, D_, I)
        rows, gu, h = rnd(M8, D_), rnd(M8, 2*I), rnd(M8, I)
        f1, f2 = 2.*M*D_*2*I, 2.*M*D_*I
        for nm, ends, m in (("", g1, M), (" 128", g8, M8)):
            r_, gu_, h_ = rows[:m], gu[:m], h[:m]
            t(f"I{I} torch{nm} gate_up", lambda: torch._grouped_mm(r_, gate_up.transpose(1, 2), offs=ends), f1)
            t(f"I{I} torch{nm} down", lambda: torch._grouped_mm(h_, down.transpose(1, 2), offs=ends), f2)
            t(f"I{I} torch{nm} dgrad down", lambda: torch._grouped_mm(r_, down, offs=ends), f2)
            t(f"I{I} torch{nm} dgrad gate_up", lambda: torch._grouped_mm(gu_, gate_up, offs=ends), f1)
            t(f"I{I} torch{nm} wgrad down", lambda: torch._grouped_mm(r_.T, h_, offs=ends), f2)
            t(f"I{I} torch{nm} wgrad gate_up", lambda: torch._grouped_mm(gu_.T, r_, offs=ends), f1)
        o = lambda n: torch.empty(M8, n, device=dev, dtype=torch.bfloat16)
        o1, o2, o3 = o(2*I), o(D_), o(I)
        if I == 1024:
            t(f"I{I} dg bf16 gate_up nt", lambda: dg.m_grouped_bf16_gemm_nt_contiguous(rows, gate_up, o1, groups), f1)
            if f"I{I} dg bf16 gate_up nt" in R: say("  diff", calc_diff(o1[groups == 3], torch._grouped_mm(rows, gate_up.transpose(1, 2), offs=g8)[groups == 3]))
            t(f"I{I} dg bf16 down nt", lambda: dg.m_grouped_bf16_gemm_nt_contiguous(h, down, o2, groups), f2)
            t(f"I{I} dg bf16 dgrad down nn", lambda: dg.m_grouped_bf16_gemm_nn_contiguous(rows, down, o3, groups), f2)
            t(f"I{I} dg bf16 dgrad gate_up nn", lambda: dg.m_grouped_bf16_gemm_nn_contiguous(gu, gate_up, o2, groups), f1)
        if I == 768 and "all" not in sys.argv: continue
        W = FE.Fp8Experts().cast(gate_up, down); rq, gq, hq = K.cast_rows(rows), K.cast_rows(gu), K.cast_rows(h)
        t(f"I{I} cast_experts", lambda: FE.Fp8Experts().cast(gate_up, down), 0.)
        t(f"I{I} dg fp8 gate_up", lambda: gemm(rq, W.gate_up, "contiguous", groups, "deep_gemm"), f1)
        t(f"I{I} dg fp8 down", lambda: gemm(hq, W.down, "contiguous", groups, "deep_gemm"), f2)
        t(f"I{I} dg fp8 dgrad down", lambda: gemm(rq, W.down_t, "contiguous", groups, "deep_gemm"), f2)
        t(f"I{I} dg fp8 dgrad gate_up", lambda: gemm(gq, W.gate_up_t, "contiguous", groups, "deep_gemm"), f1)
        y = gemm(rq, W.gate_up, "contiguous", groups, "deep_gemm"); e = groups == 5
        say("  fp8 contiguous diff", calc_diff(y[e], Q.dequantise(Q.Quantised(rq.q[e], rq.scale[e]))@Q.dequantise(Q.Quantised(W.gate_up.q[5], W.gate_up.scale[5], (128, 128))).T))

def kgroup():
    import deep_gemm as dg
    ks = torch.tensor([256, 0, 128, 384, 512, 128, 0, 640], device=dev, dtype=torch.int32); R_ = int(ks.sum())+512
    a, b = (torch.randn(256, R_, device=dev)*.1).bfloat16(), (torch.randn(512, R_, device=dev)*.1).bfloat16()
    qa, qb = K.cast_rows(a), K.cast_rows(b)
    try:
        y, z = gemm(qa, qb, "k_grouped", ks, "deep_gemm"), gemm(qa, qb, "k_grouped", ks)
        say("k_grouped with made-up host sizes: diff", calc_diff(y, z), "empty groups zero", y[1].abs().max().item())
    except Exception as e: say("k_grouped FAILED", repr(e)[:300])
    x = (torch.randn(300, 512, device=dev)*.1).bfloat16(); w = (torch.randn(384, 512, device=dev)*.1).bfloat16()
    for nm, f in {"dense": lambda be: gemm(K.cast_rows(x), K.cast_blocks(w), backend=be), "dense wgrad": lambda be: gemm(K.cast_rows(x), K.cast_rows(w), backend=be)}.items():
        try: say(nm, "diff", calc_diff(f("deep_gemm"), f("reference")))
        except Exception as e: say(nm, "FAILED", repr(e)[:300])
    xm, wm, n = (torch.randn(4, 256, 512, device=dev)*.1).bfloat16(), (torch.randn(4, 384, 512, device=dev)*.1).bfloat16(), torch.tensor([256, 3, 0, 100], device=dev, dtype=torch.int32)
    try:
        qm = Q.quantise(xm); y, z = (gemm(qm, K.cast_blocks(wm), "masked", n, be) for be in ("deep_gemm", "reference"))
        say("masked diff", [calc_diff(y[e, :m], z[e, :m]) if m else 0. for e, m in enumerate(n.tolist())])
    except Exception as e: say("masked FAILED", repr(e)[:300])
    l8 = G.layout(routes(), E_, 128); I, M8 = 1024, len(l8.pairs)
    ks = torch.diff(l8.ends, prepend=l8.ends.new_zeros(1)).int(); total = M8; E = E_
    sizes = [total//128//E*128]*(E-1); sizes.append(total-sum(sizes))
    for nm, m, n in (("down", D_, I), ("gate_up", 2*I, D_)):
        qa, qb = K.cast_rows((torch.randn(m, M8, device=dev)).bfloat16()), K.cast_rows(torch.randn(n, M8, device=dev).bfloat16())
        fa, fb = qa.q.view(-1), qb.q.view(-1)   # contents in another order: timing only
        out = torch.zeros(E, m, n, device=dev)
        try:
            v = ms(lambda: dg.k_grouped_fp8_gemm_nt_contiguous((fa, qa.scale), (fb, qb.scale), out, sizes, ks, c=out), 10, 2); z = ms(lambda: out.zero_(), 5)
            R[f"kgroup fp8 {nm}"] = v; say(f"kgroup fp8 {nm}: {v:.3f} ms {2.*131072*m*n/v/1e9:.0f} TFLOPS, zeroing {z:.3f} ms")
        except Exception as e: say(f"kgroup fp8 {nm} FAILED", repr(e)[:300])
        a, b = torch.randn(M8, m, device=dev).bfloat16(), torch.randn(M8, n, device=dev).bfloat16()
        for dt in (torch.bfloat16, torch.float32):
            o = torch.zeros(E, m, n, device=dev, dtype=dt)
            try:
                v = ms(lambda: dg.k_grouped_bf16_gemm_tn_contiguous(a, b, o, sizes, ks, c=o if dt == torch.float32 else None), 10, 2)
                R[f"kgroup bf16->{dt} {nm}"] = v; say(f"kgroup bf16->{dt} {nm}: {v:.3f} ms {2.*131072*m*n/v/1e9:.0f} TFLOPS")
                if dt == torch.bfloat16: say("   diff", calc_diff(o, torch._grouped_mm(a.T, b, offs=l8.ends)))
            except Exception as e: say(f"kgroup bf16->{dt} {nm} FAILED", repr(e)[:300])
        del qa, qb, out, a, b, o

def make_layer(I, wd=torch.bfloat16):
    g = lambda *s: (torch.randn(*s, device=dev)*.02).bfloat16().requires_grad_()
    return torch.randn(T_, D_, device=dev).bfloat16().requires_grad_(), (torch.randn(E_, D_, device=dev)*.02).to(wd).requires_grad_(), torch.zeros(E_, device=dev), g(E_, 2*I, D_), g(E_, D_, I)
def forward(p, experts):
    x, w, bias, gate_up, down = p
    r = RG.gpu_route(RG.gate_logits(x, w), K_, bias, route_scale=2.826)
    return experts(x, r.idx, r.weights, gate_up, down)

def layer_(name, experts, I, sync_backward=True):
    p = make_layer(I); leaves = [p[0], p[1], p[3], p[4]]; up = torch.randn(T_, D_, device=dev).bfloat16()
    def fb():
        for q in leaves: q.grad = None
        forward(p, experts).backward(up)
    fb(); torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        y = forward(p, experts)
        if sync_backward: y.backward(up)
        say(name, I, "no host synchronisation")
    except Exception as e: say(name, "SYNC", repr(e)[:300])
    torch.cuda.set_sync_debug_mode("default"); y = None
    for q in leaves: q.grad = None
    torch.cuda.synchronize(); torch.cuda.empty_cache(); torch.cuda.reset_peak_memory_stats(); base = torch.cuda.memory_allocated()
    fb(); torch.cuda.synchronize(); peak = torch.cuda.max_memory_allocated()/2**30
    with torch.no_grad(): tf = ms(lambda: forward(p, experts), 10)
    t = ms(fb, 20, 5); flops = 3*2.*T_*K_*3*D_*I
    t0 = time.perf_counter(); fb(); cpu = (time.perf_counter()-t0)*1e3; torch.cuda.synchronize()
    R[f"{name} I{I}"] = dict(fwd=tf, fwdbwd=t, peak=peak, base=base/2**30, cpu_ms=cpu)
    say(f"{name} I{I}: forward {tf:.3f} ms, forward+backward {t:.3f} ms = {flops/t/1e9:.0f} TFLOPS; peak {peak:.2f} GiB (inputs {base/2**30:.2f}); host {cpu:.2f} ms")
    return fb

def check_numbers():
    T, E, k, D, I = 512, 16, 4, 512, 256
    idx = routes(T, E, k); idx[5:9] = -1; idx[idx == 3] = 4; wt = torch.rand(T, k, device=dev); x = torch.randn(T, D, device=dev).bfloat16()
    gu, dn = (torch.randn(E, 2*I, D, device=dev)*.05).bfloat16(), (torch.randn(E, D, I, device=dev)*.05).bfloat16(); up = torch.randn(T, D, device=dev)
    def run(f, dt):
        a = [v.clone().to(dt).requires_grad_() for v in (x, gu, dn)]; w = wt.clone().requires_grad_()
        y = f(a[0], idx, w, a[1], a[2]); return [y.detach()]+list(torch.autograd.grad((y.float()*up).sum(), [a[0], w, a[1], a[2]]))
    ref = run(experts_loop, torch.float32)
    for nm, f in (("bf16", G.gpu_experts), ("fp8 reference", FE.Fp8Experts("reference")), ("fp8 deep_gemm", FE.Fp8Experts())):
        try: say(nm, "relative errors y dx dw dgate_up ddown", ["%.4f" % ((a.double()-b).norm()/b.double().norm()).item() for a, b in zip(run(f, torch.bfloat16), ref)])
        except Exception as e: say(nm, "FAILED", repr(e)[:400]); traceback.print_exc()

def layer():
    check_numbers()
    for I in (1024, 768): layer_("bf16", G.gpu_experts, I); torch.cuda.empty_cache()
def fp8layer():
    for I in ((1024, 768) if "all" in sys.argv else (1024,)): layer_("fp8", FE.Fp8Experts(), I, sync_backward=True); torch.cuda.empty_cache()
def prof():
    from torch.profiler import profile, ProfilerActivity
    for nm, f in (("bf16", G.gpu_experts), ("fp8", FE.Fp8Experts())):
        fb = layer_(nm, f, 1024)
        with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as pr:
            for _ in range(3): fb()
            torch.cuda.synchronize()
        rowsx = sorted(((e.key, e.device_time_total/3e3, e.count/3) for e in pr.key_averages() if e.device_time_total > 0 and e.device_type != torch.autograd.DeviceType.CPU), key=lambda r: -r[1])
        R[f"profile {nm}"] = rowsx
        for k, v, c in rowsx[:26]: say(f"  {v:7.3f} ms x{c:4.1f} {k[:100]}")

SECTIONS = dict(casts=casts, rows=rows, gemm=gemms, layer=layer, fp8layer=fp8layer, prof=prof, kgroup=kgroup)
say(torch.__version__, triton.__version__, torch.cuda.get_device_name())
for s in [a for a in sys.argv[1:] if a in SECTIONS] or SECTIONS:
    say("=====", s)
    try: SECTIONS[s]()
    except Exception: traceback.print_exc()
    torch.cuda.empty_cache(); save()
say("done")
