"Before any test: without a GPU, Triton kernels are interpreted, which Triton decides when the first of all tests imports it."
import os
import torch

if not torch.cuda.is_available(): os.environ.setdefault('TRITON_INTERPRET', '1')
