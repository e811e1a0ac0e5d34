"""How it runs: from a plan to source text, a compiled kernel, and a launch on tensors."""
