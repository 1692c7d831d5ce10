"""Any engine passes the same checks: the embedded one here, in several shapes.

What they are worth is in test_engine.py."""
import pytest

from moe_rl.rollout.conformance import CHECKS, check_update
from moe_rl.rollout.engine import Engine
from moe_rl.rollout.protocol import Embedded
from test_engine import MODELS, fresh

SHAPES = {"roomy": dict(kv_tokens=1024, block_size=16), "small blocks": dict(kv_tokens=512, block_size=3),
          "no sharing": dict(kv_tokens=512, prefix_cache=False),
          "tight": dict(kv_tokens=100, block_size=4, max_seqs=5, max_step_tokens=12)}
BY_VERSION = dict(enumerate(MODELS))

def make(**kw): return lambda: Embedded(Engine(fresh(), **kw))

@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("check", CHECKS)
def test_embedded_engine_conforms(check, shape):
    if (check, shape) == ("update", "tight"):
        pytest.skip("a mixture that is preempted is recomputed: test_engine.py has its own reference")
    CHECKS[check](make(**SHAPES[shape]), BY_VERSION)

def test_an_engine_may_answer_late():
    "A server in another process gives what has come, and often that is nothing."
    class Server(Embedded):
        turns = 0
        def poll(self):
            self.turns += 1
            return super().poll() if self.turns % 3 == 0 else []
    for check in CHECKS.values(): check(lambda: Server(Engine(fresh(), 1024)), BY_VERSION)

def test_checks_fail_for_an_engine_that_aborts_at_an_update():
    class Careless(Embedded):
        def update(self, version, source):
            self.abort([q.id for q in self.engine.scheduler.at if q])
            return super().update(version, source)
    with pytest.raises(AssertionError): check_update(lambda: Careless(Engine(fresh(), 1024)), BY_VERSION)

def test_checks_fail_for_an_engine_that_drops_requests():
    class Dropping(Embedded):
        def poll(self): return [f for f in super().poll() if f.id not in ("0", "0-0", "a0", "p1")]
    for check in CHECKS.values():
        with pytest.raises(AssertionError): check(lambda: Dropping(Engine(fresh(), 1024)), BY_VERSION)

def test_checks_fail_for_an_engine_that_goes_on_while_paused():
    class Restless(Embedded):
        def pause(self): pass
    with pytest.raises(AssertionError, match="a paused engine went on"):
        CHECKS["pause"](lambda: Restless(Engine(fresh(), 1024)), BY_VERSION)
