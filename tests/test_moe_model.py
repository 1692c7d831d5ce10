"""Attention, model, checkpoint and zoo: properties over drawn inputs, and the bugs that others shipped, put in and
caught."""
import importlib.util, inspect, json, random, subprocess, sys, textwrap
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings, strategies as st
from safetensors.torch import load_file, save_file

from moe_rl.moe import attention, checkpoint, model as model_module
from moe_rl.moe.attention import PackedAttend, document_mask, masked_attend, packed_attend, packed_positions
from moe_rl.moe.checkpoint import CheckpointError, from_hf_config, load_pretrained, save_pretrained, to_hf_config
from moe_rl.moe.families import new_afmoe
from moe_rl.moe.model import MoE, Model, ModelOutput, init_weights, moe_modules
from moe_rl.moe.spec import ModelSpec, TensorSpec, count_parameters
from moe_rl.moe.zoo import PRESETS, preset

TINY = new_afmoe(vocab_size=64, hidden_size=32, intermediate_size=64, moe_intermediate_size=16, num_hidden_layers=5,
                   num_dense_layers=2, num_attention_heads=4,
                   num_key_value_heads=2, head_dim=8, num_experts=8, num_experts_per_tok=2, sliding_window=4,
                   route_scale=2., max_position_embeddings=128)


def mutant(monkeypatch, owner, name:str, old:str, new:str):
    "Replace a function by itself with one piece of its source changed."
    fn = inspect.getattr_static(owner, name)
    plain = fn.fget if isinstance(fn, property) else fn
    source = textwrap.dedent(inspect.getsource(plain))
    assert old in source, f"{name} has no {old!r}: adapt the mutant"
    space = dict(plain.__globals__)
    exec(source.removeprefix("@property\n").replace(old, new), space)
    # a method may call a function of its own name
    slip, space[name] = space[name], plain.__globals__.get(name)
    monkeypatch.setattr(owner, name, property(slip) if isinstance(fn, property) else slip)


def stirred(cfg:ModelSpec=TINY, seed:int=0) -> Model:
    "A model whose attention, routing and biases all matter."
    model, gen = init_weights(Model(cfg), seed), torch.Generator().manual_seed(seed)
    for p in model.parameters():
        if p.ndim > 1: p.data = torch.randn(p.shape, generator=gen)*0.2
    for m in moe_modules(model): m.expert_bias.copy_(torch.randn(cfg.num_experts, generator=gen)*0.2)
    return model


def documents(lengths:list[int], seed:int=0) -> list[torch.Tensor]:
    gen = torch.Generator().manual_seed(seed)
    return [torch.randint(0, TINY.vocab_size, (n,), generator=gen) for n in lengths]


@torch.no_grad()
def run(model:Model, docs:list[torch.Tensor], **kw) -> ModelOutput:
    cu = torch.tensor([0]+[len(d) for d in docs]).cumsum(0)
    return model(torch.cat(docs), packed_positions(cu), packed_attend(cu), **kw)


@given(lengths=st.lists(st.integers(0, 40), min_size=1, max_size=8).filter(any), kv=st.integers(1, 3),
       group=st.integers(1, 3),
       window=st.none() | st.integers(1, 50), seed=st.integers(0, 99))
@settings(max_examples=60, deadline=None)
def test_packed_attention_is_the_masked_one(lengths, kv, group, window, seed):
    gen = torch.Generator().manual_seed(seed)
    cu = torch.tensor([0]+lengths).cumsum(0)
    q, k, v = (torch.randn(int(cu[-1]), h, 4, generator=gen, dtype=torch.double, requires_grad=True)
        for h in (kv*group, kv, kv))
    got, want = packed_attend(cu)(0, q, k, v, window), masked_attend(q, k, v, document_mask(cu, window))
    torch.testing.assert_close(got, want, rtol=0, atol=1e-10)
    g = torch.randn(got.shape, generator=gen, dtype=torch.double)
    for a, b in zip(torch.autograd.grad(got, (q, k, v), g), torch.autograd.grad(want, (q, k, v), g)):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-10)


@given(lengths=st.lists(st.integers(1, 5000), min_size=1, max_size=300))
@settings(max_examples=60, deadline=None)
def test_rectangles_hold_every_token_once_and_are_half_full(lengths):
    slot, shapes = attention._buckets(torch.tensor(lengths))
    area = sum(s*l for s, l in shapes)
    assert len(slot.unique()) == len(slot) == sum(lengths) and int(slot.max()) < area
    assert area < 2*sum(lengths) and len(shapes) <= 14


@given(rows=st.integers(1, 40), dim=st.integers(1, 70), scale=st.floats(1e-3, 1e3), seed=st.integers(0, 99))
@settings(max_examples=40, deadline=None)
def test_rms_norm_and_its_gradient(rows, dim, scale, seed):
    gen = torch.Generator().manual_seed(seed)
    x, w, g = (torch.randn(s, generator=gen, dtype=torch.double) for s in ((rows, dim), (dim,), (rows, dim)))
    x, w = (x*scale).requires_grad_(), w.requires_grad_()
    fast, plain = attention._RMSNormCPU.apply(x, w, 1e-5), torch.nn.functional.rms_norm(x, (dim,), w, 1e-5)
    torch.testing.assert_close(fast, plain)
    for a, b in zip(torch.autograd.grad(fast, (x, w), g), torch.autograd.grad(plain, (x, w), g)):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-9)


def sees_only_itself(model:Model) -> bool:
    "Does a change of the middle document leave the others' numbers alone?"
    docs = documents([9, 12, 7])
    other = [docs[0], (docs[1]+1) % TINY.vocab_size, docs[2]]
    a, b = run(model, docs), run(model, other)
    keep = torch.cat((torch.arange(9), torch.arange(21, 28)))
    assert not torch.allclose(a.hidden[9:21], b.hidden[9:21], atol=1e-3)
    return torch.allclose(a.hidden[keep], b.hidden[keep], atol=1e-5) and torch.equal(a.routes[keep], b.routes[keep])


def test_a_document_sees_no_other(monkeypatch):
    model = stirred()
    assert sees_only_itself(model)
    monkeypatch.setattr(PackedAttend, "__call__", lambda self, layer, q, k, v, window: masked_attend(q, k, v,
        document_mask(self.cu[[0,-1]], window)))
    assert not sees_only_itself(model)


# Known failures


def routes_belong(model:Model, docs:list[torch.Tensor], routes:torch.Tensor) -> bool:
    "Are these the routes that every document has on its own, in the order in which the documents are packed?"
    return torch.equal(routes, torch.cat([run(model, [d]).routes for d in docs]))


@given(lengths=st.lists(st.integers(1, 20), min_size=2, max_size=6), order=st.randoms(use_true_random=False))
@settings(max_examples=25, deadline=None)
def test_known_failure_02_packing_order(lengths, order):
    model, docs = stirred(), documents(lengths)
    perm = list(range(len(docs)))
    order.shuffle(perm)
    alone = [run(model, [d]) for d in docs]
    packed = run(model, [docs[i] for i in perm])
    torch.testing.assert_close(packed.hidden, torch.cat([alone[i].hidden for i in perm]), rtol=0, atol=2e-5)
    torch.testing.assert_close(model.logits(packed.hidden), torch.cat([model.logits(alone[i].hidden) for i in perm]),
        rtol=0, atol=5e-5)
    assert routes_belong(model, [docs[i] for i in perm], packed.routes)


def test_known_failure_02_misaligned_routes_are_noticed(monkeypatch):
    model, docs = stirred(), documents([5, 7, 5])
    assert routes_belong(model, docs, run(model, docs).routes)
    mutant(monkeypatch, ModelOutput, "routes", "torch.stack([r.idx for r in self.routings], 1)",
           # same shape, other tokens
           "torch.stack([r.idx for r in self.routings], 0).reshape(len(self.hidden), len(self.routings), -1)")
    assert not routes_belong(model, docs, run(model, docs).routes)


def replay_is_exact(model:Model) -> bool:
    "Do the routes of a forward pass, given back, reproduce it to the last bit?"
    docs = documents([9, 12])
    live = run(model, docs)
    again = run(model, docs, replay=live.routes)
    return torch.equal(again.hidden, live.hidden) and all(torch.equal(a.idx, b.idx)
        for a, b in zip(again.routings, live.routings))


def test_known_failure_03_layer_axis_shifted(monkeypatch):
    model = stirred()
    assert replay_is_exact(model)
    mutant(monkeypatch, ModelOutput, "routes", "self.routings], 1)", "self.routings], 1).roll(1, 1)")
    assert not replay_is_exact(model)


@pytest.mark.parametrize("old, new", [
    # entry l for layer l, the last one repeated
    ("zip(s.moe_layers, replay.unbind(1))", "zip(range(9), [*replay.unbind(1)]+[replay[:,-1]]*2)"),
    ("replay.unbind(1)", "replay.roll(-2, 1).unbind(1)")])
def test_known_failure_09_absolute_layer_as_moe_layer(monkeypatch, old, new):
    model = stirred()
    assert TINY.moe_layers[0] == 2 and replay_is_exact(model)
    mutant(monkeypatch, Model, "forward", old, new)
    assert not replay_is_exact(model)


def test_known_failure_09_routes_of_all_layers_are_refused():
    model, docs = stirred(), documents([9])
    by_absolute_layer = torch.zeros(9, TINY.num_hidden_layers, 2, dtype=torch.long)
    with pytest.raises(ValueError, match=r"replay has shape \(9, 5, 2\), this model and batch need \(9, 3, 2\)"):
        run(model, docs, replay=by_absolute_layer)


def balance_survives(folder:Path) -> bool:
    "Move bias and momentum, save, load into a fresh model: are both there, and does the bias decide the routing?"
    model, docs = stirred(seed=1), documents([30])
    for i, m in enumerate(moe_modules(model)):
        m.expert_bias += 0.5*torch.randn(8, generator=torch.Generator().manual_seed(i))
        m.bias_momentum += 1+i
    save_file(model.state_dict(), folder/"state.safetensors")
    fresh = Model(TINY)
    fresh.load_state_dict(load_file(folder/"state.safetensors"))
    kept = all(torch.equal(a.expert_bias, b.expert_bias) and torch.equal(a.bias_momentum, b.bias_momentum)
        for a, b in zip(moe_modules(model), moe_modules(fresh)))
    return kept and torch.equal(run(model, docs).routes, run(fresh, docs).routes)


@pytest.mark.parametrize("buffer", ["expert_bias", "bias_momentum"])
def test_known_failure_24_balancing_state_is_saved_and_restored(monkeypatch, tmp_path, buffer):
    assert balance_survives(tmp_path)
    line = "torch.zeros(m.num_experts, dtype=torch.float32) if m.bias else None"
    monkeypatch.setattr(model_module, "MoE", type("MoE", (MoE,), {"__init__": forgetful(line, buffer)}))
    assert not balance_survives(tmp_path)


def forgetful(line:str, buffer:str):
    "`MoE.__init__` with one buffer left out of the state dict."
    source = textwrap.dedent(inspect.getsource(MoE.__init__))
    assert line in source
    space = dict(MoE.__init__.__globals__, MoE=MoE)
    exec(source.replace(line, f"{line}, persistent=name != {buffer!r}").replace("super()", "super(MoE, self)"), space)
    return space["__init__"]


def bias_is_exported(folder:Path) -> bool:
    model = stirred(seed=1)
    try: back = load_pretrained(save_pretrained(model, folder, overwrite=True))
    except CheckpointError: return False
    return all(torch.equal(a.expert_bias, b.expert_bias) for a, b in zip(moe_modules(model), moe_modules(back)))


def test_known_failure_24_bias_is_in_a_hugging_face_checkpoint(monkeypatch, tmp_path):
    assert bias_is_exported(tmp_path/"a")
    names = TensorSpec.names.fget
    # forgotten on both sides
    monkeypatch.setattr(TensorSpec, "names", property(lambda t: [] if t.name.endswith("expert_bias") else names(t)))
    monkeypatch.setattr(checkpoint, "_stack", lambda t, state, where, stack=checkpoint._stack: stack(t, state, where)
        if t.names else torch.zeros(t.shape))
    assert not bias_is_exported(tmp_path/"a")


def test_known_failure_24_an_updated_bias_is_used(monkeypatch):
    model, docs = stirred(), documents([30])
    def moves() -> bool:
        before = run(model, docs).routes
        for m in moe_modules(model): m.expert_bias[0] += 10
        return bool((run(model, docs).routes == 0).any(-1).all()) and not torch.equal(before, run(model, docs).routes)
    assert moves()
    for m in moe_modules(model): m.expert_bias[0] -= 10
    mutant(monkeypatch, MoE, "route", "self.expert_bias", "torch.zeros_like(self.expert_bias)")
    assert not moves()


# Model


def test_counts_are_outputs_not_side_effects():
    "Activation checkpointing runs a layer twice; nothing may be counted twice."
    from torch.utils.checkpoint import checkpoint as rematerialise
    model, docs = stirred(), documents([20, 12])
    cu = torch.tensor([0, 20, 32])
    before = {n: t.clone() for n, t in model.state_dict().items()}
    plain, forward = run(model, docs), model.layers[3].forward
    model.layers[3].forward = lambda *a: rematerialise(forward, *a, use_reentrant=False)
    out = model(torch.cat(docs), packed_positions(cu), packed_attend(cu))
    out.hidden.sum().backward()
    assert torch.equal(out.counts(), plain.counts()) and out.counts().sum(1).tolist() == [64]*3
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())


def test_fillers_are_neither_routed_nor_counted(monkeypatch):
    model, docs = stirred(), documents([20, 12])
    mask = torch.arange(32) < 20
    def clean() -> bool:
        out = run(model, docs, token_mask=mask, replay=torch.where(mask[:,None,None], run(model, docs).routes, 0))
        return out.counts().sum(1).tolist() == [40]*3 and bool((out.routes[20:] == -1).all())
    assert clean()
    # padding replayed as expert 0 and counted
    mutant(monkeypatch, MoE, "route", "unroute(routing, token_mask)", "routing")
    assert not clean()


def test_bfloat16_keeps_what_decides_in_float32():
    model = model_module.lower_precision(stirred(), torch.bfloat16)
    kept = {n for n, t in model.state_dict().items() if t.dtype == torch.float32}
    assert all(("norm" in n) or ("router" in n) or ("bias" in n) or n == "lm_head.weight" for n in kept)
    out = run(model, documents([20]))
    assert out.hidden.dtype == model.logits(out.hidden).dtype == out.routings[0].weights.dtype == torch.float32


# On a GPU

gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


@gpu
@pytest.mark.parametrize("heads, kv, hd", [(4, 4, 64), (8, 2, 128), (4, 2, 24)])
@pytest.mark.parametrize("window", [None, 1, 5, 300])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_gpu_attention_is_the_masked_one(heads, kv, hd, window, dtype):
    gen = torch.Generator().manual_seed(0)
    cu = torch.tensor([0, 1, 90, 218, 228]).cuda()
    qkv = [torch.randn(228, h, hd, generator=gen).to("cuda", dtype).requires_grad_() for h in (heads, kv, kv)]
    exact = [x.detach().double().requires_grad_() for x in qkv]
    got, want = packed_attend(cu)(0, *qkv, window), masked_attend(*exact, document_mask(cu, window))
    # float32 products may use TF32
    g, tol = torch.randn(got.shape, generator=gen).cuda(), 2e-2 if dtype == torch.bfloat16 else 1e-3
    # with one visible key the gradient is exactly 0
    close = lambda a, b: (a.double()-b).abs().max() <= tol*b.abs().max().clamp(min=.1)
    assert close(got, want)
    for a, b in zip(torch.autograd.grad(got, qkv, g.to(dtype)), torch.autograd.grad(want, exact, g.double())):
        assert close(a, b)


@gpu
def test_gpu_model_is_the_cpu_one():
    model, docs = stirred(), documents([9, 30, 1])
    want, routes = model.logits(run(model, docs).hidden), run(model, docs).routes
    cu, flat = torch.tensor([0, 9, 39, 40]).cuda(), torch.cat(docs).cuda()
    with torch.no_grad(): out = model.cuda()(flat, packed_positions(cu), packed_attend(cu), replay=routes.cuda())
    torch.testing.assert_close(model.logits(out.hidden).cpu(), want, rtol=0, atol=2e-2) # TF32 allowed


# Checkpoints


def parity_bench():
    spec = importlib.util.spec_from_file_location("parity", Path(__file__).parents[1]/"benchmarks"/"parity.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_transformers_reads_ours_and_we_read_theirs(monkeypatch, tmp_path):
    bench = parity_bench()
    assert max(max(bench.hf_parity(seed, tmp_path)[1:]) for seed in (200, 201, 202)) < 1e-5
    mutant(monkeypatch, PackedAttend, "_band", "triu(1-window)", "triu(-window)") # a window of one key too many
    assert max(bench.hf_parity(203, tmp_path)[1:]) > 1e-3


def test_parameters_are_those_that_transformers_counts():
    import transformers
    for name, config in PRESETS.items():
        spec, kind = preset(name), {"kimi_k2": "deepseek_v3"}.get(config["model_type"], config["model_type"])
        theirs = transformers.AutoConfig.for_model(kind, **{k: v for k, v in config.items() if k != "model_type"})
        with torch.device("meta"): model = transformers.AutoModelForCausalLM.from_config(theirs)
        total = sum(p.numel() for p in model.parameters())
        unchosen = sum(p.numel() for n, p in model.named_parameters()
            if ".experts." in n)*(spec.num_experts-spec.num_experts_per_tok)//spec.num_experts
        assert count_parameters(spec) == (total, total-unchosen), name


def test_config_json_has_what_vllm_reads(tmp_path):
    written = json.loads((save_pretrained(stirred(), tmp_path/"m")/"config.json").read_text())
    for key, value in dict(score_func="sigmoid", route_norm=True, n_group=1, topk_group=1, num_expert_groups=1,
                           num_limited_groups=1, hidden_act="silu",
                           model_type="afmoe", architectures=["AfmoeForCausalLM"]).items(): assert written[key] == value
    assert written["layer_types"][:4] == ["sliding_attention"]*3+["full_attention"] and written["rope_parameters"][
        "rope_theta"] == 10000.
    assert not any("momentum" in n for n in load_file(tmp_path/"m"/"model.safetensors"))


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    return save_pretrained(stirred(), tmp_path_factory.mktemp("good")/"model")


def truncate(path:Path, keep:int): path.write_bytes(path.read_bytes()[:keep])


@pytest.mark.parametrize("keep", [0, 5, 100, 20_000])
def test_truncated_tensors(good, tmp_path, keep):
    copy_tree(good, tmp_path/"m")
    truncate(tmp_path/"m"/"model.safetensors", keep)
    error_line(lambda: load_pretrained(tmp_path/"m"), "model.safetensors is truncated or not a safetensors file")


def copy_tree(a:Path, b:Path):
    b.mkdir(parents=True)
    for f in a.iterdir(): (b/f.name).write_bytes(f.read_bytes())


def error_line(action, text:str):
    with pytest.raises(CheckpointError) as e: action()
    assert text in str(e.value) and "\n" not in str(e.value)


@pytest.mark.parametrize("change, text", [
    (dict(architectures=["GPT2LMHeadModel"]), "architecture GPT2LMHeadModel is foreign"),
    (dict(
        vocab_size=80), "model.embed_tokens.weight has shape (64, 32), config.json asks for (80, 32) (vocab_size=80)"),
    (dict(num_experts=9), "has no tensor model.layers.2.mlp.experts.8.down_proj.weight"),
    (dict(num_hidden_layers=4, layer_types=None), "has an unknown tensor model.layers.4."),
    (dict(moe_intermediate_size=8), "has shape (16, 32), config.json asks for (8, 32)"),
    (dict(attention_bias=True), "attention_bias=True is not supported"),
    (dict(rms_norm_eps=None), "rms_norm_eps is missing; add it")])
def test_config_that_does_not_fit(good, tmp_path, change, text):
    copy_tree(good, tmp_path/"m")
    path = tmp_path/"m"/"config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    error_line(lambda: load_pretrained(tmp_path/"m"), text)


@pytest.mark.parametrize("failing", ["save_file", "sync_path", "rename"])
def test_a_failed_save_replaces_nothing(good, tmp_path, monkeypatch, failing):
    save_pretrained(stirred(), tmp_path/"m")
    before = {f.name: f.read_bytes() for f in (tmp_path/"m").iterdir()}
    real, calls = Path.rename, []
    def fail(*a, **kw): raise OSError(28, "No space left on device")
    def second_rename(self, target): # the new folder cannot take the place that the old one has left
        calls.append(target)
        return fail() if len(calls) == 2 else real(self, target)
    monkeypatch.setattr(*(Path, "rename", second_rename) if failing == "rename" else (checkpoint, failing, fail))
    error_line(lambda: save_pretrained(stirred(seed=1), tmp_path/"m", overwrite=True),
        "could not be written ([Errno 28] No space left on device)")
    assert {f.name: f.read_bytes() for f in (tmp_path/"m").iterdir()} == before and [f.name
        for f in tmp_path.iterdir()] == ["m"]


@given(seed=st.integers(0, 10_000))
@settings(max_examples=30, deadline=None)
def test_config_json_round_trip(seed):
    cfg = parity_bench().draw_config(random.Random(seed))
    assert from_hf_config(json.loads(json.dumps(to_hf_config(cfg)))) == cfg


def test_imports_are_light():
    code = ("import sys, moe_rl.moe.checkpoint, moe_rl.moe.zoo; assert not {'transformers', 'matplotlib', 'fastcore', "
            "'IPython'} & set(sys.modules)")
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[1]).returncode == 0
