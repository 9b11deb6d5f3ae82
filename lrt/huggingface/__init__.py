"""The Hugging Face face: imported only where transformers is (``lrt.huggingface.causal_lm``)."""
