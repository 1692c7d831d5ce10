"""Expert parallelism on two GPUs: DeepEP behind our exchange against the bare kernels, an EP=2 layer with overlap
against EP=1, times for `traffic`.

    moe-rl bench ep_gpu [--parts kernels,layer,decode,death] [--dry]     # --dry: tiny sizes on CPU with gloo and
    stand-ins, to test this file

Every part runs in its own pair of processes, so that one that fails leaves the others their figures."""
import argparse, json, os, socket, statistics, subprocess, sys, tempfile, time
from pathlib import Path

import torch
import torch.distributed as dist

from moe_rl.bench import NeedsHardware

PARTS = ("kernels", "layer", "decode", "death")


def measure(args:list[str])->dict:
    p = argparse.ArgumentParser("ep_gpu")
    p.add_argument("--parts", default=",".join(PARTS))
    p.add_argument("--dry", action="store_true")
    a = p.parse_args(args)
    if not a.dry:
        if torch.cuda.device_count() < 2: raise NeedsHardware("two Hopper GPUs linked by NVLink")
        from moe_rl.ep.deepep import capabilities
        if (lack := capabilities()["deepep"]): raise NeedsHardware(f"deep_ep on two Hopper GPUs ({lack})")
    got = {}
    with tempfile.TemporaryDirectory() as tmp:
        for part in a.parts.split(","):
            out = Path(tmp)/f"{part}.json"
            failed = run_pair(part, out, a.dry)
            got[part] = json.loads(out.read_text()) if out.exists() else {}
            if failed:
                got[part]["failed"] = failed
                print(f"{part}: FAILED: {failed}")
    figures = {k: v for part in got.values() for k, v in part.pop("figures", {}).items()}
    timeline = got.get("layer", {}).pop("timeline", [])
    print(json.dumps(figures, indent=1))
    return dict(figures=figures, timeline=timeline, details=got)


def run_pair(part, out, dry, limit=280):
    "Two processes of this file; returns '' or what went wrong."
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    def start(rank):
        env = dict(os.environ, RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port),
            NVSHMEM_REMOTE_TRANSPORT="none")
        if part == "elastic": env["EP_DISABLE_GIN"] = "1"
        env.setdefault("OMP_NUM_THREADS", "1")
        return subprocess.Popen([sys.executable, __file__, part, str(out), "dry" if dry else "gpu"], env=env)
    procs, end = [start(r) for r in range(2)], time.time() + limit
    wanted = [0, 9] if part == "death" else [0, 0]
    try:
        codes = [p.wait(max(1, end-time.time())) for p in procs]
        return "" if codes == wanted else f"exit codes {codes}"
    except subprocess.TimeoutExpired: return f"no end within {limit} s"
    finally:
        for p in procs: p.kill()


#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
# ----------------------------------------------------------------------------------------------------------------------------
# in the workers
class Worker:
    "One of the two ranks: device, clock, notes."
    def __init__(self, out, dry):
        self.out, self.dry, self.rank, self.notes = Path(out), dry, int(os.environ["RANK"]), dict(figures={})
        self.device = torch.device("cpu") if dry else torch.device("cuda", self.rank)
        if dry: torch.set_num_threads(1)
        else: torch.cuda.set_device(self.device)
        dist.init_process_group("gloo" if dry else "nccl", **({} if dry else dict(device_id=self.device)))
        torch.manual_seed(self.rank)

    def say(self, *words):
        if self.rank == 0: print(*words, flush=True)

    def keep(self, **notes):
        self.notes["figures"].update(notes.pop("figures", {}))
        self.notes.update(notes)
        if self.rank == 0: self.out.write_text(json.dumps(self.notes))

    def us(self, fn, n=30, warm=5):
        "Median time of `fn` in microseconds, by events on the current stream."
        if self.dry: n, warm = 2, 1
        for _ in range(warm): fn()
        dist.barrier()
        if not self.dry: torch.cuda.synchronize()
        marks = []
        for _ in range(n):
            a = self.mark()
            fn()
            marks.append((a, self.mark()))
        return statistics.median(self.between(*m) for m in marks)

    def mark(self):
        if self.dry: return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def between(self, a, b):
        "Microseconds between two marks."
        if self.dry: return (b-a)*1e6
        torch.cuda.synchronize()
        return a.elapsed_time(b)*1e3

    def tokens(self, T, D, E, k):
        x = torch.randn(T, D, device=self.device).bfloat16()
        idx = torch.rand(T, E, device=self.device).topk(k).indices
        return x, idx, torch.rand(T, k, device=self.device)

    def deepep(self, E, D, max_rows=0, buffer=None, sms=20):
        from moe_rl.ep.deepep import BufferOnGloo, DeepEP
        return DeepEP(E, D, dist.group.WORLD, max_rows=max_rows, buffer=buffer or (BufferOnGloo(dist.group.WORLD, E) if self.dry else None), sms=sms)


def kernels(w):
    "Our exchange against the bare kernels; times over sizes for `traffic`; NCCL beside them."
    from moe_rl.ep.dispatch import AllToAll, fp8_payload
    from moe_rl.ep.ranks import ExchangeError
    T, D, E, k = (64, 256, 16, 4) if w.dry else (4096, 7168, 256, 8)
    x, idx, gates = w.tokens(T, D, E, k)
    ex = w.deepep(E, D)
    buf = ex.buffer
    def raw_dispatch():
        per_rank, per_node, per_expert, where, _ = buf.get_dispatch_layout(idx, E)
        return buf.dispatch(x, topk_idx=idx, topk_weights=gates, num_tokens_per_rank=per_rank, num_tokens_per_rdma_rank=per_node,
                            is_token_in_rank=where, num_tokens_per_expert=per_expert)
    rows, _, _, _, handle, _ = raw_dispatch()
    per_rank, per_node, per_expert, where, _ = buf.get_dispatch_layout(idx, E)
    laid_out = lambda: buf.dispatch(x, topk_idx=idx, topk_weights=gates, num_tokens_per_rank=per_rank, num_tokens_per_rdma_rank=per_node,
                                    is_token_in_rank=where, num_tokens_per_expert=per_expert)
    sent = ex.send((x,), idx, gates)
    assert torch.equal(sent.parts[0].sort(0)[0][:8], rows.sort(0)[0][:8])
    home = ex.gather(sent.parts[0], sent.plan)[0].float()
    visits = torch.zeros(T, 2, device=w.device).scatter_(1, idx//(E//2), 1.).sum(1, keepdim=True)
    assert (home - x.float()*visits).abs().max() <= 0.02*home.abs().max(), "combine(dispatch(x)) is not x times the ranks visited"
    t = dict(raw_dispatch=[], dispatch=[], raw_combine=[], combine=[], raw_dispatch_laid_out=[], raw_dispatch_again=[])
    for _ in range(3):   # take turns, so that drift hits all alike
        t["raw_dispatch"].append(w.us(raw_dispatch))
        t["dispatch"].append(w.us(lambda: ex.send((x,), idx, gates)))
        t["raw_combine"].append(w.us(lambda: buf.combine(rows, handle)))
        t["combine"].append(w.us(lambda: ex.gather(sent.parts[0], sent.plan)))
        t["raw_dispatch_laid_out"].append(w.us(laid_out))
        t["raw_dispatch_again"].append(w.us(lambda: buf.dispatch(x, handle=handle)))
    t = {n: statistics.median(v) for n, v in t.items()}
    w.say(f"{T} x {D}, E {E}, k {k}: " + ", ".join(f"{n} {v:.0f} us" for n, v in t.items()))
    w.keep(figures={f"{n}_us": t[n] for n in ("dispatch", "combine", "raw_dispatch", "raw_combine")}, all_us=t, bytes=x.nbytes)

    def attempt(name, fn):
        try: w.keep(**{name: fn()})
        except (RuntimeError, AssertionError) as e: w.keep(**{name: f"failed: {str(e).splitlines()[0][:200]}"})
        w.say(name, w.notes[name])
    fp8 = fp8_payload.encode(x)
    attempt("fp8_dispatch_us", lambda: w.us(lambda: ex.send(fp8, idx, gates)))
    def fixed():
        free = w.deepep(E, D, max_rows=2*T, buffer=buf)
        s = free.send((x,), idx, gates)
        got = (s.idx >= 0).any(1)
        assert int(got.sum()) == len(rows) and (free.gather(s.parts[0], s.plan)[0].float() - home).abs().max() <= 0.02*home.abs().max()
        return dict(dispatch=w.us(lambda: free.send((x,), idx, gates)), combine=w.us(lambda: free.gather(s.parts[0], s.plan)))
    attempt("max_rows_us", fixed)
    def nccl():
        a = AllToAll(E, dist.group.WORLD)
        s = a.send((x,), idx, gates)
        return dict(dispatch=w.us(lambda: a.send((x,), idx, gates), 10), combine=w.us(lambda: a.gather(s.parts[0], s.plan), 10))
    attempt("all_to_all_us", nccl)
    def refused():
        try: ex.send((x,), idx, gates) if w.rank == 0 else ex.send((x,), torch.zeros(T, E+1, dtype=torch.int64, device=w.device), torch.zeros(T, E+1, device=w.device))
        except ExchangeError as e: return str(e)
        return "no error on this rank: it knew its own shape"
    if w.dry is False:
        ex.agreed.clear()
        attempt("bad_k_error", refused)
    grid = [(64, 256), (128, 256)] if w.dry else [(n, d) for d in (2048, 4096, 7168) for n in (1024, 2048, 3072, 4096, 6144, 8192, 12288, 16384)]
    times = []
    for n, d in grid:
        y, i, g = w.tokens(n, d, E, k)
        e = w.deepep(E, d, buffer=None if w.dry else buf)
        s = e.send((y,), i, g)
        times.append(dict(tokens=n, width=d, experts=E, k=k, ranks=2, dispatch_us=round(w.us(lambda: e.send((y,), i, g), 20), 1),
                          combine_us=round(w.us(lambda: e.gather(s.parts[0], s.plan), 20), 1)))
    w.say("tokens width dispatch combine (us)")
    [w.say(f"{r['tokens']:6d} {r['width']:5d} {r['dispatch_us']:8.1f} {r['combine_us']:8.1f}") for r in times]
    w.keep(sizes=times)
    from moe_rl.ep.deepep import choose_exchange
    attempt("chosen", lambda: choose_exchange(E, D, k, T, 2, dist.group.WORLD)[1])   # says which backend runs here, and why not a better one


def layers_of(w, depth, D, I, E, held, dtype):
    g = torch.Generator(device=w.device).manual_seed(1)
    make = lambda *s: (torch.randn(*s, generator=g, device=w.device)*s[-1]**-.5)
    out = []
    for _ in range(depth):
        router, gate_up, down = make(E, D), make(E, 2*I, D).to(dtype)[held].clone(), make(E, D, I).to(dtype)[held].clone()
        out.append([t.requires_grad_() for t in (router, gate_up, down)])
    return out


def tools(w, k):
    "experts and choose for this device."
    if w.dry:
        from moe_rl.moe.experts import grouped_experts
        from moe_rl.moe.routing import route
        def choose(x, router):
            r = route(x.float() @ router.T, k)
            return r.idx, r.weights
        return grouped_experts, choose
    from moe_rl.gpu.experts import gpu_experts
    from moe_rl.gpu.router import gate_logits, gpu_route
    def choose(x, router):
        r = gpu_route(gate_logits(x, router)[0], k)
        return r.idx, r.weights
    return gpu_experts, choose


def step(fn, x, dy, layers):
    "Forward and backward; gradients start from nothing, as after an optimizer step."
    for l in layers:
        for p in l: p.grad = None
    x.grad = None
    fn(x).backward(dy)


class Recording:
    "Passes an exchange through and keeps what `send` delivered."
    def __init__(self, ex): self.ex, self.sent, self.num_experts, self.num_local = ex, [], ex.num_experts, ex.num_local
    def send(self, *a):
        self.sent.append(self.ex.send(*a))
        return self.sent[-1]
    def scatter(self, *a): return self.ex.scatter(*a)
    def gather(self, *a): return self.ex.gather(*a)


def check_layer(w):
    """EP=2 over every exchange, with and without streams, against EP=1 on the tokens of both ranks.

    One layer: a second one would route its tokens by rounding."""
    from moe_rl.ep.dispatch import AllToAll, Dispatcher, Local
    from moe_rl.ep.overlap import DeferredExperts, make_streams, overlapped
    T, D, I, E, k, depth = (16, 256, 32, 4, 2, 1) if w.dry else (2048, 1024, 256, 16, 4, 1)
    experts, choose = tools(w, k)
    mine = slice(w.rank*E//2, (w.rank+1)*E//2)
    both = torch.randn(2*T, D, generator=torch.Generator().manual_seed(2)).bfloat16().to(w.device)
    def run(x, layers, dispatcher, streams, parts, experts=experts):
        x = x.clone().requires_grad_()
        y = overlapped(x, layers, dispatcher, experts, choose, streams, parts)
        (y.float()*torch.arange(D, device=w.device).sin()).sum().backward()
        return [y.detach(), x.grad] + [p.grad for l in layers for p in l]
    full = run(both, layers_of(w, depth, D, I, E, slice(0, E), torch.bfloat16), Dispatcher(Local(E)), None, 1)
    my = slice(w.rank*T, (w.rank+1)*T)
    want = [full[0][my], full[1][my]] + [g if i % 3 == 0 else g[mine] for i, g in enumerate(full[2:])]
    kinds = dict(all_to_all=(AllToAll(E, dist.group.WORLD), None, 1), deepep=(w.deepep(E, D), None, 1), halves=(w.deepep(E, D), None, 2))
    if not w.dry:
        streams, ex = make_streams(), w.deepep(E, D, sms=48)
        free = lambda rows, sms=20: w.deepep(E, D, max_rows=rows, buffer=ex.buffer, sms=sms)
        kinds.update(overlap=(free(0), streams, 2), max_rows=(free(2*T), None, 1), overlap_max_rows=(free(T), streams, 2),
                     deferred=(free(2*T, 48), streams, 1, DeferredExperts(streams, 48)), overlap_deferred=(free(T), streams, 2, DeferredExperts(streams, 20, DeferredExperts.PRODUCTS)))
    worst = {}
    for name, (ex, *how) in kinds.items():
        try:
            got = run(both[my], layers_of(w, depth, D, I, E, mine, torch.bfloat16), Dispatcher(ex), *how)
            for i in range(0, len(got)-2, 3): dist.all_reduce(got[2+i])   # routers see both ranks' tokens
            err = torch.stack([(a.float()-b.float()).norm()/b.float().norm() for a, b in zip(got, want)]).max()
            dist.all_reduce(err, op=dist.ReduceOp.MAX)
            worst[name] = round(err.item(), 5)
        except (RuntimeError, AssertionError) as e:
            worst[name] = 9.
            w.say(name, "failed:", str(e)[:300])
    w.say("EP=2 against EP=1, worst relative difference of outputs and gradients (bf16):", worst)
    w.keep(parity_bf16=worst)
    return worst


def sizes_of(w, name):
    if w.dry: return dict(T=16, D=256, I=32, E=4, k=2, depth=2)
    return dict(mini=dict(T=16384, D=2048, I=1024, E=128, k=8, depth=4), wide=dict(T=16384, D=3072, I=3072, E=32, k=4, depth=8))[name]


def layer(w):
    """Stacks of residual MoE layers, forward and backward, milliseconds per layer. Variants take turns, so that clocks
    and heat treat them alike.

    ep1: all experts here. whole/halves: EP=2, communication in line. wgrad<sms>: whole batch, communication of backward
    beneath the weight gradients. overlap<sms>: halves, each
    beneath the other. compute_*: the same without communication. <sms>: multiprocessors of the exchange. The letter
    says which products leave those free: n none; w weight gradients; f the
    first of a segment and weight gradients, which have their own stream; i and b the first, or the first two, of a
    segment, with weight gradients in line."""
    from moe_rl.ep.dispatch import Dispatcher, Local
    from moe_rl.ep.overlap import DeferredExperts, Replayed, hidden_share, make_streams, overlapped
    worst = check_layer(w)
    beside = dict(n=(), w=("d_weights",), f=("up", "d_hidden", "d_weights"), i=("up", "d_hidden"), b=("up", "d_hidden", "d_rows"))
    fixed = worst.get("overlap_max_rows", 9.) < .02 and worst.get("deferred", 9.) < .02   # fixed receive buffers: the host never waits
    for name in ("mini", "wide"):
        s = sizes_of(w, name)
        T, D, I, E, k, depth = (s[n] for n in ("T", "D", "I", "E", "k", "depth"))
        plain, choose = tools(w, k)
        x = torch.randn(T, D, device=w.device).bfloat16().requires_grad_()
        dy = torch.randn(T, D, device=w.device).bfloat16()
        streams = None if w.dry else make_streams()
        mine = layers_of(w, depth, D, I, E, slice(w.rank*E//2, (w.rank+1)*E//2), torch.bfloat16)
        ex0 = w.deepep(E, D, sms=20 if w.dry else 64)
        dispatcher = lambda parts, sms: Dispatcher(w.deepep(E, D, max_rows=2*T//parts if fixed else 0, buffer=ex0.buffer, sms=sms))
        run = {}
        def add(key, layers, dispatcher, experts=plain, streams=None, parts=1):
            run[key] = lambda: step(lambda x: overlapped(x, layers, dispatcher, experts, choose, streams, parts), x, dy, layers)
        def replay(key, parts, experts=plain):
            rec = Recording(dispatcher(parts, 20).exchange)
            step(lambda x: overlapped(x, mine, Dispatcher(rec), plain, choose, None, parts), x, dy, mine)
            add(key, mine, Dispatcher(Replayed([t._replace(plan=None) for t in rec.sent], rec)), experts, None, parts)
        if name == "mini": add("ep1", layers_of(w, depth, D, I, E, slice(0, E), torch.bfloat16), Dispatcher(Local(E)))
        def filler(sms, which, streams=streams):
            """Experts that leave the exchange's multiprocessors free where `which` says; without streams, weight
            gradients in line."""
            return plain if w.dry else DeferredExperts(streams, sms, beside[which])   # without a GPU its kernels are interpreted: too slow here
        for sms in (20,) if w.dry else (32, 48, 64) if name == "mini" else (48,):
            add(f"whole{sms}", mine, dispatcher(1, sms))
            for which in "nw": add(f"wgrad{sms}{which}", mine, dispatcher(1, sms), filler(sms, which), streams)
        for sms in (20,) if w.dry else (20, 64) if name == "mini" else (8, 12, 16, 20):
            add(f"halves{sms}", mine, dispatcher(2, sms), parts=2)
            for which in "nf" if name == "mini" else "f": add(f"overlap{sms}{which}", mine, dispatcher(2, sms), filler(sms, which), streams, 2)
            if name == "wide":
                for which in "ib": add(f"overlap{sms}{which}", mine, dispatcher(2, sms), filler(sms, which, None), streams, 2)
        replay("compute_whole", 1)
        replay("compute_halves", 2)
        rounds = {n: [] for n in run}
        for r in range(4):
            for n, fn in run.items():
                t = w.us(fn, 3 if r else 1, 1)/1e3/depth
                if r: rounds[n].append(t)
        all_ms = torch.tensor([statistics.median(t) for t in rounds.values()], device=w.device, dtype=torch.float64)
        dist.all_reduce(all_ms, op=dist.ReduceOp.MAX)
        ms = {n: round(v, 4) for n, v in zip(run, all_ms.tolist())}
        w.say(f"{name} {s}, host waits {not fixed}: ms per layer, forward + backward:")
        w.say(" ".join(f"{n} {v:.3f}" for n, v in ms.items()))
        number = lambda key: "".join(c for c in key if c.isdigit())
        shares = {n: hidden_share(v, ms["halves"+number(n)], ms["compute_halves"]) for n, v in ms.items() if "overlap" in n}
        shares.update({n: hidden_share(v, ms["whole"+number(n)], ms["compute_whole"]) for n, v in ms.items() if "wgrad" in n})
        halves = [n for n in ms if "overlap" in n]
        quick = [n for n in halves if ms[n] <= 1.01*min(ms[m] for m in halves)]
        best = min(quick, key=lambda n: (int(number(n)), ms[n]))   # of equally fast ones the one that takes fewest multiprocessors
        fastest = min(shares, key=ms.get)
        w.say(f"{name}: hidden shares " + " ".join(f"{n} {v:.3f}" for n, v in shares.items()))
        w.say(f"{name}: fastest of halves {best}, of all {fastest}")
        w.keep(**{name: dict(size=s, ms=ms, shares=shares, best_halves=best, fastest=fastest, host_waits=not fixed)})
        if name == "mini":
            w.keep(figures=dict(ep2_share=ms["ep1"]/ms[fastest]))
            w.say("ep2_share", w.notes["figures"]["ep2_share"])
        else:
            w.keep(figures=dict(hidden_share=shares[best]))
            w.say("hidden_share", shares[best])
            if not w.dry: timeline(w, run[best])
        run.clear()
        mine.clear()
        if not w.dry: torch.cuda.empty_cache()


def timeline(w, fn):
    "Busy spans of one step."
    from moe_rl.ep.overlap import spans
    for _ in range(3): fn()
    torch.cuda.synchronize()
    dist.barrier()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA, torch.profiler.ProfilerActivity.CPU]) as prof:
        fn()
        torch.cuda.synchronize()
    if w.rank: return
    path = w.out.with_suffix(".trace")
    prof.export_chrome_trace(str(path))
    trace = json.loads(path.read_text())
    w.keep(timeline=next(t for gap in (5, 10, 20, 50, 100) if len(t := spans(trace, gap)) < 400 or gap == 100),
           kernel_names=sorted({e["name"][:90] for e in trace["traceEvents"] if e.get("cat") == "kernel"}))


def decode(w):
    "Low-latency kernels."
    from moe_rl.ep.deepep import DecodeBufferOnGloo, DeepEPDecode
    T, D, E, k = (8, 512, 8, 2) if w.dry else (128, 7168, 256, 8)
    ex = DeepEPDecode(E, D, T, group=dist.group.WORLD, buffer=DecodeBufferOnGloo(dist.group.WORLD, E) if w.dry else None)
    times = []
    for n in (T//4, T//2, T):
        x, idx, gates = w.tokens(n, D, E, k)
        rows, counts, handle = ex.dispatch(x, idx, gates)
        home, want = ex.combine(rows, handle).float(), x.float()*gates.sum(1, keepdim=True)
        err = ((home-want).norm()/want.norm()).item()
        assert err < .05, f"low-latency round trip is off by {err}"
        y, marks = torch.zeros(handle[2], dtype=torch.bfloat16, device=w.device), []
        dist.barrier()
        for _ in range(4 if w.dry else 40):   # always in pairs: the kernels share two buffers in turn
            marks.append([w.mark()])
            m = ex.send_masked(x, idx, gates)
            marks[-1].append(w.mark())
            ex.gather_masked(y, m)
            marks[-1].append(w.mark())
        both = [statistics.median(w.between(*m[i:i+2]) for m in marks[2:]) for i in (0, 1)]
        times.append(dict(tokens=n, width=D, experts=E, k=k, ranks=2, dispatch_us=both[0], combine_us=both[1], error=err))
        w.say({a: round(b, 4) for a, b in times[-1].items()})
    w.keep(low_latency=times)


def elastic(w):
    "DeepEP's second generation without its network (EP_DISABLE_GIN), in a pair of its own: it may crash."
    from moe_rl.ep.deepep import DeepEPElastic
    T, D, E, k = (8, 512, 8, 2) if w.dry else (4096, 7168, 256, 8)
    x, idx, gates = w.tokens(T, D, E, k)
    ex = DeepEPElastic(E, D, T, k, dist.group.WORLD)
    sent = ex.send((x,), idx, gates)
    w.keep(elastic=dict(rows=len(sent.parts[0]), dispatch_us=w.us(lambda: ex.send((x,), idx, gates)), combine_us=w.us(lambda: ex.gather(sent.parts[0], sent.plan))))
    w.say(w.notes["elastic"])


def death(w):
    "Rank 1 dies; rank 0 must say so in time instead of waiting."
    from moe_rl.ep.dispatch import AllToAll
    from moe_rl.ep.ranks import ExchangeError
    T, D, E, k = 64, 256, 8, 2
    x, idx, gates = w.tokens(T, D, E, k)
    ex = AllToAll(E, dist.group.WORLD, timeout=5.)
    ex.send((x,), idx, gates)
    if w.rank == 1: os._exit(9)
    start = time.time()
    try: ex.send((x,), idx, gates)
    except ExchangeError as e: w.keep(dead_rank=dict(error=str(e), seconds=round(time.time()-start, 1)))
    w.say(w.notes["dead_rank"])


if __name__ == "__main__":
    part, out, mode = sys.argv[1:]
    w = Worker(out, mode == "dry")
    globals()[part](w)
    sys.stdout.flush()
    if part != "death": dist.barrier()
    os._exit(0)   # DeepEP's and NCCL's destructors may wait for a peer that is gone
