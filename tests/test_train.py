"""Optimisers, objective, weights, checkpoints and warm start: properties over drawn inputs, and the bugs that other
systems shipped."""
import math, os, shutil, signal, subprocess, sys
import numpy as np, pytest, torch
from hypothesis import given, settings, strategies as st
from torch import nn
from moe_rl.config import BalanceSection
from moe_rl.errors import StorageError, UserError
from moe_rl.data.batch import packed_batches, to_torch
from moe_rl.moe.families import new_afmoe
from moe_rl.moe.model import Model, init_weights, moe_modules
from moe_rl.records import Example, replace, total
from moe_rl.train import checkpoint as ck, objective as ob, sft, weights as wt
from moe_rl.train.step import optimizer_step
from moe_rl.train.optim import Muon, build_optimizer, clip_grads, matrices, orthogonalise

quick = settings(max_examples=60, deadline=None)
SMALL = BalanceSection(aux_coef=0, head_z_coef=.01)
FLOATS = st.one_of(st.floats(-50, 50), st.sampled_from([math.inf, -math.inf, math.nan, 1e38, -1e38, 0.]))

def tiny(seed=0, **kw):
    cfg = dict(vocab_size=20, hidden_size=16, intermediate_size=24, moe_intermediate_size=8, num_hidden_layers=2,
               num_dense_layers=1, num_attention_heads=2,
               num_key_value_heads=1, head_dim=8, num_experts=4, num_experts_per_tok=2, sliding_window=8) | kw
    return init_weights(Model(new_afmoe(**cfg)), seed)

def examples(n, seed=0, longest=9):
    rng = np.random.default_rng(seed)
    return [sft.example(rng.integers(2, 20, rng.integers(1, longest)).tolist(),
        rng.integers(2, 20, rng.integers(1, longest)).tolist(), i) for i in range(n)]

# ---- objective

def plain_row(logits, temperature, top_k, top_p, keep):
    z = [float(x)/temperature for x in logits]
    order = sorted(range(len(z)), key=lambda i: (-z[i], i))
    order = order[:top_k] if top_k else order
    total, support, mass = math.fsum(math.exp(z[i]-z[order[0]]) for i in order), [], 0.
    for i in order:
        if mass >= top_p: break
        support.append(i)
        mass += math.exp(z[i]-z[order[0]])/total
    support = support if keep in support else support + [keep]
    total = math.log(math.fsum(math.exp(z[i]-z[order[0]]) for i in support)) + z[order[0]]
    return [z[i]-total if i in support else -math.inf for i in range(len(z))]

@quick
@given(st.lists(st.integers(-6, 6), min_size=1, max_size=12), st.sampled_from([.5, 1., 2.]), st.integers(0, 14),
    st.sampled_from([.1234, .4321, .9876, 1.]), st.data())
def test_sampling_logprobs_are_the_plain_ones(logits, temperature, top_k, top_p, data):
    "Small integers as logits: ties everywhere."
    keep = data.draw(st.integers(0, len(logits)-1))
    fast = ob.sampling_logprobs(torch.tensor([logits]), temperature, top_k, top_p, torch.tensor([keep]))[0]
    slow = torch.tensor(plain_row(logits, temperature, top_k, top_p, keep))
    assert torch.equal(fast.isinf(), slow.isinf())
    assert torch.allclose(fast.exp(), slow.exp(), atol=1e-5)

@quick
@given(st.lists(FLOATS, min_size=2, max_size=8), st.sampled_from([0., 1e-3, .7, 1., 5.]), st.integers(0, 9),
    st.floats(1e-6, 1.), st.data())
def test_known_failure_20_any_logits_give_finite_logprobs_and_gradients(logits, temperature, top_k, top_p, data):
    keep = torch.tensor([data.draw(st.integers(0, len(logits)-1))])
    x = torch.tensor([logits], dtype=torch.float32, requires_grad=True)
    lp = ob.sampling_logprobs(x, temperature, top_k, top_p, keep)
    entropy, kept = ob.entropy(lp), lp.gather(-1, keep[:, None])
    grad, = torch.autograd.grad((kept + entropy).sum() + ob.finite_logits(x).logsumexp(-1).sum(), x)
    assert kept.isfinite().all() and entropy.isfinite().all() and (entropy >= -1e-6).all() and grad.isfinite().all()
    assert not lp.isnan().any() and abs(lp.exp().sum().item() - 1) < 1e-5
    assert ob.sampling_logprobs(x, temperature, top_k, top_p).exp().sum().item() == pytest.approx(1, abs=1e-5)

def test_known_failure_20_plain_softmax_is_caught():
    "The same check on a log-softmax without the precautions."
    naive = lambda x, keep: x.masked_fill(x < x.max(), -math.inf).log_softmax(-1).gather(-1, keep[:, None])
    keep = torch.tensor([1])
    for row in ([3., 1.], [math.inf, 0.], [math.nan, 1.]):
        x = torch.tensor([row])
        assert not naive(x, keep).isfinite().all()
        assert ob.sampling_logprobs(x, top_k=1, keep=keep).gather(-1, keep[:, None]).isfinite().all()
    nan = torch.tensor([1., math.nan])
    mask = torch.tensor([True, False])
    assert (nan*mask).sum().isnan() and ob.global_mean(nan, mask, 1) == 1

@quick
@given(st.integers(1, 9), st.integers(0, 2**31), st.booleans())
def test_rows_do_not_depend_on_their_neighbours(n, seed, integers):
    g = torch.Generator().manual_seed(seed)
    x = torch.randint(-3, 4, (n, 11), generator=g).float() if integers else torch.randn(n, 11, generator=g)
    t = torch.tensor([0., .5, 1., 2.])[torch.randint(0, 4, (n,), generator=g)]
    k, p = torch.randint(0, 13, (n,), generator=g), torch.rand(n, generator=g).clamp_min(.01)
    p[torch.rand(n, generator=g) < .3] = 1.
    p = p.double()
    together = ob.sampling_logprobs(x, t, k, p)
    for i in range(n):
        assert torch.equal(together[i:i+1], ob.sampling_logprobs(x[i:i+1], t[i].item(), k[i].item(), p[i].item()))

@settings(max_examples=25, deadline=None)
@given(st.integers(0, 40), st.integers(1, 17), st.sampled_from([dict(), dict(temperature=.6), dict(top_k=4),
    dict(temperature=1.5, top_k=9, top_p=.7)]), st.integers(0, 2**31))
def test_chunks_change_neither_values_nor_gradients(n, chunk, how, seed):
    g = torch.Generator().manual_seed(seed)
    h, w, t = torch.randn(n, 5, generator=g), torch.randn(13, 5, generator=g), torch.randint(0, 13, (n,), generator=g)
    def run(chunk):
        a, b = h.clone().requires_grad_(), w.clone().requires_grad_()
        outs = ob.token_logprobs(a, b, t, **how, chunk=chunk)
        return *outs, *torch.autograd.grad(sum((c*o).sum() for c, o in zip((-1., .3, .1), outs)), (a, b),
            allow_unused=n == 0, materialize_grads=n == 0)
    for a, b in zip(run(chunk), run(1000)): assert torch.allclose(a, b, atol=1e-4)

# ---- global token counts

def cut_gradient(rollouts, cuts, share):
    "Gradient of a model on `rollouts`, cut into micro-batches after `cuts`."
    model, parts = tiny(), [p for p in np.split(np.arange(len(rollouts)), cuts) if len(p)]
    batches = [packed_batches([rollouts[i] for i in p], 10_000)[0][0] for p in parts]
    step = total([r.loss_mask[1:] for r in rollouts])
    for b in batches:
        divided_by = share(b, step.loss_tokens, len(batches))
        whole = replace(step, loss_tokens=max(divided_by, b.loss_tokens)) # a record refuses less
        scale = whole.loss_tokens/divided_by
        (sum(sft.sft_loss(model, to_torch(replace(b, step=whole)), SMALL).parts.values())*scale).backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])

@settings(max_examples=12, deadline=None)
@given(st.integers(2, 9), st.integers(0, 1000), st.data())
def test_known_failure_21_unequal_micro_batches_sum_to_the_big_one(n, seed, data):
    rollouts, right = examples(n, seed), lambda b, tokens, m: tokens
    cuts = sorted(data.draw(st.sets(st.integers(1, n-1), min_size=1)))
    whole = cut_gradient(rollouts, [], right)
    assert torch.allclose(cut_gradient(rollouts, cuts, right), whole, atol=1e-5)

def test_known_failure_21_means_of_micro_batches_are_caught():
    rollouts = [sft.example([2, 3], [4], 0), sft.example([5], [6, 7, 8, 9, 10, 11, 12, 13], 1)]
    whole = cut_gradient(rollouts, [], lambda b, tokens, m: tokens)
    bug = cut_gradient(rollouts, [1], lambda b, tokens, m: b.loss_tokens*m)
    assert not torch.allclose(bug, whole, atol=1e-5) and (bug-whole).norm() > .1*whole.norm()

# ---- optimisers

@settings(max_examples=30, deadline=None)
@given(st.integers(1, 4), st.integers(1, 9), st.integers(1, 9), st.integers(0, 2**31))
def test_orthogonalise_keeps_directions(b, r, c, seed):
    g = torch.randn(b, r, c, generator=torch.Generator().manual_seed(seed))
    o = orthogonalise(g)
    assert (torch.linalg.svdvals(o) < 1.3).all() and torch.allclose(orthogonalise(g.mT), o.mT, atol=1e-4)
    assert ((o*g).sum((-2, -1)) > 0).all()

def test_muon_slices_are_independent():
    "An expert's step does not depend on the other experts of its stack."
    g = torch.Generator().manual_seed(0)
    w, grads = torch.randn(3, 8, 5, generator=g), [torch.randn(3, 8, 5, generator=g) for _ in range(3)]
    def run(experts):
        p = nn.Parameter(w[experts].clone())
        opt = Muon([p], lr=.1, parts=2)
        for x in grads:
            p.grad = x[experts].clone()
            opt.step()
        return p.detach()
    whole = run([0, 1, 2])
    for e in range(3): assert torch.allclose(run([e])[0], whole[e], atol=1e-5)
    assert matrices(w, 2).shape == (6, 4, 5)

def test_a_step_with_nan_is_seen_before_it_is_taken():
    m = tiny()
    opt = build_optimizer(m)
    for p in opt.params: p.grad = torch.ones_like(p)
    opt.params[-1].grad.view(-1)[0] = math.nan
    kept = [p.grad.clone() for p in opt.params[:-1]]
    assert not math.isfinite(clip_grads(opt.params, 1.))
    assert all(torch.equal(a, p.grad) for a, p in zip(kept, opt.params))

def test_every_parameter_has_exactly_one_optimiser():
    m = tiny()
    opt = build_optimizer(m)
    assert sorted(map(id, opt.params)) == sorted(map(id, m.parameters()))
    of = {opt.names[p]: type(o).__name__ for o in opt.all for g in o.param_groups for p in g["params"]}
    for n in ("embed_tokens.weight", "lm_head.weight", "layers.1.mlp.router.weight", "norm.weight",
            "layers.0.self_attn.q_norm.weight"):
        assert of[n] == "AdamW"
    for n in ("layers.1.mlp.experts.gate_up_proj", "layers.1.mlp.experts.down_proj",
            "layers.0.self_attn.gate_proj.weight", "layers.0.mlp.up_proj.weight"):
        assert of[n] == "Muon"

@pytest.mark.parametrize("cut", [1, 3])
def test_warm_start_resumes_bit_for_bit(tmp_path, cut):
    "Model, biases and optimiser through files: the rest of the run is the same run."
    def steps(model, opt, n, skip=0):
        order = sft.index_batches(30, 8, seed=3)
        for i in range(n):
            batch = [data[j] for j in next(order)]
            if i >= skip: optimizer_step(model, opt, packed_batches(batch, 64), sft.sft_loss)
    data = examples(30)
    a = tiny()
    oa = build_optimizer(a)
    steps(a, oa, 5)
    b = tiny()
    obj = build_optimizer(b)
    steps(b, obj, cut)
    with ck.saving(tmp_path, cut) as folder:
        ck.save_tensors(folder/"model.safetensors", b.state_dict())
        ck.save_tensors(folder/"optim.safetensors", obj.state_dict())
    c = tiny(seed=9)
    oc = build_optimizer(c)
    c.load_state_dict(ck.load_tensors(ck.latest(tmp_path)/"model.safetensors"))
    oc.load_state_dict(ck.load_tensors(ck.latest(tmp_path)/"optim.safetensors"))
    steps(c, oc, 5, skip=cut)
    assert wt.fingerprint(a.state_dict() | oa.state_dict()) == wt.fingerprint(c.state_dict() | oc.state_dict())

def test_known_failure_24_forgotten_bias_momentum_is_caught(tmp_path):
    "A resume that loses the balancing momentum does not end in the same weights; with it, it does."
    data = examples(16)
    def run(lose):
        m = tiny()
        o = build_optimizer(m)
        for i in range(4):
            if i == 2 and lose: moe_modules(m)[0].bias_momentum.zero_()
            optimizer_step(m, o, packed_batches(data, 4096), sft.sft_loss)
        return wt.fingerprint(m.state_dict())
    assert run(False) == run(False) != run(True)
    assert {n.split(".")[-1] for n in tiny().state_dict()} >= {"expert_bias", "bias_momentum"}

# ---- weights

def published(tmp_path, seed=1):
    model = tiny(seed)
    wt.publish(tmp_path/"weights", 1, model.state_dict())
    return model, *wt.load_version(tmp_path/"weights", 1)

def test_weights_arrive(tmp_path):
    model, tensors, manifest = published(tmp_path)
    engine = tiny(0)
    assert wt.apply_weights(engine, tensors, manifest) == manifest == wt.describe(model.state_dict(), 1)
    assert all(torch.equal(a, b) for a, b in zip(engine.state_dict().values(), model.state_dict().values()))

def test_known_failure_14_a_missing_shard_is_an_error_by_name(tmp_path):
    model, tensors, manifest = published(tmp_path)
    shard = {n: t for n, t in tensors.items() if "experts.down_proj" not in n}
    bug = tiny(0)
    bug.load_state_dict(shard, strict=False) # the bug: reports success
    assert wt.fingerprint(bug.state_dict()) != manifest.fingerprint
    engine = tiny(0)
    before = wt.fingerprint(engine.state_dict())
    with pytest.raises(wt.WeightError, match="layers.1.mlp.experts.down_proj is missing.*nothing was loaded"):
        wt.apply_weights(engine, shard, manifest)
    assert wt.fingerprint(engine.state_dict()) == before
    wt.save_tensors(tmp_path/"weights"/"v1"/"model.safetensors", shard)
    with pytest.raises(wt.WeightError, match="down_proj is missing"): wt.load_version(tmp_path/"weights", 1)
    spoiled = model.state_dict() | {"norm.weight": torch.full((16,), math.nan)}
    with pytest.raises(wt.WeightError, match="norm.weight hold nan"): wt.publish(tmp_path/"weights", 2, spoiled)
    assert wt.versions(tmp_path/"weights") == [1]

class Dropping(nn.Module):
    "The bug: hands out a copy of one tensor, so that what is copied into it never arrives."
    def __init__(self, model, name):
        super().__init__()
        self.model, self.name = model, name
    def state_dict(self): return {n: t.clone() if n == self.name else t for n, t in self.model.state_dict().items()}

@settings(max_examples=20, deadline=None)
@given(st.data())
def test_known_failure_17_dropped_or_misnamed_tensors_are_caught(data):
    new, engine = tiny(1).state_dict(), tiny(0)
    manifest = wt.describe(new, 1)
    fresh = [n for n in new if not torch.equal(new[n], engine.state_dict()[n])]
    name = data.draw(st.sampled_from(fresh))
    with pytest.raises(wt.WeightError, match=f"did not arrive in the model: {name} has other contents; do not use it"):
        wt.apply_weights(Dropping(engine, name), new, manifest)
    twins = [n for n in fresh if n != name and new[n].shape == new[name].shape]
    if twins:
        other = data.draw(st.sampled_from(twins))
        swapped = new | {name: new[other], other: new[name]}
        tiny(0).load_state_dict(swapped) # the bug: strict, and nothing is noticed
        with pytest.raises(wt.WeightError, match="did not arrive in the model: .* has other contents"):
            wt.apply_weights(tiny(0), swapped, manifest)
    assert wt.apply_weights(tiny(0), new, manifest) == manifest

@settings(max_examples=40, deadline=None)
@given(st.data())
def test_any_flipped_bit_shows(data):
    state = {"a": torch.arange(5.), "b": torch.arange(6).reshape(2, 3), "c": torch.ones(3, dtype=torch.bfloat16)}
    name = data.draw(st.sampled_from(sorted(state)))
    t = state[name].clone()
    raw = t.view(torch.uint8).reshape(-1)
    raw[data.draw(st.integers(0, len(raw)-1))] ^= 1 << data.draw(st.integers(0, 7))
    assert wt.differences(wt.describe(state), wt.describe(state | {name: t})) == [f"{name} has other contents"]

def test_wrong_config_and_dtype_are_one_line(tmp_path):
    model, tensors, manifest = published(tmp_path)
    for engine, said in ((tiny(vocab_size=21), r"embed_tokens.weight has shape \[20, 16\] instead of \[21, 16\]"),
            (tiny(num_experts=5), "do not fit the model")):
        with pytest.raises(UserError, match=said) as e: wt.apply_weights(engine, tensors, manifest)
        assert "\n" not in str(e.value)

def test_a_killed_publish_leaves_the_old_version(tmp_path):
    wt.publish(tmp_path, 1, {"a": torch.zeros(3)})
    (tmp_path/".v2.tmp").mkdir()
    (tmp_path/".v2.tmp"/"model.safetensors").write_bytes(b"half")
    assert wt.versions(tmp_path) == [1]
    wt.publish(tmp_path, 2, {"a": torch.ones(3)})
    assert sorted(p.name for p in tmp_path.iterdir()) == ["v1", "v2"]
    wt.prune(tmp_path, 2)
    with pytest.raises(wt.WeightError, match=r"weights v1 are not in .*which has \[2\]"): wt.load_version(tmp_path, 1)

# ---- checkpoints

def save(run, step, parts=("model.safetensors", "buffer.msgpack")):
    with ck.saving(run, step, ("model.safetensors", "buffer.msgpack")) as folder:
        if parts[0]: ck.save_tensors(folder/"model.safetensors", {"w": torch.full((50,), float(step))})
        if parts[1]: ck.save_state(folder/"buffer.msgpack", {"step": step})

def careless_latest(run): return max((run/"checkpoints").iterdir(), key=lambda p: int(p.name.split("_")[1]))

def test_known_failure_28_latest_is_never_unfinished(tmp_path):
    save(tmp_path, 7)
    half = ck.step_path(tmp_path, 8)
    half.mkdir()
    (half/"model.safetensors").write_bytes(b"half")  # a crash between the parts of two components
    assert careless_latest(tmp_path) == half         # the bug
    assert ck.latest(tmp_path) == ck.step_path(tmp_path, 7) and ck.verify(ck.latest(tmp_path)).step == 7
    with pytest.raises(ck.CheckpointError, match="buffer.msgpack missing"):
        save(tmp_path, 8, ("model.safetensors", None))
    save(tmp_path, 8)                                # what the crash left is no obstacle
    assert ck.latest(tmp_path) == half and ck.verify(half).step == 8

def test_known_failure_28_sigkill_before_every_file_operation(tmp_path):
    save(tmp_path, 1)
    def attempt(fatal, save_it):
        pid = os.fork()
        if not pid:
            left = [fatal]
            def hook(event, args):
                if event in ("open", "os.rename", "os.mkdir", "os.remove", "os.rmdir"):
                    left[0] -= 1
                    if not left[0]: os.kill(os.getpid(), signal.SIGKILL)
            sys.addaudithook(hook)
            save_it()
            os._exit(0)
        return os.waitpid(pid, 0)[1] == 0
    def sweep(save_it):
        "Latest checkpoint after each kill; an error if one of them is not whole."
        seen, fatal, lived = [], 0, False
        while not lived:
            fatal += 1
            lived = attempt(fatal, save_it)
            seen.append(ck.verify(ck.latest(tmp_path)).step)
            shutil.rmtree(ck.step_path(tmp_path, 2), ignore_errors=True)
        return seen
    seen = sweep(lambda: save(tmp_path, 2))
    assert seen == sorted(seen) and {1, 2} == set(seen) and len(seen) > 10
    def marker_first():
        "The bug: the marker before the parts."
        folder = ck.step_path(tmp_path, 2)
        folder.mkdir()
        data = b"late part"
        (folder/ck.MARKER).write_bytes(ck.msgspec.json.encode(ck.Commit(2,
            {"buffer": ck.PartInfo(len(data), ck.zlib.crc32(data))})))
        (folder/"buffer").write_bytes(data)
    with pytest.raises(ck.CheckpointError, match="lacks buffer|was not written by this program"): sweep(marker_first)

def test_full_disk_is_one_line_and_overwrites_nothing(tmp_path):
    save(tmp_path, 1)
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    code = f'''
import resource, signal, torch
from moe_rl.train import checkpoint as ck
from moe_rl.errors import StorageError
from moe_rl.train.weights import publish
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))
big = {{'w': torch.zeros(100_000)}}
for attempt in (lambda folder: ck.save_tensors(folder/'model.safetensors', big), lambda folder: ck.save_state(folder/'b', [0]*20_000)):
    try:
        with ck.saving({str(tmp_path)!r}, 2) as folder: attempt(folder)
    except StorageError as e: print(e)
try: publish({str(tmp_path/'weights')!r}, 1, big)
except StorageError as e: print(e)
'''
    lines = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.splitlines()
    assert len(lines) == 3 and all("File too large; what was there before is untouched" in l and "cannot write" in l
        for l in lines)
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before
    if os.path.exists("/dev/full"):
        with pytest.raises(StorageError, match="No space left on device"): ck.write_bytes("/dev/full", b"x")

@pytest.mark.parametrize("harm, said", [
    (lambda c: (c/"model.safetensors").write_bytes((c/"model.safetensors").read_bytes()[:30]),
        "model.safetensors has 30 of"),
    (lambda c: (c/"buffer.msgpack").unlink(), "lacks buffer.msgpack"),
    (lambda c: (c/"buffer.msgpack").write_bytes(b"\x81\xa4step\x09"), "altered after the commit"),
    (lambda c: (c/ck.MARKER).write_bytes(b"yes"), "was not written by this program"),
    (lambda c: (c/ck.MARKER).unlink(), "is no finished checkpoint"),
])
def test_truncated_and_foreign_checkpoints_are_one_line(tmp_path, harm, said):
    save(tmp_path, 1)
    harm(ck.step_path(tmp_path, 1))
    with pytest.raises(UserError, match=said) as e: ck.verify(ck.step_path(tmp_path, 1))
    assert "\n" not in str(e.value)

def test_keep_last_and_rollouts_in_a_state(tmp_path):
    for step in (1, 2, 10): save(tmp_path, step)
    ck.keep_last(tmp_path, 2)
    assert ck.committed_steps(tmp_path) == [2, 10]
    ck.save_state(tmp_path/"buffer", examples(3))
    assert ck.load_state(tmp_path/"buffer", list[Example]) == examples(3)

# ---- warm start

def test_loss_is_cross_entropy_of_the_answers():
    model, data = tiny(), examples(6)
    [[batch]] = packed_batches(data, 4096)
    b = to_torch(batch)
    got = sft.sft_loss(model, b)
    loss, counts = got.parts["answers"], got.counts
    logits = model.logits(model(b.token_ids, b.positions, sft.packed_attend(b.cu_seqlens)).hidden)
    assert torch.allclose(loss, nn.functional.cross_entropy(logits[b.loss_mask], b.targets[b.loss_mask]), atol=1e-5)
    assert int(counts.sum()) == 2*batch.tokens

def test_warm_start_is_a_function_of_the_seed():
    def run(seed):
        m = tiny()
        report = sft.run_sft(m, build_optimizer(m), examples(20), batch=6, steps=4, seed=seed)
        return report.stopped_by, wt.fingerprint(m.state_dict())
    assert run(0) == run(0) and run(0)[0] == "steps" and run(0) != run(1)

def test_fillers_change_nothing():
    "Rows that only fill up a micro-batch leave loss, gradient and counts as they were."
    data = examples(5)
    def run(multiple):
        m = tiny()
        [[b]] = packed_batches(data, 512, pad_multiple=multiple)
        got = sft.sft_loss(m, to_torch(b))
        sum(got.parts.values()).backward()
        return len(b), got.counts, torch.cat([p.grad.flatten() for p in m.parameters() if p.grad is not None])
    (n, c, g), (n2, c2, g2) = run(1), run(64)
    assert n2 > n and torch.equal(c, c2) and torch.allclose(g, g2, atol=1e-6)

# ---- the one step

def whole_state(model, opt): return wt.fingerprint(model.state_dict() | opt.state_dict())

def step_with(teaching=1, size=1., strength=1., steps=1, seed=0, **balance):
    """Steps whose main part has gradients of `size` and whose small parts have `strength`; returns state before and
    after, and the last report."""
    model, s = tiny(seed), BalanceSection(rate=.05, **balance)
    opt = build_optimizer(model, muon_lr=.01, adamw_lr=.01)
    batches = packed_batches(examples(12), 64)
    optimizer_step(model, opt, batches, sft.sft_loss, s)         # moments are not zero
    before = whole_state(model, opt)
    def loss(model, b):
        p = sft.sft_loss(model, b, s)
        small = {k: v*strength for k, v in p.parts.items() if k != "answers"}
        return p._replace(parts=dict(answers=p.parts["answers"]*size, **small), teaching=teaching)
    for _ in range(steps): report = optimizer_step(model, opt, batches, loss, s)
    return before, whole_state(model, opt), report

def test_a_step_without_signal_moves_nothing():
    before, after, report = step_with(teaching=0, size=0., steps=10)
    assert report.outcome == "idle" and report.grad_norm > 0 and before == after
    before, after, report = step_with(teaching=1, size=0.)       # the bug: the small parts at full speed
    assert report.outcome == "moved" and report.loss < 1e-2 and before != after

def test_balance_rules_differ_and_none_is_none():
    def biases(rule):
        model = tiny()
        sft.run_sft(model, build_optimizer(model), examples(20), batch=6, steps=3,
            balance=BalanceSection(rule=rule, rate=.01))
        return moe_modules(model)[0].expert_bias
    none, sign, smebu = map(biases, ("none", "sign", "smebu"))
    assert not none.any() and sign.any() and smebu.any() and not torch.allclose(sign, smebu, atol=1e-4)

@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_shares_of_every_part_sum_to_one_over_ranks(ranks):
    data, s = examples(16), BalanceSection(aux_coef=.1, z_coef=.1, head_z_coef=.1)
    def parts(batches):
        got = [sft.sft_loss(tiny(), to_torch(b), s).parts for rank in batches for b in rank]
        return {k: sum(float(p[k].detach()) for p in got) for k in got[0]}
    whole, split = parts(packed_batches(data, 4096)), parts(packed_batches(data, 64, ranks, pad_multiple=4))
    for k in whole: assert split[k] == pytest.approx(whole[k], rel=1e-5), k

def test_weights_of_16_bits_are_not_trained():
    with pytest.raises(ValueError, match="embed_tokens.weight is torch.bfloat16"): build_optimizer(tiny().bfloat16())

def test_skill_is_measured_against_the_best_constant_answer():
    answers = ["1"]*361 + [str(i) for i in range(2, 641)]
    assert sft.majority(answers) == .361 and sft.skill(.361, answers) == 0 and .05 < sft.skill(.4, answers) < .07
    assert sft.skill(1., ["7"]*9) == 1 and sft.skill(.9, ["7"]*9) == 0
