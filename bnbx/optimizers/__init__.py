"""Optimizers: the rules, and the one engine that runs any of them."""
