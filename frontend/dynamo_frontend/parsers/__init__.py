"""What answers say beside text: calls of tools, and reasoning. A family of models is one file, and one corpus of tests.

`families` says which parser reads a model; `base` and `calls` are what parsers are made of.
"""
