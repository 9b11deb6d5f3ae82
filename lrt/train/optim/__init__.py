"""Groups of parameters, Muon with AdamW, and rates by step."""
