"""Measurements of bnbx beside its peers; run the scripts in this folder, nothing here is installed.

It is a package so that no other one named `benchmarks` is found in its place.
"""
