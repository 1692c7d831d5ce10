"""Before any test.

Without a GPU, Triton kernels are interpreted, which Triton decides when the first of all tests imports it. A shell lets
what it starts in the background ignore Ctrl-C, and so would the runs that tests start and interrupt. Property tests
draw the same examples every time; `pytest --hypothesis-profile random` looks for new ones."""
import os, signal
import torch
from hypothesis import settings

if not torch.cuda.is_available(): os.environ.setdefault("TRITON_INTERPRET", "1")
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN: signal.signal(signal.SIGINT, signal.default_int_handler)

settings.register_profile("random", deadline=None)
settings.register_profile("repeatable", deadline=None, derandomize=True)
settings.load_profile("repeatable")
