"""Before any test. Without a GPU, Triton kernels are interpreted, which Triton decides when the first of all tests imports it.
A shell lets what it starts in the background ignore Ctrl-C, and so would the runs that tests start and interrupt."""
import os, signal
import torch

if not torch.cuda.is_available(): os.environ.setdefault('TRITON_INTERPRET', '1')
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN: signal.signal(signal.SIGINT, signal.default_int_handler)
