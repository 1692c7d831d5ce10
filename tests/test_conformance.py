"""Any engine passes the same checks. The embedded one here, in several shapes; what the checks are worth is in test_engine.py."""
import asyncio

import pytest

from moe_rl.rollout.conformance import CHECKS, check_update
from moe_rl.rollout.engine import Engine
from test_engine import MODELS, fresh

SHAPES = {'roomy': dict(kv_tokens=1024, block_size=16), 'small blocks': dict(kv_tokens=512, block_size=3),
          'no sharing': dict(kv_tokens=512, prefix_cache=False),
          'tight': dict(kv_tokens=100, block_size=4, max_seqs=5, max_step_tokens=12)}
BY_VERSION = dict(enumerate(MODELS))

def make(**kw): return lambda: Engine(fresh(), **kw)

@pytest.mark.parametrize('shape', SHAPES)
@pytest.mark.parametrize('check', CHECKS)
def test_embedded_engine_conforms(check, shape):
    if (check, shape) == ('update', 'tight'):
        pytest.skip('a mixture that is preempted is recomputed: test_engine.py has its own reference')
    asyncio.run(CHECKS[check](make(**SHAPES[shape]), BY_VERSION))

def test_an_engine_may_answer_with_coroutines():
    class Remote:
        "The same engine, as if behind a wire."
        def __init__(self): self.engine = Engine(fresh(), 1024)
        def generate(self, requests): return self.engine.generate(requests)
        def __getattr__(self, name):
            async def call(*a, **kw):
                await asyncio.sleep(0)
                return getattr(self.engine, name)(*a, **kw)
            return call
    async def build(): return Remote()
    for check in CHECKS.values(): asyncio.run(check(build, BY_VERSION))

def test_checks_fail_for_an_engine_that_aborts_at_an_update():
    class Careless(Engine):
        def update_weights(self, *a):
            for id in [q.id for q in self.scheduler.at if q]: self.abort(id)
            return super().update_weights(*a)
    with pytest.raises(AssertionError): asyncio.run(check_update(lambda: Careless(fresh(), 1024), BY_VERSION))

def test_checks_fail_for_an_engine_that_drops_requests():
    class Dropping(Engine):
        async def generate(self, requests):
            async for f in super().generate(requests):
                if f.id not in ('0', '0-0', 'a0', 'p1'): yield f
    for check in CHECKS.values():
        with pytest.raises(AssertionError): asyncio.run(check(lambda: Dropping(fresh(), 1024), BY_VERSION))
