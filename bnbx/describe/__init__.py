"""What there is to say and to show of a quant type: tables, errors on data, pictures, a page.

Everything comes from the spec: `bnbx describe`, `bnbx plot` and docs/quant-types.md hold nothing
that was written down a second time.
"""
