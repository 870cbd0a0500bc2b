"""Losses as Python layers for any pycaffe, one a module: `module: "hintkd.layers.hint_loss" layer: "HintLoss"` in a prototxt.

Each has Caffe's four methods on numpy blobs, and `forward_torch`, the same function of tensors, for engines that can use it.
What they need to know stands in `param_str`; which nets use them is the business of nets/.
"""
