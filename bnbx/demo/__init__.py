"""`bnbx demo`: one small language model, trained with 32-bit and with 8-bit optimizer states.

A newcomer's first question is what 8-bit states cost in quality and give back in memory. The demo
answers it on their own machine in a few minutes, with nothing to download: the text is the source
of Python's standard library. The sub-modules import torch; this one and `settings` do not, so that
`bnbx --help` stays fast.
"""
