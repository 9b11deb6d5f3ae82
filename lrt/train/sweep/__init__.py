"""Many runs of one recipe: what they are, how they run side by side, and what came out."""
