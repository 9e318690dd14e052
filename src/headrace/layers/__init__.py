"""Layers: weights, the kernels they call and the group they exchange tensors through.

A layer is built before its weights exist: it declares `Parameter`s, the loader fills them, and only then it is called.
"""
