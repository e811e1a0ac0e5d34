"""Quantized layers, generic over the registry."""
