"""A CPU in the place of torchtitan's GPU, for processes that have this folder in PYTHONPATH.

torchtitan asks torch for an accelerator and takes "cuda" where there is none; here it finds the CPU, with gloo between
processes. It also imports triton, for mixture-of-experts kernels that no test runs; where there is none, a
stand-in takes their place.
"""

import importlib.util
import os
import sys
import types

os.environ["LOCAL_RANK"] = "0"  # torchtitan makes a device of it, and the only CPU is number 0

import torch  # noqa: E402
import torch._utils  # noqa: E402
import torch.distributed as dist  # noqa: E402

MEMORY = {"active_bytes.all.peak": 0, "reserved_bytes.all.peak": 0, "num_alloc_retries": 0, "num_ooms": 0}


def device_module(_):
    """What torchtitan asks of torch.cuda, for a CPU."""
    module = types.ModuleType("cpu_as_accelerator")
    module.__dict__.update(vars(torch.cpu))
    module.set_device = lambda device: None
    module.current_device = lambda: 0
    module.get_device_name = lambda device=None: "CPU"
    module.get_device_properties = lambda device=None: types.SimpleNamespace(total_memory=1 << 34)
    module.memory_stats = lambda device=None: dict(MEMORY)
    module.reset_peak_memory_stats = module.empty_cache = lambda *_: None
    return module


torch._utils._get_available_device_type = lambda: "cpu"
torch._utils._get_device_module = device_module
barrier = dist.barrier
dist.barrier = lambda *args, device_ids=None, **more: barrier(*args, **more)  # gloo takes none
if importlib.util.find_spec("triton") is None:
    kernels = types.ModuleType("torchtitan.models.moe.kernels")
    kernels.generate_permute_indices = None
    sys.modules[kernels.__name__] = kernels
