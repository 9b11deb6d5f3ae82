"""Opens this model with the library lrt; the model's own code is there.

A copy of this file lies in every folder of a whole model, for ``from_pretrained(..., trust_remote_code=True)`` without
``import lrt``.
"""

try:
    from lrt.huggingface import LRTConfig, LRTForCausalLM
except ImportError as error:
    raise ImportError(
        "this model is a Latent Recurrent Transformer and needs the library lrt, which is not installed here; "
        'the package index does not have it: get a checkout of its git repository and run  pip install -e ".[hf]"  '
        "inside"
    ) from error

__all__ = ["LRTConfig", "LRTForCausalLM"]
